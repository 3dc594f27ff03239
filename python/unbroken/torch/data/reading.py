"""Torch's iterator over batches that loader workers read, with the death of a worker told as what it is.

Touches: nothing but the iterator. Where a worker is killed while its batch is being fetched, torch's own check comes
too early: the worker's sockets are closed some milliseconds before its end can be seen. What arrives then is whatever
multiprocessing meets first (a reset connection, an end of file, a missing socket), and says nothing of a worker.
"""

import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pickle import UnpicklingError
from types import TracebackType
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from unbroken.errors import WorkerDied

# What fetching a batch can end in when a worker dies. torch's own words for it are a RuntimeError, which its handler
# of SIGCHLD raises wherever the main process happens to be.
_SIGNS = (OSError, EOFError, UnpicklingError, RuntimeError)

# The system takes a killed worker's memory apart before it says that it is dead.
_MOST_WAIT_S = 5.0


def read(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return `iter(loader)`; with workers, one that raises `WorkerDied` for a worker that has died.

    Raises:
        WorkerDied: One of the persistent workers has died since the last epoch.
    """
    try:
        iterator = iter(loader)
    except _SIGNS as error:
        dead = _dead_behind(error, loader._iterator)
        if dead is None:
            raise
        raise WorkerDied(*dead) from error
    return _Reading(iterator) if isinstance(iterator, _MultiProcessingDataLoaderIter) else iterator


class _Reading:
    def __init__(self, iterator: _MultiProcessingDataLoaderIter) -> None:
        self._iterator = iterator
        self._dead: tuple[int, int] | None = None

    def __iter__(self) -> "_Reading":
        return self

    def __next__(self) -> Any:
        if self._dead is not None:
            # torch would go on without the batches that the dead worker owed.
            raise WorkerDied(*self._dead)
        try:
            return next(self._iterator)
        except _SIGNS as error:
            self._dead = _dead_behind(error, self._iterator)
            if self._dead is None:
                raise
            raise WorkerDied(*self._dead) from error


def _dead_behind(error: Exception, iterator: Any) -> tuple[int, int] | None:
    """Return process id and exit code of the worker whose death is behind an iterator's error, if one's is."""
    try:
        return _dead_among(getattr(iterator, "_workers", ()), error)
    except RuntimeError as news:
        # torch's handler speaks once for a death, and may do so here.
        return _dead_among(getattr(iterator, "_workers", ()), news)


def _dead_among(workers: Sequence[BaseProcess], error: Exception) -> tuple[int, int] | None:
    # What the user's data set raised in a worker is the user's, and that worker is alive.
    if not workers or _is_from_worker(error.__traceback__):
        return None
    # torch's own words come when the death can be seen; what fetching meets comes before.
    return _first_dead(workers, wait_s=0 if isinstance(error, RuntimeError) else _MOST_WAIT_S)


def _first_dead(workers: Sequence[BaseProcess], *, wait_s: float) -> tuple[int, int] | None:
    deadline = time.monotonic() + wait_s
    while True:
        for worker in workers:
            if worker.pid and worker.exitcode:
                return worker.pid, worker.exitcode
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def _is_from_worker(traceback: TracebackType | None) -> bool:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code is ExceptionWrapper.reraise.__code__
