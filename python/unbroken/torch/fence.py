"""What only an optimizer's step changes, and the moment right before it: where background copies must be done.

Touches: torch's global hooks, from `install` until `uninstall`; reads optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from unbroken.torch.tensors import Storages

LEND_FROM_BYTES = 64 << 10
"""Smaller storages are copied at the boundary: looking after each costs more than its copy."""

StorageKey = tuple[int, int]
"""Address and length in bytes of a storage on the CPU."""


class Owned:
    """The storages that belong to optimizers, and whether anybody was seen to write to them since.

    Version counters miss writers (numpy, `.data`, fused kernels) and digests of windows miss writes between them; both
    together miss little, and the journal's replay finds the rest.

    Args:
        objects: Tracked objects; optimizers among them are asked.
        storages: What was just captured of them.
    """

    def __init__(self, objects: Iterable[object], storages: Storages) -> None:
        # Where all are small, nothing is lent, and thousands need not be asked.
        lends = storages.have_live(LEND_FROM_BYTES)
        candidates = [part for item in objects for part in _tensors_of(item)] if lends else []
        self.versions = storages.versions(candidates, LEND_FROM_BYTES)
        self._unchanged: bool | None = None

    @property
    def keys(self) -> Collection[StorageKey]:
        """Return the storages."""
        return self.versions.storages

    def unchanged(self) -> bool:
        """Tell whether no tensor's version counter had moved when this was asked first: when everything was copied.

        Both sides ask, the thread that copies and the one that is about to step; whoever comes first settles it.
        """
        if self._unchanged is None:
            self._unchanged = self.versions.unchanged()
        return self._unchanged


def _tensors_of(item: object) -> list[torch.Tensor]:
    if not isinstance(item, Optimizer):
        return []
    found = [part for group in item.param_groups for part in group["params"]]
    for state in item.state.values():
        if isinstance(state, dict):
            found += state.values()
    return [part for part in found if isinstance(part, torch.Tensor)]


class Fence:
    """Calls back right before any optimizer of this process steps.

    Args:
        reached: Called without arguments on the thread that steps.
    """

    def __init__(self, reached: Callable[[], None]) -> None:
        self._reached = reached
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def install(self) -> None:
        """Begin to call."""
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before)

    def uninstall(self) -> None:
        """Call no more. Idempotent."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._reached()
