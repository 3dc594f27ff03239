"""What differs between stop and resume is named before the first step, and nothing is changed. Case O15, and bad input.

After every refusal the command as it was goes on exactly: nothing was lost by trying.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import KILLED, Story, assert_exact, command

Begin = Callable[..., Story]

REFUSED = 1
NOBODY = 65534


def files_of(run: Path) -> dict[str, bytes]:
    """Return every file's content, but for the lock's, which names the process that had it last."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# What a kill leaves of a save that is under way is swept by the next life, refused or not: here there is to be none.
WAITS = ("--save", "sync")


def assert_refused(told: Story, *flags: str, names: tuple[str, ...]) -> None:
    """The life ends before its first step, says the names, and leaves what there was as it was."""
    before, lines = files_of(told.run), told.steps_written()
    life = told.live(*flags, code=REFUSED)
    for name in names:
        assert name in life.words, f"{name!r} is not in {life.words}"
    assert told.steps_written() == lines
    after = files_of(told.run)
    # A life that was refused when its loader was opened has begun a journal segment of its own.
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("journal/") for name in after.keys() - before.keys())


# O15: the data, the schedule or a hyper-parameter is another.

CHANGES = {
    "more items": (("--items", "400"), ("200", "400")),
    "fewer items": (("--items", "120"), ("200", "120")),
    "twice as long a schedule": (("--total", "300"), ("scheduler", "140", "290")),
    "twice as many epochs": (("--epochs", "6"), ("epochs", "3", "6")),
    "another weight decay": (("--weight-decay", "0.2"), ("optimizer", "weight_decay", "0.1", "0.2")),
    "another seed": (("--seed", "6"), ("seed", "5", "6")),
    "another shape": (("--hidden", "32"), ("model.first", "float32[24, 10]", "float32[32, 10]")),
    "another dtype": (("--double",), ("model.first", "float32", "float64")),
    "a renamed layer": (("--rename",), ("model.first", "model.entry")),
    "a scaler that was not there": (("--scaler",), ("scaler",)),
}


@pytest.mark.parametrize("data", [(), ("--data", "keyed")], ids=["native", "keyed"])
def test_each_change_is_refused_by_name_and_changes_nothing(
    story: Begin, reference: Begin, data: tuple[str, ...]
) -> None:
    told = story(*data, *WAITS).killed_at("73:body")
    for flags, names in CHANGES.values():
        assert_refused(told, *flags, names=names)
    told.live()
    assert_exact(told, reference(*data))


def test_other_items_are_refused_by_their_fingerprint(story: Begin, reference: Begin) -> None:
    told = story("--fingerprint", *WAITS).killed_at("73:body")
    assert_refused(told, "--swap", names=("data.fingerprint",))
    told.live()
    assert_exact(told, reference())


def test_another_number_of_workers_is_refused_in_native_mode(story: Begin, reference: Begin) -> None:
    told = story("--workers", "2", *WAITS).killed_at("73:body")
    assert_refused(told, "--workers", "1", names=("workers", "2", "1"))
    told.live()
    assert_exact(told, reference("--workers", "2"))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--weight-decay", "0.2"), "weight_decay"),
        (("--total", "300"), "scheduler"),
        (("--epochs", "4"), "plan.epochs"),
        (("--swap",), "data.fingerprint"),
    ],
)
def test_an_override_goes_on_and_is_written_to_the_journal(
    story: Begin, flags: tuple[str, ...], name: str
) -> None:
    told = story("--fingerprint", *WAITS).killed_at("73:after")
    told.live(*flags, UNBROKEN_ALLOW="*")
    steps = 200 if "--epochs" in flags else 150
    assert told.steps_written()[-1] == steps
    log = command("log", told.run).stdout
    assert "override" in log
    assert name in log


def test_without_a_fingerprint_the_run_says_that_the_content_was_not_compared(story: Begin) -> None:
    told = story(*WAITS).killed_at("73:body")
    life = told.live("--swap", "--kill", "74:before", code=KILLED)
    assert "not compared" in life.words


# One writer.


def test_a_second_process_is_refused_until_the_first_is_gone(story: Begin, reference: Begin) -> None:
    told = story()
    holder = told.start("--pause-ms", "500")  # It outlives the second process, however slow that is.
    while not told.steps_written():
        assert holder.poll() is None, holder.words
        time.sleep(0.01)
    refused = told.live(code=REFUSED)
    assert str(told.run) in refused.words
    assert str(holder.pid) in refused.words
    holder.signal(signal.SIGKILL)
    assert holder.wait() == KILLED
    told.live()
    assert_exact(told, reference())


# Directories that cannot be used.


def test_an_unknown_format_version_is_refused(story: Begin, reference: Begin) -> None:
    told = story(*WAITS).killed_at("20:body")
    identity = told.run / "run.toml"
    kept = identity.read_text()
    line = next(line for line in kept.splitlines() if line.startswith("format"))
    identity.write_text(kept.replace(line, f"{line.split('=')[0]}= 999"))
    assert_refused(told, names=("run.toml", "999"))
    identity.write_text(kept)
    told.live()
    assert_exact(told, reference())


def test_a_path_that_is_a_file_is_refused(story: Begin) -> None:
    told = story()
    told.run.write_text("not a run")
    life = told.live(code=REFUSED)
    assert str(told.run) in life.words
    assert told.run.read_text() == "not a run"


def test_a_path_below_a_file_is_refused(story: Begin) -> None:
    told = story()
    told.run.write_text("not a directory")
    told.run = told.run / "run"
    life = told.live(code=REFUSED)
    assert str(told.run) in life.words


def test_a_directory_of_something_else_is_refused(story: Begin) -> None:
    told = story()
    told.run.mkdir()
    (told.run / "thesis.tex").write_text("years of work")
    assert_refused(told, names=(str(told.run),))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can reach; pytest's own is for its owner alone."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def test_a_read_only_directory_is_refused(story: Begin, reference: Begin, open_directory: Path) -> None:
    # Permissions do not bind root, so that a life of root's becomes nobody first.
    told = story(*WAITS).killed_at("20:body")
    shutil.copytree(told.run, open_directory / "run")
    shutil.copy(told.trace, open_directory / "trace")
    told.run, told.trace = open_directory / "run", open_directory / "trace"
    told.trace.chmod(0o666)
    modes = {path: path.stat().st_mode for path in [told.run, *told.run.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files_of(told.run)
    limits = {"user": NOBODY} if os.geteuid() == 0 else {}
    life = told.live(code=REFUSED, limits=limits)
    assert str(told.run) in life.words
    assert files_of(told.run) == before
    for path, mode in modes.items():
        path.chmod(mode)
    told.live()
    assert_exact(told, reference())


def test_a_disk_that_is_full_loses_nothing(story: Begin, reference: Begin) -> None:
    # A wide net, so that a pack is above the limit that its life has for files, and everything else is below.
    wide = ("--hidden", "4000", "--epochs", "1")
    told = story(*wide, *WAITS).killed_at("20:body")
    before = files_of(told.run)
    life = told.live(code=REFUSED, limits={"file_size_limit": 100_000})
    assert str(told.run) in life.words
    assert "File too large" in life.words or "space" in life.words
    after = files_of(told.run)
    assert {name: after.get(name) for name in before if name.startswith("checkpoints")} == {
        name: content for name, content in before.items() if name.startswith("checkpoints")
    }
    told.live()
    assert_exact(told, reference(*wide))
