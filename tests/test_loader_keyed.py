"""Keyed mode: order and draws are a function of seed, epoch and position, whatever reads them."""

import random
import resource
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loader_trace import Items, Pure, Trace, batch_bytes, check_exact, seed_everything, wrapped
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from unbroken import _core
from unbroken.errors import NotExact
from unbroken.torch import rng
from unbroken.torch.data import Session

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes.*:UserWarning")


class Lazy:
    """Draws from the global generators while the epoch runs."""

    def __iter__(self):
        for _ in range(22):
            yield int(torch.randint(22, (1,))) + 0 * random.randrange(3)

    def __len__(self) -> int:
        return 22


def make_loader(**options: Any) -> DataLoader:
    options.setdefault("batch_size", 4)
    sampler = options.pop("sampler", None)
    return DataLoader(Pure(), sampler=None if sampler is None else sampler(), **options)


LOADERS: dict[str, dict[str, Any]] = {
    "shuffle": {"shuffle": True},
    "shuffle, 2 workers": {"shuffle": True, "num_workers": 2},
    "shuffle, 2 persistent workers": {"shuffle": True, "num_workers": 2, "persistent_workers": True},
    "sequential, drop last": {"drop_last": True},
    "no batches, 2 workers": {"batch_size": None, "shuffle": True, "num_workers": 2},
    "some of the samples": {"sampler": lambda: RandomSampler(Pure(), num_samples=9)},
    "subset": {"sampler": lambda: SubsetRandomSampler(range(3, 20))},
    "weighted, 2 workers": {"sampler": lambda: WeightedRandomSampler([1.0, 2.0] * 11, 18), "num_workers": 2},
    "lazy": {"sampler": Lazy},
    "lazy, 2 workers": {"sampler": Lazy, "num_workers": 2},
}


def samples(trace: Trace) -> list[bytes]:
    """Return each step's batch, epoch by epoch."""
    return [step[0] for _, step in sorted(trace.steps.items())]


@pytest.mark.parametrize("name", LOADERS)
def test_killed_at_any_boundary_the_rest_is_the_same(name):
    make = partial(make_loader, **LOADERS[name])
    check_exact(make, wrapped(make, 2, mode="keyed"), epochs=2, mode="keyed")


@pytest.mark.parametrize("sampler", [None, Lazy, lambda: SubsetRandomSampler(range(20))])
def test_the_number_of_workers_changes_no_batch(sampler):
    shuffle = {"shuffle": True} if sampler is None else {"sampler": sampler}
    first, *others = (
        samples(wrapped(partial(make_loader, num_workers=workers, **shuffle), 2, mode="keyed"))
        for workers in (0, 1, 3)
    )
    assert all(other == first for other in others)


def test_the_split_into_batches_changes_no_sample():
    def rows(size: int) -> bytes:
        session = Session(make_loader(batch_size=size, shuffle=True), name="loader", mode="keyed", seed=3)
        session.open(1)
        found = []
        try:
            while True:
                found.append(session.next())
        except StopIteration:
            return batch_bytes(torch.cat(found))

    assert rows(4) == rows(8) == rows(5)


def test_another_epoch_another_order_and_other_draws():
    trace = wrapped(partial(make_loader, shuffle=True), 2, mode="keyed")
    assert trace.steps[0, 0][0] != trace.steps[1, 0][0]
    values = torch.frombuffer(
        bytearray(b"".join(s[0].removeprefix(b"torch.float64") for s in trace.steps.values())),
        dtype=torch.float64,
    )
    rows = values.reshape(-1, 5)
    assert sorted(rows[:22, 0].tolist()) == [float(index) for index in range(22)]
    for column in range(1, 5):
        assert len(set(rows[:, column].tolist())) == len(rows), "no two samples share a draw"


@pytest.mark.parametrize(
    "options", [{"shuffle": True}, {"shuffle": True, "num_workers": 2}, {"sampler": Lazy}]
)
def test_the_trainings_generators_stay_where_they_are(options):
    seed_everything()
    session = Session(make_loader(**options), name="loader", mode="keyed", seed=3)
    before = rng.digests()
    session.open(0)
    for _ in range(6):
        session.next()
    with pytest.raises(StopIteration):
        session.next()
    session.open(1)
    session.state()
    session.close()
    assert rng.digests() == before


def test_a_resume_may_use_another_number_of_workers():
    whole = wrapped(partial(make_loader, shuffle=True, num_workers=2), 1, mode="keyed")
    kept = _core.decode(whole.states[0, 3])
    session = Session(make_loader(shuffle=True, num_workers=0), name="loader", mode="keyed", seed=3)
    session.restore(kept["session"])
    session.open(0)
    found = [batch_bytes(session.next()) for _ in range(3)]
    assert found == samples(whole)[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_changes_as_it_is_read_is_refused_by_name(workers):
    loader = DataLoader(Items(), batch_size=4, shuffle=True, num_workers=workers)
    session = Session(loader, name="loader", mode="keyed", seed=3)
    session.open(0)
    with pytest.raises(NotExact, match="dataset/count"):
        session.next()
    session.close()


class Endless(Dataset):
    """A hundred million samples that need no memory."""

    def __len__(self) -> int:
        return 100_000_000

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_deep_in_a_hundred_million_samples_costs_nothing(shuffle):
    def deep(position: int) -> Session:
        session = Session(
            DataLoader(Endless(), batch_size=256, shuffle=shuffle), name="loader", mode="keyed", seed=3
        )
        session.open(2)
        state = session.state()
        state["position"] = position
        state["pass"]["samples"] = position * 256
        other = Session(
            DataLoader(Endless(), batch_size=256, shuffle=shuffle), name="loader", mode="keyed", seed=3
        )
        other.restore(state)
        return other

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session = deep(300_000)
    start = time.thread_time()
    session.open(2)
    batch = session.next()
    spent = time.thread_time() - start
    assert spent < 0.05, f"{spent * 1000:.1f} ms"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"
    order = _core.Order(3, 2, 100_000_000)
    expected = (
        order.slice(300_000 * 256, 300_000 * 256 + 256) if shuffle else list(range(76_800_000, 76_800_256))
    )
    assert batch.tolist() == expected


def test_batches_in_order_though_the_loader_asks_for_any():
    make = partial(make_loader, shuffle=True, num_workers=2, in_order=False)
    expected = samples(wrapped(partial(make_loader, shuffle=True), 1, mode="keyed"))
    assert samples(wrapped(make, 1, mode="keyed")) == expected


def test_a_batch_sampler_of_the_users_own_is_not_taken_for_torchs():
    class Reversed(BatchSampler):
        def __iter__(self):
            yield from reversed(list(super().__iter__()))

    def make() -> DataLoader:
        return DataLoader(Pure(), batch_sampler=Reversed(range(22), 4, False))

    trace = wrapped(make, 1, mode="keyed")
    first = np.frombuffer(trace.steps[0, 0][0].removeprefix(b"torch.float64")).reshape(-1, 5)[:, 0]
    assert first.tolist() == [20.0, 21.0]
    check_exact(make, trace, epochs=1, mode="keyed")
