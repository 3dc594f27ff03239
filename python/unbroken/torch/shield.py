"""Loader workers that outlive a signal to the whole process group.

Touches: `DataLoader.__iter__`, between `install` and `uninstall`, and the signal mask of the calling thread while
workers are being created. Ctrl-C in a terminal, Slurm and most launchers signal every process of the job at once. A
worker that dies of it takes the batch in flight with it, and torch then raises in the middle of the user's step. So
workers are created with the stop signals blocked, which fork and exec both inherit: only the training process stops.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from unbroken.stop import STOP_SIGNALS

_original_iter: Any = None
_worker_pids: set[int] = set()


def _shielded_iter(self: DataLoader[Any]) -> Iterator[Any]:
    if self.num_workers == 0 or threading.current_thread() is not threading.main_thread():
        return _original_iter(self)
    context = self.multiprocessing_context or multiprocessing
    if context.get_start_method() != "fork":
        # The other methods start a tracker first, which unblocks the signals again: it must be up before.
        resource_tracker.ensure_running()
    before = {child.pid for child in multiprocessing.active_children()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return _original_iter(self)
    finally:
        # A signal that came meanwhile is delivered to this process here, never lost.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _worker_pids.update(
            child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in before
        )


def _kill_leftover_workers() -> None:
    # Registered after multiprocessing's own exit hook, so it runs before: that hook sends SIGTERM, which these workers
    # do not take, and then waits for them without a limit.
    for child in multiprocessing.active_children():
        if child.pid in _worker_pids:
            os.kill(child.pid, signal.SIGKILL)


def install() -> None:
    """Shield all loader workers created from now on, the evaluation's too. Idempotent."""
    global _original_iter
    if _original_iter is not None:
        return
    _original_iter = DataLoader.__iter__
    DataLoader.__iter__ = _shielded_iter  # type: ignore[method-assign]
    atexit.unregister(_kill_leftover_workers)
    atexit.register(_kill_leftover_workers)


def uninstall() -> None:
    """Create later workers as torch does. Idempotent."""
    global _original_iter
    if _original_iter is None:
        return
    DataLoader.__iter__ = _original_iter  # type: ignore[method-assign]
    _original_iter = None
