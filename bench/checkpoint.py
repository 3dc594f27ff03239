"""What saving a state costs, beside other ways to do it: stall, time to durable, memory, steps.

    OMP_NUM_THREADS=1 python bench/checkpoint.py [--sizes 100 1000] [--rounds N] [--loop-steps N] [--directory DIR]

The state is a model's parameters and an optimizer's momentum, half the bytes each, in few large tensors or in thousands
of small ones. All contenders save the same state by turns in one process, round by round; medians of the rounds are
shown, and their ratio to the bound: a copy into recycled memory on huge pages, then direct writes over a recycled file.

    stall      how long the training thread stands still
    durable    until a power cut would leave it there
    extra      the most memory taken beside the state while saving

The training loop is an MLP of 25 million parameters with AdamW on one thread; how much longer the same steps take with
a save every 1, 5 or 20 of them. Moonclip is not among the contenders: it is not among what the tests install. The disk
and the other cores are part of what is measured: run it on a quiet machine.
"""

import argparse
import ctypes
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from unbroken import _core
from unbroken.torch import snapshot
from unbroken.torch.fence import Owned

PIECE = 8 << 20
FEW, MANY = 8, 4000


@dataclass
class State:
    """A model and its optimizer, as a user has them."""

    parameters: nn.ParameterList
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, megabytes: int, tensors: int) -> "State":
        elements = megabytes * 1_000_000 // 8 // tensors
        parameters = nn.ParameterList([nn.Parameter(torch.randn(elements)) for _ in range(tensors)])
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        state = cls(parameters, optimizer)
        state.step()
        return state

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flat(self) -> dict[str, torch.Tensor]:
        found = {f"p{index}": p.detach() for index, p in enumerate(self.parameters)}
        for index, parameter in enumerate(self.parameters):
            found[f"m{index}"] = self.optimizer.state[parameter]["momentum_buffer"]
        return found


@dataclass
class Contender:
    """One way to save. `save` returns at the end of the stall, `settle` when all is durable."""

    name: str
    save: Callable[[State, int], object]
    settle: Callable[[], object]
    close: Callable[[], object] = lambda: None
    before_step: Callable[[], object] = lambda: None
    figures: dict[str, list[float]] = field(default_factory=dict)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def published(path: Path) -> None:
    sync_file(path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    sync_file(path.parent)


def torch_save(place: Path) -> Contender:
    path = place / "torch.pt"

    def save(state: State, step: int) -> None:
        torch.save(state.flat(), path.with_suffix(".new"))
        published(path)

    return Contender("torch.save + fsync", save, lambda: None)


def safe_tensors(place: Path) -> Contender:
    path = place / "safe.safetensors"

    def save(state: State, step: int) -> None:
        safetensors.torch.save_file(state.flat(), path.with_suffix(".new"))
        published(path)

    return Contender("safetensors + fsync", save, lambda: None)


def distributed(place: Path, *, background: bool) -> Contender:
    path = place / ("dcp-async" if background else "dcp")
    pending: list[Any] = []

    def settle() -> None:
        if pending:
            pending.pop().result()

    def save(state: State, step: int) -> None:
        settle()
        writer = FileSystemWriter(path, sync_files=True)
        if background:
            pending.append(state_dict_saver.async_save(state.flat(), storage_writer=writer))
        else:
            state_dict_saver.save(state.flat(), storage_writer=writer)

    return Contender("DCP async" if background else "DCP", save, settle)


def ours(place: Path, *, background: bool) -> Contender:
    path = place / ("background" if background else "sync")
    run = _core.Run.open(path, seed=1, settings={})
    run.begin()
    lent: list[Any] = []
    keep = (2, None, None)
    steps = [0]

    def fence() -> None:
        if lent:
            run.fence()
            lent.pop()[1].unchanged()

    def settle() -> None:
        fence()
        outcome = run.outcome(wait=True)
        assert outcome is None or outcome[0] == "saved", f"{outcome}"

    def save(state: State, _: int) -> None:
        settle()
        if steps[0]:
            run.record(steps[0], 0, 0, steps[0], [])
        objects = {"model": state.parameters, "optimizer": state.optimizer}
        captured = snapshot.capture(objects)
        what: dict[str, Any] = {
            "step": steps[0],
            "phase": 0,
            "tree": {"objects": captured.tree},
            "identity": {},
            "environment": {},
            "metrics": {},
        }
        if background:
            owned = Owned(objects.values())
            regions = captured.lendable(owned.keys)
            run.save(**what, storages=regions, keep=keep, confirm=owned.unchanged)
            lent.append((captured, owned))
        else:
            run.commit(**what, storages=captured.regions())
            run.prune(last=2, every=None, best=None)
        steps[0] += 1

    name = "Unbroken background" if background else "Unbroken sync"
    return Contender(name, save, settle, run.close, fence)


def bound(place: Path) -> Contender:
    """The least that this memory and this disk allow."""
    path = place / "bound"
    memory: list[mmap.mmap] = []
    pool = ThreadPoolExecutor(4)

    def save(state: State, _: int) -> None:
        tensors = list(state.flat().values())
        total = sum(tensor.nbytes for tensor in tensors)
        length = -(-total // PIECE) * PIECE
        if not memory or len(memory[0]) < length:
            memory[:] = [mmap.mmap(-1, length)]
            memory[0].madvise(mmap.MADV_HUGEPAGE)
            path.write_bytes(b"")
            os.truncate(path, length)
        start = at = ctypes.addressof(ctypes.c_char.from_buffer(memory[0]))
        for tensor in tensors:
            ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
            at += tensor.nbytes
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
        view = memoryview(memory[0])

        def write(offset: int) -> None:
            os.pwrite(descriptor, view[offset : offset + PIECE], offset)

        list(pool.map(write, range(0, length, PIECE)))
        os.fsync(descriptor)
        os.close(descriptor)
        view.release()
        assert at - start == total, "every byte was copied"

    return Contender("bound: memcpy + direct write", save, lambda: None, pool.shutdown)


def contenders(place: Path) -> list[Contender]:
    return [
        bound(place),
        ours(place, background=True),
        ours(place, background=False),
        torch_save(place),
        safe_tensors(place),
        distributed(place, background=False),
        distributed(place, background=True),
    ]


def status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(name)


@contextmanager
def timed(contender: Contender, figure: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    contender.figures.setdefault(figure, []).append(time.perf_counter() - begun)


def measure_states(sizes: list[int], rounds: int, directory: Path) -> None:
    for megabytes in sizes:
        for tensors in (FEW, MANY):
            place = Path(tempfile.mkdtemp(dir=directory))
            state = State.of(megabytes, tensors)
            field_of = contenders(place)
            try:
                for number in range(rounds + 1):
                    for contender in field_of:
                        measure(contender, state, number)
            finally:
                for contender in field_of:
                    contender.close()
                shutil.rmtree(place)
            show(f"{megabytes} MB in {2 * tensors} tensors", field_of)


def measure(contender: Contender, state: State, number: int) -> None:
    state.step()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kb("VmRSS")
    if number == 0:  # Makes files and memory, which the rounds use again.
        contender.save(state, number)
        contender.settle()
        contender.figures["extra"] = [(status_kb("VmHWM") - before) / 1000]
        return
    with timed(contender, "durable"):
        with timed(contender, "stall"):
            contender.save(state, number)
        contender.settle()


def show(title: str, field_of: list[Contender]) -> None:
    print(f"\n{title}: seconds, and in brackets how many times the bound's")
    print(f"{'':30}" + "".join(f"{name:>17}" for name in ("stall", "durable", "extra MB")))
    least = statistics.median(field_of[0].figures["durable"])
    for contender in field_of:
        line = f"{contender.name:30}"
        for name in ("stall", "durable"):
            median = statistics.median(contender.figures[name])
            line += f"{median:9.4f} ({median / least:5.2f})"
        print(f"{line}{contender.figures['extra'][0]:17.0f}", flush=True)


# The loop.


def build_loop() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(2240, 2240), nn.ReLU())]
    net = nn.Sequential(*layers)
    return net, torch.optim.AdamW(net.parameters()), torch.randn(128, 2240)


def loop(steps: int, interval: int | None, contender: Contender | None) -> float:
    """Return the seconds that the steps take, the last save's end included."""
    net, optimizer, batch = build_loop()
    parameters = nn.ParameterList(net.parameters())
    if contender is not None:
        optimizer.register_step_pre_hook(lambda *_: contender.before_step())  # type: ignore[arg-type]
    state = LoopState(parameters, optimizer)

    def step() -> None:
        loss = net(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if contender is not None:
        contender.save(state, 0)
        contender.settle()
    begun = time.perf_counter()
    for number in range(1, steps + 1):
        step()
        if contender is not None and interval is not None and number % interval == 0:
            contender.save(state, number)
    if contender is not None:
        contender.settle()
    return time.perf_counter() - begun


class LoopState(State):
    """A state whose optimizer is AdamW."""

    def flat(self) -> dict[str, torch.Tensor]:
        found = {f"p{index}": p.detach() for index, p in enumerate(self.parameters)}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                found[f"{name}{index}"] = value
        return found


def measure_loop(steps: int, rounds: int, directory: Path) -> None:
    names = ["Unbroken background", "Unbroken sync", "torch.save + fsync", "DCP async"]
    print(
        f"\ntraining loop, 25 million parameters, {steps} steps: how much longer with a save every so many steps"
    )
    print(f"{'':30}" + "".join(f"{interval:>12}" for interval in (1, 5, 20)))
    longer: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for interval in (1, 5, 20):
            place = Path(tempfile.mkdtemp(dir=directory))
            made = contenders(place)
            for contender in made:
                if contender.name in names:
                    plain = loop(steps, None, None)
                    saving = loop(steps, interval, contender)
                    longer.setdefault((contender.name, interval), []).append(saving / plain - 1)
                contender.close()
            shutil.rmtree(place)
    for name in names:
        figures = [statistics.median(longer[name, interval]) for interval in (1, 5, 20)]
        print(f"{name:30}" + "".join(f"{100 * figure:11.1f}%" for figure in figures), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000], help="megabytes of state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop-steps", type=int, default=20, help="0 leaves the training loop out")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", module="torch.distributed"
    )  # One process, and a checkpoint written over.
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    print("command: " + " ".join([Path(sys.executable).name, *sys.argv]))
    measure_states(arguments.sizes, arguments.rounds, arguments.directory)
    if arguments.loop_steps:
        measure_loop(arguments.loop_steps, max(1, arguments.rounds // 2), arguments.directory)
    assert threading.active_count() < 50, "nobody leaves threads behind"
    return 0


if __name__ == "__main__":
    sys.exit(main())
