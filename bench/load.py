"""How long it takes until a fresh process has its state back: ours, verified, beside others, which verify nothing.

    OMP_NUM_THREADS=1 python bench/load.py [--megabytes N ...] [--rounds N] [--directory DIR] [--json FILE]

A model and its AdamW, in few large tensors or in 6000 small ones, saved once in every format. Each load is a fresh
interpreter with model and optimizer constructed; the clock runs from there until both hold the saved state and every
page of it was written to once, as the first step will: `load_file` maps the file and has read nothing before. Ours is
a whole resume, from `Run(...)` to the first batch: lock, identity, every digest, a new journal segment that is synced,
the loader's place and all generators besides. The others are what their manuals show: `torch.load` (weights only) or
`safetensors.torch.load_file`, then `load_state_dict`; `torch.distributed.checkpoint.load` into the state of a model
and an optimizer that was made to have some. `unbroken.load`, which gives a dict of tensors, is compared with
`torch.load` and `load_file` alone, before `load_state_dict`.

Warm: the files are read once before each load. Cold: the page cache gives up their pages first. All contenders take
turns, so that a machine that slows down slows all; ratios are medians over the rounds of ours to the fastest other one.
One turn is the disk's own: what it takes to read our files past the cache, into memory that is thrown away. Where that
is more than half of what the fastest other one takes, no load of the same bytes can be twice as fast.

Expect: warm at most 1.0, cold at most 0.5.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

FEW, MANY = 8, 1500
"""Parameters; an AdamW has three more tensors for each, two of the parameter's size."""

PAGE_ELEMENTS = 4096 // 4
PIECE = 1 << 20
HUGE = 2 << 20

WHOLE = ("torch.load", "safetensors", "dcp", "unbroken")
DISK = "the disk alone"
DICTS = ("torch.load alone", "load_file alone", "unbroken.load")
OURS = ("unbroken", "unbroken.load")


class Net(nn.Module):
    """Parameters, and nothing that takes time to construct."""

    def __init__(self, count: int, elements: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(elements)) for _ in range(count))


def build(count: int, megabytes: float) -> tuple[Net, torch.optim.AdamW]:
    net = Net(count, int(megabytes * 1e6 / 12 / count))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-3)


def train(net: Net, opt: torch.optim.Optimizer) -> None:
    """Take one step with made-up gradients."""
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    opt.step()
    opt.zero_grad()


# Making the files.


def make(place: Path, count: int, megabytes: float) -> None:
    """Save one state in every format."""
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict_saver import save

    import unbroken

    net, opt = build(count, megabytes)
    run = unbroken.Run(place / "unbroken", seed=1, model=net, optimizer=opt, checkpoint=1, keep=1, quiet=True)
    for _ in run.epochs(1):
        for _ in run.batches(loader()):
            if run.step == 1:
                break
            train(net, opt)
        break
    run.close()
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, place / "state.pt")
    save_file(flat(net, opt), place / "state.safetensors")
    save(dcp_state(net, opt), checkpoint_id=place / "dcp", no_dist=True)


def loader() -> DataLoader[Any]:
    return DataLoader(range(1000), batch_size=10)  # pyright: ignore[reportArgumentType]


def flat(net: Net, opt: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": tensor for name, tensor in net.state_dict().items()}
    for index, state in opt.state_dict()["state"].items():
        tensors.update({f"state/{index}/{name}": tensor for name, tensor in state.items()})
    return tensors


def dcp_state(net: Net, opt: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(net, opt)
    return {"model": model, "optimizer": optimizer}


# Loading them, into the objects or into a dict, whose tensors are returned.


def load_torch(place: Path, net: Net, opt: torch.optim.Optimizer) -> None:
    state = torch.load(place / "state.pt", weights_only=True, mmap=False)
    net.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])


def load_torch_alone(place: Path, net: Net, opt: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    state = torch.load(place / "state.pt", weights_only=True, mmap=False)
    moments = [part for parts in state["optimizer"]["state"].values() for part in parts.values()]
    return [*state["model"].values(), *moments]


def load_safetensors(place: Path, net: Net, opt: torch.optim.Optimizer) -> None:
    from safetensors.torch import load_file

    model, state = {}, {}
    for name, tensor in load_file(place / "state.safetensors").items():
        kind, _, rest = name.partition("/")
        if kind == "model":
            model[rest] = tensor
        else:
            index, _, key = rest.partition("/")
            state.setdefault(int(index), {})[key] = tensor
    net.load_state_dict(model)
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def load_file_alone(place: Path, net: Net, opt: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(place / "state.safetensors").values()


def load_dcp(place: Path, net: Net, opt: torch.optim.Optimizer) -> None:
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    state = dcp_state(net, opt)
    load(state, checkpoint_id=place / "dcp", no_dist=True)
    set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_unbroken(place: Path, net: Net, opt: torch.optim.Optimizer) -> None:
    import unbroken

    run = unbroken.Run(place / "unbroken", seed=1, model=net, optimizer=opt, checkpoint=1, keep=1, quiet=True)
    for _ in run.epochs(1):
        for _ in run.batches(loader()):
            break
        break
    assert run.step == 1, "the run was resumed"


def load_unbroken_dict(place: Path, net: Net, opt: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    import unbroken

    objects = unbroken.load(place / "unbroken")["objects"]
    moments = [part for parts in objects["optimizer"]["state"].values() for part in parts.values()]
    return [*objects["model"]["parameters"].values(), *moments]


def read_past_cache(place: Path, net: Net, opt: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Read all files in pieces, several at a time, as fast as the disk gives them: into memory on huge pages.

    Into ordinary pages a disk may give half as much: a piece is 256 of those, each asked for by itself.
    """
    sizes = {path: path.stat().st_size for path in (place / "unbroken").rglob("*") if path.is_file()}
    pieces = [(path, at) for path, size in sizes.items() for at in range(0, size, PIECE)]
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in sizes}
    memory = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(memory, "bytes"):
            mapped = mmap.mmap(-1, 2 * HUGE)
            mapped.madvise(mmap.MADV_HUGEPAGE)
            start = -ctypes.addressof(ctypes.c_char.from_buffer(mapped)) % HUGE
            memory.bytes = memoryview(mapped)[start : start + PIECE]
        os.preadv(files[piece[0]], [memory.bytes], piece[1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, pieces))
    return ()


Loader = Callable[[Path, Net, torch.optim.Optimizer], Iterable[torch.Tensor] | None]

LOADERS: dict[str, Loader] = {
    "torch.load": load_torch,
    "safetensors": load_safetensors,
    "dcp": load_dcp,
    "unbroken": load_unbroken,
    "torch.load alone": load_torch_alone,
    "load_file alone": load_file_alone,
    "unbroken.load": load_unbroken_dict,
    DISK: read_past_cache,
}

FILES = {
    "torch.load": "state.pt",
    "safetensors": "state.safetensors",
    "dcp": "dcp",
    "unbroken": "unbroken",
    "torch.load alone": "state.pt",
    "load_file alone": "state.safetensors",
    "unbroken.load": "unbroken",
    DISK: "unbroken",
}


def live(options: argparse.Namespace) -> None:
    """One fresh process: make the files, or load from them and print what it took."""
    torch.set_num_threads(1)
    count, megabytes = options.life_count, options.megabytes[0]
    if options.life == "make":
        make(options.directory, count, megabytes)
        return
    net, opt = build(count, megabytes)
    import_first(options.life)
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    loaded = LOADERS[options.life](options.directory, net, opt)
    if loaded is None:
        touch([*net.parameters(), *(part for state in opt.state.values() for part in state.values())])
    else:
        touch(loaded)
    took = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    if options.life in WHOLE:
        check(net, opt)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {"wall_s": took, "cpu_s": cpu, "memory_mb": (after.ru_maxrss - before.ru_maxrss) / 1000}
    print(json.dumps(facts), flush=True)
    os._exit(0)


def import_first(contender: str) -> None:
    """Import what the contender needs: start-up is no part of a load."""
    import torch._dynamo

    if contender in OURS:
        import unbroken.run
        import unbroken.torch.export  # noqa: F401
    elif contender in ("safetensors", "load_file alone"):
        import safetensors.torch  # noqa: F401
    elif contender == "dcp":
        import torch.distributed.checkpoint
        import torch.distributed.checkpoint.state_dict  # noqa: F401


def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Write to each page of each tensor what is there."""
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.view(-1)
            flat[::PAGE_ELEMENTS].mul_(1)
            flat[-1:].mul_(1)


def check(net: Net, opt: torch.optim.Optimizer) -> None:
    """Assert that the last parameter and its moments are as one step of training made them."""
    last = list(net.parameters())[-1]
    state = opt.state[last]
    assert last.any(), "the weights are those of the constructor"
    assert state["exp_avg"].any(), "the first moments are zero"
    assert state["step"].item() == 1, "the step was not loaded"


# Taking turns.


def started(
    options: argparse.Namespace, life: str, place: Path, count: int, megabytes: float
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--life", life, "--life-count", str(count)]
    command += ["--megabytes", str(megabytes), "--directory", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout) if life != "make" else {}


def files_of(place: Path, contender: str) -> list[Path]:
    root = place / FILES[contender]
    return [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]


def set_cache(files: list[Path], *, warm: bool) -> None:
    """Read files once, or make the page cache give up what it has of them."""
    for path in files:
        with path.open("rb") as file:
            if warm:
                while file.read(1 << 24):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options: argparse.Namespace, count: int, megabytes: float) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        started(options, "make", place, count, megabytes)
        for warm in (True, False):
            rounds: list[dict[str, dict[str, Any]]] = []
            for _ in range(options.rounds):
                turn = {}
                for contender in LOADERS:
                    set_cache(files_of(place, contender), warm=warm)
                    turn[contender] = started(options, contender, place, count, megabytes)
                rounds.append(turn)
            row = {"megabytes": megabytes, "tensors": 4 * count, "cache": "warm" if warm else "cold"}
            rows.append({**row, "rounds": rounds})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    rounds = row["rounds"]

    def median(contender: str, fact: str) -> float:
        return statistics.median(turn[contender][fact] for turn in rounds)

    def compared(what: str, ours: str, contenders: tuple[str, ...]) -> None:
        others = [name for name in contenders if name not in OURS]
        words = []
        for fact in ("wall_s", "cpu_s"):
            ratio = statistics.median(
                turn[ours][fact] / min(turn[o][fact] for o in others) for turn in rounds
            )
            words.append(f"{ratio:.2f} of the fastest other one by {fact[:-2]} time")
        print(f"  {what}: {', '.join(words)}")
        for name in contenders:
            print(
                f"    {name:16} {median(name, 'wall_s'):7.3f} s, CPU {median(name, 'cpu_s'):7.3f} s, "
                f"{median(name, 'memory_mb'):5.0f} MB more at the peak"
            )

    print(f"{row['megabytes']:g} MB in {row['tensors']} tensors, {row['cache']}:")
    compared("objects", "unbroken", WHOLE)
    compared("a dict", "unbroken.load", DICTS)
    if row["cache"] == "cold":
        disk = [turn[DISK]["wall_s"] for turn in rounds]
        ours = [turn["unbroken"]["wall_s"] for turn in rounds]
        ratio = statistics.median(one / other for one, other in zip(ours, disk, strict=True))
        print(f"  {DISK}: {statistics.median(disk):.3f} s; all of `Run(...)` takes {ratio:.2f} of it")
    sys.stdout.flush()


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time until a fresh process has its state back.")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100, 1000], help="sizes of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, help="where the files go; by default the temporary directory"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--life", choices=["make", *LOADERS], help=argparse.SUPPRESS)
    parser.add_argument("--life-count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        live(options)
        return
    print(f"{machine()}\n{time.strftime('%Y-%m-%d')}: {' '.join(['python', *sys.argv])}")
    results = [
        row for megabytes in options.megabytes for n in (FEW, MANY) for row in measure(options, n, megabytes)
    ]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
