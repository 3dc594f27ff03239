"""Every shape of the user's loop resumes exactly: breaks, several loops an epoch, loops beside loops, no epochs.

Each shape is trained once without interruption, and again in lives that end at chosen steps by an exception that
nothing catches; each life builds everything anew, under other generators. What the lives saw, the last life's word
counting for a step done twice, must be what the uninterrupted run saw. Real processes and real kills are in `stories/`.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unbroken

Trace = dict[int, tuple[str, str, str]]


class Killed(Exception):
    """The life ends here."""


class Noisy(Dataset[torch.Tensor]):
    """Items made of their index and a draw from each global generator."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [float(index), random.random(), float(np.random.rand()), torch.rand(()).item()]
        return torch.tensor(draws)


@dataclass
class World:
    """One life: a model, an optimizer, a run, and what it saw."""

    path: Path
    kill_at: int | None
    data: Any
    seed: int
    trace: Trace = field(default_factory=dict)
    loaders: dict[str, DataLoader[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.run = unbroken.Run(
            self.path,
            seed=3,
            data=self.data,
            model=self.net,
            optimizer=self.optimizer,
            checkpoint=3,
            quiet=True,
        )

    def loader(self, length: int = 24, workers: int = 0, **options: Any) -> DataLoader[torch.Tensor]:
        return DataLoader(Noisy(length), batch_size=4, shuffle=True, num_workers=workers, **options)

    def train(self, batch: torch.Tensor) -> None:
        """One step, as the user would write it; ends the life in the middle of the step that is to be the last."""
        step = self.run.step + 1
        self.optimizer.zero_grad()
        loss = self.net(batch).square().mean() + 0.01 * random.random() + 0.01 * float(np.random.rand())
        loss.backward()
        self.optimizer.step()
        self.run.log(loss=loss)
        self.trace[step] = (_hash(batch), repr(loss.item()), _hash(*self.net.state_dict().values()))
        if step == self.kill_at:
            raise Killed


def _hash(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def plain(world: World) -> None:
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(batch)


def early_break(world: World) -> None:
    for epoch in world.run.epochs(4):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(batch)
            if world.run.position == 2 + epoch:
                break
        torch.rand(3)


def two_loops_an_epoch(world: World) -> None:
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(batch)
        torch.rand(1)
        for batch in world.run.batches(world.loaders["b"]):
            world.train(batch)


def the_same_loader_twice_an_epoch(world: World) -> None:
    for _ in world.run.epochs(2):
        for _ in range(2):
            for batch in world.run.batches(world.loaders["a"]):
                world.train(batch)


def break_then_another_loop(world: World) -> None:
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(batch)
            if world.run.position == 2:
                break
        for batch in world.run.batches(world.loaders["b"]):
            world.train(batch)


def zipped_loops(world: World) -> None:
    for _ in world.run.epochs(3):
        for first, second in zip(
            world.run.batches(world.loaders["a"]), world.run.batches(world.loaders["b"]), strict=False
        ):
            world.train(torch.cat([first, second]))


def a_stream_beside_the_loop(world: World) -> None:
    stream = world.run.stream(world.loaders["b"])
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(torch.cat([batch, next(stream)]))


def steps_without_epochs(world: World) -> None:
    for batch in world.run.batches(world.loaders["a"], until_step=17):
        world.train(batch)


def alternating_loaders(world: World) -> None:
    for epoch in world.run.epochs(4):
        name = "ab"[epoch % 2]
        for batch in world.run.batches(world.loaders[name], name=name):
            world.train(batch)


def a_new_loader_every_epoch(world: World) -> None:
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loader()):
            world.train(batch)


def counted_with_enumerate(world: World) -> None:
    for _ in world.run.epochs(2):
        for position, batch in world.run.enumerate(world.loaders["a"]):
            world.train(batch + position)


def evaluation_aside(world: World) -> None:
    for _ in world.run.epochs(3):
        for batch in world.run.batches(world.loaders["a"]):
            world.train(batch)
        with world.run.aside():
            world.net.eval()
            for batch in world.loader(8):
                world.net(batch)
            random.random()


SHAPES: list[Callable[[World], None]] = [
    plain,
    early_break,
    two_loops_an_epoch,
    the_same_loader_twice_an_epoch,
    break_then_another_loop,
    zipped_loops,
    a_stream_beside_the_loop,
    steps_without_epochs,
    alternating_loaders,
    a_new_loader_every_epoch,
    counted_with_enumerate,
    evaluation_aside,
]


def live(
    path: Path, shape: Callable[[World], None], kill_at: int | None, data: str, options: Any, seed: int
) -> Trace:
    world = World(path, kill_at, data, seed)
    world.loaders = {"a": world.loader(24, **options), "b": world.loader(28, **options)}
    try:
        shape(world)
        assert kill_at is None, f"the run ended before step {kill_at}"
        assert world.run.finished
    except Killed:
        pass
    finally:
        world.run.close()
    return world.trace


def lives(
    path: Path, shape: Callable[[World], None], kills: list[int], data: str, options: Any
) -> Iterator[Trace]:
    # The first life begins as the uninterrupted one does; the later ones from generators that must not matter.
    for number, kill_at in enumerate([*kills, None]):
        yield live(path, shape, kill_at, data, options, seed=0 if number == 0 else 100 + number)


def check(path: Path, shape: Callable[[World], None], kills: list[int], data: str, **options: Any) -> None:
    expected = live(path / "whole", shape, None, data, options, seed=0)
    found: Trace = {}
    for trace in lives(path / "killed", shape, kills, data, options):
        found.update(trace)
    assert list(found) and found == expected
    executed = {r["step"]: r["components"] for r in unbroken._core.read_journal(path / "killed")}
    reference = {r["step"]: r["components"] for r in unbroken._core.read_journal(path / "whole")}
    assert executed == reference


@pytest.mark.parametrize("data", ["native", "keyed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_loop_of_any_shape_resumes_exactly(
    tmp_path: Path, shape: Callable[[World], None], data: str
) -> None:
    check(tmp_path, shape, [1, 5, 6, 7, 11], data)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "shape",
    [plain, early_break, zipped_loops, a_stream_beside_the_loop, alternating_loaders],
    ids=lambda s: s.__name__,
)
def test_a_loop_with_workers_resumes_exactly(
    tmp_path: Path, shape: Callable[[World], None], persistent: bool
) -> None:
    check(tmp_path, shape, [2, 8, 9], "native", workers=2, persistent_workers=persistent)


def test_a_generator_that_nobody_draws_from_is_recorded_as_untouched(tmp_path: Path) -> None:
    """A script that seeds torch alone gives equal journals, whatever python's own generator began with."""
    journals = []
    for name, seed in (("one", 1), ("two", 2)):
        world = World(tmp_path / name, None, "native", seed=0)
        random.seed(seed)
        for _ in world.run.epochs(1):
            for batch in world.run.batches(DataLoader(torch.ones(8, 4), batch_size=4, shuffle=True)):  # type: ignore[arg-type]
                world.optimizer.zero_grad()
                world.net(batch).sum().backward()
                world.optimizer.step()
        world.run.close()
        journals.append(unbroken._core.read_journal(tmp_path / name))
    assert journals[0] == journals[1]
    components = dict(journals[0][-1]["components"])
    assert components["rng/python"] == "untouched"
    assert components["rng/torch"] != "untouched"
