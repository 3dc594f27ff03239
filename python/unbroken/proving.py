"""What `unbroken prove` asks of a run that it starts: where to write, where to die, where to stop, what to save.

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
"""A point, and after a colon milliseconds to wait: the process kills itself, as hard as anything else could."""
STOP_AT: Final = "UNBROKEN_STOP_AT"
"""A point: the process asks itself to stop, as a scheduler would."""
STEPS: Final = "UNBROKEN_PROVE_STEPS"
"""The run stops after this step as on a signal."""
SAVE: Final = "UNBROKEN_PROVE_SAVE"
"""Boundaries to save whatever the policy says, comma between: STEP-PHASE, or `restored` for what a resume put back."""
JOURNAL: Final = "UNBROKEN_PROVE_JOURNAL"
"""`own` leaves the journal's level to the program: a replay is compared with what the program recorded."""
SEED: Final = "UNBROKEN_PROVE_SEED"
"""Seed of runs that name none, so that several runs of one program can be compared."""


@dataclass(frozen=True)
class Instructions:
    """The variables, parsed."""

    directory: Path | None = None
    crash_at: str = ""
    crash_delay_s: float = 0.0
    stop_at: str = ""
    steps: int | None = None
    save: frozenset[str] = frozenset()
    seed: int | None = None
    own_journal: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Instructions:
        """Return what the environment asks for.

        Points: `step:K` after step K is recorded, `saved:K` after its checkpoint is durable, `saving:K` while it is
        written, `work:E` when epoch E's loop is over, `epoch:E` when its after-work is.
        """
        crash, delay = environment.get(CRASH_AT, ""), 0.0
        parts = crash.split(":")
        if len(parts) == 3:
            crash, delay = ":".join(parts[:2]), float(parts[2]) / 1000
        steps, seed = environment.get(STEPS, ""), environment.get(SEED, "")
        directory = environment.get(DIRECTORY, "")
        return cls(
            directory=Path(directory) if directory else None,
            crash_at=crash,
            crash_delay_s=delay,
            stop_at=environment.get(STOP_AT, ""),
            steps=int(steps) if steps else None,
            save=frozenset(filter(None, environment.get(SAVE, "").split(","))),
            seed=int(seed) if seed else None,
            own_journal=environment.get(JOURNAL, "") == "own",
        )

    def place(self, path: Path) -> Path:
        """Return where a run that the program wants at `path` goes."""
        return path if self.directory is None else self.directory / path.name

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


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)
