"""Runs a loader the way a training does and writes down everything that must be the same after a kill.

A kill is played in one process: the state at a boundary goes through bytes, every generator is disturbed, the
program's objects are built again, and the rest of the run is compared with the uninterrupted one.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unbroken import _core
from unbroken.torch import rng
from unbroken.torch.data import Session

Make = Callable[[], DataLoader]
Key = tuple[int, int]


class Items(Dataset):
    """Each item is its index and one draw from every kind of generator, its own ones included."""

    def __init__(self, length: int = 22) -> None:
        self.length = length
        self.own_numpy = np.random.default_rng(5)
        self.own = {"python": random.Random(6), "torch": [torch.Generator().manual_seed(7)]}
        self.count = 0
        self.recent: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.count += 1
        self.recent = [*self.recent[-3:], index]
        info = get_worker_info()
        place = (-1, -1) if info is None else (info.id, info.seed % 2**31)
        draws = [
            random.random(),
            random.gauss(0, 1),
            float(np.random.randn()),
            float(self.own_numpy.standard_normal()),
            self.own["python"].random(),
            float(torch.rand(1, generator=self.own["torch"][0])),
            float(torch.randn(1)),
            float(self.count),
            float(sum(self.recent)),
        ]
        return {"index": torch.tensor(index), "draws": torch.tensor(draws), "place": torch.tensor(place)}


class Pure(Dataset):
    """Items that draw from the global generators only and change nothing."""

    def __init__(self, length: int = 22) -> None:
        self.length = length
        self.own = np.random.default_rng(5)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [index, random.random(), np.random.randn(), float(torch.randn(1)), self.own.standard_normal()]
        return torch.tensor(draws, dtype=torch.float64)


def batch_bytes(batch: Any) -> bytes:
    if isinstance(batch, torch.Tensor):
        return str(batch.dtype).encode() + batch.contiguous().numpy().tobytes()
    if isinstance(batch, dict):
        return b"".join(str(key).encode() + batch_bytes(part) for key, part in batch.items())
    if isinstance(batch, list | tuple):
        return b"".join(batch_bytes(part) for part in batch)
    return repr(batch).encode()


def seed_everything() -> None:
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)


def disturb() -> None:
    random.seed(91)
    np.random.seed(92)
    np.random.randn()
    torch.manual_seed(93)
    torch.randn(5)


def train_on(loader: DataLoader, batch: Any) -> tuple:
    """Draw as dropout and a user's own code would, between two batches."""
    drawn = [float(torch.rand(1)), random.random(), float(np.random.randn())]
    if loader.generator is not None:
        drawn.append(float(torch.rand(1, generator=loader.generator)))
    react = getattr(loader, "react", None)
    if react is not None:
        react(drawn[0], batch)
    return tuple(drawn)


def generators(loader: DataLoader) -> tuple:
    own = () if loader.generator is None else (rng.generator_digest(loader.generator),)
    return (*(digest for _, digest in rng.digests()), *own)


@dataclass
class Trace:
    """One run: what each step saw, and the states at its boundaries."""

    steps: dict[Key, tuple] = field(default_factory=dict)
    states: dict[tuple[int, int | str], bytes] = field(default_factory=dict)


def plain(make: Make, epochs: int, breaks: dict[int, int] | None = None) -> dict[Key, tuple]:
    """Run the loader without us."""
    seed_everything()
    loader = make()
    steps = {}
    for epoch in range(epochs):
        before_epoch(loader, epoch)
        for position, batch in enumerate(loader):
            seen = generators(loader)
            steps[epoch, position] = (batch_bytes(batch), seen, train_on(loader, batch), generators(loader))
            if (breaks or {}).get(epoch) == position:
                break
    return steps


def before_epoch(loader: DataLoader, epoch: int) -> None:
    things: tuple[Any, ...] = (loader.sampler, loader.batch_sampler, loader.dataset)
    for thing in things:
        if hasattr(thing, "set_epoch"):
            thing.set_epoch(epoch)


def turn(
    session: Session,
    loader: DataLoader,
    trace: Trace,
    *,
    epoch: int,
    epochs: int,
    breaks: dict[int, int],
    save: bool,
) -> None:
    """Run an opened epoch to its end, then the epochs after it."""
    while True:
        try:
            while True:
                batch = session.next()
                key = (epoch, session.position - 1)
                seen = generators(loader)
                trace.steps[key] = (batch_bytes(batch), seen, train_on(loader, batch), generators(loader))
                trace.steps[key] += (session.indices_digest,)
                if save:
                    trace.states[epoch, session.position] = boundary(session)
                if breaks.get(epoch) == session.position - 1:
                    session.abandon()
                    break
        except StopIteration:
            pass
        if save:
            trace.states[epoch, "end"] = boundary(session)
        epoch += 1
        if epoch == epochs:
            return
        before_epoch(loader, epoch)
        session.open(epoch)


def boundary(session: Session) -> bytes:
    before = rng.digests()
    state = session.state()
    assert rng.digests() == before, "taking a state moves nothing"
    return _core.encode({"session": state, "generators": rng.capture()})


def wrapped(make: Make, epochs: int, breaks: dict[int, int] | None = None, mode: Any = "native") -> Trace:
    """Run the loader in a session, and keep the state of every boundary."""
    seed_everything()
    loader = make()
    session = Session(loader, name="loader", mode=mode, seed=3)
    trace = Trace()
    before_epoch(loader, 0)
    session.open(0)
    turn(session, loader, trace, epoch=0, epochs=epochs, breaks=breaks or {}, save=True)
    session.close()
    return trace


def resumed(
    make: Make,
    state: bytes,
    at: tuple[int, int | str],
    epochs: int,
    breaks: dict[int, int] | None = None,
    mode: Any = "native",
    save: bool = False,
) -> Trace:
    """Build everything again under disturbed generators and run the rest from a state."""
    epoch, position = at
    kept = _core.decode(state)
    disturb()
    loader = make()
    trace = Trace()
    if position == "end":
        if epoch + 1 == epochs:
            return trace
        # Between epochs a run restores the generators before the user's next epoch begins.
        rng.restore(kept["generators"])
        before_epoch(loader, epoch + 1)
        session = Session(loader, name="loader", mode=mode, seed=3)
        session.restore(kept["session"])
        session.open(epoch + 1)
        epoch += 1
    else:
        before_epoch(loader, epoch)
        session = Session(loader, name="loader", mode=mode, seed=3)
        session.restore(kept["session"])
        before = rng.digests()
        session.open(epoch)
        assert rng.digests() == before, "a resumed open moves no global generator"
        assert session.position == position
        rng.restore(kept["generators"])
        if (breaks or {}).get(epoch) == session.position - 1:
            session.abandon()
    turn(session, loader, trace, epoch=epoch, epochs=epochs, breaks=breaks or {}, save=save)
    session.close()
    return trace


def rest(steps: dict[Key, tuple], at: tuple[int, int | str]) -> dict[Key, tuple]:
    epoch, position = at
    first = (epoch + 1, 0) if position == "end" else (epoch, position)
    return {key: step for key, step in steps.items() if key >= first}  # pyright: ignore[reportOperatorIssue]


def differences(expected: dict[Key, tuple], found: dict[Key, tuple]) -> list[str]:
    names = ("batch", "generators at the batch", "draws", "generators after", "indices")
    lines = (
        [f"steps {sorted(expected.keys() ^ found.keys())} are in one only"]
        if expected.keys() != found.keys()
        else []
    )
    for key in sorted(expected.keys() & found.keys()):
        for name, left, right in zip(names, expected[key], found[key], strict=False):
            if left != right:
                lines.append(f"step {key}: {name}")
    return lines


def kill_points(trace: Trace, epoch_full: int, epoch_last: int) -> Iterator[tuple[int, int | str]]:
    """First step, mid-epoch, last of an epoch, after it, first of the next."""
    points = list(trace.states)
    in_first = [p for p in points if p[0] == epoch_full and p[1] != "end"]
    in_last = [p for p in points if p[0] == epoch_last and p[1] != "end"]
    wanted = [in_first[0], in_first[len(in_first) // 2], in_first[-1], (epoch_full, "end"), in_last[0]]
    yield from dict.fromkeys(wanted)


def check_exact(
    make: Make, trace: Trace, *, epochs: int, breaks: dict[int, int] | None = None, mode: Any = "native"
) -> None:
    """Kill at each kind of point, and once more after the first resume; compare everything."""
    for at in kill_points(trace, 0, epochs - 1):
        again = resumed(make, trace.states[at], at, epochs, breaks, mode)
        assert differences(rest(trace.steps, at), again.steps) == [], f"killed at {at}"
    check_twice(make, trace, epochs, breaks, mode)


def check_twice(make: Make, trace: Trace, epochs: int, breaks: dict[int, int] | None, mode: Any) -> None:
    points = [p for p in trace.states if p[0] == epochs - 1 and p[1] != "end"]
    if len(points) < 3:
        return
    first, second = points[0], points[2]
    middle = resumed(make, trace.states[first], first, epochs, breaks, mode, save=True)
    last = resumed(make, middle.states[second], second, epochs, breaks, mode)
    assert differences(rest(trace.steps, second), last.steps) == [], f"killed at {first}, then at {second}"


def check_same_as_plain(
    make: Make, trace: Trace, *, epochs: int, breaks: dict[int, int] | None = None
) -> None:
    """Compare a wrapped run with one that never heard of us."""
    found = {key: step[:4] for key, step in trace.steps.items()}
    assert differences(plain(make, epochs, breaks), found) == []
