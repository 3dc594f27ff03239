"""The border `unbroken._core`: values both ways, digests over memory, errors with their fields."""

import ast
import copy
import ctypes
import math
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict, namedtuple
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unbroken
from unbroken import _core, errors

# Values by their bits: `==` would take 1 for True, 0.0 for -0.0, and no NaN for itself.


def bits(value: object) -> object:
    """Return a value in which types, float bits, dict order and NaN payloads decide equality."""
    kind = type(value).__name__
    match value:
        case bool() | None | str() | bytes() | int():
            return kind, value
        case float():
            return kind, struct.pack("<d", value)
        case complex():
            return kind, struct.pack("<dd", value.real, value.imag)
        case list() | tuple():
            return kind, [bits(item) for item in value]
        case dict():
            return kind, [(bits(key), bits(item)) for key, item in value.items()]
        case set() | frozenset():
            return kind, sorted(repr(bits(item)) for item in value)
        case _core.Tensor():
            return (
                kind,
                value.dtype,
                value.shape,
                value.strides,
                value.offset,
                value.storage,
                bits(value.attrs),
            )
        case _core.Object():
            return kind, value.kind, value.name, bits(value.fields)
        case _:
            raise AssertionError(f"no bits for {value!r}")


floats = st.floats() | st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0])
texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | texts
    | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
dimensions = st.lists(st.tuples(st.integers(0, 2**40), st.integers(-(2**40), 2**40)), max_size=4)
tensors = st.builds(
    lambda dimensions, **fields: _core.Tensor(
        shape=[size for size, _ in dimensions], strides=tuple(step for _, step in dimensions), **fields
    ),
    dimensions=dimensions,
    dtype=st.sampled_from(["float32", "bfloat16", "complex64"]),
    offset=st.integers(0, 2**40),
    storage=st.integers(0, 2**31),
    device=st.sampled_from(["cpu", "cuda:0"]),
    attrs=st.dictionaries(texts, st.booleans(), max_size=2),
)
values = st.recursive(
    keys | tensors | st.integers(-(2**300), 2**300) | floats | st.builds(complex, floats, floats),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.builds(_core.Object, st.just("dataclass"), texts, st.dictionaries(texts, inner, max_size=3))
    ),
    max_leaves=12,
)


@given(values)
def test_decoding_what_was_encoded_gives_the_same_types_and_bits(value: Any) -> None:
    encoded = _core.encode(value)
    assert bits(_core.decode(encoded)) == bits(value)
    assert _core.encode(_core.decode(encoded)) == encoded


@given(tensors, texts)
def test_equal_tensors_and_objects_hash_equal_and_key_dicts(leaf: _core.Tensor, name: str) -> None:
    again = _core.decode(_core.encode(leaf))
    assert again == leaf
    assert hash(again) == hash(leaf)
    key = _core.Object("enum", "m.Color", {"name": name})
    ((found, value),) = _core.decode(_core.encode({key: leaf})).items()
    assert found == key
    assert value == leaf
    assert {found: 1}[key] == 1
    assert key != _core.Object("enum", "m.Colour", key.fields)


@pytest.mark.parametrize(
    "number",
    [0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 255 << 56, -(255 << 56), 10**400, -(10**400)],
)
def test_integers_of_any_size_come_back(number: int) -> None:
    assert bits(_core.decode(_core.encode(number))) == bits(number)


def test_nan_payloads_and_signed_zeros_keep_their_bits() -> None:
    for pattern in (0x7FF8000000000001, 0xFFF8DEADBEEF0001, 0x8000000000000000, 0x7FF0000000000000):
        (number,) = struct.unpack("<d", struct.pack("<Q", pattern))
        assert bits(_core.decode(_core.encode(number))) == bits(number)
        assert bits(_core.decode(_core.encode(complex(number, -0.0)))) == bits(complex(number, -0.0))


class Color(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "path", "type_name"),
    [
        ({"a": [1, Color.RED]}, "a/1", "Color"),
        ([(0, {"p": Point(1, 2)})], "0/1/p", "Point"),
        ({1: {None: Text("x")}}, "1/None", "Text"),
        ({"o": OrderedDict()}, "o", "collections.OrderedDict"),
        ({"b": bytearray(2)}, "b", "bytearray"),
        ({Text("k"): 1}, "'k'", "Text"),
        ({"s": {1, (2, Color.RED)}}, "s/(2, <Color.RED: 1>)/1", "Color"),
        ({"o": [object]}, "o/0", "type"),
        (object(), ".", "object"),
        ({"t": "\ud800"}, "t", "str"),
        ({"\udfff": 1}, "?", "str"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path(value: Any, path: str, type_name: str) -> None:
    with pytest.raises(errors.UnsupportedState) as caught:
        _core.encode(value)
    assert isinstance(caught.value, TypeError)
    if path != "?":
        assert caught.value.path == path
    assert caught.value.type_name.endswith(type_name)
    assert type_name in str(caught.value)


def test_a_field_that_cannot_be_held_is_refused_where_the_object_is_made() -> None:
    with pytest.raises(TypeError) as caught:
        _core.Object("dataclass", "m.P", {"x": [object()]})
    assert isinstance(caught.value, errors.UnsupportedState)
    assert caught.value.path == "x/0"
    with pytest.raises(TypeError):
        _core.Tensor(dtype="f", shape=(), strides=(), offset=0, storage=0, attrs={"a": object()})
    with pytest.raises(TypeError, match="name must be text"):
        _core.Object("dataclass", "m.P", {1: 2})  # pyright: ignore[reportArgumentType]


def test_a_list_inside_itself_is_refused_and_not_a_crash() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(errors.UnsupportedState, match="nested deeper than"):
        _core.encode(loop)
    nested: Any = _core.Object("x", "x", {})
    with pytest.raises(errors.UnsupportedState, match="nested deeper than"):
        for _ in range(100_000):
            nested = _core.Object("x", "x", {"inner": nested})


def test_the_deepest_value_that_is_taken_also_comes_back() -> None:
    deepest: Any = None
    taken: Any = None
    with pytest.raises(errors.UnsupportedState):
        for _ in range(1000):
            deepest = [deepest]
            _core.encode(deepest)
            taken = deepest
    assert bits(_core.decode(_core.encode(taken))) == bits(taken)
    objects: Any = None
    with pytest.raises(errors.UnsupportedState):
        for _ in range(1000):
            objects = _core.Object("x", "x", {"inner": objects})
            _core.encode(objects)


def test_a_set_of_two_nans_with_the_same_bits_is_refused() -> None:
    with pytest.raises(errors.UnsupportedState, match="NaN"):
        _core.encode({float("nan"), float("nan")})


def test_bytes_that_python_cannot_hold_are_a_format_error() -> None:
    # Two keys that the file tells apart (1 and True) and Python does not.
    one, true = _core.encode([1]), _core.encode([True])
    pair = _core.encode({1: None, 2: None})
    two = _core.encode([2])
    twin = pair.replace(two[-1:], true[-1:])
    assert one != true
    with pytest.raises(errors.FormatError, match="equal in Python"):
        _core.decode(twin)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_decode_or_are_a_format_error(data: bytes) -> None:
    try:
        value = _core.decode(data)
    except errors.FormatError as error:
        assert error.path is None
        assert error.what in str(error)
    else:
        assert _core.encode(value) == data


def test_the_digest_of_a_value_tells_types_and_order_apart() -> None:
    distinct = [
        1,
        True,
        1.0,
        "1",
        b"1",
        (1,),
        [1],
        {1},
        frozenset({1}),
        {"a": 1, "b": 2},
        {"b": 2, "a": 1},
        0.0,
        -0.0,
    ]
    assert len({_core.digest_value(value) for value in distinct}) == len(distinct)
    assert _core.digest_value({3, 1, 2}) == _core.digest_value({2, 3, 1})
    assert len(_core.digest_value(None)) == 32


def lend(data: bytes) -> tuple[ctypes.Array[ctypes.c_char], tuple[int, int]]:
    """Return a buffer that holds the bytes, and its region."""
    buffer = ctypes.create_string_buffer(data, len(data)) if data else ctypes.create_string_buffer(1)
    return buffer, (ctypes.addressof(buffer), len(data))


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(0, 50), st.integers(1, 2000))
def test_digests_of_memory_equal_digests_of_the_same_bytes(
    parts: list[bytes], turn: int, length: int
) -> None:
    lent = [lend(part) for part in parts]
    regions = [region for _, region in lent]
    assert _core.digest_memory(regions) == _core.digest_bytes(*parts)
    assert _core.digest_memory(tuple(regions)) == _core.digest_bytes(*parts)
    whole = b"".join(parts)
    if whole:
        start = turn * length % len(whole)
        window = (whole[start:] + whole[:start])[: min(length, len(whole))]
        other, region = lend(window)
        assert watched(regions).window([], turn, length) == watched([region]).window([], 0, len(window))
        del other


def watched(regions: list[tuple[int, int]]) -> _core.WatchedMemory:
    return _core.WatchedMemory(gather=lambda members: (regions, True), tensors=[], data_ptr=id)


def test_members_are_the_values_of_dicts_and_what_is_none() -> None:
    class Part: ...

    a, b, c = Part(), Part(), Part()
    found: list[list[Any]] = []

    def gather(members: list[Any]) -> tuple[list[tuple[int, int]], bool]:
        found.append(members)
        return [], False

    memory = _core.WatchedMemory(gather=gather, tensors=[], data_ptr=id)
    space = {"a": a, "b": b}
    assert memory.changed([space, c])
    assert not memory.changed([space, c])
    assert not memory.changed(iter([{"other": a}, b, c]))
    space["b"] = c
    assert memory.changed([space, c])
    assert memory.changed([space])
    assert memory.changed([])
    assert not memory.changed([])
    assert found == [[a, b, c], [a, c, c], [a, c], []]


def test_moving_a_byte_from_one_region_to_the_next_changes_the_digest() -> None:
    assert _core.digest_bytes(b"ab", b"c") != _core.digest_bytes(b"a", b"bc")
    assert _core.digest_bytes() != _core.digest_bytes(b"")


def test_a_region_at_null_is_refused_and_an_empty_one_is_not() -> None:
    with pytest.raises(errors.InvalidArgument):
        _core.digest_memory([(0, 8)])
    with pytest.raises(ValueError):
        _core.digest_memory([(8, 2**64 - 4)])
    assert _core.digest_memory([(0, 0)]) == _core.digest_bytes(b"")


def test_a_large_digest_lets_other_threads_run() -> None:
    buffer, region = lend(bytes(64 << 20))
    turns = 0
    finished = threading.Event()

    def count() -> None:
        nonlocal turns
        while not finished.is_set():
            turns += 1
            time.sleep(0)  # Gives the GIL back by itself.

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # Nothing but a release of the GIL lets the other thread in.
    try:
        thread.start()
        before = turns
        for _ in range(5):
            _core.digest_memory([region])
        assert turns > before
    finally:
        finished.set()
        sys.setswitchinterval(interval)
        thread.join()
    del buffer


def test_keys_are_a_pure_function_of_their_arguments() -> None:
    key = _core.derive_key(1, "order", 2, 3)
    assert len(key) == 32
    assert key == _core.derive_key(1, "order", 2, 3)
    others = {_core.derive_key(*other) for other in [(2, "order", 2, 3), (1, "x", 2, 3), (1, "order", 3, 2)]}
    assert len(others | {key}) == 4


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_an_order_is_a_permutation_that_any_position_opens(seed: int, epoch: int, length: int) -> None:
    order = _core.Order(seed, epoch, length)
    assert len(order) == length
    whole = order.slice(0, length)
    assert sorted(whole) == list(range(length))
    assert [order.at(position) for position in range(length)] == whole
    assert order.slice(length // 3, length // 2) == whole[length // 3 : length // 2]


def test_positions_outside_an_order_are_refused() -> None:
    order = _core.Order(1, 0, 10)
    with pytest.raises(IndexError):
        order.at(10)
    with pytest.raises(IndexError):
        order.slice(5, 11)
    with pytest.raises(IndexError):
        order.slice(6, 5)


def stub_names(tree: ast.Module) -> dict[str, set[str]]:
    """Return the public names of the stub: "" for the module's, a class's name for its members."""
    found: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[""].add(node.name)
        elif isinstance(node, ast.ClassDef):
            found[""].add(node.name)
            found[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_the_stub_names_exactly_what_the_module_has() -> None:
    stub = Path(unbroken.__file__).with_name("_core.pyi")
    found = stub_names(ast.parse(stub.read_text()))
    assert {name for name in vars(_core) if not name.startswith("__")} == found.pop("")
    for class_name, members in found.items():
        real = {name for name in vars(getattr(_core, class_name)) if not name.startswith("_")}
        assert real == {name for name in members if not name.startswith("_")}, class_name


def test_tensors_and_objects_answer_at_a_prompt() -> None:
    leaf = _core.Tensor(
        dtype="float32", shape=(2, 3), strides=(3, 1), offset=0, storage=4, attrs={"grad": True}
    )
    assert repr(leaf) == (
        "Tensor(dtype='float32', shape=(2, 3), strides=(3, 1), offset=0, storage=4, device='cpu', attrs={'grad': True})"
    )
    assert (
        repr(_core.Object("enum", "m.Color", {"name": "RED"})) == "Object('enum', 'm.Color', {'name': 'RED'})"
    )


def test_importing_the_package_brings_in_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, unbroken, unbroken._core, unbroken.errors, unbroken.__main__\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_keeps_its_fields_through_a_copy_and_a_process_border() -> None:
    original = errors.UnsupportedState("a/b", "m.T", hint="lower it")
    mismatch = errors.MismatchError([("optimizer/0/lr", 0.1, 0.2)], hint="override")
    for error in (original, mismatch):
        for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert vars(again) == vars(error)
    assert mismatch.differences == (("optimizer/0/lr", 0.1, 0.2),)
    assert "`optimizer/0/lr` was 0.1, is 0.2" in str(mismatch)


def test_build_info_says_what_was_built() -> None:
    info = _core.build_info()
    assert info["version"]
    assert info["format"].isdigit()
    assert not math.isnan(float(info["format"]))
