"""What only an optimizer's step changes, and the moment right before it: where background reads must be done.

Touches: torch's global hooks, from `install` until `uninstall`; reads optimizers.
"""

from __future__ import annotations

from collections import deque
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
        self._settled: dict[str, bool] = {}

    @property
    def keys(self) -> Collection[StorageKey]:
        """Return the storages."""
        return self.versions.storages

    def unchanged(self) -> bool:
        """Tell whether no tensor's version counter had moved when this was asked first: when everything was read.

        Both sides ask, the thread that saves and the one that is about to step; whoever has an answer first settles it,
        also for the other one that had begun to ask before and sees what the step wrote.
        """
        if not self._settled:
            self._settled.setdefault("unchanged", self.versions.unchanged())
        return self._settled["unchanged"]


def _tensors_of(item: object) -> list[torch.Tensor]:
    if not isinstance(item, Optimizer):
        return []
    found = [part for group in item.param_groups for part in group["params"]]
    for state in item.state.values():
        if isinstance(state, dict):
            found += state.values()
    return [part for part in found if isinstance(part, torch.Tensor)]


class UntilStep:
    """How long it is from a boundary to the next optimizer's step, which is how long memory is lent."""

    _KNOWN = 4  # So many times must be known, and the last ones count.
    _RELIED_ON = 0.8  # Of the shortest of them: who is late is waited for.

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=self._KNOWN)
        self._begun: float | None = None

    def begin(self, now: float) -> None:
        """Note a boundary, in seconds of a monotonic clock."""
        self._begun = now

    def reached(self, now: float) -> None:
        """Note that an optimizer is about to step; only the first one behind a boundary counts."""
        if self._begun is not None:
            self._seconds.append(now - self._begun)
            self._begun = None

    def at_least_s(self) -> float | None:
        """Return for how many seconds memory is surely lent; None where too little is known."""
        return self._RELIED_ON * min(self._seconds) if len(self._seconds) == self._KNOWN else None


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
