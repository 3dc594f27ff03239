"""Native mode over iterable data sets: by their state where they have one, by reading again where not."""

import random
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from loader_trace import Trace, check_exact, check_same_as_plain, wrapped
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unbroken.errors import NotExact
from unbroken.torch.data import Session
from unbroken.torch.data.iterable import way_of


class Lines(IterableDataset):
    """Each worker reads a share of its own length and draws from everything."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(3)
        self.read = 0

    def share(self) -> range:
        info = get_worker_info()
        if info is None:
            return range(21)
        return range(100 * info.id, 100 * info.id + (3, 13, 6)[info.id])

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.share())).tolist()
        for turn in order:
            self.read += 1
            yield self.sample(self.share()[turn])

    def sample(self, index: int) -> torch.Tensor:
        draws = [
            index,
            random.random(),
            np.random.randn(),
            float(torch.rand(1)),
            self.own.random(),
            self.read,
        ]
        return torch.tensor(draws, dtype=torch.float64)


class Stateful(Lines):
    """Lines that know where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.share()):
            self.next += 1
            yield self.sample(self.share()[self.next - 1])
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.read = state["next"], state["read"]


def rows(start: int, stop: int) -> Iterator[dict[str, int]]:
    for index in range(start, stop):
        yield {"index": index}


def numbers(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from rows(10 * shard, 10 * shard + 7)


def drawn(row: dict[str, int]) -> dict[str, Any]:
    return {**row, "drawn": random.random()}


def stream(*, buffer: int | None) -> datasets.IterableDataset:
    found = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [0, 1, 2, 3]})
    if buffer is not None:
        found = found.shuffle(seed=4, buffer_size=buffer)
    return found.map(drawn)


def make_loader(data: Any, **options: Any) -> DataLoader:
    options.setdefault("batch_size", 4)
    return DataLoader(data(), **options)


plain_stream = partial(stream, buffer=None)
shuffled_stream = partial(stream, buffer=6)

MAKERS: dict[str, Any] = {
    "no state": partial(make_loader, Lines),
    "no state, drop last": partial(make_loader, Lines, drop_last=True),
    "no state, 3 workers of unequal length": partial(make_loader, Lines, num_workers=3),
    "no state, no batches, 2 workers": partial(make_loader, Lines, num_workers=2, batch_size=None),
    "state": partial(make_loader, Stateful),
    "state, 3 workers of unequal length": partial(make_loader, Stateful, num_workers=3, batch_size=2),
    "state, drop last, 3 workers": partial(make_loader, Stateful, num_workers=3, drop_last=True),
    "state, no batches, 3 workers": partial(
        make_loader, Stateful, num_workers=3, batch_size=None, prefetch_factor=4
    ),
    "no state, 2 persistent workers": partial(make_loader, Lines, num_workers=2, persistent_workers=True),
    "no state, drop last, 3 persistent workers": partial(
        make_loader, Lines, num_workers=3, drop_last=True, persistent_workers=True, batch_size=3
    ),
    "state, no batches, 2 persistent workers": partial(
        make_loader, Stateful, num_workers=2, batch_size=None, persistent_workers=True
    ),
    "Hugging Face stream with a shuffle buffer, 2 persistent workers": partial(
        make_loader, shuffled_stream, num_workers=2, persistent_workers=True
    ),
    "Hugging Face stream": partial(make_loader, plain_stream),
    "Hugging Face stream, 2 workers": partial(make_loader, plain_stream, num_workers=2),
    "Hugging Face stream with a shuffle buffer": partial(make_loader, shuffled_stream),
    "Hugging Face stream with a shuffle buffer, 2 workers": partial(
        make_loader, shuffled_stream, num_workers=2
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes.*:UserWarning")


def epochs_of(name: str) -> int:
    """Return how many epochs show what a loader carries from one to the next."""
    return 3 if "persistent" in name else 2


@cache
def uninterrupted(name: str) -> Trace:
    return wrapped(MAKERS[name], epochs_of(name))


@pytest.mark.parametrize("name", MAKERS)
def test_killed_at_any_boundary_the_rest_is_the_same(name):
    check_exact(MAKERS[name], uninterrupted(name), epochs=epochs_of(name))


@pytest.mark.parametrize("name", MAKERS)
def test_adopting_a_session_changes_no_number(name):
    check_same_as_plain(MAKERS[name], uninterrupted(name), epochs=epochs_of(name))


@pytest.mark.parametrize(
    "name", ["no state", "state, 3 workers of unequal length", "no state, 2 persistent workers"]
)
def test_a_break_in_mid_epoch_is_part_of_the_run(name):
    breaks = {0: 2}
    trace = wrapped(MAKERS[name], 2, breaks)
    check_same_as_plain(MAKERS[name], trace, epochs=2, breaks=breaks)
    check_exact(MAKERS[name], trace, epochs=2, breaks=breaks)


def test_a_state_is_used_only_where_it_is_exact():
    assert way_of(Lines()) == "replay"
    assert way_of(Stateful()) == "state"
    assert way_of(plain_stream()) == "state"
    assert way_of(shuffled_stream()) == "replay"


def test_keyed_mode_is_refused_by_name():
    with pytest.raises(NotExact, match=r"Lines.*keyed"):
        Session(make_loader(Lines), name="loader", mode="keyed", seed=0)


def test_batches_have_no_indices():
    session = Session(make_loader(Lines), name="loader", mode="native", seed=0)
    session.open(0)
    session.next()
    assert session.indices_digest is None
