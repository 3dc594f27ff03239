"""Lives of a training as real processes: started, killed, started again, and judged by the trace they leave.

Touches: a temporary directory for each story; processes that it starts itself, and their process groups.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORKLOAD = HERE / "workload.py"
TABLES = HERE / "tables.py"
STEPS = 150

KILLED = -signal.SIGKILL


def environment(**more: str) -> dict[str, str]:
    """Return this process' environment with one thread and nothing that schedulers or earlier tests set."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("UNBROKEN_", "SLURM_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


class Nursery:
    """The client of nursery.py: lives that start in milliseconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery ended with exit code {self._process.wait()}")
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Life:
    """One process of a run."""

    pid: int
    poll: Callable[[], int | None]
    stdout: Path
    stderr: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = 120) -> int:
        """Return the exit code, negative for a signal, after the whole process group is gone."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"no end after {timeout_s} s; stderr:\n{self.stderr.read_text()}")
            time.sleep(0.01)
        # Workers end with their parent, but not at once.
        self.signal(signal.SIGKILL)
        return code

    def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal to the whole group (as a terminal and Slurm do), or to the training process alone."""
        try:
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    @property
    def words(self) -> str:
        return self.stderr.read_text() + self.stdout.read_text()


class Story:
    """One run in a directory of its own, over any number of lives, with the trace they all append to."""

    def __init__(
        self, nursery: Nursery, directory: Path, flags: Sequence[str] = (), script: Path = WORKLOAD
    ) -> None:
        self.nursery = nursery
        self.directory = directory
        self.flags = list(flags)
        self.script = script
        self.run = directory / "run"
        self.trace = directory / "trace"
        self.lives: list[Life] = []
        directory.mkdir(parents=True, exist_ok=True)

    def start(
        self, *flags: str, fresh: bool = False, limits: Mapping[str, int] | None = None, **variables: str
    ) -> Life:
        """Start a life.

        Args:
            flags: Arguments of the script besides the story's own.
            fresh: Start a new interpreter instead of a fork of the nursery.
            limits: `file_size_limit` in bytes, `user` to become; not with `fresh`.
            variables: Environment variables.
        """
        number = len(self.lives) + 1
        stdout, stderr = self.directory / f"{number}.out", self.directory / f"{number}.err"
        arguments = ["--run", str(self.run), "--trace", str(self.trace), *self.flags, *flags]
        if fresh:
            with stdout.open("w") as out, stderr.open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, str(self.script), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=environment(**variables),
                    start_new_session=True,
                )
            life = Life(process.pid, process.poll, stdout, stderr)
        else:
            stdout.touch()
            stderr.touch()
            pid = self.nursery.ask(
                do="start",
                script=str(self.script),
                arguments=arguments,
                environment=variables,
                stdout=str(stdout),
                stderr=str(stderr),
                **(limits or {}),
            )
            life = Life(pid, lambda: self.nursery.ask(do="poll", pid=pid), stdout, stderr)
        self.lives.append(life)
        return life

    def live(
        self,
        *flags: str,
        code: int = 0,
        fresh: bool = False,
        limits: Mapping[str, int] | None = None,
        **variables: str,
    ) -> Life:
        """Start a life and wait for the end that it should come to."""
        life = self.start(*flags, fresh=fresh, limits=limits, **variables)
        found = life.wait()
        assert found == code, f"exit code {found} instead of {code}:\n{life.words}"
        return life

    def killed_at(self, *points: str) -> "Story":
        """Go through one life for each kill point, WHEN:PLACE."""
        for point in points:
            self.live("--kill", point, code=KILLED)
        return self

    def lines(self) -> list[dict[str, Any]]:
        """Return the trace's whole lines, in the order in which they were written."""
        if not self.trace.exists():
            return []
        # A write in the middle of being made is seen in part, and a kill may leave it so.
        whole = [line for line in self.trace.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole]

    def steps_written(self) -> list[int]:
        return [line["step"] for line in self.lines() if "step" in line]


def key(line: dict[str, Any]) -> tuple[str, int]:
    name = next(name for name in ("step", "epoch_end", "final") if name in line)
    return name, line[name]


def joined(story: Story, *ignored: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the trace of all lives as one, in which what was executed twice came out the same both times."""
    result: dict[tuple[str, int], dict[str, Any]] = {}
    for line in story.lines():
        content = {name: value for name, value in line.items() if name not in ("pid", *ignored)}
        earlier = result.get(key(line))
        assert earlier is None or earlier == content, (
            f"{key(line)} executed again: {differing(earlier, content)}"
        )
        result[key(line)] = content
    return result


def differing(expected: dict[str, Any], found: dict[str, Any]) -> str:
    names = [name for name in expected if expected[name] != found.get(name)]
    return "; ".join(f"{name} was {expected[name]!r}, is {found.get(name)!r}" for name in names)


def assert_exact(story: Story, reference: Story) -> None:
    """Every step, every epoch's end and the final state are the reference's, none missing, none extra."""
    expected, found = joined(reference), joined(story)
    for place in sorted(expected.keys() | found.keys(), key=lambda p: (p[0] == "final", p)):
        assert place in found, f"{place} is missing"
        assert place in expected, f"{place} is not in the reference"
        assert expected[place] == found[place], f"{place}: {differing(expected[place], found[place])}"


def assert_journal_whole(story: Story, steps: int = STEPS) -> None:
    """The run's own journal has each step once."""
    from unbroken import _core

    boundaries = [entry for entry in _core.read_journal(story.run) if entry["phase"] == 0]
    assert [entry["step"] for entry in boundaries if entry["step"] > 0] == list(range(1, steps + 1))


def command(*arguments: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the `unbroken` program."""
    done = subprocess.run(
        [sys.executable, "-m", "unbroken", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done
