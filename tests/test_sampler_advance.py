"""Dropping indices by a jump leaves a sampler's iterator where turning it as often would have."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from unbroken.torch.data.sampler import advance


def _seeded(make: Callable[[torch.Generator], Any]) -> Callable[[], Iterator[int]]:
    return lambda: iter(make(torch.Generator().manual_seed(5)))


SAMPLERS: dict[str, Callable[[], Iterator[int]]] = {
    "random": _seeded(lambda g: RandomSampler(range(50), generator=g)),
    "random, more than one pass": _seeded(lambda g: RandomSampler(range(20), num_samples=50, generator=g)),
    "random with replacement": _seeded(
        lambda g: RandomSampler(range(20), replacement=True, num_samples=50, generator=g)
    ),
    "subset": _seeded(lambda g: SubsetRandomSampler(range(3, 53), generator=g)),
    "weighted": _seeded(lambda g: WeightedRandomSampler([1.0, 2.0] * 25, 50, generator=g)),
    "sequential": lambda: iter(SequentialSampler(range(50))),
    "a list's iterator": lambda: iter(list(range(50))),
    "a plain generator": lambda: (i * i for i in range(50)),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("begun", [0, 1, 7])
def test_advancing_equals_turning(name: str, begun: int) -> None:
    for count in (0, 1, 2, 19, 20, 21, 32, 33, 40, 49, 50, 60):
        turned, jumped = SAMPLERS[name](), SAMPLERS[name]()
        for indices in (turned, jumped):
            list(itertools.islice(indices, begun))
        list(itertools.islice(turned, count))
        advance(jumped, count)
        assert list(jumped) == list(turned), f"after dropping {count}"


def test_advancing_over_millions_makes_no_turns() -> None:
    turns = 0

    def counted() -> Iterator[int]:
        nonlocal turns
        for item in yield_from():
            turns += 1
            yield item

    def yield_from() -> Iterator[int]:
        yield from [0] * 10

    advance(counted(), 5)
    assert turns == 5, "a generator that does not hand on a list is turned"

    def handed_on() -> Iterator[int]:
        yield from list(range(3_000_000))

    indices = handed_on()
    advance(indices, 2_999_999)
    assert next(indices) == 2_999_999
