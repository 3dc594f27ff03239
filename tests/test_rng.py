"""Generators: reading advances nothing, what was read draws again, a key is a pure function."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from unbroken import _core
from unbroken.errors import MismatchError
from unbroken.torch import rng

KEY = _core.derive_key(7, "sample", 3, 11)
OWNED = {
    "random.Random": lambda: random.Random(3),
    "numpy.Generator": lambda: np.random.default_rng(3),
    "numpy.Generator, Philox": lambda: np.random.Generator(np.random.Philox(3)),
    "numpy.Generator, SFC64": lambda: np.random.Generator(np.random.SFC64(3)),
    "numpy.Generator, MT19937": lambda: np.random.Generator(np.random.MT19937(3)),
    "numpy.RandomState": lambda: np.random.RandomState(3),
    "numpy.BitGenerator": lambda: np.random.PCG64DXSM(3),
    "torch.Generator": lambda: torch.Generator().manual_seed(3),
}


def draw(generator) -> tuple:
    if isinstance(generator, random.Random):
        return (generator.random(), generator.gauss(0, 1))
    if isinstance(generator, torch.Generator):
        return tuple(torch.randn(3, generator=generator).tolist())
    if isinstance(generator, np.random.BitGenerator):
        return (generator.random_raw(),)
    return (
        float(generator.standard_normal()),
        int(generator.integers(9)) if hasattr(generator, "integers") else 0,
    )


def draw_globals() -> tuple:
    python = (random.random(), random.gauss(0, 1))
    return (python, float(np.random.randn()), np.random.rand(), torch.randn(3).tolist())


@pytest.fixture(autouse=True)
def seeded():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def through_bytes(value):
    return _core.decode(_core.encode(value))


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_restoring_draws_the_same_numbers_with_and_without_a_cached_normal(warm_up):
    for _ in range(warm_up):
        random.gauss(0, 1)
        np.random.randn()
    state = through_bytes(rng.capture())
    expected = [draw_globals() for _ in range(3)]
    np.random.randn(5)
    rng.restore(state)
    assert [draw_globals() for _ in range(3)] == expected


def test_the_fast_reading_gives_the_bytes_of_the_public_one():
    numpy = rng._numpy()
    assert numpy is not None
    assert rng._PYTHON_OFFSET is not None
    assert numpy.gauss_offset is not None
    for _ in range(3):
        np.random.randn()
        random.random()
        assert numpy.read() == numpy._read_slow()
        assert rng._read_python(rng._PYTHON_GLOBAL)[:2500] == rng._python_words_slow(rng._PYTHON_GLOBAL)


def test_reading_advances_nothing():
    expected = draw_globals()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = rng.digests()
    rng.capture()
    rng.pack()
    assert rng.digests() == before
    assert draw_globals() == expected


def test_each_draw_changes_the_digest_of_its_generator_alone():
    def changed(action) -> set[str]:
        before = dict(rng.digests())
        action()
        return {name for name, digest in rng.digests() if before[name] != digest}

    assert changed(random.random) == {"rng/python"}
    assert changed(lambda: torch.rand(1)) == {"rng/torch"}
    assert changed(np.random.randn) == {"rng/numpy"}
    assert changed(np.random.randn) == {"rng/numpy"}, "the cached normal is part of the state"


def test_a_refused_state_changes_nothing():
    state = rng.capture()
    before = rng.digests()
    for broken in (None, {}, {**state, "torch": b"short"}, {**state, "numpy": 3}, {**state, "python": b""}):
        with pytest.raises(MismatchError):
            rng.restore(broken)
        assert rng.digests() == before
    with pytest.raises(MismatchError, match="cuda"):
        rng.restore({**state, "cuda": [bytes(16)] * 99})
    assert rng.digests() == before


def test_preserved_puts_everything_back_also_after_an_error():
    np.random.randn()
    before = rng.digests()
    with pytest.raises(KeyError), rng.preserved():
        draw_globals()
        raise KeyError
    assert rng.digests() == before


def test_packing_and_unpacking_draw_the_same_numbers():
    np.random.randn()
    data = rng.pack()
    expected = draw_globals()
    draw_globals()
    rng.unpack(data)
    assert draw_globals() == expected


def test_another_global_bit_generator_of_numpy_is_kept_too():
    legacy: Any = np.random
    before = legacy.get_bit_generator()
    try:
        legacy.set_bit_generator(np.random.Philox(5))
        state = through_bytes(rng.capture())
        expected = np.random.rand(3).tolist()
        np.random.rand(2)
        rng.restore(state)
        assert np.random.rand(3).tolist() == expected
        rng.rekey(KEY)
        first = np.random.rand()
        rng.rekey(KEY)
        assert np.random.rand() == first
    finally:
        legacy.set_bit_generator(before)


@pytest.mark.parametrize("kind", OWNED)
def test_an_owned_generator_comes_back_where_it_was(kind):
    generator = OWNED[kind]()
    assert rng.is_generator(generator)
    draw(generator)
    digest = rng.generator_digest(generator)
    state = through_bytes(rng.capture_generator(generator))
    expected = [draw(generator) for _ in range(3)]
    assert rng.generator_digest(generator) != digest
    rng.restore_generator(generator, state)
    assert rng.generator_digest(generator) == digest
    assert [draw(generator) for _ in range(3)] == expected


def test_a_state_of_another_kind_of_generator_is_refused():
    with pytest.raises(MismatchError, match="kind"):
        rng.restore_generator(random.Random(1), rng.capture_generator(torch.Generator()))
    with pytest.raises(MismatchError, match="Philox"):
        rng.restore_generator(
            np.random.default_rng(1), rng.capture_generator(np.random.Generator(np.random.Philox(1)))
        )


def test_generators_that_cannot_be_read_are_not_generators():
    assert not rng.is_generator(random.SystemRandom())
    assert not rng.is_generator(object())


def test_rekeying_is_a_pure_function_of_the_key():
    owned = [make() for make in OWNED.values()]

    def drawn(key: bytes) -> list:
        rng.rekey(key, owned)
        return [draw_globals(), *(draw(generator) for generator in owned)]

    first = drawn(KEY)
    drawn(_core.derive_key(7, "sample", 3, 12))
    np.random.randn()
    again = drawn(KEY)
    assert again == first
    other = drawn(_core.derive_key(7, "sample", 3, 12))
    assert all(left != right for left, right in zip(first, other, strict=True))
