"""A run's checkpoints on their way to the disk: when one is due, written while the training goes on or waited for.

Touches: the run directory through the core; memory that the core reads until an optimizer steps, and frozen parameters
until their save is over; torch's global hook before optimizer steps, from `install` until `close`.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import _core, room
from .errors import StorageError, UnbrokenError
from .full import FullDisk
from .notices import Say, size
from .policy import Cost, Keep, Policy
from .torch import digests, tensors
from .torch.fence import LEND_FROM_BYTES, Fence, Owned, UntilStep
from .torch.snapshot import Snapshot

Mode = Literal["background", "copy", "sync"]
Compression = Literal["alone", "differences"]

# What compressing takes beside a copy of the state, in states: what is written, and what it is differences to.
_COMPRESSING: dict[Compression | None, int] = {None: 0, "alone": 1, "differences": 2}


@dataclass(frozen=True)
class _UnderWay:
    step: int
    pinned: bool
    frozen: _core.Versions | None
    # (address, length in bytes) of what is read where it lies, and what keeps it alive.
    resting: set[tuple[int, int]]
    held: Snapshot | None


class Saves:
    """Saves boundaries of one run: one at a time, each either durable, thrown away, or an error that is raised.

    Args:
        core: The run on disk.
        objects: Tracked objects; optimizers among them own the memory that may be lent.
        policy: When a boundary is due.
        keep: What stays.
        mode: `background` lends what only optimizers change, and copies the rest; `copy` copies all at the boundary;
            `sync` waits until it is durable.
        compress: Whether they are compressed, and how.
        level: The journal's: with `full` every lent byte is compared with its copy.
        disk: What a full disk means.
        say: Says one line to the user.
    """

    def __init__(
        self,
        core: _core.Run,
        objects: Mapping[str, object],
        *,
        policy: Policy,
        keep: Keep,
        mode: Mode,
        compress: Compression | None,
        level: digests.Level,
        disk: FullDisk,
        say: Say,
    ) -> None:
        self._core, self._objects = core, objects
        self._policy, self._keep = policy, keep
        self._mode: Mode = mode
        self._compress: Compression | None = compress
        self._level = level
        self._disk, self._say = disk, say
        self._fence = Fence(self._optimizer_steps)
        self._lent: tuple[Snapshot, Owned] | None = None
        self._until_step = UntilStep()
        self._under_way: _UnderWay | None = None
        # Frozen parameters as they were at the last save: what nobody has written to since is not copied again.
        self._frozen: _core.Versions | None = None
        self._rests = self._learns = mode == "background"
        # The largest state that there was memory for: it is kept.
        self._provided_bytes = 0
        self.pin_next = False
        # Something came to nothing: the next boundary is saved in its place, and waited for.
        self._again = self._again_waiting = False
        now = time.monotonic()
        self._last_durable = self._step_began = now
        # Boundaries within an epoch before this step and before this time are not due: see `Policy.quiet_until`.
        self._quiet_until: tuple[int, float] = (0, 0.0)
        # What saving costs is measured where the policy asks for it.
        self.weighs = policy.continuous is not None
        self._cost: Cost | None = None
        self.has_news = self.weighs

    def resumed(self, resting: list[tuple[torch.Tensor, int]], checkpoint: _core.Checkpoint) -> None:
        """Take note of what parameters hold that training does not change: the first save need not copy them.

        Args:
            resting: Parameters, and which of the checkpoint's storages each is now.
            checkpoint: What was restored.
        """
        if not self._rests:
            return
        known = [digest for _, digest in checkpoint.storages]
        self._core.know([(tensor.data_ptr(), tensor.nbytes, known[storage]) for tensor, storage in resting])
        self._frozen = tensors.versions([tensor for tensor, _ in resting], LEND_FROM_BYTES)

    def due(self, step: int, phase: int) -> bool:
        """Tell whether this boundary is to be saved."""
        if self.pin_next or self._again:
            return True
        now = time.monotonic()
        if self._learns:
            self._learn(now)
        quiet_step, quiet_time = self._quiet_until
        if phase == 0 and step < quiet_step and now < quiet_time:
            return False
        self._quiet_until = self._policy.quiet_until(step=step, last=self._last_durable)
        return self._policy.due(
            step=step,
            phase=phase,
            seconds_since_last=now - self._last_durable,
            saving=self._under_way is not None,
            cost=self._cost,
        )

    def _learn(self, now: float) -> None:
        """Measure the first few steps: how long it is until an optimizer steps."""
        self._learns = self._until_step.at_least_s() is None
        if self._learns:
            self._until_step.begin(now)
            self._fence.install()
        elif self._under_way is None:
            self._fence.uninstall()

    def save(
        self,
        captured: Snapshot,
        checkpoint: dict[str, Any],
        *,
        before: Callable[[], object],
        wait: bool = False,
        required: bool = False,
    ) -> None:
        """Save a boundary; older checkpoints go when, and only when, it survives a power cut.

        Args:
            captured: The tracked objects' state.
            checkpoint: The other arguments of the core's `commit`.
            before: Writes what must be written before it.
            wait: Return when it is durable.
            required: The same, and a full disk is no reason to leave it out under any policy.

        Raises:
            StorageError: It, or the one before it, could not be written. Older ones are as they were.
        """
        if required:
            self._settle_quietly()
        else:
            self.settle()
        checkpoint["pinned"] = self.pin_next
        frozen = captured.storages.take_frozen() if self._rests else None
        unmoved = frozen.unmoved_since(self._frozen) if frozen and self._frozen else set[tuple[int, int]]()
        self._find_memory(captured, resting=sum(length for _, length in unmoved))
        if wait or required or self._mode == "sync" or self._again_waiting:
            if self._save_waiting(captured, checkpoint, before, required=required):
                self._frozen = frozen
        else:
            self._start(captured, checkpoint, before, frozen, unmoved)

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Weigh what the training stands still for: all that a boundary does because it is saved.

        Not the pauses in which it waits for room on the disk, which are no save's; and not the checkpoint before the
        first step, which comes with any policy.
        """
        begun, paused_s = time.monotonic(), self._disk.paused_s
        yield
        if self._cost is not None:
            now = time.monotonic()
            self._cost.begin()
            self._cost.stood(now - begun - (self._disk.paused_s - paused_s), now=now)

    def hear(self) -> None:
        """At a step's boundary: learn what became of the save that is under way, if it is over.

        Raises:
            StorageError: It could not be written.
        """
        if self._cost is not None:
            now = time.monotonic()
            self._cost.step(now - self._step_began, saving=self._under_way is not None, now=now)
        self._listen(wait=False)

    def step_begins(self) -> None:
        """The boundary's work is done, or a loop opens. To be called where what a step takes is weighed."""
        self._step_began = time.monotonic()
        part = self._policy.continuous
        if self._cost is None and part is not None:
            self._cost = Cost(part, now=self._step_began, draw=random.Random(0))

    def close(self) -> None:
        """Wait for what is under way, and listen no more. Idempotent; what failed is said, not raised."""
        self._settle_quietly()
        self._fence.uninstall()

    # One save.

    def _save_waiting(
        self, captured: Snapshot, checkpoint: dict[str, Any], before: Callable[[], object], *, required: bool
    ) -> bool:
        storages = captured.memory()

        def write() -> None:
            before()
            self._core.commit(**checkpoint, storages=storages)

        saved = self._disk.attempt(write, required=required)
        self._last_durable = time.monotonic()
        self._again = self._again_waiting = False
        if saved:
            self.pin_next = False
            if self._keep.last is not None:
                self._core.prune(last=self._keep.last, every=self._keep.every, best=self._keep.best)
                self._tell_notices()
        return saved

    def _find_memory(self, captured: Snapshot, *, resting: int) -> None:
        """Do without what there is no memory for, from now on: the kernel would kill the training.

        First without compression; then without a copy, which means to wait for each checkpoint.
        """
        copies = self._mode != "sync"
        if not copies and self._compress is None:
            return
        state = captured.nbytes() - resting
        if state <= self._provided_bytes:
            return
        free = room.free_bytes()
        if free is None:
            return
        compressing = state * _COMPRESSING[self._compress]
        if compressing and compressing + state * copies > free:
            self._say(
                f"compressing checkpoints would take {size(compressing)} of memory beside a copy, and {size(free)} are "
                "free: they are written as they are"
            )
            self._compress = None
            self._core.set_compression(None)
        if copies and state > free:
            self._mode = "sync"
            self._say(
                f"a copy of the state would take {size(state)} of memory, and {size(free)} are free: the training "
                'waits for each checkpoint, as with save="sync"'
            )
        self._provided_bytes = state

    def _start(
        self,
        captured: Snapshot,
        checkpoint: dict[str, Any],
        before: Callable[[], object],
        frozen: _core.Versions | None,
        unmoved: set[tuple[int, int]],
    ) -> None:
        if not self._disk.attempt(before):
            return
        keep = self._keep
        objects = self._objects.values() if self._mode == "background" else ()
        owned = Owned(objects, captured.storages)
        try:
            self._core.save(
                **checkpoint,
                storages=captured.lendable(owned, unmoved),
                keep=(keep.last, keep.every, keep.best) if keep.last is not None else None,
                full=self._level == "full",
                lent_for_s=self._until_step.at_least_s(),
                confirm=owned.unchanged,
            )
        except StorageError as error:
            if error.errno != errno.ENOMEM:
                raise
            self._mode = "sync"
            self._say(f"{error}; from now on the training waits for each checkpoint, which takes no memory")
            self._save_waiting(captured, checkpoint, before, required=False)
            return
        self._lent = (captured, owned)
        # Only now: at each step, a hook costs the training some microseconds.
        self._until_step.begin(time.monotonic())
        self._fence.install()
        held = captured if unmoved else None
        self._under_way = _UnderWay(checkpoint["step"], self.pin_next, frozen, unmoved, held)
        self.pin_next = self._again = False
        self.has_news = True

    def _optimizer_steps(self) -> None:
        """An optimizer is about to step: what it writes to must have been copied."""
        begun = time.monotonic()
        self._until_step.reached(begun)
        if self._lent is None:
            return
        self._end_lending()
        if self._cost is not None:
            now = time.monotonic()
            self._cost.stood(now - begun, now=now)
            self._step_began += now - begun

    def _end_lending(self) -> None:
        if self._lent is None:
            return
        self._core.fence()
        _, owned = self._lent
        owned.unchanged()
        self._lent = None

    def settle(self) -> None:
        """Wait until nothing is under way.

        Raises:
            StorageError: What was under way could not be written.
        """
        self._end_lending()
        self._listen(wait=True)

    def _settle_quietly(self) -> None:
        """Wait for what is under way when nothing can be made of its failure but words."""
        try:
            self.settle()
        except UnbrokenError as error:
            self._say(str(error))

    def _listen(self, *, wait: bool) -> None:
        under_way = self._under_way
        if under_way is None:
            return
        try:
            outcome = self._core.outcome(wait=wait)
        except UnbrokenError as error:
            self._over(pinned=under_way.pinned)
            with contextlib.suppress(StorageError):  # The journal may be on the same full disk.
                self._core.event("save failed", under_way.step, {"error": str(error)})
            # It may be made up for at the next boundary, where the training can wait for room.
            self._again = self._again_waiting = self._disk.refused(error)
            return
        if outcome is None:
            return
        if outcome[0] == "saved":
            self._over(pinned=False)
            self._frozen = under_way.frozen
            self._disk.took()
            self._tell_notices()
            return
        self._over(pinned=under_way.pinned)
        # What was read was nobody's state. The next boundary is saved in its place.
        self._again = True
        self._core.event("save torn", under_way.step, {})
        self._say(
            f"the checkpoint of step {under_way.step} was thrown away: {self._tell_apart(outcome[0], under_way)}"
        )

    def _tell_apart(self, outcome: str, under_way: _UnderWay) -> str:
        """Say why what was read is worth nothing, and see to it that it does not happen again."""
        if outcome == "torn":
            self._mode, self._rests = "copy", False
            return (
                "something else than an optimizer's step wrote to parameters or optimizer state; from now on all state "
                "is copied at the boundary"
            )
        frozen = under_way.frozen
        if frozen is not None and not frozen.unchanged(under_way.resting):
            return "a parameter that required no gradient was written to before it was saved"
        self._rests = False
        return (
            "a parameter that requires no gradient was written to without torch seeing it; from now on such parameters "
            "are copied, too"
        )

    def _tell_notices(self) -> None:
        for text in self._core.take_notices():
            self._say(text)

    def _over(self, *, pinned: bool) -> None:
        self._fence.uninstall()
        self._under_way = self._lent = None
        self.pin_next = self.pin_next or pinned
        self._last_durable = time.monotonic()
        self.has_news = self.weighs
