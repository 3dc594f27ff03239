"""Fixtures and settings that every test file shares. Imports neither torch nor numpy."""

import hypothesis
import pytest
from browser import browser, is_needed

# Examples are few because the suite runs everywhere and often; the blob that replays a failure is always printed.
hypothesis.settings.register_profile("lean", max_examples=60, deadline=None, print_blob=True)
hypothesis.settings.load_profile("lean")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a browser on a machine that has none and need not have one; the summary says so."""
    if browser() is None and not is_needed():
        left_out = [item for item in items if item.get_closest_marker("browser")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what nobody looked at."""
    if browser() is None and not is_needed():
        terminalreporter.write_line("no Chromium on this machine: nobody looked at the report's pages")
