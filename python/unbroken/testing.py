"""The proof as an assertion for a test suite: kill a script in many ways, and fail with the first difference.

Touches: child processes that it starts itself, and a temporary directory. Imports neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import forks


@dataclass(frozen=True)
class Proof:
    """What a proof came to.

    Args:
        exact: Whether every boundary and the final state of each killed run are those of the uninterrupted one.
        verdict: The same in words.
        boundaries: How many boundaries the uninterrupted run recorded.
        stops: How often the script was stopped.
        details: Everything that `unbroken prove --json` says.
    """

    exact: bool
    verdict: str
    boundaries: int
    stops: int
    details: Mapping[str, Any]


def prove(
    script: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    *,
    steps: int | None = None,
    kills: int = 3,
    seed: int = 1,
    jobs: int | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    fresh: bool = False,
) -> Proof:
    """Run a script uninterrupted and killed, and compare the runs.

    Args:
        script: A Python script that trains with `unbroken.Run`; it is run as it is, by this interpreter.
        arguments: What follows the script on its command line.
        steps: Prove this many steps only; by default those of the first seconds, and one epoch's end at least.
        kills: How often to stop it, in all.
        seed: Which steps and instants.
        jobs: Trials at the same time; by default one for each processor.
        environment: Variables to add to this process's own.
        timeout_s: Give up after this many seconds.
        fresh: Start a new interpreter for each life. By default lives are forked from processes that have imported
            torch and done nothing else (see `unbroken.forks`), which takes a tenth of the time.

    Raises:
        RuntimeError: The question could not be answered: the script does not run by itself, or records no step.
        subprocess.TimeoutExpired: It took longer than `timeout_s`.
    """
    command = [sys.executable, "-m", "unbroken", "prove", "--json", f"--kills={kills}", f"--seed={seed}"]
    if steps is not None:
        command.append(f"--steps={steps}")
    if jobs is not None:
        command.append(f"--jobs={jobs}")
    variables = {**os.environ, **(environment or {})}
    with contextlib.nullcontext([sys.executable]) if fresh else forks.serving(variables) as life:
        done = subprocess.run(
            [*command, "--", *life, str(Path(script)), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=variables,
            timeout=timeout_s,
            check=False,
        )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise RuntimeError(f"`unbroken prove` could not tell: {done.stderr.strip()}")
    details = json.loads(done.stdout)
    return Proof(
        exact=details["exact"],
        verdict=details["verdict"],
        boundaries=details["boundaries"],
        stops=details["stops"],
        details=details,
    )


def assert_exact(script: str | os.PathLike[str], arguments: Sequence[str] = (), **options: Any) -> Proof:
    """Fail unless a killed and resumed run of the script is the uninterrupted one, bit for bit.

        def test_training_survives_a_kill():
            unbroken.testing.assert_exact("train.py", steps=40)

    Args:
        script: As in `prove`.
        arguments: As in `prove`.
        options: The other arguments of `prove`.

    Raises:
        AssertionError: It is not; the message has the first difference and its likely cause.
        RuntimeError: The question could not be answered.
    """
    __tracebackhide__ = True
    proof = prove(script, arguments, **options)
    if not proof.exact:
        raise AssertionError(_words(proof))
    return proof


def _words(proof: Proof) -> str:
    lines = [proof.verdict]
    lines += [
        f"{trial['trial']}: {trial['result']}" for trial in proof.details["trials"] if not trial["identical"]
    ]
    difference = proof.details["difference"]
    if difference is not None:
        if difference["component"] is not None:
            after = (
                "" if difference["resumed_at"] is None else f", resumed from step {difference['resumed_at']}"
            )
            lines.append(
                f"first difference at step {difference['step']}{after}: `{difference['component']}` "
                f"should be {difference['expected'] or 'nothing'}, found {difference['found'] or 'nothing'}"
            )
        leaves = difference["restored"] or difference["leaves"]
        lines += [f"`{leaf['path']}`: {leaf['change']}" for leaf in leaves[:3]]
        if difference["cause"] is not None:
            lines.append(f"likely cause: {difference['cause']['words']}")
    if proof.details["directory"] is not None:
        lines.append(f"everything is kept in {proof.details['directory']}")
    return "\n".join(lines)


__all__ = ["Proof", "assert_exact", "prove"]
