"""When to save, what to keep, when time is up: decisions as plain data.

Touches: nothing but the process environment, in `walltime_deadline`, for Slurm's end time. Clocks are passed in.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a boundary becomes a checkpoint. Any of the conditions that is met suffices.

    A stop request (signal, walltime), step 0 and the end of the run are always checkpoints.

    Args:
        every_steps: After each multiple of this many steps.
        every_seconds: At the first boundary this many seconds after the last checkpoint was durable.
        epoch_ends: When an epoch's after-work (evaluation, scheduler) is done.
        continuous: As soon as the last checkpoint is durable, as far as saving costs the training no more than this
            part of its time (0.01 is one percent), by what earlier saves were measured to cost.
    """

    every_steps: int | None = None
    every_seconds: float | None = None
    epoch_ends: bool = True
    continuous: float | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise InvalidArgument(f"every_steps must be at least 1, got {self.every_steps}")
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise InvalidArgument(f"every_seconds must be above 0, got {self.every_seconds}")
        if self.continuous is not None and not 0 < self.continuous <= 1:
            raise InvalidArgument(f"continuous must be above 0 and at most 1, got {self.continuous}")

    def quiet_until(self, *, step: int, last: float) -> tuple[int, float]:
        """Return a step and a time: no boundary within an epoch is due that is after `step` and before both.

        Args:
            step: Steps done.
            last: When the last checkpoint was durable. A later one only makes it quiet for longer.
        """
        if self.continuous is not None:
            return 0, 0.0
        every = self.every_steps
        next_step = sys.maxsize if every is None else step + every - step % every
        return next_step, math.inf if self.every_seconds is None else last + self.every_seconds

    def due(
        self,
        *,
        step: int,
        phase: int,
        seconds_since_last: float,
        saving: bool = False,
        cost: Cost | None = None,
        now: float = 0.0,
    ) -> bool:
        """Tell whether the boundary (step, phase) is to be saved.

        Args:
            step: Steps done.
            phase: 0 in an epoch, 1 between epochs.
            seconds_since_last: Time since the last checkpoint was durable.
            saving: A save is under way. Then only what is due by step or at an epoch's end waits for it and follows.
            cost: What saves have cost so far, for `continuous`.
            now: The clock that `cost` is kept by.
        """
        if phase == 1 and self.epoch_ends:
            return True
        if phase == 0 and self.every_steps is not None and step % self.every_steps == 0:
            return True
        if saving:
            return False
        if self.every_seconds is not None and seconds_since_last >= self.every_seconds:
            return True
        return self.continuous is not None and cost is not None and cost.allows(self.continuous, now=now)


class Cost:
    """What saving costs the training: time that it stands still, and steps that are slower while a save is under way.

    Plain arithmetic over seconds that are passed in.

    Args:
        now: The clock's time at which the training begins.
    """

    def __init__(self, now: float) -> None:
        self._begun = now
        self._spent = 0.0
        self._last = 0.0
        self._usual: float | None = None

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return self._spent

    def begin(self) -> None:
        """A save begins: what is added from here on is its cost, the best guess at the next one's."""
        self._last = 0.0

    def stood(self, seconds: float) -> None:
        """Add time in which the training stood still for a save."""
        self._add(seconds)

    def step(self, seconds: float, *, saving: bool) -> None:
        """Take note of one step's time, standing still left out; what a save made it longer than usual is added."""
        if not saving:
            self._usual = seconds if self._usual is None else self._usual + (seconds - self._usual) / 8
        elif self._usual is not None:
            self._add(seconds - self._usual)

    def _add(self, seconds: float) -> None:
        # Also below zero: steps vary, and only the sum says something.
        self._spent += seconds
        self._last += seconds

    def allows(self, part: float, *, now: float) -> bool:
        """Tell whether one more save like the last keeps the cost within this part of the time."""
        return max(self._spent, 0.0) + max(self._last, 0.0) <= part * (now - self._begun)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay. The newest, and pinned ones, always do.

    Steps are counted. The checkpoints of one step (after it, after its epoch's work, at the run's end) share their
    files, so that what damages one damages all: the newest of them stands for them.

    Args:
        last: This many newest steps; None keeps all.
        every: Also steps that are a multiple of this.
        best: Also the best by a logged number: (name, "min" or "max", how many, each of another step).
    """

    last: int | None = 3
    every: int | None = None
    best: tuple[str, Literal["min", "max"], int] | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise InvalidArgument(f"last must be at least 1, got {self.last}")
        if self.every is not None and self.every < 1:
            raise InvalidArgument(f"every must be at least 1, got {self.every}")
        if self.best is not None:
            name, direction, count = self.best
            if direction not in ("min", "max") or count < 1:
                raise InvalidArgument(f"best must be (name, 'min' or 'max', count >= 1), got {self.best!r}")
            if not name:
                raise InvalidArgument("best needs the name of a logged number")


def as_policy(checkpoint: Policy | int | None) -> Policy:
    """Return the policy that a user's `checkpoint=` argument stands for; None is a minute and epoch ends."""
    if checkpoint is None:
        return Policy(every_seconds=60.0)
    if isinstance(checkpoint, Policy):
        return checkpoint
    return Policy(every_steps=checkpoint)


_WALLTIME = re.compile(r"^(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?$")

# Left between the last boundary that may start and the scheduler's kill: one step, one save, one exit.
SLURM_MARGIN_S = 120.0


def parse_walltime(walltime: str | float) -> float:
    """Return seconds. Text is `H:MM`, `H:MM:SS` or `D-HH:MM:SS`, the way Slurm writes it."""
    if not isinstance(walltime, str):
        seconds = float(walltime)
    else:
        match = _WALLTIME.match(walltime)
        if match is None:
            raise InvalidArgument(f"walltime {walltime!r} is not H:MM, H:MM:SS, D-HH:MM:SS or seconds")
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    if not seconds > 0:
        raise InvalidArgument(f"walltime must be above 0, got {walltime!r}")
    return seconds


def walltime_deadline(
    walltime: str | float | None, *, now: float, environment: Mapping[str, str]
) -> float | None:
    """Return the wall clock time (seconds since 1970) at which to stop, or None.

    An explicit walltime counts from `now`. Without one, Slurm's `SLURM_JOB_END_TIME` less a margin is used.
    """
    if walltime is not None:
        return now + parse_walltime(walltime)
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - SLURM_MARGIN_S if end.isdigit() else None
