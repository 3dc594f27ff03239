"""The demo: two trainings, each run once in peace and once through five kill -9, and the verdict on every step.

    python examples/demo.py [--seed N] [--keep DIRECTORY]

Each interrupted training is started by one command, killed with SIGKILL at random instants (every other
time with the loader's workers), and started again by the same command until it is complete. Then `unbroken
diff` compares the journals of the two runs, step by step. About two and a half minutes on two cores.

Expect at the end:  same bits: 2 of 2
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from unbroken import _core
from unbroken.errors import UnbrokenError

HERE = Path(__file__).parent
KILLS = 5


@dataclass(frozen=True)
class Training:
    """One program of the demo."""

    title: str
    script: str
    arguments: tuple[str, ...] = ()


TRAININGS = (
    Training("Handwritten digits: a conv net, augmentation in 2 workers", "digits.py"),
    Training("A GPT on the Python language reference", "gpt.py", ("60",)),
)


class Terminal:
    """Words with colour on a terminal that wants it, plain ones everywhere else."""

    COLOURS = {"killed": "31", "resumed": "36", "exact": "1;32", "DIFFERS": "1;31", "": "2"}  # noqa: RUF012

    def __init__(self) -> None:
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.colour = wanted and sys.stdout.isatty()

    def title(self, text: str) -> None:
        print(f"\n\033[1m{text}\033[0m" if self.colour else f"\n{text}", flush=True)

    def say(self, what: str, text: str) -> None:
        code = self.COLOURS.get(what)
        label = f"{what:<9}"
        print(
            f"  \033[{code}m{label}\033[0m {text}" if self.colour and code else f"  {label} {text}",
            flush=True,
        )


def steps_recorded(run: Path) -> int:
    """Return the last step in the run's journal, 0 if there is none yet."""
    try:
        return max((entry["step"] for entry in _core.read_journal(run)), default=0)
    except UnbrokenError:
        return 0  # The directory is being made at this moment.


class Life:
    """One process of a training, its words collected while it runs."""

    def __init__(self, training: Training, run: Path) -> None:
        self.lines: list[str] = []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "UNBROKEN_JOURNAL": "full",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / training.script), str(run), *training.arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self, *, group: bool) -> None:
        """Kill the training process, alone or with all that it has started."""
        if group:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join(timeout=10)
        return code

    def said(self, words: str) -> str | None:
        """Return the first line with these words, as the run said it."""
        return next((line.removeprefix("unbroken: ") for line in list(self.lines) if words in line), None)


def report(life: Life, terminal: Terminal) -> None:
    if resumed := life.said("resumed "):
        _, _, where = resumed.partition(" at ")
        terminal.say("resumed", f"at {where.partition(' from checkpoint')[0]}")
    if verified := life.said("executed again"):
        terminal.say("verified", verified)


def interrupted(
    training: Training, run: Path, share_s: float, chance: random.Random, terminal: Terminal
) -> int:
    """Run the training through its kills to its end; return the last life's exit code."""
    for number in range(1, KILLS + 1):
        before = steps_recorded(run)
        life = Life(training, run)
        while life.running and steps_recorded(run) <= before and not life.said("resumed "):
            time.sleep(0.05)
        time.sleep(chance.uniform(0.3, 1.2) * share_s)
        if not life.running:
            return life.wait()
        group = number % 2 == 1
        life.kill(group=group)
        life.wait()
        report(life, terminal)
        whom = "training and workers" if group else "the training process"
        terminal.say("killed", f"{whom}, kill -9 number {number}, at step {steps_recorded(run)}")
    life = Life(training, run)
    code = life.wait()
    report(life, terminal)
    if code != 0:
        print("\n".join(life.lines[-20:]), file=sys.stderr)
    return code


def demonstrate(training: Training, home: Path, chance: random.Random, terminal: Terminal) -> bool:
    """Return whether the killed training has the bits of the one in peace."""
    terminal.title(training.title)
    name = Path(training.script).stem
    whole, broken = home / f"{name}-in-peace", home / f"{name}-killed"
    begun = time.monotonic()
    life = Life(training, whole)
    if life.wait() != 0:
        print("\n".join(life.lines[-20:]), file=sys.stderr)
        return False
    seconds = time.monotonic() - begun
    terminal.say("in peace", f"{steps_recorded(whole)} steps in {seconds:.0f} s")
    # A fair share of the way for each life, start-up aside, so that the last kill falls before the end.
    if interrupted(training, broken, max(seconds - 5, 2) / (KILLS + 1), chance, terminal) != 0:
        return False
    terminal.say("complete", f"{steps_recorded(broken)} steps")
    command = [sys.executable, "-m", "unbroken", "diff", str(whole), str(broken)]
    verdict = subprocess.run(command, capture_output=True, text=True, check=False)
    exact = verdict.returncode == 0
    words = (verdict.stdout + verdict.stderr).replace(f"{home}/", "").strip().splitlines()
    terminal.say("exact" if exact else "DIFFERS", words[0] if words else "no verdict")
    for line in words[1:]:
        terminal.say("", line)
    return exact


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Two trainings, killed five times each, compared step by step."
    )
    parser.add_argument("--seed", type=int, help="seed of the kill times; drawn and printed by default")
    parser.add_argument("--keep", type=Path, help="directory for the runs, kept afterwards")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    begun = time.monotonic()
    print(
        f"Each training runs once in peace, and once through {KILLS} kill -9 at random instants (seed {seed})."
    )
    home = options.keep or Path(tempfile.mkdtemp(prefix="unbroken-demo-"))
    home.mkdir(parents=True, exist_ok=True)
    try:
        chance, terminal = random.Random(seed), Terminal()
        verdicts = [demonstrate(training, home, chance, terminal) for training in TRAININGS]
    finally:
        if options.keep is None:
            shutil.rmtree(home, ignore_errors=True)
    print(f"\nsame bits: {sum(verdicts)} of {len(verdicts)}, in {time.monotonic() - begun:.0f} s")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
