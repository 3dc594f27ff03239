"""A full disk: what a run does about it, and what it will need, decided in one place.

Touches: the clock, while it waits. What is written, and whether that worked, its callers know.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Literal

from .errors import InvalidArgument, StorageError, UnbrokenError
from .notices import Say, size

OnFull = Literal["stop", "wait", "continue"]

# The disk, a quota or the process' own limit has no room left.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_POLL_S = 0.5
_LONGEST_PAUSE_S = 10.0


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that there was no room."""
    return isinstance(error, StorageError) and error.errno in _FULL


class FullDisk:
    """What a run does when there is no room for what it writes.

    Args:
        policy: `stop` raises; `wait` pauses the training and tries again until there is room; `continue` trains on
            and tries again at the next occasion.
        say: Says one line to the user.
        stopping: Tells whether a stop was asked for; nothing waits then.
        sleep: Waits for some seconds.
    """

    def __init__(
        self,
        policy: OnFull,
        *,
        say: Say,
        stopping: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if policy not in ("stop", "wait", "continue"):
            raise InvalidArgument(f"on_full must be 'stop', 'wait' or 'continue', got {policy!r}")
        self.policy: OnFull = policy
        self._say = say
        self._stopping = stopping
        self._sleep = sleep
        self._full = False
        self.paused_s = 0.0
        """Seconds in which the training waited for room, so far."""

    def attempt(self, write: Callable[[], object], *, required: bool = False) -> bool:
        """Write; return False if there was no room and the training is to go on without.

        Args:
            write: Writes all of it or raises, and can be called again.
            required: There is no going on without it, under no policy.

        Raises:
            StorageError: There is no room, and the policy or a stop request says not to wait for it.
        """
        pause_s = _POLL_S
        while True:
            try:
                write()
            except StorageError as error:
                if not is_full(error) or self.policy == "stop":
                    raise
                if self.policy == "continue":
                    if required:
                        raise
                    self._tell(
                        f"{error}; training goes on, and what is missing is written when there is room"
                    )
                    return False
                self._tell(f"{error}; training waits for room")
                self._pause(pause_s, error)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                self.took()
                return True

    def took(self) -> None:
        """Note that the disk took what was written."""
        if self._full:
            self._full = False
            self._say("there is room on the disk again")

    def refused(self, error: UnbrokenError) -> bool:
        """Hear that a write beside the training failed; tell whether to try again, and wait, at the next boundary.

        Raises:
            UnbrokenError: The error itself, if it is not a full disk's, or the policy is to stop.
        """
        if not is_full(error) or self.policy == "stop":
            raise error
        does = (
            "waits for room" if self.policy == "wait" else "goes on, and tries again when a checkpoint is due"
        )
        self._tell(f"{error}; training {does}")
        return self.policy == "wait"

    def _tell(self, text: str) -> None:
        if not self._full:
            self._full = True
            self._say(text)

    def _pause(self, seconds: float, error: StorageError) -> None:
        while seconds > 0:
            if self._stopping():
                raise error
            self._sleep(min(seconds, _POLL_S))
            self.paused_s += min(seconds, _POLL_S)
            seconds -= _POLL_S


def estimate(checkpoint_bytes: int, kept: int | None, free_bytes: int) -> str:
    """Return in words what a run will need: `kept` newest checkpoints and the one being written."""
    each = f"a checkpoint takes up to {size(checkpoint_bytes)}"
    free = f"{size(free_bytes)} are free"
    if kept is None:
        return f"{each}, all are kept, {free}"
    needed = checkpoint_bytes * (kept + 1)
    short = "; that may not do" if needed > free_bytes else ""
    return f"{each}, {kept} kept and one being written up to {size(needed)}, {free}{short}"
