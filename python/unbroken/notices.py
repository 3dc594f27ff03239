"""The words that a run says on stderr: what was resumed from where, what was verified, how it ended.

Touches: stderr, one line a call, unless quiet. Nothing is printed by the core.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable


class UnbrokenWarning(UserWarning):
    """Something that a person should know and that does not stop the run."""


Say = Callable[[str], None]


def speaker(*, quiet: bool) -> Say:
    """Return the function that says one line; silent if `quiet` or `UNBROKEN_QUIET` is set."""
    if quiet or os.environ.get("UNBROKEN_QUIET", "") not in ("", "0"):
        return lambda text: None

    def say(text: str) -> None:
        print(f"unbroken: {text}", file=sys.stderr, flush=True)

    return say


def warn(text: str) -> None:
    """Warn once per place, through Python's warnings."""
    warnings.warn(text, UnbrokenWarning, stacklevel=3)


def size(count: int) -> str:
    """Return bytes for people: `1.2 MB`, decimal units as disks have them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit returns")
