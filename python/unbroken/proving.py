"""What `unbroken prove` and its kin ask of a run that they start: where to write, die and stop, what to save or trace.

Touches: the process environment, read once; signals to this very process at the points that were asked for. Without
the variables nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DIRECTORY: Final = "UNBROKEN_PROVE_DIR"
"""Run directories are made in here, by the last part of their path, whatever the program says."""
CRASH_AT: Final = "UNBROKEN_CRASH_AT"
"""POINT[:MS][@RUN]: at this point of this run (of any, without) the process kills itself, as hard as anything could."""
STOP_AT: Final = "UNBROKEN_STOP_AT"
"""POINT[@RUN]: the process asks itself to stop, as a scheduler would."""
STEPS: Final = "UNBROKEN_PROVE_STEPS"
"""The run stops after this step as on a signal."""
SECONDS: Final = "UNBROKEN_PROVE_SECONDS"
"""The run stops as on a signal after this much training, a little behind the end of an epoch if one comes soon."""
SAVE: Final = "UNBROKEN_PROVE_SAVE"
"""Boundaries to save whatever the policy says, comma between: STEP-PHASE, or `restored` for what a resume put back."""
JOURNAL: Final = "UNBROKEN_PROVE_JOURNAL"
"""`own` leaves the journal's level to the program: a replay is compared with what the program recorded."""
TRACE: Final = "UNBROKEN_TRACE"
"""STEP:FILE: what the operators of this step compute is written to the file."""
SEED: Final = "UNBROKEN_PROVE_SEED"
"""Seed of runs that name none, so that several runs of one program can be compared."""

_STEPS_BEHIND_EPOCH = 4
_PATIENCE = 6


@dataclass(frozen=True)
class Instructions:
    """The variables, parsed."""

    directory: Path | None = None
    crash_at: str = ""
    crash_delay_s: float = 0.0
    stop_at: str = ""
    steps: int | None = None
    seconds: float | None = None
    save: frozenset[str] = frozenset()
    seed: int | None = None
    own_journal: bool = False
    trace_step: int | None = None
    trace_file: Path = Path()

    @classmethod
    def read(cls, environment: Mapping[str, str], run: str = "") -> Instructions:
        """Return what the environment asks of a run, by the last part of its path.

        Points: `step:K` after step K is recorded, `saved:K` after its checkpoint is durable, `saving:K` while it is
        written, `work:E` when epoch E's loop is over, `epoch:E` when its after-work is.
        """
        crash, delay = _point(environment.get(CRASH_AT, ""), run), 0.0
        parts = crash.split(":")
        if len(parts) == 3:
            crash, delay = ":".join(parts[:2]), float(parts[2]) / 1000
        steps, seed = environment.get(STEPS, ""), environment.get(SEED, "")
        seconds = environment.get(SECONDS, "")
        directory = environment.get(DIRECTORY, "")
        traced, _, trace_file = environment.get(TRACE, "").partition(":")
        return cls(
            directory=Path(directory) if directory else None,
            crash_at=crash,
            crash_delay_s=delay,
            stop_at=_point(environment.get(STOP_AT, ""), run),
            steps=int(steps) if steps else None,
            seconds=float(seconds) if seconds else None,
            save=frozenset(filter(None, environment.get(SAVE, "").split(","))),
            seed=int(seed) if seed else None,
            own_journal=environment.get(JOURNAL, "") == "own",
            trace_step=int(traced) if traced else None,
            trace_file=Path(trace_file),
        )

    def place(self, path: Path) -> Path:
        """Return where a run that the program wants at `path` goes."""
        return path if self.directory is None else self.directory / path.name

    def is_last(self, step: int, *, epoch: int, position: int, elapsed_s: float) -> bool:
        """Tell whether this is the last step to prove.

        Args:
            step: Steps done.
            epoch: The epoch that it belongs to.
            position: Its place in the epoch.
            elapsed_s: Training since the life began.
        """
        if self.steps is not None and step >= self.steps:
            return True
        if self.seconds is None or elapsed_s < self.seconds:
            return False
        # What happens between two epochs is to be among what is proven, and a kill behind it too.
        return (epoch > 0 and position >= _STEPS_BEHIND_EPOCH) or elapsed_s >= _PATIENCE * self.seconds

    def awaits(self, point: str) -> bool:
        """Tell whether something is to happen at this point."""
        return point in (self.crash_at, self.stop_at)

    def reached(self, point: str) -> None:
        """Die or ask to stop, if that was asked for at this point."""
        if point == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if point != self.crash_at:
            return
        if self.crash_delay_s > 0:
            threading.Thread(target=_die_after, args=(self.crash_delay_s,), daemon=True).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def _point(text: str, run: str) -> str:
    point, _, meant = text.partition("@")
    return point if meant in ("", run) else ""


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)
