"""O10: the disk gets full for real in the middle of a training, and has room again."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import TABLES, Life, Story, assert_exact, assert_journal_whole, command
from small_disk import LARGE_BYTES, LIMIT_BYTES, SmallDisk, limited, small_disk
from tables import STEPS
from unbroken import _core

Begin = Callable[..., Story]

STOPPED = 1


@pytest.fixture
def disk(tmp_path: Path, record_property: Callable[[str, object], None]) -> Iterator[SmallDisk]:
    with small_disk(tmp_path) as made:
        print(made.how)
        record_property("full disk", made.how)
        yield made


def wait_for(life: Life, what: str, *, told: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not told():
        assert life.poll() is None, f"ended before {what}:\n{life.words}"
        assert time.monotonic() < deadline, f"no {what}:\n{life.words}"
        time.sleep(0.005)


def until_step(story: Story, step: int) -> Callable[[], bool]:
    return lambda: step in story.steps_written()


def begin_on(story: Begin, disk: SmallDisk, *flags: str) -> tuple[Story, Life]:
    """Start a run on the small disk and fill it once two checkpoints after step 0 are there: the third cannot be."""
    told = story("--checkpoint", "10", "--keep", "50", "--pause-ms", "8", *disk.flags, *flags)
    told.run = disk.directory / "run"
    life = told.start()
    wait_for(life, "a checkpoint of step 20", told=lambda: any(told.run.glob("checkpoints/*20-0*")))
    disk.fill(life.pid)
    return told, life


def whole_steps(told: Story) -> list[int]:
    answer = json.loads(command("verify", "--json", told.run).stdout)
    assert answer["whole"] is True, answer
    return sorted({int(name.split("-")[0]) for name in answer["checkpoints"]})


def test_a_full_disk_stops_the_run_by_default_and_loses_nothing(
    story: Begin, reference: Begin, disk: SmallDisk
) -> None:
    told, life = begin_on(story, disk)
    assert life.wait() == STOPPED
    assert str(told.run) in life.words
    assert "No space left" in life.words or "File too large" in life.words
    assert "a checkpoint takes up to" in life.words
    steps = whole_steps(told)
    assert steps[:3] == [0, 10, 20]
    disk.empty(life.pid)
    told.live()
    assert_exact(told, reference(*disk.flags))
    assert_journal_whole(told)


def test_a_full_disk_is_waited_out(story: Begin, reference: Begin, disk: SmallDisk) -> None:
    told, life = begin_on(story, disk, "--on-full", "wait")
    wait_for(life, "waiting", told=lambda: "waits for room" in life.words)
    steps = told.steps_written()
    time.sleep(1)
    assert told.steps_written() == steps, "it went on"
    assert whole_steps(told)[:3] == [0, 10, 20]
    disk.empty(life.pid)
    assert life.wait() == 0, life.words
    assert "there is room on the disk again" in life.words
    assert whole_steps(told) == [*range(0, 151, 10)]
    assert_exact(told, reference(*disk.flags))
    assert_journal_whole(told)


def test_a_full_disk_is_gone_past_and_the_next_save_works(
    story: Begin, reference: Begin, disk: SmallDisk
) -> None:
    told, life = begin_on(story, disk, "--on-full", "continue")
    wait_for(life, "step 60", told=until_step(told, 60))
    full = whole_steps(told)
    assert full[:3] == [0, 10, 20]
    assert 50 not in full
    assert "training goes on" in life.words
    disk.empty(life.pid)
    assert life.wait() == 0, life.words
    assert {0, 10, 20, 100, 150} <= set(whole_steps(told))
    assert_exact(told, reference(*disk.flags))
    assert_journal_whole(told)


def test_a_signal_ends_the_wait_for_room(story: Begin, reference: Begin, disk: SmallDisk) -> None:
    told, life = begin_on(story, disk, "--on-full", "wait")
    wait_for(life, "waiting", told=lambda: "waits for room" in life.words)
    life.signal(signal.SIGTERM, group=False)
    assert life.wait() == STOPPED
    assert whole_steps(told)[:3] == [0, 10, 20]
    disk.empty(life.pid)
    told.live()
    assert_exact(told, reference(*disk.flags))


def test_a_save_that_cannot_fit_says_what_it_needs_and_what_there_is(story: Begin, disk: SmallDisk) -> None:
    # A state larger than the disk, or than the limit: refused at step 0, before a byte of it is in place.
    told = story("--hidden", "100000", "--epochs", "1")
    told.run = disk.directory / "run"
    life = told.live(code=STOPPED, limits={"file_size_limit": LIMIT_BYTES} if disk.limits else None)
    assert disk.limits or "that may not do" in life.words
    error = next(line for line in life.words.splitlines() if "StorageError" in line)
    assert str(told.run) in error
    assert "bytes needed" in error
    assert "bytes free" in error
    assert list((told.run / "objects").iterdir()) == []


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_disk_gets_full_while_an_embedding_table_is_saved_by_chunks(
    story: Begin,
    reference: Begin,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    kind: str,
) -> None:
    # A disk that has no room is seen before a chunk is written; a limit is met in the middle of it.
    with contextlib.ExitStack() as stack:
        disk = (
            limited(tmp_path) if kind == "limit" else stack.enter_context(small_disk(tmp_path, LARGE_BYTES))
        )
        record_property("full disk", disk.how)
        told = story("--on-full", "continue", "--pause-ms", "100", script=TABLES)
        told.run = disk.directory / "run"
        life = told.start()
        wait_for(life, "a checkpoint of step 6", told=lambda: any(told.run.glob("checkpoints/*6-0*")))
        disk.fill(life.pid)
        last = told.steps_written()[-1]
        wait_for(life, "steps without room", told=until_step(told, last + 5))
        full = whole_steps(told)
        assert full[:4] == [0, 2, 4, 6]
        assert full[-1] <= last
        assert "training goes on" in life.words
        # On a full disk the journal may be the first to have no room.
        assert kind == "disk" or "bytes needed" in life.words
        disk.empty(life.pid)
        assert life.wait() == 0, life.words
        later = [step for step in whole_steps(told) if step > last + 5]
        assert later[-1] == STEPS
        assert_exact(told, reference(script=TABLES))
        assert_journal_whole(told, STEPS)
        infos = [_core.read_checkpoint(path).info for path in told.run.glob("checkpoints/*")]
        shares = [
            info.new_bytes / info.size_bytes for info in infos if info.step in later and info.phase == 0
        ]
        # Now and then packs that are hardly used are given up, and the rest of them written again.
        assert sorted(shares)[len(shares) // 2] < 1 / 3, shares
