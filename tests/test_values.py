"""Python values come back with their types and their bits, through the core's bytes; the rest is refused by name."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import struct
import subprocess
import sys
import types
import uuid
import zoneinfo
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken import _core, values
from unbroken.errors import FormatError, UnsupportedState


@dataclasses.dataclass
class Score:
    best: float
    history: list[int] = dataclasses.field(default_factory=list)
    label: str = "none"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int
    y: tuple[int, ...]


@dataclasses.dataclass
class Loud:
    """Its constructor must not run again."""

    x: int
    made: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        raise AssertionError("a constructor ran")


class Point(NamedTuple):
    x: int
    y: str


class Colour(enum.Enum):
    RED = "r"
    BLUE = ("b", 1)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    EXECUTE = 4


class Bits(enum.IntFlag, boundary=enum.KEEP):
    ONE = 1
    TWO = 2


class Metres:
    def __init__(self, value: float) -> None:
        self.value = value


class MyInt(int):
    pass


class MyList(list[int]):
    pass


def through_bytes(value: object, **more: Any) -> Any:
    lowered = values.lower(value, path="state")
    return values.raise_(_core.decode(_core.encode(lowered)), path="state", **more)


def same(one: Any, other: Any) -> bool:
    """Equal, of equal types all the way down, floats by their bits, mappings in order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, collections.deque) and one.maxlen != other.maxlen:
        return False
    if isinstance(one, collections.defaultdict) and one.default_factory is not other.default_factory:
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, types.SimpleNamespace):
        return same(vars(one), vars(other))
    if isinstance(one, np.generic):
        return one.tobytes() == other.tobytes()
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return bool(one == other)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats(allow_nan=True)
    | st.complex_numbers(allow_nan=True)
    | st.text(st.characters())
    | st.binary()
)
hashables = (
    st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text()) | st.dates()
)
special = (
    st.binary().map(bytearray)
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.timedeltas()
    | st.times()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.uuids()
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 5))
    | st.sampled_from([*Colour, *Level, Access.READ | Access.EXECUTE, Access(0), Bits(13)])
    | st.builds(Point, st.integers(), st.text())
    | st.builds(Frozen, st.integers(), st.tuples(st.integers()))
    | st.sampled_from([np.float32(0.1), np.int8(-3), np.bool_(True), np.float64(2.5), np.complex64(1 + 2j)])
    | st.sampled_from([pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:/y")])
)
trees = st.recursive(
    scalars | special,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.lists(inner, max_size=4).map(lambda items: collections.deque(items, maxlen=5))
        | st.dictionaries(hashables, inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(hashables, inner, max_size=3).map(
            lambda items: collections.defaultdict(list, items)
        )
        | st.dictionaries(hashables, st.integers(), max_size=3).map(collections.Counter)
        | st.sets(hashables, max_size=3)
        | st.frozensets(hashables, max_size=3)
        | st.builds(Score, st.floats(), st.lists(st.integers()), st.text())
        | st.builds(types.SimpleNamespace, a=inner)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_of_values_comes_back_with_its_types(value: object) -> None:
    assert same(through_bytes(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF))[0],
        2**64,
        -(2**63) - 1,
        "lone \ud800 surrogate",
        {True: 1, "1": 2, (1, 2): 3, None: 4, b"1": 5},
        {Colour.RED: 1, Frozen(1, (2,)): 2},
        Score(math.inf, [1, 2]),
        Ellipsis,
        slice(1, None, "x"),
        datetime.datetime(2026, 3, 1, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("UTC")),
        datetime.timezone(datetime.timedelta(hours=2), "here"),
        datetime.timezone(datetime.timedelta(seconds=-90)),
        decimal.Decimal("-0E+5"),
        decimal.Decimal("sNaN").is_snan(),
        fractions.Fraction(-(10**30), 7),
        uuid.UUID(int=5),
        array.array("d", [1.5, -0.0]),
        array.array("H", [1, 65535]),
        pathlib.Path("caf\udce9"),
        np.datetime64("2026-01-02T03:04:05", "ns"),
        np.str_("text"),
        np.str_(""),
        np.bytes_(b"xy"),
        np.longdouble(1) / 3,
        np.dtype([("a", "<f4"), ("b", ">i2", (2, 3))], align=True),
    ],
    ids=repr,
)
def test_a_rare_value_comes_back_with_its_type(value: object) -> None:
    assert same(through_bytes(value), value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(24).reshape(2, 3, 4),
        lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        lambda: np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        lambda: np.arange(10)[::-2],
        lambda: np.zeros((0, 3), np.float16),
        lambda: np.array(5, ">i4"),
        lambda: np.array(["a", "bcd"]),
        lambda: np.array([b"x", b"yz"]),
        lambda: np.array([np.datetime64("NaT"), np.datetime64("2026-01-01")]),
        lambda: np.array([(1, 2.5), (3, np.nan)], dtype=[("n", "i1"), ("x", "f8")]),
        lambda: np.zeros(3, np.dtype([("n", "i1"), ("x", "f8")], align=True)),
    ],
)
def test_an_array_comes_back_with_dtype_shape_and_order(make: Any) -> None:
    value = make()
    back = through_bytes(value)
    assert same(back, value)
    axes = [axis for axis in range(value.ndim) if value.shape[axis] > 1]
    by_stride = sorted(axes, key=lambda axis: -abs(value.strides[axis]))
    assert sorted(axes, key=lambda axis: -abs(back.strides[axis])) == by_stride


def test_an_array_that_could_not_be_written_stays_so() -> None:
    value = np.arange(3)
    value.flags.writeable = False
    assert not through_bytes(value).flags.writeable
    assert through_bytes(np.arange(3)).flags.writeable


def test_no_constructor_runs_and_attributes_beyond_the_fields_come_back() -> None:
    made = object.__new__(Loud)
    made.x, made.made = 1, 2
    made.extra = "kept"  # type: ignore[attr-defined]
    back = through_bytes(made)
    assert (back.x, back.made, back.extra) == (1, 2, "kept")


def test_a_registered_type_comes_back_through_its_functions() -> None:
    values.register(Metres, lower=lambda item: item.value, raise_=Metres)
    back = through_bytes({"height": [Metres(1.5)]})
    assert type(back["height"][0]) is Metres
    assert back["height"][0].value == 1.5


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"a": [1, object()]}, "state/a/1", "builtins.object"),
        ({"a": {"b": MyInt(3)}}, "state/a/b", "test_values.MyInt"),
        ([MyList([1])], "state/0", "test_values.MyList"),
        ({"f": len}, "state/f", "builtins.builtin_function_or_method"),
        ({"o": np.array([object()])}, "state/o", "numpy array of object"),
        ({"d": collections.defaultdict(lambda: 0)}, "state/d", "collections.defaultdict"),
        (Score(1.0, [1], {2: object()}), "state/label/2", "builtins.object"),  # type: ignore[arg-type]
        ({(1, 2): object}, "state/(1, 2)", "builtins.type"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path_and_type(value: object, path: str, kind: str) -> None:
    with pytest.raises(UnsupportedState) as refused:
        values.lower(value, path="state")
    assert (refused.value.path, refused.value.type_name) == (path, kind)
    assert refused.value.hint


def test_a_type_that_no_later_process_can_find_is_refused_at_once() -> None:
    @dataclasses.dataclass
    class Local:
        x: int

    with pytest.raises(UnsupportedState, match="cannot be found again"):
        values.lower(Local(1), path="state")


def test_a_container_inside_itself_is_refused_with_both_paths() -> None:
    inner: list[Any] = []
    value = {"a": inner}
    inner.append({"up": inner})
    with pytest.raises(UnsupportedState, match=r"`state/a/0/up`.*it is also `state/a`"):
        values.lower(value, path="state")


def test_nesting_beyond_what_a_file_can_hold_is_refused() -> None:
    value: Any = 1
    for _ in range(values.DEPTH_LIMIT + 1):
        value = collections.OrderedDict(a=value)
    with pytest.raises(UnsupportedState, match="levels deep"):
        values.lower(value, path="state")
    _core.encode(values.lower(value["a"], path="state"))


def test_an_unknown_type_becomes_a_record_where_the_reader_asks_for_one() -> None:
    lowered = _core.Object(
        "dataclass", "never.imported.Thing", {"x": 1, "y": [_core.Object("deque", "d", {})]}
    )
    with pytest.raises(UnsupportedState, match=r"never\.imported\.Thing"):
        values.raise_(lowered, path="state")
    known = _core.Object("dataclass", "never.imported.Thing", {"x": 1})
    record = values.raise_([known], path="state", missing="record")[0]
    assert (record.kind, record.name, record.fields) == ("dataclass", "never.imported.Thing", {"x": 1})
    assert values.lower(record, path="state") == known


@pytest.mark.parametrize(
    "value",
    [
        _core.Object("dataclass", "subprocess.Popen", {"args": "true"}),
        _core.Object("enum", "os.system", {"member": "x"}),
        _core.Object("namedtuple", "builtins.tuple", {"a": 1}),
        _core.Object("registered", "os.system", {"value": "true"}),
        _core.Object("dataclass", "test_values.Score", {"__class__": 1}),
        _core.Object("enum", "test_values.Colour", {"member": "__class__"}),
    ],
)
def test_a_name_in_a_file_reaches_nothing_that_is_not_what_it_claims(value: Any) -> None:
    with pytest.raises(UnsupportedState):
        values.raise_(value, path="state")


@pytest.mark.parametrize(
    "value",
    [
        _core.Object("deque", "collections.deque", {}),
        _core.Object("uuid", "uuid.UUID", {"data": b"short"}),
        _core.Object("date", "datetime.date", {"date": (1, 2, 99)}),
        _core.Object("decimal", "decimal.Decimal", {"text": "not a number"}),
        _core.Object("defaultdict", "x", {"factory": "os.system", "items": {}}),
        _core.Object("numpy_scalar", "numpy.float64", {"dtype": "<f8", "data": b"abc"}),
        _core.Object("numpy_scalar", "numpy.object_", {"dtype": "|O", "data": b"12345678"}),
        _core.Object(
            "ndarray",
            "numpy.ndarray",
            {"dtype": "<f8", "shape": (2**40,), "order": "C", "writeable": True, "data": b""},
        ),
    ],
)
def test_parts_that_make_no_value_are_a_format_error(value: Any) -> None:
    with pytest.raises(FormatError):
        values.raise_(value, path="state")


@given(st.dictionaries(hashables, trees, max_size=4))
def test_a_dict_filled_entry_by_entry_is_that_dict_wherever_it_stands(found: dict[Any, object]) -> None:
    lowered = values.lower(found, path="")
    entries = _core.Entries()
    for key, value in lowered.items():
        entries[key] = value
    assert len(entries) == len(lowered)
    for place in (
        lambda it: it,
        lambda it: [it],
        lambda it: {1: it},
        lambda it: _core.Object("k", "n", {"x": it}),
    ):
        assert _core.encode(place(entries)) == _core.encode(place(lowered))


@given(st.dictionaries(hashables, trees, max_size=6))
def test_what_is_taken_as_plain_is_what_it_is_lowered_to(found: dict[Any, object]) -> None:
    entries = _core.Entries()
    at = entries.take_plain(found, 0)
    for number, (key, value) in enumerate(found.items()):
        if number == at:
            entries[values.lower(key, path="")] = values.lower(value, path="")
            at = entries.take_plain(found, at + 1)
    assert at == len(found)
    assert _core.encode(entries) == _core.encode(values.lower(found, path=""))


def test_numbers_texts_and_tuples_of_numbers_are_plain() -> None:
    plain = {"none": None, "on": True, "n": 3, "x": 0.5, "text": "é", "raw": b"", "size": (3, 3)}
    for unusual in ([], {}, (1, []), ("a",), "\udc80", object()):
        entries = _core.Entries()
        assert entries.take_plain({**plain, "unusual": unusual, "behind": 1}, 0) == len(plain) == len(entries)


def test_a_dict_filled_entry_by_entry_takes_what_any_other_does_and_when_it_is_put_in() -> None:
    entries, changing = _core.Entries(), [1]
    entries["kept"] = changing
    changing.append(2)
    with pytest.raises(UnsupportedState):
        entries["refused"] = object()
    assert _core.decode(_core.encode(entries)) == {"kept": [1]}
    deep: object = 0
    for _ in range(126):
        deep = [deep]
    entries["deep"] = deep
    equal = {float("nan"), float("nan")}
    with pytest.raises(UnsupportedState, match="two of its members") as refused:
        _core.Entries("model/layer")["seen"] = [equal]
    assert refused.value.path == "model/layer/seen/0"
    _core.encode(entries)
    with pytest.raises(UnsupportedState, match="nested deeper"):
        _core.encode([entries])
    twice = _core.Entries()
    twice["a"] = twice["a"] = 1
    with pytest.raises(ValueError, match='"a" twice'):
        _core.encode(twice)


def test_neither_torch_nor_numpy_is_imported_to_hold_a_value() -> None:
    program = (
        "import sys; from unbroken import values; values.lower([1, {2: 'x'}], path='');"
        "raise SystemExit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
