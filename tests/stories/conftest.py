"""Fixtures of the stories: one nursery and one set of references for the whole session.

Touches: a temporary directory; with `pytest -n`, one nursery and one set of references for each worker.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import WORKLOAD, Nursery, Story


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    opened = Nursery()
    yield opened
    opened.close()


@pytest.fixture
def story(nursery: Nursery, tmp_path: Path) -> Callable[..., Story]:
    """Return a function that begins a story with the given flags."""
    count = 0

    def begin(*flags: str, script: Path = WORKLOAD) -> Story:
        nonlocal count
        count += 1
        return Story(nursery, tmp_path / f"story{count}", flags, script)

    return begin


@pytest.fixture(scope="session")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Story]:
    """Return a function that gives the uninterrupted training under the given flags, executed once a session.

    In native mode that is plain PyTorch: the same loop with no Unbroken in it. In keyed mode it is the run
    without an interruption.
    """
    known: dict[tuple[str, ...], Story] = {}

    def uninterrupted(*flags: str, script: Path = WORKLOAD) -> Story:
        name = (str(script), *flags)
        if name not in known:
            told = Story(nursery, tmp_path_factory.mktemp("reference"), flags, script)
            told.live(*(() if "keyed" in flags else ("--plain",)))
            known[name] = told
        return known[name]

    return uninterrupted
