"""When to save, what to keep, when time is up: decisions as plain data.

Touches: nothing but the process environment, in `walltime_deadline`, for Slurm's end time. Clocks are passed in.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections import deque
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
        continuous: Some steps after the last checkpoint is durable, as far as saving costs the training no more than
            this part of its time (0.01 is one percent), by what earlier saves were measured to cost: see `Cost`.
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
    ) -> bool:
        """Tell whether the boundary (step, phase) is to be saved.

        Args:
            step: Steps done.
            phase: 0 in an epoch, 1 between epochs.
            seconds_since_last: Time since the last checkpoint was durable.
            saving: A save is under way. Then only what is due by step or at an epoch's end waits for it and follows.
            cost: What saves have cost so far, for `continuous`.
        """
        if phase == 1 and self.epoch_ends:
            return True
        if phase == 0 and self.every_steps is not None and step % self.every_steps == 0:
            return True
        if saving:
            return False
        if self.every_seconds is not None and seconds_since_last >= self.every_seconds:
            return True
        return self.continuous is not None and cost is not None and cost.allows


_FIRST_STEPS = 3
"""Nothing is learnt from as many steps of a life: caches, allocators and compilers are warmed up in them."""

_RECENT = 16
_SIMILAR = 4
_FAR = 2.0
"""A step that takes more than this many times as long as steps of its kind lately counts as one that takes as many."""

_REST_LEAST = 2
_REST_SHARE = 8
"""A save is compared with one step before and after it for this many of its own, and with two at least."""

_STRAY = 8
"""Out of so many steps, by lot, in which the next save may begin."""

_LOOKS_BACK_S = 600.0
"""What earlier saves left of their part is not owed to later ones for longer than this."""


@dataclass
class _Steps:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


class Cost:
    """What saving costs the training, and when the time for the next save has come.

    That is the time in which the training stands still, and what steps take longer while a save is under way. Each
    save is paid for by the time after it: the next one waits until all so far took no more than their part.

    How long a step takes by itself changes during a training, and is known from steps without a save only. So a save
    is compared with the steps right before and right after it, no step with two saves, and there is no next one without
    them: at least two on each side, and an eighth of the steps that it takes. When the next one begins must not depend
    on the steps that it is compared with, nor on where in a period (of gradients added up, of evaluations) the training
    is: a comparison that came out too cheap would bring about more of the same. Hence some more steps, by lot.

    Plain arithmetic over seconds that are passed in.

    Args:
        part: Of the time, that saving may take.
        now: The clock's time at which the first step begins.
        draw: Draws how many more steps; a generator that nothing else draws from.
    """

    def __init__(self, part: float, *, now: float, draw: random.Random) -> None:
        self._part = part
        self._draw = draw
        self._spent = 0.0
        self._paid_until = now
        self._first_steps = _FIRST_STEPS
        self._plain_lately: deque[float] = deque(maxlen=_RECENT)
        self._slow_lately: deque[float] = deque(maxlen=_RECENT)
        # Steps before a save, in its course and after it.
        self._before: deque[float] = deque(maxlen=_RECENT)
        self._during, self._after = _Steps(), _Steps()
        self._rest = 2 * _REST_LEAST
        self._stray = self._drawn()

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return self._spent

    @property
    def allows(self) -> bool:
        """Whether the next save may begin."""
        return self._stray == 0

    def begin(self) -> None:
        """A save begins, of whatever reason. To be called before `stood` tells of it."""
        self._stray = self._drawn()

    def stood(self, seconds: float, *, now: float) -> None:
        """Add time in which the training stood still for a save."""
        self._spend(seconds, now)

    def step(self, seconds: float, *, saving: bool, now: float) -> None:
        """Take note of one step's time, standing still left out, and of whether a save was under way in it."""
        if self._first_steps:
            self._first_steps -= 1
        elif saving:
            if not self._slow_lately:
                # Until more is known, steps with a save are taken to be like others.
                self._slow_lately.extend(list(self._plain_lately)[-_SIMILAR:])
            self._during.add(_cut(seconds, self._slow_lately))
        elif self._during.count:
            self._after.add(_cut(seconds, self._plain_lately))
            if self._after.count >= self._side():
                self._compare(now)
        else:
            self._before.append(_cut(seconds, self._plain_lately))
            if self._stray and len(self._before) >= self._rest and self._paid_until <= now:
                self._stray -= 1

    def _side(self) -> int:
        return max(_REST_LEAST, self._during.count // _REST_SHARE)

    def _compare(self, now: float) -> None:
        """Add what the steps of a save took longer than those on both sides of it."""
        during, usual = self._during, self._after.seconds / self._after.count
        if self._before:
            # The means' mean: steps that become longer all the time are neither a cost nor a gain.
            usual = (usual + sum(self._before) / len(self._before)) / 2
        # Also below zero: steps vary, and only the sum over many saves says something.
        self._spend(during.seconds - during.count * usual, now)
        self._rest = min(self._side(), _RECENT)
        self._before.clear()
        self._during, self._after = _Steps(), _Steps()

    def _drawn(self) -> int:
        return 1 + self._draw.randrange(_STRAY)

    def _spend(self, seconds: float, now: float) -> None:
        self._spent += seconds
        self._paid_until = max(self._paid_until, now - _LOOKS_BACK_S) + seconds / self._part


def _cut(seconds: float, lately: deque[float]) -> float:
    """Note a step among those of its kind; return its time, or what it has in common with them.

    An evaluation within a step, a slow disk under the data: rare and long, they belong to no save, wherever they fall.
    """
    lately.append(seconds)
    return min(seconds, _FAR * sorted(lately)[len(lately) // 2])


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
