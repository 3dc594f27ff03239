"""Tensors lowered to leaves that view storages, and made again from a checkpoint's verified bytes.

Touches: reads live tensors; `Storages` keeps references so that their memory stays where it was. `write` changes the
tensor it is given, in place, and nothing else here does. Ties, views and strides are state and survive.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import Buffer, Parameter, is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unbroken import _core, values
from unbroken._core import Object
from unbroken._core import Tensor as Leaf
from unbroken.errors import FormatError, UnsupportedState

if TYPE_CHECKING:
    from unbroken._core import Checkpoint, Entries, NameList, Names, States, Value

ALIGNMENT_BYTES = 64
"""What torch's own allocator gives on the CPU. Addresses below 16 bytes of alignment change results."""

WHOLE_FROM = 0.5
"""A view is saved as a compact copy if it covers less than this part of its storage."""

ARRAY_INLINE_BYTES = 4096
"""numpy arrays up to this size stay in the tree; larger ones become storages."""

_PLAIN = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
"""Dtypes of which an empty tensor is nothing special."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Public in all but name: torch offers no other way to set a negative bit or to make an empty quantized tensor.
_neg_view: Any = vars(torch)["_neg_view"]
_empty_affine: Any = vars(torch)["_empty_affine_quantized"]
_empty_per_channel: Any = vars(torch)["_empty_per_channel_affine_quantized"]

_ELEMENTS_A_BYTE = {torch.quint4x2: 2, torch.quint2x4: 4}

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}

_CONSTANTS: dict[str, Any] = {
    str(constant): constant
    for constant in vars(torch).values()
    if isinstance(constant, torch.dtype | torch.memory_format | torch.layout | torch.qscheme)
}


_PARAMETER = values.type_name(Parameter)

READER = _core.TensorReader(
    tensor=torch.Tensor,
    parameter=(Parameter, _PARAMETER),
    exchange=vars(torch.Tensor).get("__dlpack_c_exchange_api__"),
)
"""Reads what nearly all tensors are, without a line of Python for each."""

_Key = tuple[str, int, int]
"""What tells one storage from another: device, address, length in bytes."""


class _Whole:
    """Storages that must be saved whole, found while lowering: views of them had been copied compactly."""

    def __init__(self) -> None:
        self.keys: set[_Key] = set()
        self.late: set[_Key] = set()


class Storages:
    """Storages of one capture, each saved once however many tensors view it.

    Args:
        own_copies: Copy every storage, so that training may go on while the copy is written. Otherwise the regions
            are the live tensors' own memory wherever that is possible.
        whole: Storages that an earlier attempt found to be viewed by several leaves; see `settled`.
    """

    def __init__(self, *, own_copies: bool = False, whole: Iterable[_Key] = ()) -> None:
        self._own_copies = own_copies
        self._whole = _Whole()
        self._whole.keys.update(whole)
        self._regions = _core.Regions(READER)
        self._kept: list[Any] = []
        # Where storages went that are not on the CPU; the regions know of the others.
        self._index: dict[_Key, int] = {}
        self._compact: dict[_Key, dict[Any, tuple[int, int, tuple[int, ...]]]] = {}
        self._empty: int | None = None

    @property
    def usual(self) -> Callable[[torch.Tensor, dict[str, Value] | None], Leaf | None]:
        """Return `lower` for tensors that are all of their storage, as nearly every one is; it gives None for others.

        It is what `lower` gives; a model has thousands of tensors, and training stands still meanwhile.
        """
        return _unusual if self._own_copies else self._regions.leaf

    @property
    def usual_alone(self) -> Callable[[torch.Tensor], Leaf | None]:
        """Return `usual` without flags; it gives None also for a tensor that holds a gradient."""
        return _unusual if self._own_copies else self._regions.lone_leaf

    def usual_parameters(
        self,
        parameters: Mapping[str, Any],
        prefix: str,
        leaves: Entries,
        gradients: Entries,
    ) -> bool:
        """Put what `lower` gives for a module's parameters and their gradients there, by name.

        Of parameters it is noted whether they require a gradient, and nothing else. False, and none of them there,
        where one of them is unusual, or its name is no text.
        """
        return not self._own_copies and self._regions.parameters(parameters, prefix, leaves, gradients)

    def usual_states(
        self,
        names: NameList,
        parameters: list[torch.Tensor],
        first: int,
        states: States,
        elsewhere: Names,
        lowered: Entries,
    ) -> int:
        """Put `usual_alone` of all that an optimizer has for its parameters there, by their names.

        Args:
            names: The parameters' names.
            parameters: An optimizer's parameters, or a group's.
            first: Number of the first one to look at.
            states: What it has for each, which is taken; some may have none.
            elsewhere: Has the tensors that are saved elsewhere.
            lowered: Takes a dict of leaves for each parameter that has a dict of such tensors under plain names.

        Returns:
            The number of the first parameter that has anything else; how many they are where there is none.
        """
        if self._own_copies:
            return first
        return self._regions.lone_states(names, parameters, first, states, elsewhere, lowered)

    def settled(self) -> bool:
        """Tell, when all is lowered, whether every view came out tied; if not, capture again with `whole`."""
        if self._whole.late:
            return False
        self._regions.settled()
        return True

    @property
    def whole(self) -> frozenset[_Key]:
        """Storages that must be saved whole in the next attempt."""
        return frozenset(self._whole.keys | self._whole.late)

    def regions(self) -> list[tuple[int, int]]:
        """Return (address, length in bytes) of each storage. This object keeps the memory alive."""
        return self._regions.spans()

    def nbytes(self) -> int:
        """Return how many bytes the storages are."""
        return self._regions.bytes()

    def have_live(self, least_bytes: int) -> bool:
        """Tell whether a region of at least so many bytes is a live tensor's own memory."""
        return self._regions.have_live(least_bytes)

    def lent(
        self, owned: _core.Versions | None = None, unmoved: Set[tuple[int, int]] = frozenset()
    ) -> _core.Lent:
        """Return the regions for a save, and of each whether it stays as it is until the next optimizer step.

        Args:
            owned: Tensors that only optimizers write to.
            unmoved: Storages that nobody is known to have written to since the last save.
        """
        return self._regions.lent(owned, unmoved)

    def take_frozen(self) -> _core.Versions:
        """Return the version counters of large parameters that require no gradient, once."""
        return self._regions.take_frozen()

    def versions(self, candidates: list[torch.Tensor], least_bytes: int) -> _core.Versions:
        """Return the version counters of tensors whose storage on the CPU has at least so many bytes."""
        return READER.versions(candidates, least_bytes, self._regions)

    def lower(
        self, tensor: torch.Tensor, path: str, *, flags: dict[str, Value] | None = None
    ) -> Leaf | Object:
        """Return a tensor's leaf, or an object of leaves for sparse tensors. Reads; never changes the tensor.

        Args:
            tensor: What to lower; a graph that it has is left behind.
            path: Where it is in the state, for errors.
            flags: What to note with it. Given, nothing is noted of its class and whether it requires a gradient.

        Raises:
            UnsupportedState: The tensor has no memory of its own here (meta, fake, distributed).
        """
        leaf = self.usual(tensor, flags)
        if leaf is not None:
            return leaf
        attrs: dict[str, Value] = {}
        kind = type(tensor)
        if kind is Parameter:
            attrs["class"] = _PARAMETER
        elif kind is not torch.Tensor:
            special = self._lower_subclass(tensor, path, attrs)
            if special is not None:
                return special
        if tensor.is_leaf and tensor.requires_grad:
            attrs["requires_grad"] = True
        if flags is not None:
            attrs = dict(flags)
        return self._lower_layout(tensor.detach(), path, attrs)

    def _lower_subclass(self, tensor: torch.Tensor, path: str, attrs: dict[str, Value]) -> Object | None:
        kind = type(tensor)
        name = values.type_name(kind)
        if is_lazy(tensor):
            return Object(
                "uninitialized",
                name,
                {"dtype": str(tensor.dtype), "requires_grad": bool(tensor.requires_grad)},
            )
        if isinstance(tensor, FakeTensor):
            raise UnsupportedState(
                path, name, why="a fake tensor: it has no values", hint="make it a real tensor"
            )
        if is_traceable_wrapper_subclass(tensor):
            raise UnsupportedState(
                path,
                name,
                why="a tensor made of other tensors, such as one spread over processes",
                hint="keep its parts (for a DTensor: `to_local()`) in the tracked state",
            )
        if values.find_type(name) is not kind and kind is not Buffer:
            raise UnsupportedState(
                path, name, why="its type cannot be found again", hint="define it at a module's top level"
            )
        attrs["class"] = name
        return None

    def _lower_layout(self, tensor: torch.Tensor, path: str, attrs: dict[str, Value]) -> Leaf | Object:
        if type(tensor) is not torch.Tensor:
            tensor = tensor.as_subclass(torch.Tensor)
        if tensor.device.type == "meta":
            raise UnsupportedState(path, "torch.Tensor", why="a meta tensor: it has no values")
        if tensor.layout is torch.sparse_coo:
            parts = {
                "indices": self._lower_strided(tensor._indices(), path, {}),
                "values": self._lower_layout(tensor._values(), path, {}),
                "shape": tuple(tensor.shape),
                "coalesced": tensor.is_coalesced(),
                "attrs": attrs,
            }
            return Object("sparse", "torch.sparse_coo", parts)
        if tensor.layout in _COMPRESSED:
            compressed, plain = _COMPRESSED[tensor.layout]
            parts = {
                "compressed": self._lower_strided(getattr(tensor, compressed)(), path, {}),
                "plain": self._lower_strided(getattr(tensor, plain)(), path, {}),
                "values": self._lower_layout(tensor.values(), path, {}),
                "shape": tuple(tensor.shape),
                "attrs": attrs,
            }
            return Object("sparse", str(tensor.layout), parts)
        if tensor.layout is not torch.strided:
            raise UnsupportedState(path, "torch.Tensor", why=f"its layout is {tensor.layout}")
        return self._lower_strided(tensor, path, attrs)

    def _lower_strided(self, tensor: torch.Tensor, path: str, attrs: dict[str, Value]) -> Leaf:
        if tensor.is_quantized:
            attrs["quantizer"] = _lower_quantizer(tensor, path)
        if tensor.is_conj():
            attrs["conj"] = True
        if tensor.is_neg():
            attrs["neg"] = True
        index, offset, strides = self._place(tensor)
        if strides != tuple(tensor.stride()):
            attrs["strides"] = tuple(tensor.stride())
        return Leaf(
            dtype=_dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            strides=strides,
            offset=offset,
            storage=index,
            device=str(tensor.device),
            attrs=dict(sorted(attrs.items())),
        )

    def _place(self, tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
        """Return (storage, offset, strides) under which a tensor's bytes are saved."""
        if tensor.numel() == 0:
            return self._empty_storage(), 0, tuple(tensor.stride())
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr(), storage.nbytes())
        known = self._find(key)
        if known is not None:
            return known, int(tensor.storage_offset()), tuple(tensor.stride())
        covered = _covered_elements(tensor) * tensor.element_size() / _ELEMENTS_A_BYTE.get(tensor.dtype, 1)
        large = covered >= WHOLE_FROM * storage.nbytes()
        if large or key in self._whole.keys or tensor.is_quantized:
            if key in self._compact:
                self._whole.late.add(key)
            index = self._add_storage(storage)
            self._note(key, index)
            self._kept.append(tensor)
            return index, int(tensor.storage_offset()), tuple(tensor.stride())
        views = self._compact.setdefault(key, {})
        view = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if view not in views:
            if views:
                self._whole.late.add(key)
            views[view] = self._add_compact(tensor)
            self._note(key, None)
        return views[view]

    def _find(self, key: _Key) -> int | None:
        device, address, length = key
        return self._regions.find(address, length) if device == "cpu" else self._index.get(key)

    def _note(self, key: _Key, index: int | None) -> None:
        """Note which region a storage went to, or that it went there in parts only."""
        device, address, length = key
        if device == "cpu":
            self._regions.note(address, length, index)
        elif index is not None:
            self._index[key] = index

    def _add_storage(self, storage: torch.UntypedStorage) -> int:
        private = storage.device.type != "cpu" or self._own_copies
        if storage.device.type != "cpu":
            storage = storage.cpu()
        elif self._own_copies:
            storage = storage.clone()
        self._kept.append(storage)
        return self._regions.add(storage.data_ptr(), storage.nbytes(), private=private)

    def _add_compact(self, tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
        span = _span_elements(tensor.shape, tensor.stride())
        if span * WHOLE_FROM <= _covered_elements(tensor):
            flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
            copy, strides = _compact_copy(flat), tuple(tensor.stride())
        else:
            copy = _compact_copy(tensor)
            strides = tuple(copy.stride())
        storage = copy.untyped_storage()
        self._kept.append(storage)
        return self._regions.add(storage.data_ptr(), storage.nbytes(), private=True), 0, strides

    def _empty_storage(self) -> int:
        if self._empty is None:
            anchor = torch.empty(ALIGNMENT_BYTES, dtype=torch.uint8)
            self._kept.append(anchor)
            self._empty = self._regions.add(anchor.data_ptr(), 0, private=True)
        return self._empty

    def lower_bytes(self, data: torch.Tensor) -> Leaf:
        """Return the leaf of bytes that this object now owns: a dense uint8 tensor nobody else changes."""
        self._kept.append(data)
        size = data.numel()
        index = self._regions.add(data.data_ptr(), size, private=True) if size else self._empty_storage()
        return Leaf(dtype="uint8", shape=(size,), strides=(1,), offset=0, storage=index)


def _unusual(tensor: Any, flags: Any = None) -> None:
    """No tensor is usual where each is copied."""
    return


def extend_lower(storages: Storages) -> values.Extend:
    """Return what `values.lower` needs for tensors, torch's constants and large numpy arrays."""

    def extend(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            if value.grad_fn is not None:
                raise UnsupportedState(
                    path,
                    values.type_name(type(value)),
                    why="a tensor with an autograd graph, which cannot be saved",
                    hint="store `tensor.detach()` instead",
                )
            return storages.lower(value, path)
        return lower_constant(value, storages)

    return extend


def lower_constant(value: Any, storages: Storages) -> Any:
    """Return torch's dtypes, sizes, devices and formats, and large numpy arrays, lowered; else NotImplemented."""
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout | torch.qscheme):
        return Object("torch_constant", str(value), {})
    if isinstance(value, torch.Size):
        return Object("torch_size", "torch.Size", {"sizes": tuple(value)})
    if isinstance(value, torch.device):
        return Object("torch_device", "torch.device", {"type": value.type, "index": value.index})
    numpy = sys.modules.get("numpy")
    if numpy is not None and type(value) is numpy.ndarray and value.nbytes > ARRAY_INLINE_BYTES:
        lowered = values.lower(value, path="")
        assert isinstance(lowered, Object), "an array is lowered to an object"
        fields = lowered.fields
        data = bytearray(fields["data"])
        fields["data"] = storages.lower_bytes(torch.frombuffer(data, dtype=torch.uint8).clone())
        return Object(lowered.kind, lowered.name, fields)
    return NotImplemented


class Loader:
    """A checkpoint's storages in memory of their own, verified; tensors that view them.

    Tensors of one storage share memory here as they did when it was saved. Each call gives new tensor objects.

    Args:
        checkpoint: What to read from.
        lengths: Bytes of each of its storages, where somebody has them already.
    """

    def __init__(self, checkpoint: Checkpoint, lengths: list[int] | None = None) -> None:
        self._checkpoint = checkpoint
        self._lengths = [length for length, _ in checkpoint.storages] if lengths is None else lengths
        self._memory: dict[int, torch.Tensor] = {}
        # Storages that are only copied from, and where they begin in memory that is not torch's.
        self._staged: dict[int, int] = {}
        self._stage: _core.Memory | None = None
        # Storages whose memory was made as the one tensor that it is, and that tensor's look.
        self._looks: dict[int, _Look] = {}
        self._devices: dict[tuple[int, str], torch.UntypedStorage] = {}

    def lend(self, tree: Value, *, copied: Iterable[Leaf] = ()) -> list[tuple[int, int, int]]:
        """Make memory for all storages that a tree refers to, for somebody else to fill with verified bytes.

        Args:
            tree: What is needed.
            copied: Leaves of which live tensors have memory already: their bytes need none that torch can own.

        Returns:
            (storage, address, length in bytes) of what is not here yet.

        Raises:
            FormatError: A leaf refers to a storage that is not there.
        """
        targets = self._lend_stage({leaf.storage for leaf in copied if _is_plain(leaf)})
        return targets + self._lend({leaf.storage: leaf for leaf in leaves(tree)})

    def _lend(self, wanted: dict[int, Leaf | None]) -> list[tuple[int, int, int]]:
        targets = []
        for index in sorted(index for index in wanted if not self._has(index)):
            length = self._length(index)
            look = _Look.of(wanted[index], length)
            if look is None:
                memory = torch.empty(length, dtype=torch.uint8)
            else:
                memory = torch.empty_strided(look.shape, look.strides, dtype=_PLAIN[look.dtype])
                self._looks[index] = look
            self._memory[index] = memory
            if length:
                targets.append((index, memory.data_ptr(), length))
        return targets

    def _has(self, index: int) -> bool:
        return index in self._memory or index in self._staged

    def _lend_stage(self, wanted: set[int]) -> list[tuple[int, int, int]]:
        spans, end = [], 0
        for index in sorted(wanted):
            length = self._length(index)
            spans.append((index, end, length))
            end += -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if not end:
            return []
        assert self._stage is None, "memory to copy from is lent once, for all that is copied"
        self._stage = _core.Memory(end)
        start = self._stage.address
        self._staged = {index: start + offset for index, offset, _ in spans}
        return [(index, start + offset, length) for index, offset, length in spans if length]

    def _length(self, index: int) -> int:
        if index >= len(self._lengths):
            raise FormatError(f"a leaf refers to storage {index} of {len(self._lengths)}")
        return self._lengths[index]

    def _address(self, index: int) -> int:
        staged = self._staged.get(index)
        return self._memory[index].data_ptr() if staged is None else staged

    def _own(self, index: int) -> torch.Tensor:
        """Return a storage's memory as torch's own."""
        if index not in self._memory:
            memory = self._memory[index] = torch.empty(self._lengths[index], dtype=torch.uint8)
            _core.copy_memory([(self._staged[index], memory.data_ptr(), self._lengths[index])])
        return self._memory[index]

    def prepare(self, tree: Value) -> None:
        """Read all storages that a tree refers to and that are not here yet, in one go.

        Raises:
            DamagedCheckpoint: Bytes differ from those committed.
            FormatError: A leaf refers to a storage that is not there.
        """
        self._read(self.lend(tree))

    def _read(self, targets: list[tuple[int, int, int]]) -> None:
        if targets:
            try:
                self._checkpoint.read_into(targets)
            except BaseException:
                for index, _, _ in targets:
                    del self._memory[index]
                    self._looks.pop(index, None)
                raise

    def copied(self, tree: Value) -> Loader:
        """Return a loader with copies of the storages that a tree refers to."""
        self.prepare(tree)
        other = Loader(self._checkpoint, self._lengths)
        copies = other.lend(tree)
        # As bytes: torch's own copy of a bool makes it 0 or 1.
        _core.copy_memory([(self._address(index), to, length) for index, to, length in copies])
        return other

    def source_of(self, leaf: Leaf, live: torch.Tensor) -> tuple[int, int, int] | None:
        """Return (from address, to address, length in bytes) if copying bytes brings a live tensor to a leaf.

        None where elements have to be copied one by one, or layouts differ.
        """
        dtype = _PLAIN.get(leaf.dtype)
        plain = (
            dtype is live.dtype
            and type(live) in (torch.Tensor, Parameter)
            and live.device.type == "cpu"
            and not (live.is_inference() or live.is_conj() or live.is_neg())
            and _SPECIAL.isdisjoint(leaf.attrs)
            and same_layout(live, leaf)
            and (
                live.is_contiguous() or (live.dim() == 4 and live.is_contiguous(memory_format=_CHANNELS_LAST))
            )
        )
        if not plain or live.numel() == 0:
            return None
        self._read(self._lend({leaf.storage: None}))
        start, length = leaf.offset * live.element_size(), live.numel() * live.element_size()
        if start + length > self._lengths[leaf.storage]:
            return None
        return self._address(leaf.storage) + start, live.data_ptr(), length

    def bytes_of(self, leaf: Leaf) -> bytes:
        """Return a dense uint8 leaf's bytes."""
        return bytes(self.tensor(leaf, path="").numpy())

    def tensor(self, leaf: Leaf, *, path: str, device: torch.device | None = None) -> torch.Tensor:
        """Return a tensor with the leaf's dtype, shape and strides, viewing this loader's memory.

        Args:
            leaf: What to make.
            path: Where it is in the state, for errors.
            device: Where to put it; by default the CPU.

        Raises:
            FormatError: The leaf does not fit its storage, or its dtype is not one of torch's.
        """
        strides, shape = leaf.strides, leaf.shape
        look = self._looks.get(leaf.storage)
        if (
            look is not None
            and (look.dtype, look.shape, look.strides, 0) == (leaf.dtype, shape, strides, leaf.offset)
            and (device is None or device.type == "cpu")
            and _SPECIAL.isdisjoint(leaf.attrs)
        ):
            return self._memory[leaf.storage].data
        dtype = _CONSTANTS.get(f"torch.{leaf.dtype}")
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"`{path}` has the dtype `{leaf.dtype}`, which this torch does not have")
        self._read(self._lend({leaf.storage: None}))
        if len(strides) != len(shape) or any(stride < 0 for stride in strides):
            raise FormatError(f"`{path}` has strides that torch cannot have")
        elements = leaf.offset + _span_elements(shape, strides)
        needed = -(-elements // _ELEMENTS_A_BYTE.get(dtype, 1)) * dtype.itemsize
        if 0 not in shape and needed > self._lengths[leaf.storage]:
            raise FormatError(f"`{path}` needs {needed} bytes of a storage of {self._lengths[leaf.storage]}")
        attrs = leaf.attrs
        storage = self._storage(leaf.storage, device or torch.device("cpu"))
        made = view_storage(storage, dtype, shape, strides, leaf.offset, attrs.get("quantizer"), path)
        original = attrs.get("strides")
        if original is not None:
            if len(original) != len(shape) or any(stride < 0 for stride in original):
                raise FormatError(f"`{path}` has strides that torch cannot have")
            spread = torch.empty_strided(shape, original, dtype=dtype, device=made.device)
            write(spread, made)
            made = spread
        return made.conj() if attrs.get("conj") else _neg_view(made) if attrs.get("neg") else made

    def _storage(self, index: int, device: torch.device) -> torch.UntypedStorage:
        host = self._own(index)
        if device.type == "cpu":
            return host.untyped_storage()
        key = (index, str(device))
        if key not in self._devices:
            self._devices[key] = host.to(device).untyped_storage()
        return self._devices[key]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away while thousands of leaves are made and nothing becomes garbage.

    It would look at all of torch's objects again and again, for longer than the rest takes.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the garbage collector away, also from what was made when it is over: for what happens once in a life.

    What is young then counts as old, as it would after two collections. Else the collector looks at it, and as it is a
    good part of all there is, at everything that torch has made: 0.2 s after a resume of thousands of tensors.
    """
    with uncollected():
        yield
        # Merges lists, and looks at nothing. Who has frozen objects wants them to stay so.
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()


class Staging:
    """Memory for the checkpoint that is opened: its bytes are left there while they are verified, and read once.

    Args:
        copied: Returns the leaves of a tree that live tensors are the copies of.
    """

    def __init__(self, copied: Callable[[Value], Iterable[Leaf]] = lambda tree: ()) -> None:
        self._copied = copied
        self._tree: Value = None
        self._loader: Loader | None = None

    def __call__(self, checkpoint: Checkpoint) -> list[tuple[int, int, int]]:
        """Return memory for a checkpoint about to be read, giving up what was for another one before."""
        self._loader = None
        self._tree = checkpoint.tree
        self._loader = Loader(checkpoint)
        return self._loader.lend(self._tree, copied=self._copied(self._tree))

    def taken(self) -> tuple[Value, Loader]:
        """Return the tree of the checkpoint that was opened, and the loader that has its bytes."""
        assert self._loader is not None, "a checkpoint was opened"
        return self._tree, self._loader


_SPECIAL = frozenset({"quantizer", "conj", "neg", "strides"})
"""Attributes of leaves whose elements are not simply those of their storage."""

_CHANNELS_LAST = torch.channels_last


def _is_plain(leaf: Leaf) -> bool:
    """Tell whether a leaf's bytes may be copied to a live tensor as they are."""
    return leaf.device == "cpu" and leaf.dtype in _PLAIN and _SPECIAL.isdisjoint(leaf.attrs)


@dataclass(frozen=True)
class _Look:
    """What a tensor is that is its whole storage, each byte of it once."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(leaf: Leaf | None, length: int) -> _Look | None:
        if leaf is None or leaf.offset or leaf.dtype not in _PLAIN or not _SPECIAL.isdisjoint(leaf.attrs):
            return None
        shape, strides = leaf.shape, leaf.strides
        expected = 1
        for size, stride in zip(reversed(shape), reversed(strides), strict=False):
            if stride != expected:
                return None
            expected *= size
        whole = len(shape) == len(strides) and expected * _PLAIN[leaf.dtype].itemsize == length > 0
        return _Look(leaf.dtype, shape, strides) if whole else None


def versions(candidates: list[torch.Tensor], least_bytes: int) -> _core.Versions:
    """Return the version counters of tensors whose storage on the CPU has at least so many bytes."""
    return READER.versions(candidates, least_bytes, _core.Regions(READER))


def view_storage(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    quantizer: Value,
    path: str,
) -> torch.Tensor:
    """Return a tensor that views a storage. The caller has checked that it fits."""
    with warnings.catch_warnings():
        # Making a tensor of a rare dtype warns about operators, and none is used here.
        warnings.simplefilter("ignore")
        if quantizer is None:
            empty = torch.empty(0, dtype=dtype, device=storage.device)
        else:
            empty = _empty_quantized(dtype, shape, quantizer, path)
        return empty.set_(storage, offset, shape, strides)  # type: ignore[arg-type]


def extend_raise(loader: Loader) -> values.Extend:
    """Return what `values.raise_` needs for what `extend_lower` made. Tensors come back as copies on the CPU."""

    def extend(value: Any, path: str) -> Any:
        if isinstance(value, Leaf):
            return raise_leaf(loader, value, path)
        return raise_constant(loader, value, path)

    return extend


def raise_leaf(loader: Loader, leaf: Leaf, path: str, *, device: torch.device | None = None) -> torch.Tensor:
    """Return a new tensor of a leaf, of the class and with the flags it had."""
    return _dress(loader.tensor(leaf, path=path, device=device), leaf.attrs, path)


def raise_constant(loader: Loader, value: Object, path: str, *, device: torch.device | None = None) -> Any:
    """Return what `lower_constant` or a sparse tensor came from; else NotImplemented."""
    kind = value.kind
    if kind == "torch_constant":
        if value.name not in _CONSTANTS:
            raise FormatError(f"`{path}` is `{value.name}`, which this torch does not have")
        return _CONSTANTS[value.name]
    if kind == "torch_size":
        return torch.Size(value.fields["sizes"])
    if kind == "torch_device":
        fields = value.fields
        return torch.device(fields["type"]) if fields["index"] is None else torch.device(**fields)
    if kind == "sparse":
        return _raise_sparse(loader, value, path, device)
    if kind == "uninitialized":
        parameter = value.name.endswith("Parameter")
        lazy: Any = torch.nn.UninitializedParameter if parameter else torch.nn.UninitializedBuffer
        dtype = _CONSTANTS.get(value.fields["dtype"])
        return lazy(requires_grad=value.fields["requires_grad"], device=device or "cpu", dtype=dtype)
    if kind == "ndarray":
        fields = value.fields
        if isinstance(fields["data"], Leaf):
            fields["data"] = loader.bytes_of(fields["data"])
            return values.raise_(Object(kind, value.name, fields), path=path)
    return NotImplemented


def _dress(made: torch.Tensor, attrs: dict[str, Value], path: str) -> torch.Tensor:
    name = attrs.get("class")
    flag = bool(attrs.get("requires_grad", False))
    if name == values.type_name(Parameter):
        return Parameter(made, requires_grad=flag)
    if name == values.type_name(Buffer):
        made = Buffer(made)
    elif name is not None:
        kind = values.find_type(str(name))
        if kind is None or not issubclass(kind, torch.Tensor):
            raise UnsupportedState(
                path, str(name), why="no such tensor type is imported", hint=f"import what defines `{name}`"
            )
        made = made.as_subclass(kind)
    return made.requires_grad_() if flag else made


def _raise_sparse(loader: Loader, value: Object, path: str, device: torch.device | None) -> torch.Tensor:
    def part(lowered: Value) -> torch.Tensor:
        if isinstance(lowered, Leaf):
            return loader.tensor(lowered, path=path, device=device)
        return _raise_sparse(loader, lowered, path, device)

    fields = value.fields
    data, shape = part(fields["values"]), fields["shape"]
    try:
        # The invariants are checked: indices from a file must not point outside.
        if value.name == "torch.sparse_coo":
            made = torch.sparse_coo_tensor(
                part(fields["indices"]), data, shape, check_invariants=True, is_coalesced=fields["coalesced"]
            )
        else:
            made = torch.sparse_compressed_tensor(
                part(fields["compressed"]),
                part(fields["plain"]),
                data,
                shape,
                layout=_CONSTANTS.get(value.name),
                check_invariants=True,
            )
    except RuntimeError as error:
        raise FormatError(f"`{path}` is not a valid {value.name} tensor: {error}", path=path) from error
    return _dress(made, fields["attrs"], path)


def leaves(tree: Value) -> Iterator[Leaf]:
    """Yield every leaf of a tree."""
    stack = [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, Leaf):
            yield value
        elif isinstance(value, Object):
            stack.extend(value.fields.values())
        elif isinstance(value, dict):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)


def find(tree: Value, path: str = "") -> Iterator[tuple[str, Value]]:
    """Yield (path, value) of each part of a tree that has no parts with paths of their own."""
    if isinstance(tree, dict) and tree:
        parts: Iterable[tuple[object, Value]] = ((values.key_text(key), part) for key, part in tree.items())
    elif isinstance(tree, list | tuple) and tree:
        parts = enumerate(tree)
    elif isinstance(tree, Object) and tree.fields:
        parts = tree.fields.items()
    else:
        yield path, tree
        return
    for key, part in parts:
        yield from find(part, values.join_path(path, key))


def write(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor's values into another of the same dtype and shape, bit for bit and in place.

    Works on every dtype, on tensors that autograd watches, on expanded and overlapping ones.
    """
    if target.numel() == 0:
        return
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target, source = target.detach(), source.detach()
        if target.layout is not torch.strided or target.is_quantized:
            target.copy_(source)
            return
        if target.is_conj() == source.is_conj() and target.is_neg() == source.is_neg():
            # As integers: no arithmetic unit may touch a NaN's payload, and rare dtypes have no copy of their own.
            target, source = _as_integers(target), _as_integers(source)
        for dim in range(target.dim()):
            if target.stride(dim) == 0 and target.size(dim) > 1:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        length = _span_elements(target.shape, target.stride())
        if target.numel() > length:
            # Elements overlap: torch refuses to copy into such a tensor, but its span is an ordinary one.
            flat = target.as_strided((length,), (1,))
            flat[_positions(target).reshape(-1)] = source.reshape(-1)
            return
        target.copy_(source)


def _positions(tensor: torch.Tensor) -> torch.Tensor:
    """Return each element's position in the tensor's span, shape as the tensor's, dtype int64."""
    positions = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size, device=tensor.device) * stride
        positions += steps.view([size if at == dim else 1 for at in range(tensor.dim())])
    return positions


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_conj():
        tensor = tensor.conj()
    if tensor.is_neg():
        tensor = _neg_view(tensor)
    same = _SAME_SIZE.get(tensor.element_size())
    return tensor if same is None else tensor.view(same)


def same_layout(one: torch.Tensor, leaf: Leaf) -> bool:
    """Tell whether a live tensor has a leaf's dtype, shape and strides, so that bytes can be copied into it."""
    strides = leaf.attrs.get("strides", leaf.strides)
    return (
        one.layout is torch.strided
        and _dtype_name(one.dtype) == leaf.dtype
        and tuple(one.shape) == leaf.shape
        and (_same_strides(leaf.shape, tuple(one.stride()), strides))
    )


def _same_strides(shape: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    # The stride of a dimension of one element is never used.
    return 0 in shape or all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


def describe(item: Any) -> str:
    """Return a tensor's or leaf's dtype, shape and unusual strides, for people."""
    if isinstance(item, Leaf):
        strides = item.attrs.get("strides", item.strides)
        return _describe(item.dtype, item.shape, tuple(strides))
    if is_lazy(item):
        return "uninitialized"
    if isinstance(item, torch.Tensor):
        if item.layout is not torch.strided:
            return f"{item.layout} {_dtype_name(item.dtype)}{list(item.shape)}"
        return _describe(_dtype_name(item.dtype), tuple(item.shape), tuple(item.stride()))
    if isinstance(item, Object):
        return item.kind if item.kind != "sparse" else item.name
    return "absent" if item is None else type(item).__name__


def _describe(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    dense, step = [], 1
    for size in reversed(shape):
        dense.append(step)
        step *= max(size, 1)
    unusual = not _same_strides(shape, strides, tuple(reversed(dense)))
    return f"{dtype}{list(shape)}" + (f" with strides {list(strides)}" if unusual else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _span_elements(shape: Iterable[int], strides: Iterable[int]) -> int:
    """Return how many elements lie between the first and the last element of a view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _covered_elements(tensor: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            count *= size
    return count


def _compact_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements, dense and on the CPU, as integers where its dtype has no copy of its own."""
    bits = _as_integers(tensor).cpu()
    return torch.empty(bits.shape, dtype=bits.dtype).copy_(bits)


def _lower_quantizer(tensor: torch.Tensor, path: str) -> Value:
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return {"scheme": str(scheme), "scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    if scheme in (
        torch.per_channel_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine_float_qparams,
    ):
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return {
            "scheme": str(scheme),
            "axis": tensor.q_per_channel_axis(),
            "scales": scales.tolist(),
            "scales_dtype": str(scales.dtype),
            "zero_points": zeros.tolist(),
            "zero_points_dtype": str(zeros.dtype),
        }
    raise UnsupportedState(path, "torch.Tensor", why=f"its quantization scheme is {scheme}")


def _empty_quantized(dtype: torch.dtype, shape: tuple[int, ...], quantizer: Any, path: str) -> torch.Tensor:
    try:
        if "scale" in quantizer:
            scale, zero = quantizer["scale"], quantizer["zero_point"]
            return _empty_affine(shape, scale=scale, zero_point=zero, dtype=dtype)
        return _empty_per_channel(
            shape,
            scales=torch.tensor(quantizer["scales"], dtype=_CONSTANTS[quantizer["scales_dtype"]]),
            zero_points=torch.tensor(
                quantizer["zero_points"], dtype=_CONSTANTS[quantizer["zero_points_dtype"]]
            ),
            axis=quantizer["axis"],
            dtype=dtype,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise FormatError(f"`{path}` has a quantizer that torch refuses: {error}", path=path) from error
