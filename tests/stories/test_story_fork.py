"""A fork goes on exactly as its source would have, and neither needs the other.

The judge is the trace that the workload writes with its own hashes, against the same loop in plain PyTorch.
"""

import shutil
from collections.abc import Callable

from harness import Story, assert_exact, assert_journal_whole, command

Begin = Callable[..., Story]


def test_a_fork_of_a_killed_run_and_the_run_itself_both_end_as_if_nothing_had_happened(
    story: Begin, reference: Begin
) -> None:
    source, fork = story().killed_at("73:body"), story()
    said = command("fork", f"{source.run}@63", fork.run)
    assert "no tensor written" in said.stderr
    shutil.copy(source.trace, fork.trace)
    source.live()
    shutil.rmtree(source.run)
    assert "step 63" in fork.live().words
    assert_exact(fork, reference())
    assert_journal_whole(fork)
    command("verify", fork.run)
    assert_exact(source, reference())
