"""What Unbroken adds to a step on which no checkpoint is due: main thread's CPU time and wall time, 0 and 2 workers.

    OMP_NUM_THREADS=1 python bench/step_cost.py [--steps N] [--rounds N] [--json FILE]

The same training runs twice in one process, plain and wrapped, one step of each by turns, and now the one comes first,
now the other. Each pair of steps gives one difference; the median of all pairs is reported, with the lowest and the
highest quarter of the blocks' medians as its spread. Pairs, because a machine that others use too is now fast, now half
as fast, for seconds; medians, because there a few steps take ten times as long, and they are not what is asked about.
CPU time is that of the main thread alone (`time.thread_time`); workers' own time is not in it, their waiting shows in
the wall time.

Expect: less than 200 us of the main thread for a step, which is less than 1 % of a step of 20 ms.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unbroken
from unbroken.policy import Policy

BATCH_SIZE = 32
FEATURES = 256
STEP_MS = 20.0
LEFT_OUT = 20


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """Rows with a little noise, so that workers draw."""

    def __init__(self, length: int) -> None:
        self.rows = torch.randn(length, FEATURES)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index] + 0.01 * torch.randn(FEATURES), index % 10


def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    net = nn.Sequential(
        nn.Linear(FEATURES, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10)
    )
    opt = torch.optim.AdamW(net.parameters())
    return net, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10**6)


class Training:
    """One training with its parts; `wrapped` or plain."""

    def __init__(self, directory: Path | None, loader: DataLoader[Any], rounds: int, level: str) -> None:
        self.net, self.opt, self.sched = build()
        self.loader = loader
        self.run = None
        if directory is not None:
            never = Policy(epoch_ends=False)
            self.run = unbroken.Run(
                directory,
                seed=1,
                model=self.net,
                optimizer=self.opt,
                scheduler=self.sched,
                checkpoint=never,
                journal=level,  # pyright: ignore[reportArgumentType]
                quiet=True,
                allow=["untracked:*"],  # The plain loop beside it trains in the same process.
            )
            self.epochs = self.run.epochs(rounds)

    def batches(self) -> Iterator[Any]:
        """Begin an epoch."""
        if self.run is None:
            return iter(self.loader)
        next(self.epochs)
        return iter(self.run.batches(self.loader))

    def step(self, batches: Iterator[Any]) -> tuple[float, float]:
        """Run one step; return main thread CPU and wall seconds."""
        cpu, wall = time.thread_time(), time.perf_counter()
        x, y = next(batches)
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.sched.step()
        if self.run is not None:
            self.run.log(loss=loss)
        return time.thread_time() - cpu, time.perf_counter() - wall


def measure(workers: int, steps: int, rounds: int, level: str) -> dict[str, Any]:
    torch.manual_seed(0)
    loaders = [
        DataLoader(Rows(steps * BATCH_SIZE), BATCH_SIZE, shuffle=True, num_workers=workers) for _ in range(2)
    ]
    with tempfile.TemporaryDirectory() as name:
        plain = Training(None, loaders[0], rounds, level)
        wrapped = Training(Path(name) / "run", loaders[1], rounds + 1, level)
        _epoch(plain, wrapped, steps)
        blocks = [_epoch(plain, wrapped, steps) for _ in range(rounds)]
        assert wrapped.run is not None
        wrapped.run.close()
    pairs = [pair for block in blocks for pair in block]
    added_cpu = 1e6 * _added(pairs, 0)
    low, _, high = statistics.quantiles((1e6 * _added(block, 0) for block in blocks), n=4)
    return {
        "workers": workers,
        "journal": level,
        "plain_step_us": round(1e6 * statistics.median(plain[0] for plain, _ in pairs)),
        "added_cpu_us": round(added_cpu, 1),
        "added_cpu_quarters_us": [round(low, 1), round(high, 1)],
        "added_wall_us": round(1e6 * _added(pairs, 1), 1),
        "share_of_20_ms": round(added_cpu / (STEP_MS * 1000), 5),
    }


Pair = tuple[tuple[float, float], tuple[float, float]]


def _epoch(plain: Training, wrapped: Training, steps: int) -> list[Pair]:
    """Run one epoch of both; return what each pair of steps took.

    The first steps are left out: they belong to the start of workers and to the watch for untracked modules.
    """
    of_plain, of_wrapped = plain.batches(), wrapped.batches()
    pairs: list[Pair] = []
    for number in range(steps):
        if number % 2:
            before = plain.step(of_plain)
            after = wrapped.step(of_wrapped)
        else:
            after = wrapped.step(of_wrapped)
            before = plain.step(of_plain)
        pairs.append((before, after))
    for batches in (of_plain, of_wrapped):
        assert next(batches, None) is None, "an epoch has as many batches as it has steps"
    return pairs[LEFT_OUT:]


def _added(pairs: list[Pair], clock: int) -> float:
    return statistics.median(after[clock] - before[clock] for before, after in pairs)


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What Unbroken adds to a step without a checkpoint.")
    parser.add_argument("--steps", type=int, default=150, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=12, help="epochs of each")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n{time.strftime('%Y-%m-%d')}: {' '.join(['python', *sys.argv])}")
    head = ("workers", "journal", "plain step", "added CPU", "quarters", "added wall", "of 20 ms")
    print("{:>7} {:>8} {:>11} {:>10} {:>15} {:>11} {:>9}".format(*head))
    results = [
        measure(w, options.steps, options.rounds, level) for w in (0, 2) for level in ("sampled", "full")
    ]
    for r in results:
        quarters = "{:.0f}..{:.0f} us".format(*r["added_cpu_quarters_us"])
        print(
            f"{r['workers']:>7} {r['journal']:>8} {r['plain_step_us']:>8} us {r['added_cpu_us']:>7.0f} us "
            f"{quarters:>15} {r['added_wall_us']:>8.0f} us {r['share_of_20_ms']:>9.2%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
