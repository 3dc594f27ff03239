"""What the objects behind a loader own: generators, and plain attributes that change.

Touches: the attributes of the data set, of samplers, of a collate function with state, and of what they hold. Reads
`__dict__` and `__slots__`, runs no property. Nothing is written but by `Owned.install`.

A path names a place: `dataset/transform/0/generator`. Walks are bounded (`DEPTH`, `NODES`, `WIDE`); a value above
`SMALL_BYTES` is not kept, and named once if it is seen to change.
"""

import functools
import marshal
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch

from unbroken import _core, notices, values
from unbroken.errors import NotExact, UnsupportedState
from unbroken.torch import rng

Value = Any

DEPTH = 8
NODES = 4_000
WIDE = 256
"""Longest list, tuple or dict of objects that is looked into."""
SMALL_ITEMS = 1_024
SMALL_BYTES = 64 * 1024

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS = (list, dict, set, tuple, frozenset, deque, bytearray)
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.GeneratorType,
    torch.nn.Module,
    torch.dtype,
    torch.device,
)
_FOREIGN = {"datasets", "h5py", "numpy", "pandas", "PIL", "polars", "pyarrow", "tokenizers", "transformers"}
_GONE = b"gone"


class Leaf(NamedTuple):
    """One place that is watched: where it is, what holds it, under which key, and what is there."""

    path: str
    holder: Any
    key: Any
    value: Any
    is_generator: bool


class Captured(NamedTuple):
    """What an `Owned` held: canonical bytes by path, and what the changed values' digests were at the start."""

    generators: dict[str, bytes]
    values: dict[str, bytes]
    baseline: dict[str, bytes]

    def to_value(self) -> Value:
        """Return it in the core's algebra."""
        return {"generators": self.generators, "values": self.values, "baseline": self.baseline}

    @staticmethod
    def from_value(value: Value) -> "Captured":
        """Return what `to_value` was given."""
        return Captured(dict(value["generators"]), dict(value["values"]), dict(value["baseline"]))


class Owned:
    """The generators and the small plain attributes reachable from a few objects.

    Args:
        roots: Objects by the name that their paths begin with.
        skip: Objects that belong to someone else: neither they nor what only they hold is looked at.
        array_bytes: Largest array or tensor that is kept.
        hooks: Let roots with `state_dict` and `load_state_dict` speak for their values.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        *,
        skip: tuple[object, ...] = (),
        array_bytes: int = SMALL_BYTES,
        hooks: bool = True,
    ) -> None:
        self._roots = dict(roots)
        self._skip = {id(obj) for obj in skip}
        self._array_bytes = array_bytes
        self._nodes_left = NODES
        self._arrays: dict[str, tuple[int, int, bytes]] = {}
        self._hooks = {name: obj for name, obj in self._roots.items() if hooks and has_state_hook(obj)}
        self._warned: set[str] = set()
        self._touched: set[str] = set()
        leaves = list(self._walk())
        self._baseline = {leaf.path: self._token(leaf) for leaf in leaves if not leaf.is_generator}
        self._is_empty = not leaves and not self._hooks
        if self._nodes_left <= 0:
            notices.warn(
                f"`{'`, `'.join(self._roots)}` hold more than {NODES} objects: what the later ones own is not kept"
            )

    def generators(self) -> list[Any]:
        """Return the owned generator objects, in the order of their paths' discovery."""
        return [leaf.value for leaf in self._walk() if leaf.is_generator]

    def generators_by_path(self) -> dict[str, Any]:
        """Return the owned generator objects by path."""
        return {leaf.path: leaf.value for leaf in self._walk() if leaf.is_generator}

    def tokens(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return, by path, the generators' canonical bytes, and bytes that change with each value."""
        generators: dict[str, bytes] = {}
        plain: dict[str, bytes] = {}
        if self._is_empty and not self._grew():
            return generators, plain
        for leaf in self._walk():
            if leaf.is_generator:
                generators[leaf.path] = encode_generator(leaf.value)
            else:
                plain[leaf.path] = self._token(leaf)
        for name, obj in self._hooks.items():
            plain[f"{name}/state_dict()"] = encode_hook(obj, name)
        return generators, plain

    def changed(self, plain: Mapping[str, bytes]) -> list[str]:
        """Return the paths whose value differs, or once differed, from what it was when watching began."""
        found = [path for path, now in plain.items() if self._baseline.get(path) != now]
        found += [path for path in self._baseline if path not in plain]
        self._touched.update(path for path in found if self._is_kept(path, plain))
        return sorted(self._touched)

    def capture(self, *, only: set[str] | None = None) -> Captured:
        """Return all generators, and the values that have changed since watching began.

        Args:
            only: Values' paths to return instead, whether they changed or not.
        """
        leaves = {leaf.path: leaf for leaf in self._walk()}
        generators = {p: encode_generator(leaf.value) for p, leaf in leaves.items() if leaf.is_generator}
        if only is None:
            plain = {p: self._token(leaf) for p, leaf in leaves.items() if not leaf.is_generator}
            wanted = self.changed(plain)
        else:
            wanted = sorted(only)
        kept: dict[str, bytes] = {}
        for path in wanted:
            encoded = self._encode(path, leaves.get(path))
            if encoded is not None:
                kept[path] = encoded
        for name, obj in self._hooks.items():
            kept[f"{name}/state_dict()"] = encode_hook(obj, name)
        baseline = {path: self._baseline[path] for path in kept if path in self._baseline}
        return Captured(generators, kept, baseline)

    def encode(self, paths: set[str]) -> dict[str, bytes]:
        """Return the canonical bytes of generators and values at these paths."""
        leaves = {leaf.path: leaf for leaf in self._walk()} if paths else {}
        found: dict[str, bytes] = {}
        for path in sorted(paths):
            leaf = leaves.get(path)
            if leaf is not None and leaf.is_generator:
                found[path] = encode_generator(leaf.value)
                continue
            name, _, tail = path.rpartition("/")
            encoded = (
                encode_hook(self._hooks[name], name) if tail == "state_dict()" else self._encode(path, leaf)
            )
            if encoded is not None:
                found[path] = encoded
        return found

    def install(self, captured: Captured, *, unless_set: bool = False) -> None:
        """Put back generators and values.

        Args:
            captured: What was captured, in this process or another.
            unless_set: Leave values alone that this program has set to something else than the program that was
                captured began with: `sampler.set_epoch(3)` before the loader is opened is such a one.

        Raises:
            NotExact: A place does not exist in this program.
        """
        leaves: dict[str, Leaf] = {}
        holders: dict[str, Any] = dict(self._roots)
        for leaf in self._walk(holders):
            leaves[leaf.path] = leaf
        for path, data in captured.values.items():
            self._touched.add(path)
            name, _, tail = path.rpartition("/")
            if tail == "state_dict()":
                load_hook(self._hooks.get(name), data, name)
                continue
            leaf = leaves.get(path)
            if unless_set and leaf is not None and captured.baseline.get(path) != self._token(leaf):
                continue
            if data == _GONE:
                _remove(leaf)
                continue
            if leaf is None:
                leaf = _new_place(path, holders)
            _put(leaf, values.raise_(_core.decode(data), path=path, extend=raise_tensor))
        for path, data in captured.generators.items():
            leaf = leaves.get(path)
            if leaf is None or not leaf.is_generator:
                raise NotExact(
                    f"`{path}`", "the checkpoint has the state of a generator that is not there now"
                )
            rng.restore_generator(leaf.value, _core.decode(data))

    def _token(self, leaf: Leaf) -> bytes:
        """Return a few bytes that change when the value does; they begin with `big` where it is not kept."""
        value = leaf.value
        if _is_array(value):
            return self._array(leaf.path, value)
        data = marshal.dumps(value, 2) if type(value) in _ATOMS else plain_bytes(value) or b"big"
        return data if len(data) <= 24 else _core.digest_bytes(data)

    def _array(self, path: str, value: Any) -> bytes:
        label = f"{value.dtype}{tuple(value.shape)}".encode()
        version = value._version if isinstance(value, torch.Tensor) and not value.is_inference() else -1
        if value.nbytes > self._array_bytes:
            return b"big%d" % version + label
        known = self._arrays.get(path)
        # Torch counts most writes; a small tensor is read all the same, because some writers are not counted.
        if (
            known is not None
            and value.nbytes > SMALL_BYTES
            and version >= 0
            and known[:2] == (id(value), version)
        ):
            return known[2]
        found = _array_token(value, label)
        self._arrays[path] = (id(value), version, found)
        return found

    def _grew(self) -> bool:
        self._is_empty = next(self._walk(), None) is None
        return not self._is_empty

    def _is_kept(self, path: str, plain: Mapping[str, bytes]) -> bool:
        if not plain.get(path, b"").startswith(b"big"):
            return True
        if path not in self._warned:
            self._warned.add(path)
            notices.warn(
                f"`{path}` changes while data is read and is larger than {SMALL_BYTES // 1024} KiB: it is not kept, "
                "and a resumed run begins with what the program builds"
            )
        return False

    def _encode(self, path: str, leaf: Leaf | None) -> bytes | None:
        if leaf is None:
            return _GONE if path in self._baseline else None
        if leaf.is_generator or self._token(leaf).startswith(b"big"):
            return None
        try:
            return _core.encode(values.lower(leaf.value, path=path, extend=lower_tensor))
        except UnsupportedState:
            return None

    def _walk(self, holders: dict[str, Any] | None = None) -> Iterator[Leaf]:
        seen = set(self._skip)
        self._nodes_left = NODES
        for name, root in self._roots.items():
            yield from self._visit(name, None, None, root, 0, seen, holders)

    def _visit(
        self,
        path: str,
        holder: Any,
        key: Any,
        value: Any,
        depth: int,
        seen: set[int],
        holders: dict[str, Any] | None,
    ) -> Iterator[Leaf]:
        kind = type(value)
        if kind in _ATOMS:
            if holder is not None:
                yield Leaf(path, holder, key, value, False)
            return
        if id(value) in seen or self._nodes_left <= 0 or depth > DEPTH:
            return
        seen.add(id(value))
        self._nodes_left -= 1
        if rng.is_generator(value):
            yield Leaf(path, holder, key, value, True)
            return
        if kind in _CONTAINERS or _is_array(value):
            if holder is not None and (_is_array(value) or plain_bytes(value) is not None):
                yield Leaf(path, holder, key, value, False)
                return
            if kind not in (list, dict, tuple) or len(value) > WIDE:
                return
        parts = _parts(value)
        if parts is None:
            return
        if holders is not None:
            holders[path] = value
        # A state_dict speaks for the values; generators that it may leave out are looked for all the same.
        quiet = path in self._hooks
        for part_key, part in parts:
            name = part_key.replace("/", "~") if isinstance(part_key, str) else repr(part_key)
            for leaf in self._visit(f"{path}/{name}", value, part_key, part, depth + 1, seen, holders):
                if leaf.is_generator or not quiet:
                    yield leaf


def has_state_hook(obj: object) -> bool:
    """Tell whether an object speaks for itself through `state_dict` and `load_state_dict`."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def encode_hook(obj: Any, name: str) -> bytes:
    """Return the canonical bytes of an object's `state_dict()`."""
    return _core.encode(values.lower(obj.state_dict(), path=f"{name}/state_dict()", extend=lower_tensor))


def load_hook(obj: Any, data: bytes, name: str) -> None:
    """Give an object the `state_dict` that `encode_hook` kept."""
    if not has_state_hook(obj):
        raise NotExact(f"`{name}`", "the checkpoint has its state_dict, and it has no load_state_dict now")
    obj.load_state_dict(values.raise_(_core.decode(data), path=f"{name}/state_dict()", extend=raise_tensor))


def encode_generator(generator: Any) -> bytes:
    """Return the canonical bytes of a generator object's state."""
    return _core.encode(rng.capture_generator(generator))


def plain_bytes(value: Any) -> bytes | None:
    """Return bytes that determine a plain container, None if it holds objects, `b"big..."` if it is large."""
    kind = type(value)
    if len(value) > SMALL_ITEMS:
        sample = next(iter(value), None)
        plain = type(sample) in _ATOMS or type(sample) in _CONTAINERS
        return b"big%d" % len(value) if plain else None
    if kind is deque:
        value = (kind.__name__, value.maxlen, *value)
    elif kind is bytearray:
        value = (kind.__name__, bytes(value))
    try:
        # Version 2 knows no references: equal values give equal bytes.
        data = marshal.dumps(value, 2)
    except ValueError:
        return None
    if len(data) > SMALL_BYTES:
        return b"big%d" % len(data)
    return data


def _array_token(value: Any, label: bytes) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        return _core.digest_bytes(label, _core.digest_memory([(value.data_ptr(), value.nbytes)]))
    return _core.digest_bytes(label, value.tobytes())


def _is_array(value: Any) -> TypeGuard[Any]:
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray" and not value.dtype.hasobject


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the named parts of something that is looked into, or None."""
    kind = type(value)
    if kind is dict:
        return list(value.items())
    if kind in (list, tuple):
        return list(enumerate(value))
    if isinstance(value, types.MethodType):
        return [("__self__", value.__self__)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, _OPAQUE):
        return None
    package = kind.__module__.partition(".")[0]
    if package in _FOREIGN or (package == "torch" and not kind.__module__.startswith("torch.utils.data")):
        return None
    found = list(vars(value).items()) if hasattr(value, "__dict__") else []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = base.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found.append((name, member.__get__(value, kind)))
                except AttributeError:
                    continue
    return found


def _new_place(path: str, holders: Mapping[str, Any]) -> Leaf:
    parent, _, name = path.rpartition("/")
    holder = holders.get(parent)
    if holder is None or isinstance(holder, tuple):
        raise NotExact(f"`{path}`", "the checkpoint has a value for it, and there is no such place now")
    return Leaf(path, holder, name, None, False)


def _put(leaf: Leaf, value: Any) -> None:
    """Set a place to a value, inside the object that is there if it has the same type: others may hold it too."""
    live = leaf.value
    if type(live) is type(value):
        if isinstance(value, list | bytearray):
            live[:] = value
            return
        if isinstance(value, dict | set):
            live.clear()
            live.update(value)
            return
        if isinstance(value, deque) and live.maxlen == value.maxlen:
            live.clear()
            live.extend(value)
            return
        if isinstance(value, torch.Tensor) and live.dtype == value.dtype and live.shape == value.shape:
            with torch.no_grad():
                live.copy_(value)
            return
        if (
            _is_array(value)
            and live.dtype == value.dtype
            and live.shape == value.shape
            and live.flags.writeable
        ):
            live[...] = value
            return
        if type(value) in _ATOMS and value == live and not isinstance(value, float | complex):
            return
    if isinstance(leaf.holder, dict | list):
        leaf.holder[leaf.key] = value
    elif isinstance(leaf.holder, tuple):
        raise NotExact(f"`{leaf.path}`", "it is inside a tuple, which cannot be given back its value")
    else:
        object.__setattr__(leaf.holder, leaf.key, value)


def _remove(leaf: Leaf | None) -> None:
    if leaf is None:
        return
    if isinstance(leaf.holder, dict):
        leaf.holder.pop(leaf.key, None)
    elif not isinstance(leaf.holder, list | tuple):
        object.__delattr__(leaf.holder, leaf.key)


def lower_tensor(value: Any, path: str) -> Any:
    """Extend `values.lower` by small tensors, as bytes with dtype and shape."""
    if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
        return NotImplemented
    flat = value.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    name = str(value.dtype).removeprefix("torch.")
    return _core.Object("torch", "tensor", {"dtype": name, "shape": tuple(value.shape), "data": data})


def raise_tensor(value: Any, path: str) -> Any:
    """Extend `values.raise_` by what `lower_tensor` made."""
    if not isinstance(value, _core.Object) or value.kind != "torch" or value.name != "tensor":
        return NotImplemented
    fields = value.fields
    dtype = getattr(torch, fields["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise NotExact(f"`{path}`", f"its dtype {fields['dtype']!r} is not one that this torch has")
    if not fields["data"]:
        return torch.empty(fields["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(fields["data"]), dtype=dtype).reshape(fields["shape"]).clone()
