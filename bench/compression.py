"""What compressed checkpoints save and cost beside the same ones uncompressed: bytes, time until durable, time to load.

    OMP_NUM_THREADS=1 python bench/compression.py [--gaps STEPS ...] [--saves N] [--directory DIR]

The state is that of a net in training: an MLP of 25 million parameters with AdamW that learns to reproduce the digits
of `fixtures/digits` through random projections, in float32 or bfloat16, after 100 steps of warm-up. Three runs of the
core take turns with the same states: written as they are, each tensor compressed alone, and as differences to an
earlier checkpoint, `gap` steps apart.

    bytes      written by a save, to those uncompressed, over all saves; differences begin with a base
    durable    seconds from the boundary until the save would survive a power cut, medians, and to those uncompressed
    load       seconds until the newest one is read and verified, likewise

What a disk would have to be slower than, so that a save is durable sooner, follows from the first two: it is printed as
the rate at which both take as long.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import Ours, State
from torch import nn

import unbroken

WARM_UP_STEPS = 100
FORMS = (None, "alone", "differences")


class Training:
    """An MLP of 25 million parameters in training on digits."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        raw = (Path(__file__).parent.parent / "fixtures/digits/digits.bin").read_bytes()
        pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 65)[:, :64]
        inputs = pixels.to(torch.float32) / 16 @ torch.randn(64, 2240) / 8
        self.inputs = inputs.to(dtype)
        layers = [layer for _ in range(5) for layer in (nn.Linear(2240, 2240), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1]).to(dtype)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-4)
        self.state = State(nn.ParameterList(self.net.parameters()), optimizer)

    def step(self) -> None:
        batch = self.inputs[torch.randint(len(self.inputs), (64,))]
        (self.net(batch) - batch).square().mean().backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()


def measure(dtype: torch.dtype, gap: int, saves: int, directory: Path) -> None:
    training = Training(dtype)
    for _ in range(WARM_UP_STEPS):
        training.step()
    place = Path(tempfile.mkdtemp(dir=directory))
    runs: dict[str | None, Ours] = {}
    for form in FORMS:
        runs[form] = Ours(place / str(form), "sync", deletes=True, compress=form)
    written: dict[str | None, list[int]] = {form: [] for form in FORMS}
    durable: dict[str | None, list[float]] = {form: [] for form in FORMS}
    loads: dict[str | None, list[float]] = {form: [] for form in FORMS}
    try:
        for _ in range(saves):
            for _ in range(gap):
                training.step()
            for form, run in runs.items():
                begun = time.perf_counter()
                run.save(training.state)
                durable[form].append(time.perf_counter() - begun)
                written[form].append(run.run.checkpoints()[-1].new_bytes)
        for _ in range(3):
            for form, run in runs.items():
                begun = time.perf_counter()
                unbroken.load(run.run.checkpoints()[-1].path)
                loads[form].append(time.perf_counter() - begun)
    finally:
        for run in runs.values():
            run.run.close()
        shutil.rmtree(place)
    name = str(dtype).removeprefix("torch.")
    for form in FORMS:
        show(f"{name:9}{gap:4}  {form or 'as it is'}", form, written, durable, loads)


def show(words: str, form: str | None, written: Any, durable: Any, loads: Any) -> None:
    ratio = sum(written[form]) / sum(written[None])
    took, plain = statistics.median(durable[form]), statistics.median(durable[None])
    load, plain_load = statistics.median(loads[form]), statistics.median(loads[None])
    line = f"{words:30}{written[form][-1] / 1e6:9.1f}{ratio:8.2f}{took:10.2f} ({took / plain:5.2f})"
    line += f"{load:8.2f} ({load / plain_load:5.2f})"
    if form is not None and took > plain:
        saved = statistics.mean(written[None]) - statistics.mean(written[form])
        line += f"{saved / (took - plain) / 1e6:12.0f} MB/s"
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gaps", type=int, nargs="*", default=[1, 20], help="steps between saves")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print("command: " + " ".join([Path(sys.executable).name, *sys.argv]))
    print(
        f"{'state, steps between saves':30}{'last, MB':>9}{'bytes':>8}{'durable, s':>18}{'load, s':>16}",
        end="",
    )
    print(f"{'pays below':>16}")
    for dtype in (torch.float32, torch.bfloat16):
        for gap in arguments.gaps:
            measure(dtype, gap, arguments.saves, arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
