"""O8 and O14: kill -9 while a checkpoint is written, and while older ones are deleted, at random moments.

Each life saves after every step and keeps two checkpoints, so that a kill falls into a write, a sync, a rename or a
deletion; the training stands still meanwhile, or goes on. Steps that are executed again are held to the journal.
`UNBROKEN_KILLS=200 UNBROKEN_STATE_MB=200 python -m pytest -s -k save_kills tests/stories` is acceptance case O8 in
full; `UNBROKEN_SEED` picks other moments, and `--basetemp` another file system.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import HERE, environment

KILLS = int(os.environ.get("UNBROKEN_KILLS", "12"))
STATE_BYTES = int(float(os.environ.get("UNBROKEN_STATE_MB", "20")) * 1e6)
# After a save begins; its time grows with the state.
WINDOW_S = 0.3 if STATE_BYTES >= 10**8 else 0.12


class Saver:
    """One life of saver.py."""

    def __init__(self, run: Path, said: Path, steps: int, mode: str) -> None:
        self.said = said
        with said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "saver.py"), str(run), str(STATE_BYTES), str(steps), mode],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
            )

    @property
    def words(self) -> str:
        return self.said.read_text()

    def number_of(self, what: str) -> int | None:
        """The last step that was said to be so."""
        found = re.findall(rf"^{what} (\d+)\n", self.words, re.MULTILINE)  # A line that is whole.
        return int(found[-1]) if found else None

    def wait_for_a_save(self) -> None:
        deadline = time.monotonic() + 120
        while self.number_of("saving") is None:
            assert self.process.poll() is None, self.words
            assert time.monotonic() < deadline, self.words
            time.sleep(0.002)


@pytest.mark.parametrize("mode", ["sync", "background"])
def test_save_kills_at_random_moments_cost_at_most_the_save_that_was_under_way(
    tmp_path: Path, mode: str
) -> None:
    seed = int(os.environ.get("UNBROKEN_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"seed {seed}: {KILLS} kills, state of {STATE_BYTES / 1e6:.0f} MB")
    moments = random.Random(seed)
    run, acknowledged, began = tmp_path / "run", -1, -1
    permissions = 0o750
    run.mkdir(mode=permissions)
    run.chmod(permissions)
    in_save = 0
    for kill in range(KILLS):
        life = Saver(run, tmp_path / f"{kill}.out", steps=1000, mode=mode)
        life.wait_for_a_save()
        time.sleep(moments.uniform(0, WINDOW_S))
        life.process.send_signal(signal.SIGKILL)
        assert life.process.wait() == -signal.SIGKILL, f"seed {seed}, kill {kill}: {life.words}"
        resumed = life.number_of("resumed")
        story = f"seed {seed}, kill {kill}: {life.words}"
        if acknowledged >= 0:
            # What was acknowledged is there; what was begun may be, if it came to be before the kill.
            assert resumed is not None, story
            assert acknowledged <= resumed <= began, story
            assert began - resumed <= 1, story
        saved, began_now = life.number_of("saved"), life.number_of("saving")
        assert began_now is not None, story
        in_save += began_now != saved
        acknowledged = max(acknowledged, -1 if resumed is None else resumed, -1 if saved is None else saved)
        began = began_now
    last = Saver(run, tmp_path / "last.out", steps=2, mode=mode)
    assert last.process.wait() == 0, f"seed {seed}: {last.words}"
    assert list((run / "tmp").iterdir()) == []
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert len(list((run / "objects").iterdir())) == 2
    assert run.stat().st_mode & 0o777 == permissions
    print(
        f"{KILLS} of {KILLS} restarts; {in_save} kills fell into a save, the others into a deletion or between"
    )
    assert in_save > 0, "no kill fell into a save"
