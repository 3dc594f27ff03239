"""Stop requests as a flag that the boundary reads: signals and walltime.

Touches: the process's handlers for the stop signals, between `install` and `uninstall`, from the main thread only.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether the run has been asked to stop, and by whom.

    The first signal raises the flag, so that the step is finished and committed. A second Ctrl-C interrupts at once:
    a person who presses twice means now, and what was committed stays.
    """

    def __init__(self, *, deadline: float | None) -> None:
        self.deadline = deadline
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the stop signals; outside the main thread, where Python forbids it, only walltime counts."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Put the previous handlers back. Idempotent."""
        if threading.current_thread() is not threading.main_thread():
            return
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._reason is not None
        self._reason = signal.Signals(number).name
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    @property
    def reason(self) -> str | None:
        """Name of the signal, `walltime`, or None while nothing asks to stop."""
        if self._reason is None and self.deadline is not None and time.time() >= self.deadline:
            self._reason = "walltime"
        return self._reason
