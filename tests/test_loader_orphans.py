"""Workers of a loader whose training was killed: none stays behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import os, pathlib, sys, time
import torch, unbroken
from torch.utils.data import DataLoader

place = pathlib.Path(sys.argv[1])

def outlive(number):
    parent = os.getppid()
    (place / "new").write_text(str(os.getpid()))
    (place / "new").rename(place / "worker")
    while os.getppid() == parent:
        time.sleep(0.01)

if __name__ == "__main__":
    run = unbroken.Run(place / "run", seed=1, model=torch.nn.Linear(1, 1), quiet=True)
    loader = DataLoader(
        range(8), num_workers=1, worker_init_fn=outlive, multiprocessing_context=sys.argv[2]
    )
    for _ in run.epochs(1):
        for _ in run.batches(loader):
            pass
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # One that has ended may still be there for whoever adopted it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_whose_training_is_killed_before_it_is_set_up_ends_too(tmp_path: Path, method: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path), method]
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(command, stdout=said, stderr=said)
    found = wait_until((tmp_path / "worker").exists, 120)
    training.kill()
    training.wait()
    assert found, (tmp_path / "said").read_text()
    worker = int((tmp_path / "worker").read_text())
    try:
        assert wait_until(lambda: not is_running(worker), 60), "the worker goes on without its training"
    finally:
        if is_running(worker):
            os.kill(worker, 9)
