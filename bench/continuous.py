"""Whether the budget of `Policy(continuous=...)` is held: how much longer a training takes that saves as often as that.

    OMP_NUM_THREADS=1 python bench/continuous.py [--budget PART ...] [--steps N] [--pairs N] [--directory DIR]

Each life is a process of its own: an MLP of 25 million parameters with AdamW on one thread (300 MB of state) under
`unbroken.Run`, which saves at its beginning only, or continuously within the budget. Lives of both kinds take turns,
and each one that saves is compared with those around it. Shown are medians of the pairs and, in brackets, their
quarters; how many checkpoints were durable in a life, and how many steps they are apart, which is what a kill costs at
most. The first steps, in which the first save is weighed, are not counted.
"""

import argparse
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unbroken
from unbroken import Policy

WARM_UP_STEPS = 10


def live(place: Path, budget: float, steps: int) -> None:
    """Train, and print the seconds of the counted steps and the steps that were saved."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(2240, 2240), nn.ReLU())])
    optimizer = torch.optim.AdamW(net.parameters())
    loader = DataLoader(TensorDataset(torch.randn(128 * 4, 2240).repeat(steps // 4 + 4, 1)), batch_size=128)
    policy = Policy(epoch_ends=False, continuous=budget or None)
    begun = 0.0
    with unbroken.Run(
        place, seed=1, checkpoint=policy, keep=100, quiet=True, net=net, optimizer=optimizer
    ) as run:
        for _ in run.epochs(1):
            for (batch,) in run.batches(loader):
                if run.step == WARM_UP_STEPS:
                    begun = time.perf_counter()
                if run.step == WARM_UP_STEPS + steps:
                    print(time.perf_counter() - begun, *[info.step for info in run.checkpoints()], flush=True)
                    os._exit(0)  # What a life's end takes is not of this.
                net(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()


def lived(directory: Path, budget: float, steps: int) -> tuple[float, list[int]]:
    place = Path(tempfile.mkdtemp(dir=directory))
    command = [
        sys.executable,
        __file__,
        "--life",
        str(place / "run"),
        "--budget",
        str(budget),
        "--steps",
        str(steps),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(place)
    seconds, *saved = done.stdout.split()
    return float(seconds), [int(step) for step in saved]


def measure(directory: Path, budget: float, steps: int, pairs: int) -> None:
    before, _ = lived(directory, 0, steps)
    longer, counts, gaps = [], [], []
    for _ in range(pairs):
        saving, saved = lived(directory, budget, steps)
        after, _ = lived(directory, 0, steps)
        longer.append(100 * (2 * saving / (before + after) - 1))
        counts.append(len([step for step in saved if step > WARM_UP_STEPS]))
        gaps += [later - earlier for earlier, later in itertools.pairwise(saved)]
        before = after
    low, middle, high = statistics.quantiles(longer, n=4) if pairs > 1 else [longer[0]] * 3
    apart = statistics.median(gaps) if gaps else steps
    line = f"{100 * budget:5.1f} %{middle:8.1f} ({low:.1f} to {high:.1f}) %{statistics.median(counts):8.0f} saves"
    print(f"{line}, {apart:.0f} steps apart, of {1000 * before / steps:.0f} ms a step", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, nargs="*", default=[0.01, 0.05])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life is not None:
        live(arguments.life, arguments.budget[0], arguments.steps)
        return 0
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print("command: " + " ".join([Path(sys.executable).name, *sys.argv]))
    print("budget   steps take longer by")
    for budget in arguments.budget:
        measure(arguments.directory, budget, arguments.steps, arguments.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
