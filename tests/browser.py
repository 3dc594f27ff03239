"""Which browser looks at pages in the tests. Reads the search path and the environment."""

import os
import shutil


def browser() -> str | None:
    """Return the program that looks at pages, or None on a machine that has none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def is_needed() -> bool:
    """Tell whether a machine without a browser fails the tests that need one, as in continuous integration."""
    return "UNBROKEN_BROWSER" in os.environ
