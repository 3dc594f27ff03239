"""Policies are plain decisions: when a boundary is saved, what stays, when time is up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.errors import InvalidArgument
from unbroken.policy import SLURM_MARGIN_S, Keep, Policy, as_policy, parse_walltime, walltime_deadline


def test_a_multiple_of_every_steps_is_due_inside_an_epoch() -> None:
    policy = Policy(every_steps=5, epoch_ends=False)
    due = [step for step in range(1, 21) if policy.due(step=step, phase=0, seconds_since_last=0.0)]
    assert due == [5, 10, 15, 20]


def test_the_same_multiple_is_not_due_again_when_the_epoch_ends() -> None:
    assert not Policy(every_steps=5, epoch_ends=False).due(step=5, phase=1, seconds_since_last=0.0)


def test_epoch_ends_are_due_by_default() -> None:
    assert Policy().due(step=7, phase=1, seconds_since_last=0.0)
    assert not Policy().due(step=7, phase=0, seconds_since_last=1e9)


def test_seconds_count_from_the_last_commit() -> None:
    policy = Policy(every_seconds=60.0)
    assert not policy.due(step=3, phase=0, seconds_since_last=59.9)
    assert policy.due(step=3, phase=0, seconds_since_last=60.0)


@given(
    st.none() | st.integers(1, 20),
    st.none() | st.floats(0.5, 30.0),
    st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60),
)
def test_no_boundary_is_due_while_it_is_quiet(
    every_steps: int | None, every_seconds: float | None, durations: list[float]
) -> None:
    policy = Policy(every_steps=every_steps, every_seconds=every_seconds)
    now = last = 100.0
    quiet_step, quiet_time = 0, 0.0
    for step, duration in enumerate(durations, start=1):
        now += duration
        due = policy.due(step=step, phase=0, seconds_since_last=now - last)
        if step < quiet_step and now < quiet_time:
            assert not due
            continue
        quiet_step, quiet_time = policy.quiet_until(step=step, last=last)
        assert quiet_step > step
        last = now if due else last


def test_a_policy_that_weighs_costs_is_never_quiet() -> None:
    assert Policy(continuous=0.01).quiet_until(step=7, last=3.0) == (0, 0.0)


def test_a_number_means_steps_and_nothing_means_a_minute_and_epoch_ends() -> None:
    assert as_policy(50) == Policy(every_steps=50)
    assert as_policy(None) == Policy(every_seconds=60.0, epoch_ends=True)


@pytest.mark.parametrize("wrong", [{"every_steps": 0}, {"every_seconds": 0.0}, {"every_seconds": -1.0}])
def test_a_policy_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        Policy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"last": 0}, {"every": 0}, {"best": ("loss", "least", 1)}, {"best": ("", "min", 1)}]
)
def test_a_retention_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Keep(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:30", 1800), ("3:50:00", 13800), ("1-00:00:01", 86401), (90, 90), (0.5, 0.5)]
)
def test_walltimes_are_read_as_slurm_writes_them(text: str | float, seconds: float) -> None:
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1:2:3", "abc", "1-1", 0, -5])
def test_a_walltime_that_cannot_be_read_is_refused(text: str | float) -> None:
    with pytest.raises(InvalidArgument):
        parse_walltime(text)


def test_slurm_gives_the_deadline_where_the_user_gave_none() -> None:
    environment = {"SLURM_JOB_END_TIME": "1000"}
    assert walltime_deadline(None, now=0.0, environment=environment) == 1000 - SLURM_MARGIN_S
    assert walltime_deadline("0:10", now=50.0, environment=environment) == 650.0
    assert walltime_deadline(None, now=0.0, environment={}) is None
