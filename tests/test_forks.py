"""Forked lives are lives: they train, die and are killed as fresh ones do, and draw as fresh ones would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from false_alarms import SCRIPT, count_alarms

from unbroken import _core, forks


@pytest.fixture(scope="module")
def command() -> object:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("UNBROKEN_")}
    with forks.serving(environment) as command:
        yield command


def test_a_forked_life_trains_to_the_same_bits_as_a_fresh_one(command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for name, start in (("forked", command), ("fresh", [sys.executable])):
        (tmp_path / name).mkdir()
        variables = {**os.environ, "UNBROKEN_JOURNAL": "full"}
        subprocess.run([*start, str(script)], cwd=tmp_path / name, check=True, env=variables)
    assert _core.main(["explain", str(tmp_path / "fresh" / "run"), str(tmp_path / "forked" / "run")]) == 0


def test_a_forked_life_ends_as_its_program_does(command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "end.py"
    for text, code in (
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("raise ValueError('no')", 1),
        ("print(__name__, __file__.rpartition('/')[2], __import__('sys').argv[1:])", 0),
    ):
        script.write_text(text)
        done = subprocess.run(
            [*command, script, "a"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
    assert done.stdout == "__main__ end.py ['a']\n"


def test_killing_what_stands_for_a_life_kills_the_life(command: list[str], tmp_path: Path) -> None:
    script, beats = tmp_path / "beat.py", tmp_path / "beats"
    script.write_text("import time\nwhile True:\n    open('beats', 'a').write('.')\n    time.sleep(0.01)\n")
    life = subprocess.Popen([*command, str(script)], cwd=tmp_path)
    while not beats.exists():
        time.sleep(0.01)
    life.kill()
    life.wait()
    time.sleep(0.3)
    size = beats.stat().st_size
    time.sleep(0.2)
    assert beats.stat().st_size == size


def test_what_is_random_in_a_fresh_process_is_random_in_forked_ones(
    command: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import random, numpy, torch\nprint(random.random(), numpy.random.random(), hash('text'))"
    )
    outputs = [subprocess.check_output([*command, script], text=True).split() for _ in range(4)]
    assert len({draws[0] for draws in outputs}) == 4
    assert len({draws[1] for draws in outputs}) == 4
    assert len({draws[2] for draws in outputs}) == forks.SERVERS


def test_clean_kills_raise_no_alarm() -> None:
    total = count_alarms(8, seed=1)
    assert (total.alarms, total.kills) == ([], 8)
