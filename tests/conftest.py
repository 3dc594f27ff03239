"""Fixtures and settings that every test file shares. Imports neither torch nor numpy."""

import hypothesis

# Examples are few because the suite runs everywhere and often; the blob that replays a failure is always printed.
hypothesis.settings.register_profile("lean", max_examples=60, deadline=None, print_blob=True)
hypothesis.settings.load_profile("lean")
