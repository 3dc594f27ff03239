"""The training that the stories kill: small, random in every way, watched by a witness of its own.

200 items; each is built from its index and one draw each of python, numpy's global generator, a numpy
generator that the data set holds, and torch. Batches of 4, shuffled, 3 epochs of 50 steps. A two-layer net
with batch norm and dropout, AdamW with two groups, warm-up and cosine stepped after every batch.

Touches: the run directory through Unbroken (or nothing, with ``--plain``), and the trace file: one line for
each step, appended by one write, hashed here with hashlib. What the tests judge by is that file.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

FEATURES = 10
CLASSES = 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True)
    add("--trace", type=Path, required=True)
    add("--plain", action="store_true", help="the same loop without Unbroken")
    add("--data", choices=["native", "keyed"], default="native")
    add("--seed", type=int, default=5)
    add("--workers", type=int, default=0)
    add("--persistent", action="store_true")
    add(
        "--reseed-workers",
        action="store_true",
        help="a worker_init_fn that seeds the data set's own generator",
    )
    add("--items", type=int, default=200)
    add("--swap", action="store_true", help="exchange the content of two items")
    add("--fingerprint", action="store_true", help="tell the run what the data is")
    add("--epochs", type=int, default=3)
    add("--total", type=int, default=150, help="length of the schedule in steps")
    add("--checkpoint", type=int, default=7, help="a checkpoint every so many steps; 0: at epoch ends only")
    add("--journal", default="full")
    add("--order", default="model,optimizer,scheduler,loader,run", help="what is constructed when")
    add("--draw-before", type=int, default=0, help="numbers to draw from every generator before training")
    add("--reseed", action="store_true", help="call the seed function after everything is constructed")
    add("--schedule", choices=["sequential", "lambda"], default="sequential")
    add("--accumulate", type=int, default=1)
    add("--scaler", action="store_true")
    add("--evaluate", action="store_true", help="after each epoch, with draws of its own")
    add("--weight-decay", type=float, default=0.1)
    add("--hidden", type=int, default=24)
    add("--rename", action="store_true", help="give one layer another name")
    add("--double", action="store_true", help="float64 parameters")
    add("--allow", default="", help="refusals to override, comma between")
    add("--slow-ms", type=float, default=0, help="time that an item takes to load")
    add("--pause-ms", type=float, default=0, help="time that a step takes besides the work")
    add("--on-full", default="stop", help="what to do when the disk is full")
    add("--save", default="background", help="whether training goes on while a checkpoint is written")
    add("--keep", type=int, default=3)
    add("--walltime", default=None)
    add("--requeue-code", type=int, default=75)
    add(
        "--kill",
        default=None,
        metavar="WHEN:PLACE",
        help="SIGKILL at a step (or epoch); before, body, after, epoch-end",
    )
    add("--signal", default=None, metavar="WHEN:PLACE:NAME:TO", help="a signal to `self` or to the `group`")
    add("--leave", type=int, default=0, help="end the program after this step, as if that were all")
    add("--extra-state", action="store_true", help="keep values of every type and check them after a resume")
    add("--forbid-pickle", action="store_true", help="die of any use of pickle between start and end")
    return parser.parse_args(arguments)


# The data


class Items(Dataset[dict[str, torch.Tensor]]):
    """Items that no two epochs see alike."""

    def __init__(self, length: int, *, swap: bool, slow_ms: float) -> None:
        table = np.random.Generator(np.random.PCG64(3))
        self.features = table.standard_normal((max(length, 200), FEATURES - 4))[:length].astype(np.float32)
        self.labels = (self.features[:, 0] * 2 + self.features[:, 1] > 0).astype(np.int64) + (
            self.features[:, 2] > 0.8
        )
        if swap:
            self.features[[3, 17]] = self.features[[17, 3]]
        self.slow_s = slow_ms / 1000
        self.generator = np.random.default_rng(11)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.slow_s:
            time.sleep(self.slow_s)
        draws = [
            random.random(),
            float(np.random.random()),
            self.generator.random(),
            float(torch.rand((), dtype=torch.float64)),
        ]
        x = np.concatenate([self.features[index], np.array(draws, np.float32) - 0.5])
        return {
            "index": torch.tensor(index),
            "draws": torch.tensor(draws, dtype=torch.float64),
            "x": torch.from_numpy(x),
            "y": torch.tensor(int(self.labels[index])),
        }


def seed_worker(worker: int) -> None:
    """What PyTorch's own documentation tells people to do for generators that a data set holds."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Items)
    info.dataset.generator = np.random.default_rng(info.seed)


# The training


class Net(nn.Module):
    def __init__(self, hidden: int, *, rename: bool) -> None:
        super().__init__()
        first = nn.Linear(FEATURES, hidden)
        if rename:
            self.entry = first
        else:
            self.first = first
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.entry if hasattr(self, "entry") else self.first
        return self.last(self.drop(torch.relu(self.norm(first(x)))))


def build_optimizer(net: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    weights = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "lr": 0.02},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def build_scheduler(
    opt: torch.optim.Optimizer, kind: str, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if kind == "lambda":
        return schedulers.LambdaLR(opt, [lambda k: 0.97 ** (k % 40), lambda k: 1 / (1 + k / total)])
    warm_up = schedulers.LinearLR(opt, 0.1, total_iters=10)
    cosine = schedulers.CosineAnnealingLR(opt, total - 10)
    return schedulers.SequentialLR(opt, [warm_up, cosine], [10])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw(count: int) -> None:
    for _ in range(count):
        random.random()
        np.random.random()
        torch.rand(3)


# The witness


def feed(digest: Any, value: Any) -> None:
    """Hash a value with its types, its order and its bits."""
    digest.update(type(value).__name__.encode() + b"\0")
    match value:
        case torch.Tensor():
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        case np.ndarray() | np.generic():
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        case dict():
            for key, item in value.items():
                feed(digest, key)
                feed(digest, item)
        case list() | tuple():
            digest.update(struct.pack("<q", len(value)))
            for item in value:
                feed(digest, item)
        case float():
            digest.update(struct.pack("<d", value))
        case _:
            digest.update(repr(value).encode() + b"\0")


def hashed(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=12)
    feed(digest, value)
    return digest.hexdigest()


class Witness:
    """Appends what the training does to the trace file, one write a line."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # A kill from outside may cut a write at a page's end. What the line told is executed again.
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        os.ftruncate(self._file, content.rfind(b"\n") + 1)

    def write(self, **fields: Any) -> None:
        os.write(self._file, (json.dumps({**fields, "pid": os.getpid()}) + "\n").encode())


def generators() -> list[Any]:
    return [repr(random.getstate()), np.random.get_state(), torch.get_rng_state()]


def die_at(plan: str | None, when: int, place: str) -> None:
    if plan == f"{when}:{place}":
        os.kill(os.getpid(), signal.SIGKILL)


def signal_at(plan: str | None, when: int, place: str) -> None:
    if plan is not None and plan.startswith(f"{when}:{place}:"):
        name, to = plan.split(":")[2:]
        number = signal.Signals[f"SIG{name}"]
        if to == "group":
            os.killpg(os.getpgrp(), number)
        else:
            os.kill(os.getpid(), number)


def forbid_pickle() -> None:
    import pickle

    def refuse(*_: object, **__: object) -> Any:
        raise RuntimeError("pickle is used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        setattr(pickle, name, refuse)
    torch.save = torch.load = refuse


# The same loop without Unbroken


class PlainRun:
    """What the loop needs of a run, and nothing more."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def epochs(self, count: int) -> range:
        return range(count)

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        return iter(loader)

    def log(self, **_: object) -> None:
        pass

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        yield
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def open_run(options: argparse.Namespace, parts: dict[str, Any], data: Items) -> Any:
    if options.plain:
        return PlainRun()
    import unbroken
    from unbroken.policy import Policy

    more: dict[str, Any] = {}
    if options.fingerprint:
        more["data_fingerprint"] = hashed(data.features)
    if options.walltime:
        more["walltime"] = options.walltime
    if options.requeue_code != 75:
        more["requeue_code"] = options.requeue_code
    if options.allow:
        more["allow"] = options.allow.split(",")
    checkpoint: Any = options.checkpoint or Policy(epoch_ends=True)
    return unbroken.Run(
        options.run,
        seed=options.seed,
        data=options.data,
        journal=options.journal,
        checkpoint=checkpoint,
        keep=options.keep,
        on_full=options.on_full,
        save=options.save,
        **parts,
        **more,
    )


def extra_state() -> dict[str, Any]:
    """Return values of every type a program keeps, the same each time."""
    legacy = np.random.RandomState(4)
    legacy.standard_normal()  # Leaves a cached second normal in the state.
    python = random.Random(4)
    python.gauss()
    return {
        "legacy": legacy.get_state(),
        "generator": np.random.Generator(np.random.Philox(4)).bit_generator.state,
        "python": python.getstate(),
        "scalars": (np.float32(0.1), np.int64(-3), np.bool_(True), np.float64("nan")),
        "nested": {
            "list": [1, (2, None, [3.5])],
            7: {"set": {1, 2}},
            (1, "a"): b"bytes",
            None: complex(0, -0.0),
        },
        "large": 2**80,
        "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
        "point": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    if options.forbid_pickle:
        forbid_pickle()
    witness = Witness(options.trace)
    seed_all(options.seed)
    data = Items(options.items, swap=options.swap, slow_ms=options.slow_ms)
    parts: dict[str, Any] = {}
    made: dict[str, Any] = {}

    def build(name: str) -> Any:
        match name:
            case "model":
                net = Net(options.hidden, rename=options.rename)
                return net.double() if options.double else net
            case "optimizer":
                return build_optimizer(made["model"], options.weight_decay)
            case "scheduler":
                return build_scheduler(made["optimizer"], options.schedule, options.total)
            case "loader":
                return DataLoader(
                    data,
                    4,
                    shuffle=True,
                    num_workers=options.workers,
                    persistent_workers=options.persistent,
                    worker_init_fn=seed_worker if options.reseed_workers else None,
                )
            case _:
                return open_run(options, parts, data)

    if options.scaler:
        made["scaler"] = parts["scaler"] = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    for name in options.order.split(","):
        made[name] = build(name)
        if name in ("run", "loader"):
            continue
        parts[name] = made[name]
        if "run" in made and not options.plain:
            made["run"].track(**{name: made[name]})
    draw(options.draw_before)
    if options.reseed:
        seed_all(options.seed + 1)
    train(options, made, data, witness)


def train(options: argparse.Namespace, made: dict[str, Any], data: Items, witness: Witness) -> None:
    run, net, opt = made["run"], made["model"], made["optimizer"]
    sched, scaler = made["scheduler"], made.get("scaler")
    run.state.setdefault("steps", 0)
    if options.extra_state:
        run.state.setdefault("extra", extra_state())

    def update() -> None:
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        opt.zero_grad()
        sched.step()

    for epoch in run.epochs(options.epochs):
        for batch in run.batches(made["loader"]):
            step = run.state["steps"] + 1
            if options.extra_state and hashed(run.state["extra"]) != hashed(extra_state()):
                raise RuntimeError("a value came back as another")
            die_at(options.kill, step, "before")
            signal_at(options.signal, step, "before")
            x = batch["x"].double() if options.double else batch["x"]
            loss = nn.functional.cross_entropy(net(x), batch["y"]) / options.accumulate
            if options.scaler and step <= 4:
                loss = loss * float("inf")
            (loss if scaler is None else scaler.scale(loss)).backward()
            die_at(options.kill, step, "body")
            signal_at(options.signal, step, "body")
            if options.pause_ms:
                time.sleep(options.pause_ms / 1000)
            run.state["steps"] = step
            if step % options.accumulate == 0:
                update()
            run.log(loss=loss, rate=sched.get_last_lr()[0])
            witness.write(
                step=step,
                epoch=epoch,
                indices=batch["index"].tolist(),
                draws=batch["draws"].tolist(),
                batch=hashed(batch),
                loss=loss.detach().numpy().tobytes().hex(),
                rates=[struct.pack("<d", float(group["lr"])).hex() for group in opt.param_groups],
                model=hashed(dict(net.state_dict())),
                gradients=hashed([p.grad for p in net.parameters()]),
                optimizer=hashed(opt.state_dict()),
                scheduler=[sched.last_epoch, struct.pack("<d", float(sched.get_last_lr()[0])).hex()],
                scaler=None if scaler is None else scaler.state_dict(),
                generators=hashed(generators()),
                held=hashed(data.generator.bit_generator.state),
            )
            die_at(options.kill, step, "after")
            signal_at(options.signal, step, "after")
            if step == options.leave:
                return
        if options.evaluate:
            with run.aside():
                evaluate(net, data, epoch, options)
        witness.write(
            epoch_end=epoch,
            model=hashed(dict(net.state_dict())),
            optimizer=hashed(opt.state_dict()),
            generators=hashed(generators()),
            held=hashed(data.generator.bit_generator.state),
        )
        die_at(options.kill, epoch, "epoch-end")
        signal_at(options.signal, epoch, "epoch-end")
    witness.write(
        final=run.state["steps"],
        model=hashed(dict(net.state_dict())),
        optimizer=hashed(opt.state_dict()),
        generators=hashed(generators()),
    )


def evaluate(net: nn.Module, data: Items, epoch: int, options: argparse.Namespace) -> float:
    """Return the mean loss on random items with random noise; may die or send a signal half-way."""
    net.eval()
    total = 0.0
    with torch.no_grad():
        for number in range(12):
            if number == 6:
                die_at(options.kill, epoch, "evaluation")
                signal_at(options.signal, epoch, "evaluation")
            index = random.randrange(len(data))
            x = torch.from_numpy(
                np.concatenate([data.features[index], np.random.random(4).astype(np.float32)])
            )
            x = (x + 0.01 * torch.randn(FEATURES))[None]
            y = torch.tensor([int(data.labels[index])])
            total += float(nn.functional.cross_entropy(net(x.double() if options.double else x), y))
    net.train()
    return total / 12


if __name__ == "__main__":
    main()
