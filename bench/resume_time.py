"""How long a resume takes deep inside a large epoch: from the start of the process to the first resumed batch.

    OMP_NUM_THREADS=1 python bench/resume_time.py [--samples N] [--batch N] [--at N] [--rounds N]

A data set of ten million samples, batches of 512, stopped at batch 19,000 of its first epoch and started
again. The checkpoint is made by a life that takes its steps without loading data, so that the epoch's first
19,000 batches cost seconds. Each resumed life is a fresh interpreter that writes down, by its own clock,
when its imports were done and when the first batch was there.

In native mode torch's permutation of the epoch has to be made again; the time is compared with what torch
itself needs for its list, measured in the same process afterwards. CPU time is given beside wall time,
which a busy machine stretches. In keyed mode the order is a function of the position, and nothing has to be
made again.

Expect: native at most 1.2 times torch's own permutation; keyed below 50 ms beyond the imports.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Keying each sample costs tens of microseconds, so that ten million of them would take the first life minutes.
KEYED_BATCH = 32


def clocks() -> tuple[float, float]:
    """Return seconds on the wall and of this process' CPU time."""
    return time.perf_counter(), time.process_time()


BEGUN = clocks()

import torch._dynamo  # noqa: E402  The first optimizer imports it; that is torch's start-up, not the resume's.
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import unbroken.run  # noqa: E402


class Numbers(Dataset[torch.Tensor]):
    """Samples that cost nothing to load."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.none = torch.zeros(())

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self.none] * len(indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.none


def first_of(samples: list[torch.Tensor]) -> torch.Tensor:
    return samples[0]


def live(options: argparse.Namespace) -> None:
    """One life: go to the batch to stop at, or time the resume there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    data = Numbers(options.samples)
    loader = DataLoader(data, options.batch, shuffle=True, collate_fn=first_of)
    imported = clocks()
    run = unbroken.run.Run(
        options.run, seed=1, model=net, optimizer=opt, data=options.mode, checkpoint=options.at, quiet=True
    )
    for _ in run.epochs(1):
        for _ in run.batches(loader):
            if options.life == "resume":
                report(options, imported, clocks(), run.step)
            if run.step >= options.at:
                sys.stdout.flush()
                os._exit(0)


def report(
    options: argparse.Namespace, imported: tuple[float, float], arrived: tuple[float, float], step: int
) -> None:
    assert step == options.at, f"resumed at step {step}, expected {options.at}"
    facts = {"imports": since(BEGUN, imported), "resume": since(imported, arrived)}
    if options.mode == "native":
        sampler = torch.utils.data.RandomSampler(range(options.samples))
        begun = clocks()
        next(iter(sampler))
        facts["permutation"] = since(begun, clocks())
    print(json.dumps(facts))


def since(begun: tuple[float, float], ended: tuple[float, float]) -> dict[str, float]:
    return {"wall_s": ended[0] - begun[0], "cpu_s": ended[1] - begun[1]}


def started(options: argparse.Namespace, mode: str, life: str, run: Path) -> dict[str, Any]:
    arguments = ["--samples", options.samples, "--batch", options.batch, "--at", options.at]
    command = [
        sys.executable,
        __file__,
        *map(str, arguments),
        "--mode",
        mode,
        "--life",
        life,
        "--run",
        str(run),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) if life == "resume" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from process start to the first resumed batch.")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--at", type=int, default=19_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=["native", "keyed"], help=argparse.SUPPRESS)
    parser.add_argument("--life", choices=["begin", "resume"], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        live(options)
        return
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else platform.processor()
    print(f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{time.strftime('%Y-%m-%d')}: {' '.join(['python', *sys.argv])}")
    for mode in ("native", "keyed"):
        if mode == "keyed":
            options.batch = min(options.batch, KEYED_BATCH)
        with tempfile.TemporaryDirectory() as name:
            run = Path(name) / "run"
            started(options, mode, "begin", run)
            rounds = [started(options, mode, "resume", run) for _ in range(options.rounds)]
        words = [f"{what} {show(rounds, what)}" for what in rounds[0]]
        if mode == "native":
            ratios = [r["resume"]["cpu_s"] / r["permutation"]["cpu_s"] for r in rounds]
            words.append(f"resume / permutation {statistics.median(ratios):.2f} of CPU time")
        print(f"{mode:>6}: {'; '.join(words)}", flush=True)


def show(rounds: list[dict[str, Any]], what: str) -> str:
    """Return the medians of the wall time and of the process' CPU time, in milliseconds."""
    wall, cpu = (1000 * statistics.median(r[what][clock] for r in rounds) for clock in ("wall_s", "cpu_s"))
    return f"{wall:.0f} ms (CPU {cpu:.0f} ms)"


if __name__ == "__main__":
    main()
