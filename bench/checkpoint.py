"""What saving a state costs, beside other ways to do it: stall, time to durable, memory, steps.

    OMP_NUM_THREADS=1 python bench/checkpoint.py [--sizes MB ...] [--tensors N ...] [--frozen MB ...] [--rest S]
                                                 [--rounds N] [--pairs N] [--only NAME ...] [--intervals N ...]
                                                 [--directory DIR]

The state is a model's parameters and an optimizer's momentum, half the bytes each, in few large tensors or in thousands
of small ones. Each contender takes turns with the bound, which is the least that this memory and this disk allow: a
copy into recycled memory on huge pages, then direct writes over a recycled file, four at a time. So each round has a
ratio of its own, and a machine or a disk that slows down slows both; shown are medians of the rounds and, in brackets,
their quarters. What a contender has under way by itself goes on while the training thread rests for as long as a short
forward and backward would take: `--rest` seconds for each GB of state.

    stall      how long the training thread stands still, to the bound's copy
    durable    until a power cut would leave it there: to the bound's direct write alone
    after      what follows on the disk, for contenders that delete older checkpoints themselves
    extra      the most memory taken beside the state in the first saves
    written    megabytes that the process had the system write for a save

A frozen base is such a state that no optimizer has, in 16 tensors, with an adapter beside it: two tensors of 5 MB in
training, and their momentum.

The training loop is an MLP of 25 million parameters with AdamW on one thread: a state of 300 MB. Stretches of the same
steps with and without saves alternate in one process; each stretch with saves is compared with those around it. With a
save every n steps there are n steps behind each, the last one too, before all must be durable.

Moonclip is a contender where it is installed (the extra `bench`). The disk and the other cores are part of what is
measured: run it on a quiet machine. At 4 GB it takes 12 GB of disk and 12 of memory at a time.
"""

import argparse
import ctypes
import importlib.util
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from unbroken.torch.fence import Owned, UntilStep

PIECE = 8 << 20
ADAPTER_MEGABYTES = 10
WARM_UPS = 3
"""Rounds that make files and memory, which the others use again."""

FIRST_SAVES = 3
"""Saves in which memory is watched. Before the first one, a run has seen how long its steps take."""

STRETCH_STEPS = {1: 4, 5: 10}
"""Steps of a stretch at an interval between saves; otherwise the interval itself: one save."""


@dataclass
class State:
    """A model and its optimizer, as a user has them."""

    parameters: nn.ParameterList
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, megabytes: int, tensors: int) -> "State":
        elements = megabytes * 1_000_000 // 8 // tensors
        parameters = nn.ParameterList([nn.Parameter(torch.randn(elements)) for _ in range(tensors)])
        state = cls(parameters, torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))
        state.step()
        return state

    @classmethod
    def of_adapter(cls, megabytes: int) -> "State":
        base = [torch.randn(megabytes * 1_000_000 // 4 // 16) for _ in range(16)]
        frozen = [nn.Parameter(part, requires_grad=False) for part in base]
        adapter = [nn.Parameter(torch.randn(ADAPTER_MEGABYTES * 1_000_000 // 4 // 2)) for _ in range(2)]
        state = cls(nn.ParameterList([*frozen, *adapter]), torch.optim.SGD(adapter, lr=1e-3, momentum=0.9))
        state.step()
        return state

    def step(self) -> None:
        for parameter in self.parameters:
            if not parameter.requires_grad:
                continue
            # Of each parameter its own: equal tensors would be written once.
            parameter.grad = parameter.detach().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flat(self) -> dict[str, torch.Tensor]:
        found = {f"p{index}": p.detach() for index, p in enumerate(self.parameters)}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}{index}"] = value
        return found


@dataclass
class Contender:
    """One way to save.

    Args:
        name: What the table calls it.
        save: Returns when the training may go on.
        settle: Returns when all is durable.
        close: Gives everything back.
        before_step: What the optimizer has to wait for, if anything.
        after: What is due on the disk after a save.
    """

    name: str
    save: Callable[[State], object]
    settle: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    before_step: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
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

    def save(state: State) -> None:
        torch.save(state.flat(), path.with_suffix(".new"))
        published(path)

    return Contender("torch.save + fsync", save)


def safe_tensors(place: Path) -> Contender:
    path = place / "safe.safetensors"

    def save(state: State) -> None:
        safetensors.torch.save_file(state.flat(), path.with_suffix(".new"))
        published(path)

    return Contender("safetensors + fsync", save)


def distributed(place: Path) -> Contender:
    path = place / "dcp"

    def save(state: State) -> None:
        writer = FileSystemWriter(path, sync_files=True)
        state_dict_saver.save(state.flat(), storage_writer=writer)

    return Contender("DCP", save)


def distributed_async(place: Path) -> Contender:
    path = place / "dcp-async"
    pending: list[Any] = []

    def settle() -> None:
        if pending:
            pending.pop().result()

    def save(state: State) -> None:
        settle()
        writer = FileSystemWriter(path, sync_files=True)
        pending.append(state_dict_saver.async_save(state.flat(), storage_writer=writer))

    return Contender("DCP async", save, settle, settle)


def moonclip(place: Path) -> Contender:
    """As its manual shows it: in the background, compressed, two snapshots kept."""
    from moonclip import CheckpointManager  # type: ignore[import-not-found]

    manager = CheckpointManager(str(place / "moonclip"), max_total_snapshots=2)
    steps = [0]

    def save(state: State) -> None:
        steps[0] += 1
        manager.save(step=steps[0], model=state.parameters, optimizer=state.optimizer)

    return Contender("Moonclip", save, manager.flush, manager.flush)


class Ours:
    """A run's core, as `unbroken.Run` uses it: the same capture, the same fence, two checkpoints kept.

    Args:
        place: Where the run goes.
        mode: That of `Run(save=...)`.
        deletes: Whether a save deletes older checkpoints, as in a run; otherwise that is a step of its own.
        rest_s: How long the steps before the first save took until the optimizer's, where there were any.
        compress: That of `Run(compress=...)`.
    """

    def __init__(
        self, place: Path, mode: str, *, deletes: bool, rest_s: float | None = None, compress: Any = None
    ) -> None:
        self.mode, self.deletes = mode, deletes
        self.run = _core.Run.open(place / mode, seed=1, settings={}, compress=compress)
        self.run.begin()
        self.step = 0
        self.lent: tuple[Any, Owned] | None = None
        self.until_step = UntilStep()
        while rest_s is not None and self.until_step.at_least_s() is None:
            self.until_step.begin(0)
            self.until_step.reached(rest_s)
        self.captured: Any = None
        self.frozen: _core.Versions | None = None

    def contender(self) -> Contender:
        before_step = self.fence if self.mode == "background" else None
        after = None if self.deletes else self.delete
        return Contender(f"Unbroken {self.mode}", self.save, self.settle, self.run.close, before_step, after)

    def fence(self) -> None:
        if self.lent is not None:
            self.until_step.reached(time.monotonic())
            self.run.fence()
            self.lent[1].unchanged()
            self.lent = None

    def settle(self) -> None:
        self.fence()
        outcome = self.run.outcome(wait=True)
        assert outcome is None or outcome[0] == "saved", f"{outcome}"

    def delete(self) -> None:
        self.run.prune(last=2, every=None, best=None)

    def save(self, state: State) -> None:
        self.settle()
        if self.step:
            self.run.record(self.step, 0, 0, self.step, [])
        objects = {"model": state.parameters, "optimizer": state.optimizer}
        captured = self.captured = snapshot.capture(objects)
        before, self.frozen = self.frozen, captured.storages.take_frozen()
        what: dict[str, Any] = {
            "step": self.step,
            "phase": 0,
            "tree": {"objects": captured.tree},
            "identity": {},
            "environment": {},
            "metrics": {},
        }
        if self.mode == "sync" or self.step == 0:  # A run waits for its first checkpoint in any mode.
            self.run.commit(**what, storages=captured.memory())
            if self.deletes:
                self.delete()
        else:
            owned = Owned(objects.values() if self.mode == "background" else (), captured.storages)
            keep = (2, None, None) if self.deletes else None
            unmoved = set[tuple[int, int]]()
            if self.mode == "background" and before is not None:
                unmoved = self.frozen.unmoved_since(before)
            regions = captured.lendable(owned, unmoved)
            lent_for_s = self.until_step.at_least_s()
            self.run.save(**what, storages=regions, keep=keep, lent_for_s=lent_for_s, confirm=owned.unchanged)
            self.lent = (captured, owned)
            self.until_step.begin(time.monotonic())
        self.step += 1


OURS = ("background", "copy", "sync")
OTHERS: dict[str, Callable[[Path], Contender]] = {
    "torch": torch_save,
    "safetensors": safe_tensors,
    "dcp": distributed,
    "dcp-async": distributed_async,
    "moonclip": moonclip,
}


def make(name: str, place: Path, *, deletes: bool, rest_s: float | None = None) -> Contender:
    if name in OURS:
        return Ours(place, name, deletes=deletes, rest_s=rest_s).contender()
    return OTHERS[name](place)


class Bound:
    """The least that this memory and this disk allow: a copy, and direct writes."""

    def __init__(self, place: Path) -> None:
        self.path = place / "bound"
        self.memory = mmap.mmap(-1, PIECE)
        self.pool = ThreadPoolExecutor(4)
        self.copies: list[float] = []
        self.writes: list[float] = []

    def take_turn(self, state: State) -> None:
        tensors = list(state.flat().values())
        length = -(-sum(tensor.nbytes for tensor in tensors) // PIECE) * PIECE
        if len(self.memory) < length:
            self.memory = mmap.mmap(-1, length)
            self.memory.madvise(mmap.MADV_HUGEPAGE)
            self.path.write_bytes(b"")
            descriptor = os.open(self.path, os.O_WRONLY)
            os.posix_fallocate(descriptor, 0, length)
            os.close(descriptor)
        begun = time.perf_counter()
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for tensor in tensors:
            ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
            at += tensor.nbytes
        copied = time.perf_counter()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        with memoryview(self.memory) as view:

            def write(offset: int) -> None:
                with view[offset : offset + PIECE] as piece:
                    written = os.pwrite(descriptor, piece, offset)
                    assert written == PIECE, "the disk takes a piece at once"

            list(self.pool.map(write, range(0, length, PIECE)))
            os.fsync(descriptor)
        os.close(descriptor)
        self.copies.append(copied - begun)
        self.writes.append(time.perf_counter() - copied)


def status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(name)


def written_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


@contextmanager
def timed(contender: Contender, figure: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    contender.figures.setdefault(figure, []).append(time.perf_counter() - begun)


def measure_states(
    states: Iterator[tuple[str, State]],
    names: list[str],
    rounds: int,
    directory: Path,
    rest_s_per_gb: float,
) -> None:
    for words, state in states:
        print(f"\n{words}")
        print(
            f"{'':21}{'seconds: stall':>14}{'durable':>8}{'after':>7}{'extra MB':>9}{'written':>8}   ", end=""
        )
        print(f"{'stall / copy':>20}{'durable / write':>20}{'/ copy and write':>20}")
        rest_s = rest_s_per_gb * sum(tensor.nbytes for tensor in state.flat().values()) / 1e9
        for name in names:
            place = Path(tempfile.mkdtemp(dir=directory))
            bound, contender = Bound(place), make(name, place, deletes=False, rest_s=rest_s)
            try:
                for number in range(WARM_UPS + rounds):
                    take_turns(state, bound, contender, number, rest_s)
            finally:
                contender.close()
                shutil.rmtree(place)
            show(contender, bound)


def states_of(sizes: list[int], counts: list[int], frozen: list[int]) -> Iterator[tuple[str, State]]:
    for megabytes in sizes:
        for count in counts:
            yield f"{megabytes} MB in {count} tensors", State.of(megabytes, count // 2)
    for megabytes in frozen:
        changes = 2 * ADAPTER_MEGABYTES
        yield f"{megabytes} MB frozen, and {changes} MB that change", State.of_adapter(megabytes)


def take_turns(state: State, bound: Bound, contender: Contender, number: int, rest_s: float) -> None:
    turns = [lambda: bound.take_turn(state), lambda: measure(contender, state, rest_s)]
    for turn in turns if number % 2 else reversed(turns):
        state.step()
        turn()
    if number + 1 == WARM_UPS:
        bound.copies, bound.writes = [], []
        contender.figures = {"extra": contender.figures["extra"]}


def measure(contender: Contender, state: State, rest_s: float) -> None:
    if "extra" not in contender.figures:
        before, peaks = status_kb("VmRSS"), []
        for _ in range(FIRST_SAVES):
            Path("/proc/self/clear_refs").write_text("5")
            contender.save(state)
            if contender.before_step is not None:
                time.sleep(rest_s)
                contender.before_step()
            contender.settle()
            peaks.append(status_kb("VmHWM"))
            state.step()
        contender.figures["extra"] = [(max(peaks) - before) / 1000]
        return
    written = written_bytes()
    with timed(contender, "durable"):
        with timed(contender, "stall"):
            contender.save(state)
        if contender.before_step is not None:
            time.sleep(rest_s)
            with timed(contender, "fence"):
                contender.before_step()
            contender.figures["stall"][-1] += contender.figures["fence"][-1]
        contender.settle()
    contender.figures.setdefault("written", []).append((written_bytes() - written) / 1e6)
    if contender.after is not None:
        with timed(contender, "after"):
            contender.after()


def quarters(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def show(contender: Contender, bound: Bound) -> None:
    figures = contender.figures
    stall, durable = figures["stall"], figures["durable"]
    after = f"{statistics.mean(figures['after']):7.3f}" if "after" in figures else f"{'':7}"
    both = [copy + write for copy, write in zip(bound.copies, bound.writes, strict=True)]
    ratios = [(stall, bound.copies), (durable, bound.writes), (durable, both)]
    line = f"{contender.name:21}{statistics.median(stall):14.4f}{statistics.median(durable):8.3f}{after}"
    line += f"{figures['extra'][0]:9.0f}{statistics.median(figures['written']):8.1f}   "
    for ours, least in ratios:
        line += f"{quarters([a / b for a, b in zip(ours, least, strict=True)]):>20}"
    copy, write = statistics.median(bound.copies), statistics.median(bound.writes)
    print(f"{line}   of {copy:.3f}, {write:.3f}", flush=True)


# The loop.


class Loop:
    """An MLP of 25 million parameters in training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(5) for layer in (nn.Linear(2240, 2240), nn.ReLU())]
        self.net = nn.Sequential(*layers)
        self.batch = torch.randn(128, 2240)
        optimizer = torch.optim.AdamW(self.net.parameters())
        optimizer.register_step_pre_hook(lambda *_: self.fence())  # type: ignore[arg-type]
        self.state = State(nn.ParameterList(self.net.parameters()), optimizer)
        self.saving: Contender | None = None

    def fence(self) -> None:
        if self.saving is not None and self.saving.before_step is not None:
            self.saving.before_step()

    def step(self) -> None:
        self.net(self.batch).square().mean().backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()

    def stretch(self, steps: int, interval: int, contender: Contender | None) -> float:
        """Return the seconds of the steps, with a save before each `interval` of them and all durable at the end."""
        self.saving = contender
        begun = time.perf_counter()
        for number in range(steps):
            if contender is not None and number % interval == 0:
                contender.save(self.state)
            self.step()
        if contender is not None:
            contender.settle()
        taken = time.perf_counter() - begun
        self.saving = None
        return taken


def measure_loop(names: list[str], intervals: list[int], pairs: int, directory: Path) -> None:
    loop = Loop()
    for _ in range(3):
        loop.step()
    print(
        f"\ntraining loop, 25 million parameters: how much longer steps take in %, {pairs} pairs of stretches"
    )
    for name in names:
        place = Path(tempfile.mkdtemp(dir=directory))
        contender = make(name, place, deletes=True)
        try:
            loop.stretch(WARM_UPS, 1, contender)
            for interval in intervals:
                measure_interval(loop, contender, interval, pairs)
        finally:
            contender.close()
            shutil.rmtree(place)


def measure_interval(loop: Loop, contender: Contender, interval: int, pairs: int) -> None:
    steps = STRETCH_STEPS.get(interval, interval)
    before = loop.stretch(steps, interval, None)
    longer: list[float] = []
    for _ in range(pairs):
        saving = loop.stretch(steps, interval, contender)
        after = loop.stretch(steps, interval, None)
        longer.append(100 * (2 * saving / (before + after) - 1))
        before = after
    line = f"{contender.name:21} a save every {interval:2} steps: {quarters(longer):>24} %"
    print(f"{line}   of {1000 * before / steps:.0f} ms a step", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000], help="megabytes of state")
    parser.add_argument("--tensors", type=int, nargs="*", default=[16, 2000, 8000], help="how many they are")
    parser.add_argument(
        "--frozen", type=int, nargs="*", default=[1000], help="megabytes of a base that is not trained"
    )
    parser.add_argument(
        "--rest", type=float, default=0.15, help="seconds of forward and backward for each GB of state"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--pairs", type=int, default=5, help="of stretches of the training loop; 0 leaves it out"
    )
    parser.add_argument("--only", nargs="*", choices=[*OURS, *OTHERS], default=[*OURS, *OTHERS])
    parser.add_argument("--intervals", type=int, nargs="*", default=[1, 5, 20], help="steps between saves")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # One process, and a checkpoint written over.
    warnings.filterwarnings("ignore", module="torch.distributed")
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print("command: " + " ".join([Path(sys.executable).name, *sys.argv]))
    names = list(arguments.only)
    if "moonclip" in names and importlib.util.find_spec("moonclip") is None:
        names.remove("moonclip")
        print("Moonclip is left out: it is not installed (pip install moonclip==0.3.1)")
    states = states_of(arguments.sizes, arguments.tensors, arguments.frozen)
    measure_states(states, names, arguments.rounds, arguments.directory, arguments.rest)
    if arguments.pairs:
        measure_loop(names, arguments.intervals, arguments.pairs, arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
