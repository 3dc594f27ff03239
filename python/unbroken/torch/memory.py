"""Where the bytes of the state lie, part by part: found once, and seen at each step to lie there still.

Touches: reads live objects; tensors elsewhere than on the CPU are passed over, and so are gradients: their effect is
among the rest. What is returned is the live tensors' own memory, valid until the next step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Watch(ABC):
    """One tracked object's parts, such as `state/parameters/NAME`.

    Args:
        name: The object's name.
        item: The object.
    """

    def windows(self, turn: int, length: int) -> list[tuple[str, bytes]]:
        """Return, for each part, the digest of its window number `turn` of `length` bytes, cyclic."""
        return [(part, memory.window(spaces, turn, length)) for part, memory, spaces in self.parts()]

    def regions(self) -> dict[str, list[Region]]:
        """Return (address, length in bytes) of each part's bytes. Cheap while nothing is replaced."""
        return {part: memory.regions(spaces) for part, memory, spaces in self.parts()}

    @abstractmethod
    def parts(self) -> list[_Part]:
        """Return name, memory and members of each part, as the object is now."""


def watches(objects: Mapping[str, object]) -> list[Watch]:
    """Return a watch for each object whose state is tensors."""
    found = (_watch(name, item) for name, item in objects.items())
    return [watch for watch in found if watch is not None]


def regions(watches: Iterable[Watch]) -> dict[str, list[Region]]:
    """Return (address, length in bytes) of the state, part by part in causal order: optimizers, then modules."""
    ordered: dict[str, list[Region]] = {}
    for watch in sorted(watches, key=lambda watch: not isinstance(watch, _OptimizerWatch)):
        ordered.update(watch.regions())
    return ordered


_Part = tuple[str, _core.WatchedMemory, Iterable[Any]]


def _watch(name: str, item: object) -> Watch | None:
    if isinstance(item, torch.nn.Module):
        return _ModuleWatch(name, item)
    if isinstance(item, Optimizer):
        return _OptimizerWatch(name, item)
    return _TensorWatch(name, item) if isinstance(item, torch.Tensor) else None


class _ModuleWatch(Watch):
    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self._module = module
        self._machinery: set[int] = set()
        # Modules hold no memory: theirs is looked at for the children alone.
        self._children = _core.WatchedMemory(gather=lambda _: ([], False), tensors=[], data_ptr=id)
        self._child_spaces: list[Any] = []
        self._parts: list[_Part] = [
            (f"state/parameters/{name}", _memory(), []),
            (f"state/buffers/{name}", _memory(skip=self._machinery), []),
        ]

    def parts(self) -> list[_Part]:
        if self._children.changed(self._child_spaces):
            self._find()
            self._children.changed(self._child_spaces)
        return self._parts

    def _find(self) -> None:
        parts = [part for _, part in modules.walk(self._module)]
        # Layers of torch's own gain no children or tensors and keep none in plain attributes; looking costs time.
        users = [part for part in parts if not type(part).__module__.startswith("torch.nn.modules.")]
        own = [vars(part) for part in users]
        grown = {id(part) for part in users}
        self._child_spaces = [part._modules for part in parts if part._modules or id(part) in grown]
        spaces = (
            [part._parameters for part in parts if part._parameters or id(part) in grown],
            [*(part._buffers for part in parts if part._buffers or id(part) in grown), *own],
        )
        self._parts = [
            (part, memory, found) for (part, memory, _), found in zip(self._parts, spaces, strict=True)
        ]
        self._machinery.clear()
        self._machinery.update(
            id(value) for space in own for key, value in space.items() if key in modules.MACHINERY
        )


class _OptimizerWatch(Watch):
    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._name, self._memory = f"state/optimizer/{name}", _memory()

    def parts(self) -> list[_Part]:
        return [(self._name, self._memory, self._optimizer.state.values())]


class _TensorWatch(Watch):
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._parts: list[_Part] = [(f"state/parameters/{name}", _memory(), [tensor])]

    def parts(self) -> list[_Part]:
        return self._parts


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
