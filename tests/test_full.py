"""A full disk: when the training stops, waits or goes on."""

import errno
from pathlib import Path

import pytest

from unbroken.errors import InvalidArgument, StorageError
from unbroken.full import FullDisk, OnFull, estimate, is_full


def error(number: int) -> StorageError:
    return StorageError("cannot write", doing="write", path=Path("run"), errno=number)


class Disk:
    """Has no room for some attempts."""

    def __init__(self, failures: int, number: int = errno.ENOSPC) -> None:
        self.failures = failures
        self.number = number
        self.said: list[str] = []
        self.slept = 0.0
        self.stopping = False

    def write(self) -> None:
        if self.failures:
            self.failures -= 1
            raise error(self.number)

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def under(self, policy: OnFull) -> FullDisk:
        return FullDisk(policy, say=self.said.append, stopping=lambda: self.stopping, sleep=self.sleep)


def test_only_errors_of_room_are_of_a_full_disk() -> None:
    assert all(is_full(error(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert not is_full(error(errno.EIO))
    assert not is_full(OSError(errno.ENOSPC, "no room"))


@pytest.mark.parametrize("policy", ["wait", "continue", "stop"])
def test_other_errors_are_raised_under_every_policy(policy: OnFull) -> None:
    disk = Disk(1, errno.EIO)
    with pytest.raises(StorageError):
        disk.under(policy).attempt(disk.write)


def test_stop_raises_at_once() -> None:
    disk = Disk(1)
    with pytest.raises(StorageError):
        disk.under("stop").attempt(disk.write)
    assert disk.said == []


def test_wait_tries_until_there_is_room_and_says_so_once() -> None:
    disk = Disk(7)
    assert disk.under("wait").attempt(disk.write)
    assert len(disk.said) == 2
    # 0.5, 1, 2, 4, 8, 10 and 10 seconds.
    assert disk.slept == 35.5


def test_wait_ends_when_a_stop_is_asked_for() -> None:
    disk = Disk(100)
    disk.stopping = True
    with pytest.raises(StorageError):
        disk.under("wait").attempt(disk.write)
    assert disk.slept == 0


def test_continue_goes_on_until_what_is_required() -> None:
    disk = Disk(3)
    full = disk.under("continue")
    assert not full.attempt(disk.write)
    assert not full.attempt(disk.write)
    with pytest.raises(StorageError):
        full.attempt(disk.write, required=True)
    assert full.attempt(disk.write)
    assert len(disk.said) == 2


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="on_full"):
        Disk(0).under("hope")  # pyright: ignore[reportArgumentType]


def test_the_estimate_says_when_the_room_may_not_do() -> None:
    assert estimate(1_000_000, 3, 10_000_000) == (
        "a checkpoint takes up to 1.0 MB, 3 kept and one being written up to 4.0 MB, 10.0 MB are free"
    )
    assert estimate(1_000_000, 3, 3_000_000).endswith("that may not do")
    assert "all are kept" in estimate(1, None, 2)
