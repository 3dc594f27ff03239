"""Native mode over map-style data sets: plain torch's numbers, and exact after a kill at every kind of boundary."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from loader_trace import (
    Items,
    Pure,
    Trace,
    check_exact,
    check_same_as_plain,
    differences,
    plain,
    rest,
    resumed,
    wrapped,
)
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

WEIGHTS = [0.1, 0.9, 0.4, 0.7] * 5 + [0.3, 0.2]


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def make_loader(
    *, data: Any = Items, generator: bool = False, sampler: Any = None, **options: Any
) -> DataLoader:
    dataset = data()
    options.setdefault("batch_size", 4)
    if sampler is not None:
        options["sampler"] = sampler(dataset)
    return DataLoader(dataset, generator=own_generator() if generator else None, **options)


def init_worker(number: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Items), "the user's own data set is in sight"
    info.dataset.count = 100 * number
    torch.rand(number + 1)


def subset(dataset: Any) -> SubsetRandomSampler:
    return SubsetRandomSampler(range(3, len(dataset)))


def weighted(dataset: Any) -> WeightedRandomSampler:
    return WeightedRandomSampler(WEIGHTS, 18)


def replacement(dataset: Any) -> RandomSampler:
    return RandomSampler(dataset, replacement=True, num_samples=70, generator=own_generator())


def longer(dataset: Any) -> RandomSampler:
    return RandomSampler(dataset, num_samples=30)


def distributed(dataset: Any) -> DistributedSampler:
    return DistributedSampler(dataset, num_replicas=2, rank=1, seed=4)


def nested() -> Any:
    return ConcatDataset([Subset(Items(), range(12)), Items(10)])


LOADERS: dict[str, dict[str, Any]] = {
    "shuffle": {"shuffle": True},
    "sequential": {},
    "shuffle, 2 workers": {"shuffle": True, "num_workers": 2},
    "sequential, 2 persistent workers": {"num_workers": 2, "persistent_workers": True},
    "shuffle, 2 persistent workers": {"shuffle": True, "num_workers": 2, "persistent_workers": True},
    "shuffle, 3 workers, prefetch 1, drop last": {
        "shuffle": True,
        "num_workers": 3,
        "prefetch_factor": 1,
        "drop_last": True,
    },
    "shuffle, generator": {"shuffle": True, "generator": True},
    "shuffle, generator, 2 workers": {"shuffle": True, "generator": True, "num_workers": 2},
    "shuffle, generator, 2 persistent workers, prefetch 4": {
        "shuffle": True,
        "generator": True,
        "num_workers": 2,
        "persistent_workers": True,
        "prefetch_factor": 4,
    },
    "shuffle, 1 worker, prefetch 4": {"shuffle": True, "num_workers": 1, "prefetch_factor": 4},
    "replacement, generator": {"sampler": replacement, "batch_size": 9},
    "replacement, generator, 2 workers": {"sampler": replacement, "batch_size": 9, "num_workers": 2},
    "more samples than items": {"sampler": longer, "num_workers": 2},
    "subset": {"sampler": subset},
    "subset, 2 workers": {"sampler": subset, "num_workers": 2},
    "weighted": {"sampler": weighted},
    "weighted, 2 persistent workers": {"sampler": weighted, "num_workers": 2, "persistent_workers": True},
    "distributed with set_epoch": {"sampler": distributed, "batch_size": 2},
    "distributed with set_epoch, 2 workers": {"sampler": distributed, "batch_size": 2, "num_workers": 2},
    "no batches": {"batch_size": None, "shuffle": True},
    "no batches, 2 workers": {"batch_size": None, "shuffle": True, "num_workers": 2},
    "nested data set, 2 workers": {"data": nested, "shuffle": True, "num_workers": 2},
    "nested data set": {"data": nested, "shuffle": True},
    "worker_init_fn": {"shuffle": True, "num_workers": 2, "worker_init_fn": init_worker},
    "pin_memory and timeout": {"shuffle": True, "num_workers": 2, "pin_memory": True, "timeout": 60},
}


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:.*worker processes.*:UserWarning"
)


def epochs_of(name: str) -> int:
    return 3 if "persistent" in name else 2


@cache
def uninterrupted(name: str) -> Trace:
    return wrapped(MAKERS[name], epochs_of(name))


@pytest.mark.parametrize("name", LOADERS)
def test_killed_at_any_boundary_the_rest_is_the_same(name):
    check_exact(MAKERS[name], uninterrupted(name), epochs=epochs_of(name))


@pytest.mark.parametrize("name", LOADERS)
def test_adopting_a_session_changes_no_number(name):
    check_same_as_plain(MAKERS[name], uninterrupted(name), epochs=epochs_of(name))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_break_in_mid_epoch_is_part_of_the_run(workers, persistent):
    if persistent and not workers:
        persistent, workers = True, 3
    make = partial(make_loader, shuffle=True, num_workers=workers, persistent_workers=persistent)
    breaks = {0: 1, 1: 2}
    trace = wrapped(make, 3, breaks)
    check_same_as_plain(make, trace, epochs=3, breaks=breaks)
    check_exact(make, trace, epochs=3, breaks=breaks)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_are_resumed_too(context):
    make = partial(make_loader, data=Pure, shuffle=True, num_workers=1, multiprocessing_context=context)
    trace = wrapped(make, 1)
    # The same numbers as a plain loader's forked worker gives: they do not depend on how it was started.
    expected = plain(partial(make_loader, data=Pure, shuffle=True, num_workers=1), 1)
    assert differences(expected, {key: step[:4] for key, step in trace.steps.items()}) == []
    found = resumed(make, trace.states[0, 3], (0, 3), 1)
    assert differences(rest(trace.steps, (0, 3)), found.steps) == []


# Samplers of the user's own.


class Lazy:
    """Draws each index from the global generators at the moment it is asked for."""

    def __init__(self, length: int = 22) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for turn in range(self.length):
            yield int(torch.randint(self.length, (1,))) if turn % 2 else np.random.randint(self.length)


class Eager(Lazy):
    """Draws its order in `__iter__`, which is no generator function."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length).tolist())


class Dynamic:
    """Batches of varying size, drawn from a generator of its own and from the global one."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(4)
        self.epochs_begun = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs_begun += 1
        left = torch.randperm(22).tolist()
        while left:
            size = int(self.generator.integers(1, 6)) + self.epochs_begun % 2
            yield left[:size]
            left = left[size:]


class Hard:
    """Prefers items by weights that training writes."""

    def __init__(self) -> None:
        self.weights = torch.ones(22, dtype=torch.float64)
        self.seen = 0

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        for _ in range(22):
            self.seen += 1
            yield int(torch.multinomial(self.weights, 1))


class Counting:
    """Knows its own state."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        if self.next >= len(self.order):
            self.order, self.next = torch.randperm(22).tolist(), 0
        while self.next < len(self.order):
            self.next += 1
            yield self.order[self.next - 1]

    def __len__(self) -> int:
        return 22

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.next = list(state["order"]), state["next"]


def lazy(dataset: Any) -> Lazy:
    return Lazy()


def eager(dataset: Any) -> Eager:
    return Eager()


def with_dynamic(workers: int) -> DataLoader:
    return DataLoader(Items(), batch_sampler=Dynamic(), num_workers=workers)


def with_counting(workers: int) -> DataLoader:
    return DataLoader(Items(), batch_size=4, sampler=Counting(), num_workers=workers)


def with_hard(workers: int) -> DataLoader:
    sampler = Hard()
    loader = DataLoader(Items(), batch_sampler=BatchSampler(sampler, 4, False), num_workers=workers)

    def react(loss: float, batch: Any) -> None:
        sampler.weights[batch["index"]] = loss

    loader.react = react  # pyright: ignore[reportAttributeAccessIssue]
    return loader


def with_weights_between_epochs(workers: int) -> DataLoader:
    sampler = WeightedRandomSampler(WEIGHTS, 18)
    loader = DataLoader(Items(), batch_size=4, sampler=sampler, num_workers=workers)

    def react(loss: float, batch: Any) -> None:
        sampler.weights[batch["index"]] = loss

    loader.react = react  # pyright: ignore[reportAttributeAccessIssue]
    return loader


CUSTOM: dict[str, Any] = {
    "lazy": partial(make_loader, sampler=lazy),
    "lazy, 2 workers": partial(make_loader, sampler=lazy, num_workers=2),
    "lazy, no batches, 2 workers": partial(make_loader, sampler=lazy, num_workers=2, batch_size=None),
    "eager": partial(make_loader, sampler=eager),
    "eager, no batches, 2 workers": partial(make_loader, sampler=eager, num_workers=2, batch_size=None),
    "dynamic batches": partial(with_dynamic, 0),
    "dynamic batches, 2 workers": partial(with_dynamic, 2),
    "weights written by training": partial(with_hard, 0),
    "weights written by training, 2 workers": partial(with_hard, 2),
    "torch's weighted sampler, written by training": partial(with_weights_between_epochs, 0),
    "torch's weighted sampler, written by training, 2 workers": partial(with_weights_between_epochs, 2),
    "with state_dict": partial(with_counting, 0),
    "with state_dict, 2 workers": partial(with_counting, 2),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_a_sampler_of_the_users_own_gives_the_same_rest(name):
    check_exact(MAKERS[name], uninterrupted(name), epochs=2)


@pytest.mark.parametrize("name", CUSTOM)
def test_a_sampler_of_the_users_own_is_not_changed(name):
    check_same_as_plain(MAKERS[name], uninterrupted(name), epochs=2)


MAKERS: dict[str, Any] = {**{name: partial(make_loader, **LOADERS[name]) for name in LOADERS}, **CUSTOM}
