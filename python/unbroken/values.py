"""Python values lowered to the core's algebra, and raised again with their types.

Touches: `sys.modules`, to look up types that a checkpoint names. Never imports one, never runs a constructor of the
user's, never pickles. Knows nothing of torch: fronts hand in an `extend` function for values of their own.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import sys
import types
import uuid
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

from unbroken._core import Object, Tensor
from unbroken.errors import FormatError, UnsupportedState

if TYPE_CHECKING:
    from unbroken._core import Value

Extend: TypeAlias = Callable[[Any, str], Any]
"""What a front adds: (value, path) -> the lowered (or raised) value, or NotImplemented to leave it to this module."""

Missing: TypeAlias = Literal["error", "record"]
"""What raising does with a type that the program has not imported."""

DEPTH_LIMIT = 50
"""Deepest nesting that is lowered. One level here takes up to two of the levels that docs/format.md bounds."""

_Registered = TypeVar("_Registered")

_HINT = "register it: `unbroken.values.register(type, lower=..., raise_=...)`, or keep it out of the tracked state"


@dataclass(frozen=True)
class Record:
    """A typed value whose type the reading program does not have: what the checkpoint says of it.

    Args:
        kind: What sort of thing it is, such as ``dataclass``.
        name: Its type's name, such as ``__main__.Score``.
        fields: Its parts, raised.
    """

    kind: str
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class _Registration:
    type: type
    name: str
    lower: Callable[[Any], object]
    raise_: Callable[[Any], object]


_registered_types: dict[type, _Registration] = {}
_registered_names: dict[str, _Registration] = {}


def register(
    type: type[_Registered],
    *,
    lower: Callable[[_Registered], object],
    raise_: Callable[[Any], _Registered],
    name: str | None = None,
) -> None:
    """Teach this module one more type.

    Args:
        type: The type; its subclasses are not included.
        lower: Gives a value made of types that can be stored; it is lowered in turn.
        raise_: Makes the object from that value.
        name: Name in checkpoints; by default module and qualified name. Must stay the same for as long as
            checkpoints are to be read.
    """
    entry = _Registration(type, name or type_name(type), lower, raise_)
    known = _registered_names.get(entry.name)
    if known is not None and known.type is not type and type_name(known.type) != type_name(type):
        raise ValueError(f"the name `{entry.name}` is registered for `{type_name(known.type)}`")
    _registered_types[type] = entry
    _registered_names[entry.name] = entry


def type_name(cls: type) -> str:
    """Return a type's name as checkpoints write it, such as ``collections.OrderedDict``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_type(name: str) -> type | None:
    """Return the type of that name among what the program has imported, or None. Imports and runs nothing."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if not isinstance(module, types.ModuleType):
            continue
        found: object = module
        for part in parts[cut:]:
            # `vars` and not `getattr`: a module's `__getattr__` or a descriptor could run anything.
            space = vars(found) if isinstance(found, types.ModuleType | type) else {}
            found = space.get(part)
        if isinstance(found, type):
            return found
    return None


def join_path(path: str, part: object) -> str:
    """Return the path of a part: keys that are text as they are, others by their repr."""
    text = part if isinstance(part, str) else repr(part)
    return f"{path}/{text}" if path else text


def lower(value: object, *, path: str, extend: Extend | None = None) -> Value:
    """Return a value in the core's algebra, from which `raise_` makes an equal one of the same types.

    Nested containers may hold anything that can be stored. The same object twice comes back as two equal ones.

    Args:
        value: What to lower.
        path: Where it is in the state, parts separated by ``/``; errors name the place below it.
        extend: Asked first about everything that is not a plain builtin value or container.

    Raises:
        UnsupportedState: A part has a type that cannot be stored, or contains itself; names its path.
    """
    return _Lowering(extend).lower(value, path)


def raise_(value: Value, *, path: str, extend: Extend | None = None, missing: Missing = "error") -> Any:
    """Return the Python value of a lowered one.

    Args:
        value: What `lower` returned, or a checkpoint's reader.
        path: Where it is in the state, for errors.
        extend: Asked about tensors, and first about objects.
        missing: What to do where a type is not imported: raise, or put a `Record` in its place.

    Raises:
        UnsupportedState: A type is not imported, or is not what the checkpoint says it is.
        FormatError: An object's parts are not those of its kind.
    """
    return _Raising(extend, missing).raise_(value, path)


# Lowering.


class _Lowering:
    def __init__(self, extend: Extend | None) -> None:
        self._extend = extend
        self._open: dict[
            int, str
        ] = {}  # Containers being lowered, by identity: meeting one again is a cycle.

    def lower(self, value: Any, path: str) -> Value:
        kind = type(value)
        if value is None or kind in _AS_THEY_ARE:
            return value
        if kind is str:
            return (
                value if _is_encodable(value) else Object("str", "surrogates", {"utf8": _surrogates(value)})
            )
        known = id(value)
        if known in self._open:
            raise UnsupportedState(
                path, type_name(kind), why=f"it contains itself: it is also `{self._open[known]}`"
            )
        if len(self._open) >= DEPTH_LIMIT:
            raise UnsupportedState(path, type_name(kind), why=f"nested more than {DEPTH_LIMIT} levels deep")
        self._open[known] = path
        try:
            return self._lower_composite(value, kind, path)
        finally:
            del self._open[known]

    def _lower_composite(self, value: Any, kind: type, path: str) -> Value:
        if kind is list:
            return [self.lower(part, join_path(path, index)) for index, part in enumerate(value)]
        if kind is tuple:
            return tuple(self.lower(part, join_path(path, index)) for index, part in enumerate(value))
        if kind is dict:
            return self._dict(value, path)
        if kind is set or kind is frozenset:
            lowered = kind(self.lower(part, join_path(path, part)) for part in value)
            self._require_distinct(len(lowered), len(value), kind, path)
            return lowered

        entry = _registered_types.get(kind)
        if entry is not None:
            return Object("registered", entry.name, {"value": self.lower(entry.lower(value), path)})
        if self._extend is not None:
            lowered = self._extend(value, path)
            if lowered is not NotImplemented:
                return lowered
        exact = _LOWER_EXACT.get(kind)
        if exact is not None:
            return exact(self, value, path)
        return self._lower_by_base(value, kind, path)

    def _lower_by_base(self, value: Any, kind: type, path: str) -> Value:
        if isinstance(value, enum.Enum):
            return self._enum(value, path)
        if isinstance(value, Record):
            fields = {name: self.lower(part, join_path(path, name)) for name, part in value.fields.items()}
            return Object(value.kind, value.name, fields)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(value, path)
        if isinstance(value, tuple) and _is_namedtuple(kind):
            return self._namedtuple(value, path)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray | numpy.dtype):
            return _lower_numpy(numpy, value, path)
        raise UnsupportedState(path, type_name(kind), hint=_HINT)

    def _dict(self, value: Mapping[Any, Any], path: str) -> dict[Value, Value]:
        lowered = {}
        for key, part in value.items():
            place = join_path(path, key)
            lowered[self.lower(key, place)] = self.lower(part, place)
        self._require_distinct(len(lowered), len(value), type(value), path)
        return lowered

    def _require_distinct(self, lowered: int, given: int, kind: type, path: str) -> None:
        if lowered != given:
            raise UnsupportedState(
                path,
                type_name(kind),
                why="two of its keys are distinct objects that are saved alike",
                hint=_HINT,
            )

    def _items(self, kind: str, value: Any, path: str, **more: Value) -> Object:
        parts = [self.lower(part, join_path(path, index)) for index, part in enumerate(value)]
        return Object(kind, type_name(type(value)), {"items": parts, **more})

    def _deque(self, value: collections.deque[Any], path: str) -> Object:
        return self._items("deque", value, path, maxlen=value.maxlen)

    def _ordered_dict(self, value: Mapping[Any, Any], path: str) -> Object:
        return Object("mapping", type_name(type(value)), {"items": self._dict(value, path)})

    def _defaultdict(self, value: collections.defaultdict[Any, Any], path: str) -> Object:
        factory = value.default_factory
        if not is_plain_factory(factory):
            named = ", ".join(f"`{name}`" for name in _FACTORIES)
            raise UnsupportedState(
                path, "collections.defaultdict", why="its default factory is code", hint=f"use one of {named}"
            )
        name = next((name for name, known in _FACTORIES.items() if known is factory), None)
        return Object(
            "defaultdict", "collections.defaultdict", {"factory": name, "items": self._dict(value, path)}
        )

    def _namespace(self, value: types.SimpleNamespace, path: str) -> Object:
        return Object("namespace", "types.SimpleNamespace", {"items": self._dict(vars(value), path)})

    def _slice(self, value: slice, path: str) -> Object:
        parts = (value.start, value.stop, value.step)
        return Object("slice", "slice", {"parts": tuple(self.lower(part, path) for part in parts)})

    def _enum(self, value: enum.Enum, path: str) -> Object:
        kind = type(value)
        _require_findable(kind, path)
        if isinstance(value, enum.Flag):
            names, rest = _split_flag(value)
            return Object("flag", type_name(kind), {"names": names, "rest": rest})
        return Object("enum", type_name(kind), {"member": value.name})

    def _dataclass(self, value: Any, path: str) -> Object:
        kind = type(value)
        _require_findable(kind, path)
        _require_plain_layout(kind, path)
        present = {field.name: getattr(value, field.name) for field in _set_fields(value)}
        # What the object was given besides its declared fields is part of it too.
        present.update(
            {name: part for name, part in getattr(value, "__dict__", {}).items() if name not in present}
        )
        fields = {name: self.lower(part, join_path(path, name)) for name, part in present.items()}
        return Object("dataclass", type_name(kind), fields)

    def _namedtuple(self, value: Any, path: str) -> Object:
        kind = type(value)
        _require_findable(kind, path)
        if getattr(value, "__dict__", None):
            raise UnsupportedState(
                path, type_name(kind), why="a named tuple with attributes of its own", hint=_HINT
            )
        parts = zip(kind._fields, tuple(value), strict=True)
        fields = {name: self.lower(part, join_path(path, name)) for name, part in parts}
        return Object("namedtuple", type_name(kind), fields)

    def _tzinfo(self, value: datetime.tzinfo | None, path: str) -> Value:
        return None if value is None else self.lower(value, join_path(path, "tzinfo"))

    def _datetime(self, value: datetime.datetime, path: str) -> Object:
        date = (value.year, value.month, value.day)
        time = (value.hour, value.minute, value.second, value.microsecond, value.fold)
        fields = {"date": date, "time": time, "tzinfo": self._tzinfo(value.tzinfo, path)}
        return Object("datetime", "datetime.datetime", fields)

    def _time(self, value: datetime.time, path: str) -> Object:
        time = (value.hour, value.minute, value.second, value.microsecond, value.fold)
        return Object("time", "datetime.time", {"time": time, "tzinfo": self._tzinfo(value.tzinfo, path)})

    def _timezone(self, value: datetime.timezone, path: str) -> Object:
        # The name that was given is visible in `tzname` only, and there also where none was given.
        offset = value.utcoffset(None)
        name = value.tzname(None)
        given = None if name == datetime.timezone(offset).tzname(None) else name
        return Object("timezone", "datetime.timezone", {"offset": _timedelta_parts(offset), "name": given})

    def _path(self, value: pathlib.PurePath, path: str) -> Object:
        return Object("path", f"pathlib.{type(value).__name__}", {"text": self.lower(str(value), path)})


def is_known(value: object) -> bool:
    """Tell whether `lower` can store a value of this type, without its `extend`."""
    kind = type(value)
    if kind in _registered_types or kind in _LOWER_EXACT or kind in _AS_THEY_ARE or kind in _CONTAINERS:
        return True
    if value is None or isinstance(value, str | enum.Enum | Record) or dataclasses.is_dataclass(kind):
        return True
    numpy = sys.modules.get("numpy")
    return _is_namedtuple(kind) or (numpy is not None and isinstance(value, numpy.generic | numpy.ndarray))


def is_plain_factory(factory: object) -> bool:
    """Tell whether a defaultdict's factory is one that a checkpoint can name."""
    return factory is None or any(factory is known for known in _FACTORIES.values())


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogates(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _is_namedtuple(kind: type) -> bool:
    fields = getattr(kind, "_fields", None)
    return isinstance(fields, tuple) and all(isinstance(name, str) for name in fields)


def _set_fields(value: Any) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(value) if hasattr(value, field.name))


def _require_findable(kind: type, path: str) -> None:
    """Refuse a type that no later process could look up by its name, while there is still time to say so."""
    if find_type(type_name(kind)) is not kind:
        raise UnsupportedState(
            path,
            type_name(kind),
            why="its type cannot be found again under that name",
            hint="define it at the top level of a module, under the name that it has there",
        )


def _require_plain_layout(kind: type, path: str) -> None:
    """Refuse a dataclass that is also a container or number: its fields are not all there is of it."""
    if not has_plain_layout(kind):
        raise UnsupportedState(path, type_name(kind), why="it extends a builtin type", hint=_HINT)


def has_plain_layout(kind: type) -> bool:
    """Tell whether an object's attributes and slots are all there is of it: no builtin type in its ancestry."""
    # Python and Cython classes alike: only a class whose instances `object` can make has no hidden contents.
    return all(base is object or _is_python_class(base) for base in kind.__mro__)


def _is_python_class(kind: type) -> bool:
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE; builtin containers and numbers lack it.


def _split_flag(value: enum.Flag) -> tuple[tuple[str, ...], int]:
    members = [
        member for member in type(value) if member.value and member.value & value.value == member.value
    ]
    covered = 0
    for member in members:
        covered |= member.value
    return tuple(str(member.name) for member in members), value.value & ~covered


def _timedelta_parts(value: datetime.timedelta) -> tuple[int, int, int]:
    return (value.days, value.seconds, value.microseconds)


_AS_THEY_ARE = frozenset({bool, int, float, complex, bytes})

_CONTAINERS = frozenset({list, tuple, dict, set, frozenset})

_FACTORIES: dict[str, type] = {
    "bool": bool,
    "bytes": bytes,
    "complex": complex,
    "dict": dict,
    "float": float,
    "frozenset": frozenset,
    "int": int,
    "list": list,
    "set": set,
    "str": str,
    "tuple": tuple,
    "collections.Counter": collections.Counter,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.deque": collections.deque,
}

_CONSTANTS = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}

_PATHS: dict[str, type[pathlib.PurePath]] = {
    f"pathlib.{kind.__name__}": kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
}

_LOWER_EXACT: dict[type, Callable[[_Lowering, Any, str], Value]] = {
    bytearray: lambda self, value, path: Object("bytearray", "bytearray", {"data": bytes(value)}),
    collections.deque: _Lowering._deque,
    collections.OrderedDict: _Lowering._ordered_dict,
    collections.Counter: _Lowering._ordered_dict,
    collections.defaultdict: _Lowering._defaultdict,
    types.SimpleNamespace: _Lowering._namespace,
    datetime.datetime: _Lowering._datetime,
    datetime.date: lambda self, value, path: Object(
        "date", "datetime.date", {"date": (value.year, value.month, value.day)}
    ),
    datetime.time: _Lowering._time,
    datetime.timedelta: lambda self, value, path: Object(
        "timedelta", "datetime.timedelta", {"parts": _timedelta_parts(value)}
    ),
    datetime.timezone: _Lowering._timezone,
    decimal.Decimal: lambda self, value, path: Object("decimal", "decimal.Decimal", {"text": str(value)}),
    fractions.Fraction: lambda self, value, path: Object(
        "fraction", "fractions.Fraction", {"parts": (value.numerator, value.denominator)}
    ),
    range: lambda self, value, path: Object(
        "range", "range", {"parts": (value.start, value.stop, value.step)}
    ),
    slice: _Lowering._slice,
    uuid.UUID: lambda self, value, path: Object("uuid", "uuid.UUID", {"data": value.bytes}),
    array.array: lambda self, value, path: Object(
        "array",
        "array.array",
        {
            "typecode": value.typecode,
            "itemsize": value.itemsize,
            "order": sys.byteorder,
            "data": value.tobytes(),
        },
    ),
    type(Ellipsis): lambda self, value, path: Object("constant", "Ellipsis", {}),
    type(NotImplemented): lambda self, value, path: Object("constant", "NotImplemented", {}),
    **dict.fromkeys(_PATHS.values(), _Lowering._path),
}


def _lower_zone(self: _Lowering, value: zoneinfo.ZoneInfo, path: str) -> Value:
    if value.key is None:
        raise UnsupportedState(path, "zoneinfo.ZoneInfo", why="a time zone without a key", hint=_HINT)
    return Object("zone", "zoneinfo.ZoneInfo", {"key": value.key})


_LOWER_EXACT[zoneinfo.ZoneInfo] = _lower_zone


# Raising.


class _Opened(NamedTuple):
    """An object's parts, converted once: each look at `Object.fields` makes them anew."""

    kind: str
    name: str
    fields: dict[str, Value]


class _Raising:
    def __init__(self, extend: Extend | None, missing: Missing) -> None:
        self._extend = extend
        self._missing = missing

    def raise_(self, value: Value, path: str) -> Any:
        kind = type(value)
        if kind is list:
            return [self.raise_(part, join_path(path, index)) for index, part in enumerate(value)]
        if kind is tuple:
            return tuple(self.raise_(part, join_path(path, index)) for index, part in enumerate(value))
        if kind is dict:
            return {
                self.raise_(key, path): self.raise_(part, join_path(path, key_text(key)))
                for key, part in value.items()
            }
        if kind is set:
            return {self.raise_(part, path) for part in value}
        if kind is frozenset:
            return frozenset(self.raise_(part, path) for part in value)
        if kind is Object:
            return self._object(value, path)
        if kind is Tensor:
            raised = self._extend(value, path) if self._extend is not None else NotImplemented
            if raised is NotImplemented:
                raise UnsupportedState(path, "tensor", why="a tensor, and nothing here reads tensors")
            return raised
        return value

    def _object(self, value: Object, path: str) -> Any:
        if self._extend is not None:
            raised = self._extend(value, path)
            if raised is not NotImplemented:
                return raised
        opened = _Opened(value.kind, value.name, value.fields)
        make = _RAISE.get(opened.kind)
        try:
            if make is None:
                return self._unknown(opened, path, f"its kind `{opened.kind}` is not known here")
            return make(self, opened, path)
        except UnsupportedState:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"`{path}` is not a valid `{value.name}`: {error}", path=path) from error

    def _unknown(self, value: _Opened, path: str, why: str) -> Record:
        if self._missing == "error":
            raise UnsupportedState(
                path,
                value.name,
                why=why,
                hint=f"import what defines `{value.name}` (or register it) before the checkpoint is read",
            )
        fields = {name: self.raise_(part, join_path(path, name)) for name, part in value.fields.items()}
        return Record(value.kind, value.name, fields)

    def _parts(self, value: _Opened, path: str) -> dict[str, Any]:
        return {name: self.raise_(part, join_path(path, name)) for name, part in value.fields.items()}

    def _registered(self, value: _Opened, path: str) -> Any:
        entry = _registered_names.get(value.name)
        if entry is None:
            return self._unknown(value, path, "its type is not registered in this program")
        return entry.raise_(self.raise_(value.fields["value"], path))

    def _typed(self, value: _Opened, path: str, claim: Callable[[type], bool]) -> type | None:
        found = find_type(value.name)
        return found if found is not None and claim(found) else None

    def _enum(self, value: _Opened, path: str) -> Any:
        found = self._typed(value, path, lambda kind: issubclass(kind, enum.Enum))
        if found is None:
            return self._unknown(value, path, "no such enum is imported")
        members = found.__members__  # type: ignore[attr-defined]
        if value.fields["member"] not in members:
            return self._unknown(value, path, f"the enum has no member `{value.fields['member']}`")
        return members[value.fields["member"]]

    def _flag(self, value: _Opened, path: str) -> Any:
        found = self._typed(value, path, lambda kind: issubclass(kind, enum.Flag))
        if found is None:
            return self._unknown(value, path, "no such enum is imported")
        members = found.__members__  # type: ignore[attr-defined]
        bits = value.fields["rest"]
        for name in value.fields["names"]:
            if name not in members:
                return self._unknown(value, path, f"the enum has no member `{name}`")
            bits |= members[name].value
        return found(bits)

    def _dataclass(self, value: _Opened, path: str) -> Any:
        found = self._typed(
            value, path, lambda kind: dataclasses.is_dataclass(kind) and has_plain_layout(kind)
        )
        if found is None:
            return self._unknown(value, path, "no such dataclass is imported")
        declared = {field.name for field in dataclasses.fields(found)}  # type: ignore[arg-type]
        instance = object.__new__(found)
        space = getattr(instance, "__dict__", None)
        for name, part in self._parts(value, path).items():
            slot = slot_of(found, name)
            if slot is not None and name in declared:
                slot.__set__(instance, part)
            elif isinstance(space, dict) and not (name.startswith("__") and name.endswith("__")):
                space[name] = part
            else:
                return self._unknown(value, path, f"the dataclass has no field `{name}`")
        return instance

    def _namedtuple(self, value: _Opened, path: str) -> Any:
        found = self._typed(value, path, lambda kind: issubclass(kind, tuple) and _is_namedtuple(kind))
        if found is None:
            return self._unknown(value, path, "no such named tuple is imported")
        parts = self._parts(value, path)
        if found._fields != tuple(parts):  # type: ignore[attr-defined]
            return self._unknown(value, path, f"the named tuple has other fields than {', '.join(parts)}")
        return tuple.__new__(found, parts.values())

    def _mapping(self, value: _Opened, path: str) -> Any:
        kinds = {type_name(kind): kind for kind in (collections.OrderedDict, collections.Counter)}
        kind = kinds[value.name]
        made = kind()
        made.update(self.raise_(value.fields["items"], path))
        return made

    def _defaultdict(self, value: _Opened, path: str) -> Any:
        name = value.fields["factory"]
        factory = None if name is None else _FACTORIES[name]
        return collections.defaultdict(factory, self.raise_(value.fields["items"], path))

    def _deque(self, value: _Opened, path: str) -> Any:
        return collections.deque(self.raise_(value.fields["items"], path), value.fields["maxlen"])

    def _namespace(self, value: _Opened, path: str) -> Any:
        return types.SimpleNamespace(**self.raise_(value.fields["items"], path))

    def _datetime(self, value: _Opened, path: str) -> Any:
        year, month, day = value.fields["date"]
        hour, minute, second, microsecond, fold = value.fields["time"]
        zone = self.raise_(value.fields["tzinfo"], path)
        return datetime.datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)

    def _time(self, value: _Opened, path: str) -> Any:
        hour, minute, second, microsecond, fold = value.fields["time"]
        return datetime.time(
            hour, minute, second, microsecond, self.raise_(value.fields["tzinfo"], path), fold=fold
        )

    def _timezone(self, value: _Opened, path: str) -> Any:
        offset, name = datetime.timedelta(*value.fields["offset"]), value.fields["name"]
        return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)

    def _zone(self, value: _Opened, path: str) -> Any:
        try:
            return zoneinfo.ZoneInfo(value.fields["key"])
        except zoneinfo.ZoneInfoNotFoundError:
            return self._unknown(
                value, path, f"this machine does not know the time zone `{value.fields['key']}`"
            )

    def _path(self, value: _Opened, path: str) -> Any:
        kind = _PATHS[value.name]
        if issubclass(kind, pathlib.Path) and kind is not type(pathlib.Path()):
            return self._unknown(value, path, "a path of another operating system")
        return kind(self.raise_(value.fields["text"], path))

    def _array(self, value: _Opened, path: str) -> Any:
        made = array.array(value.fields["typecode"])
        if made.itemsize != value.fields["itemsize"]:
            return self._unknown(value, path, f"its items have {made.itemsize} bytes here")
        made.frombytes(value.fields["data"])
        if value.fields["order"] != sys.byteorder:
            made.byteswap()
        return made

    def _numpy(self, value: _Opened, path: str) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return self._unknown(value, path, "numpy is not imported")
        return _raise_numpy(numpy, value, path)


def key_text(key: Value) -> object:
    """Return what stands for a lowered key in a path."""
    return key.name if isinstance(key, Object) else key


def slot_of(kind: type, name: str) -> Any:
    """Return the slot descriptor that holds a field, or None: found without running any descriptor's code."""
    for base in kind.__mro__:
        found = vars(base).get(name)
        if isinstance(found, types.MemberDescriptorType):
            return found
    return None


_RAISE: dict[str, Callable[[_Raising, _Opened, str], Any]] = {
    "str": lambda self, value, path: value.fields["utf8"].decode("utf-8", "surrogatepass"),
    "bytearray": lambda self, value, path: bytearray(value.fields["data"]),
    "registered": _Raising._registered,
    "enum": _Raising._enum,
    "flag": _Raising._flag,
    "dataclass": _Raising._dataclass,
    "namedtuple": _Raising._namedtuple,
    "mapping": _Raising._mapping,
    "defaultdict": _Raising._defaultdict,
    "deque": _Raising._deque,
    "namespace": _Raising._namespace,
    "datetime": _Raising._datetime,
    "date": lambda self, value, path: datetime.date(*value.fields["date"]),
    "time": _Raising._time,
    "timedelta": lambda self, value, path: datetime.timedelta(*value.fields["parts"]),
    "timezone": _Raising._timezone,
    "zone": _Raising._zone,
    "decimal": lambda self, value, path: decimal.Decimal(value.fields["text"]),
    "fraction": lambda self, value, path: fractions.Fraction(*value.fields["parts"]),
    "range": lambda self, value, path: range(*value.fields["parts"]),
    "slice": lambda self, value, path: slice(*self.raise_(value.fields["parts"], path)),
    "uuid": lambda self, value, path: uuid.UUID(bytes=value.fields["data"]),
    "constant": lambda self, value, path: _CONSTANTS[value.name],
    "path": _Raising._path,
    "array": _Raising._array,
    "ndarray": _Raising._numpy,
    "numpy_scalar": _Raising._numpy,
    "numpy_dtype": _Raising._numpy,
}


# numpy, where the program has it.


def _lower_numpy(numpy: Any, value: Any, path: str) -> Object:
    if isinstance(value, numpy.dtype):
        return Object("numpy_dtype", "numpy.dtype", {"dtype": _lower_dtype(numpy, value, path)})
    dtype = _lower_dtype(numpy, value.dtype, path)
    if isinstance(value, numpy.generic):
        if type(value) is not value.dtype.type:
            raise UnsupportedState(path, type_name(type(value)), hint=_HINT)
        data = (
            value.tobytes() if value.dtype.itemsize else b""
        )  # An empty text has no bytes, and numpy gives four.
        return Object("numpy_scalar", type_name(type(value)), {"dtype": dtype, "data": data})
    if type(value) is not numpy.ndarray:
        raise UnsupportedState(path, type_name(type(value)), why="a subclass of numpy.ndarray", hint=_HINT)
    # The order of the axes in memory decides how sums are made, so that it is state; gaps between elements are not.
    axes = tuple(sorted(range(value.ndim), key=lambda axis: -abs(value.strides[axis])))
    order: Value = "C" if value.flags.c_contiguous else "F" if value.flags.f_contiguous else axes
    laid_out = value.transpose(axes) if isinstance(order, tuple) else value.T if order == "F" else value
    fields = {
        "dtype": dtype,
        "shape": tuple(value.shape),
        "order": order,
        "writeable": bool(value.flags.writeable),
        "data": laid_out.tobytes(),
    }
    return Object("ndarray", "numpy.ndarray", fields)


def _lower_dtype(numpy: Any, dtype: Any, path: str) -> Value:
    """Return a dtype by its string, or by its fields; refuse what does not come back equal from that."""
    described = _describe_dtype(dtype)
    if dtype.hasobject or _make_dtype(numpy, described) != dtype:
        raise UnsupportedState(
            path,
            f"numpy array of {dtype}",
            why="its elements are not plain numbers, text or bytes",
            hint="convert it to a list, or to an array of a plain dtype",
        )
    return described


def _describe_dtype(dtype: Any) -> Value:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _describe_dtype(base), "shape": tuple(shape)}
    if dtype.names is None:
        return dtype.str
    return {
        "names": list(dtype.names),
        "formats": [_describe_dtype(dtype.fields[name][0]) for name in dtype.names],
        "offsets": [dtype.fields[name][1] for name in dtype.names],
        "itemsize": dtype.itemsize,
        "aligned": bool(dtype.isalignedstruct),
    }


def _make_dtype(numpy: Any, described: Value) -> Any:
    if isinstance(described, str):
        return numpy.dtype(described)
    if "base" in described:
        return numpy.dtype((_make_dtype(numpy, described["base"]), described["shape"]))
    formats = [_make_dtype(numpy, part) for part in described["formats"]]
    layout = {key: described[key] for key in ("names", "offsets", "itemsize")}
    return numpy.dtype({**layout, "formats": formats}, align=described["aligned"])


def _raise_numpy(numpy: Any, value: _Opened, path: str) -> Any:
    fields = value.fields
    dtype = _make_dtype(numpy, fields["dtype"])
    if dtype.hasobject:
        raise ValueError("an array of objects")
    if value.kind == "numpy_dtype":
        return dtype
    if value.kind == "numpy_scalar":
        if dtype.itemsize != len(fields["data"]):
            raise ValueError(f"{len(fields['data'])} bytes for a {dtype}")
        if dtype.itemsize == 0:
            return dtype.type()
        return numpy.frombuffer(bytearray(fields["data"]), dtype)[0]
    shape, order = fields["shape"], fields["order"]
    axes = tuple(reversed(range(len(shape)))) if order == "F" else order
    laid_out_shape = shape if order == "C" else tuple(shape[axis] for axis in axes)
    count = 1
    for size in shape:
        count *= size
    if count * dtype.itemsize != len(fields["data"]):
        raise ValueError(f"{len(fields['data'])} bytes for {count} elements of {dtype.itemsize} bytes")
    made = numpy.empty(laid_out_shape, dtype)
    if fields["data"]:
        # `copyto` would leave padding between fields behind; the bytes are copied as bytes.
        made.reshape(-1).view(numpy.uint8)[:] = numpy.frombuffer(fields["data"], numpy.uint8)
    if order != "C":
        back = sorted(range(len(shape)), key=lambda position: axes[position])
        made = made.transpose(back)
    made.flags.writeable = fields["writeable"]
    return made
