"""A full disk: when the training stops, waits or goes on; and what it will take, said before it begins."""

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import unbroken
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
    full = disk.under("wait")
    assert full.attempt(disk.write)
    assert len(disk.said) == 2
    # 0.5, 1, 2, 4, 8, 10 and 10 seconds.
    assert disk.slept == full.paused_s == 35.5


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


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters),
        lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.RMSprop(parameters, momentum=0.9, centered=True),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.Adadelta(parameters),
        lambda parameters: torch.optim.Rprop(parameters),
    ],
)
def test_what_is_said_to_be_needed_before_training_is_what_checkpoints_take(
    make: Callable[[Any], torch.optim.Optimizer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = torch.nn.Linear(300, 300)
    net.bias.requires_grad_(False)
    optimizer = make(net.parameters())
    loader = DataLoader(TensorDataset(torch.randn(4, 300)), batch_size=2)
    with unbroken.Run(tmp_path / "run", checkpoint=1, net=net, optimizer=optimizer) as run:
        for _ in run.epochs(1):
            for (x,) in run.batches(loader):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
    said = re.search(r"a checkpoint takes up to ([\d.]+) (kB|MB),", capsys.readouterr().err)
    assert said is not None
    expected = float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]]
    taken = max(info.size_bytes for info in run.checkpoints())
    assert taken == pytest.approx(expected, rel=0.1)
