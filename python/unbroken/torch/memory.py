"""Where the bytes of the state lie, part by part: found once, and seen at each step to lie there still.

Touches: reads live objects; tensors elsewhere than on the CPU are passed over, and so are gradients: their effect is
among the rest. What is returned is the live tensors' own memory, valid until the next step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from unbroken import _core
from unbroken.torch import modules
from unbroken.torch.objects import walk_leaves

Region = tuple[int, int]
_CONTAINERS = (list, dict, tuple, set)


def regions(objects: Mapping[str, object]) -> dict[str, list[Region]]:
    """Return (address, length in bytes) of the state, part by part in causal order: optimizers, then modules.

    Cheap when nothing was replaced since the last call.
    """
    ordered: dict[str, list[Region]] = {}
    for name, item in sorted(objects.items(), key=_optimizers_first):
        watch = _watch_of(item)
        if watch is not None:
            ordered.update(
                (part, memory.regions(members)) for part, memory, members in watch.parts(name, item)
            )
    return ordered


def windows(name: str, item: object, *, turn: int, length: int) -> list[tuple[str, bytes]]:
    """Return, for each part of one object, the digest of its window number `turn` of `length` bytes, cyclic."""
    watch = _watch_of(item)
    if watch is None:
        return []
    return [(part, memory.window(members, turn, length)) for part, memory, members in watch.parts(name, item)]


def is_watched(item: object) -> bool:
    """Tell whether an object has parts here."""
    return isinstance(item, (torch.nn.Module, Optimizer, torch.Tensor))


_Part = tuple[str, _core.WatchedMemory, list[Any]]


class _ModuleWatch:
    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)
        self._machinery: set[int] = set()
        self._parameters, self._buffers = _memory(), _memory(skip=self._machinery)
        self._children: list[int] = []
        self._spaces: tuple[list[Any], list[Any], list[Any]] = ([], [], [])

    def watches(self, item: object) -> bool:
        return self._module() is item

    def parts(self, name: str, module: Any) -> list[_Part]:
        spaces, parameters, buffers = self._spaces
        children = list(map(id, _members(spaces)))
        if not spaces or children != self._children:
            self._find(module)
            spaces, parameters, buffers = self._spaces
            self._children = list(map(id, _members(spaces)))
        return [
            (f"state/parameters/{name}", self._parameters, _members(parameters)),
            (f"state/buffers/{name}", self._buffers, _members(buffers)),
        ]

    def _find(self, module: torch.nn.Module) -> None:
        parts = [part for _, part in modules.walk(module)]
        # Layers of torch's own gain no children or tensors and keep none in plain attributes; looking costs time.
        users = [part for part in parts if not type(part).__module__.startswith("torch.nn.modules.")]
        own = [vars(part) for part in users]
        grown = {id(part) for part in users}
        self._spaces = (
            [part._modules for part in parts if part._modules or id(part) in grown],
            [part._parameters for part in parts if part._parameters or id(part) in grown],
            [*(part._buffers for part in parts if part._buffers or id(part) in grown), *own],
        )
        self._machinery.clear()
        self._machinery.update(
            id(value) for space in own for key, value in space.items() if key in modules.MACHINERY
        )


class _OptimizerWatch:
    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._state = _memory()

    def watches(self, item: object) -> bool:
        return self._optimizer() is item

    def parts(self, name: str, optimizer: Any) -> list[_Part]:
        return [(f"state/optimizer/{name}", self._state, _members(optimizer.state.values()))]


class _TensorWatch:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._memory = _memory()

    def watches(self, item: object) -> bool:
        return self._tensor() is item

    def parts(self, name: str, tensor: Any) -> list[_Part]:
        return [(f"state/parameters/{name}", self._memory, [tensor])]


_Watch = _ModuleWatch | _OptimizerWatch | _TensorWatch

_watches: dict[int, _Watch] = {}


def _watch_of(item: object) -> _Watch | None:
    watch = _watches.get(id(item))
    if watch is None or not watch.watches(item):
        watch = _new_watch(item)
        if watch is not None:
            _forget_dead()
            _watches[id(item)] = watch
    return watch


def _new_watch(item: object) -> _Watch | None:
    if isinstance(item, torch.nn.Module):
        return _ModuleWatch(item)
    if isinstance(item, Optimizer):
        return _OptimizerWatch(item)
    return _TensorWatch(item) if isinstance(item, torch.Tensor) else None


def _forget_dead() -> None:
    for key in [key for key, watch in _watches.items() if watch.watches(None)]:
        del _watches[key]


def _optimizers_first(entry: tuple[str, object]) -> bool:
    return not isinstance(entry[1], Optimizer)


def _members(spaces: Iterable[Any]) -> list[Any]:
    try:
        return list(itertools.chain.from_iterable(map(dict.values, spaces)))
    except TypeError:  # An optimizer that keeps something else than dicts in its state.
        return [space for part in spaces for space in (part.values() if isinstance(part, dict) else [part])]


def _memory(skip: Set[int] = frozenset()) -> _core.WatchedMemory:
    """Return the memory of one part. `skip` holds identities of members that are passed over, and may change."""

    def gather(members: list[Any]) -> tuple[list[Region], bool]:
        members = [member for member in members if id(member) not in skip]
        containers = [member for member in members if isinstance(member, _CONTAINERS)]
        # Tensors inside containers can be exchanged without a trace in the members' identities.
        nested = next(walk_leaves(containers), None) is not None
        tensors = [tensor for tensor in walk_leaves(members) if _is_readable(tensor)]
        return list(dict.fromkeys(map(_region, tensors))), nested

    return _core.WatchedMemory(
        gather=gather, tensors=[torch.Tensor, torch.nn.Parameter], data_ptr=torch.Tensor.data_ptr
    )


def _is_readable(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not is_lazy(tensor)
        and tensor.numel() > 0
    )


def _region(tensor: torch.Tensor) -> Region:
    if tensor.is_contiguous() and not tensor.is_quantized:
        return tensor.data_ptr(), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
