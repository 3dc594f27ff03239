"""Loader workers outlive a stop signal to the whole process group, and die with the process all the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from unbroken.torch import shield

class Items(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        time.sleep(float(sys.argv[2]))
        return index

class Stuck(Items):
    def __getitem__(self, index):
        while True:
            time.sleep(60)

def main():
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    shield.install()
    if sys.argv[3] == "stuck":
        batches = iter(DataLoader(Stuck(), num_workers=1, multiprocessing_context=sys.argv[1], timeout=0))
        print("ready", *[w.pid for w in batches._workers], flush=True)
        while not received:
            time.sleep(0.05)
        sys.exit(75)
    count = 0
    for batch in DataLoader(Items(), num_workers=2, multiprocessing_context=sys.argv[1]):
        count += 1
        if count == 3:
            print("ready", flush=True)
    print(count, sorted(set(received)), flush=True)

if __name__ == "__main__":
    main()
"""


def start(path: Path, context: str, item_seconds: float, kind: str) -> subprocess.Popen[str]:
    program = path / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), context, str(item_seconds), kind],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_a_signal_to_the_group_costs_no_batch(tmp_path: Path, context: str) -> None:
    child = start(tmp_path, context, 0.05, "plain")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(child.pid, number)
        time.sleep(0.1)
    rest, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert rest == f"40 {[int(signal.SIGINT), int(signal.SIGUSR1), int(signal.SIGTERM)]}\n"


def test_a_worker_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    child = start(tmp_path, "fork", 0.0, "stuck")
    assert child.stdout is not None
    _, worker = child.stdout.readline().split()
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(timeout=120) == 75
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists(), "the worker is gone too"
