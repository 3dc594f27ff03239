"""When to save, what to keep, when time is up: decisions as plain data.

Touches: nothing but the process environment, in `walltime_deadline`, for Slurm's end time. Clocks are passed in.
"""

from __future__ import annotations

import re
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
    """

    every_steps: int | None = None
    every_seconds: float | None = None
    epoch_ends: bool = True

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise InvalidArgument(f"every_steps must be at least 1, got {self.every_steps}")
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise InvalidArgument(f"every_seconds must be above 0, got {self.every_seconds}")

    def due(self, *, step: int, phase: int, seconds_since_last: float) -> bool:
        """Tell whether the boundary (step, phase) is to be saved, `seconds_since_last` after the last commit."""
        if phase == 1 and self.epoch_ends:
            return True
        if phase == 0 and self.every_steps is not None and step % self.every_steps == 0:
            return True
        return self.every_seconds is not None and seconds_since_last >= self.every_seconds


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay. The newest, and pinned ones, always do.

    Args:
        last: This many newest ones; None keeps all.
        every: Also those whose step is a multiple of this.
        best: Also the best by a logged number: (name, "min" or "max", how many).
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
