"""What Unbroken adds to a step on which no checkpoint is due: main thread's CPU time and wall time, 0 and 2 workers.

    OMP_NUM_THREADS=1 python bench/step_cost.py [--steps N] [--rounds N] [--json FILE]

The same training runs plain and wrapped by turns, in one process: one plain epoch, one wrapped epoch, and
again. Each epoch gives its median step, each pair of epochs one difference of these, and the median of the pairs
is reported, with the lowest and the highest quarter as its spread. Medians, because on a machine that others use
too a few steps take ten times as long, and they are not what is asked about. CPU time is that of the main thread
alone (`time.thread_time`); workers' own time is not in it, their waiting shows in the wall time.

Expect: less than 200 us of the main thread for a step, which is less than 1 % of a step of 20 ms.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
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

    def epoch(self) -> tuple[float, float]:
        """Run one epoch; return main thread CPU and wall seconds of the median step, the first ones left out.

        The first steps belong to the start of workers and to the watch for untracked modules.
        """
        batches: Iterable[Any] = self.loader
        if self.run is not None:
            next(self.epochs)
            batches = self.run.batches(self.loader)
        cpu, wall = [time.thread_time()], [time.perf_counter()]
        for x, y in batches:
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            self.sched.step()
            if self.run is not None:
                self.run.log(loss=loss)
            cpu.append(time.thread_time())
            wall.append(time.perf_counter())
        return _median_step(cpu), _median_step(wall)


def _median_step(stamps: list[float]) -> float:
    return statistics.median(end - begin for begin, end in itertools.pairwise(stamps[LEFT_OUT:]))


def measure(workers: int, steps: int, rounds: int, level: str) -> dict[str, Any]:
    torch.manual_seed(0)
    loader = DataLoader(Rows(steps * BATCH_SIZE), BATCH_SIZE, shuffle=True, num_workers=workers)
    with tempfile.TemporaryDirectory() as name:
        plain = Training(None, loader, rounds, level)
        wrapped = Training(Path(name) / "run", loader, rounds + 1, level)
        plain.epoch()
        wrapped.epoch()
        pairs = [(plain.epoch(), wrapped.epoch()) for _ in range(rounds)]
        assert wrapped.run is not None
        wrapped.run.close()
    added_cpu = [1e6 * (after[0] - before[0]) for before, after in pairs]
    added_wall = [1e6 * (after[1] - before[1]) for before, after in pairs]
    low, _, high = statistics.quantiles(added_cpu, n=4)
    return {
        "workers": workers,
        "journal": level,
        "plain_step_us": round(1e6 * statistics.median(before[0] for before, _ in pairs)),
        "added_cpu_us": round(statistics.median(added_cpu), 1),
        "added_cpu_quarters_us": [round(low, 1), round(high, 1)],
        "added_wall_us": round(statistics.median(added_wall), 1),
        "share_of_20_ms": round(statistics.median(added_cpu) / (STEP_MS * 1000), 5),
    }


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What Unbroken adds to a step without a checkpoint.")
    parser.add_argument("--steps", type=int, default=150, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of a plain and a wrapped epoch")
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
