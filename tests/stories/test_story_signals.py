"""A signal or the end of the walltime finishes the step, saves it, and ends with the code that schedulers requeue on.

Unlike after a kill, no step is executed twice: the trace of all lives has each step once.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import STEPS, Life, Story, assert_exact

Begin = Callable[..., Story]

REQUEUE = 75
WORKERS = ("--workers", "2")


def assert_each_step_once(story: Story) -> None:
    assert story.steps_written() == list(range(1, STEPS + 1))


def wait_for_step(story: Story, step: int, life: Life) -> None:
    while step not in story.steps_written():
        assert life.poll() is None, life.words
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1"])
@pytest.mark.parametrize("to", ["self", "group"])
def test_a_signal_finishes_the_step_and_asks_for_a_requeue(
    story: Begin, reference: Begin, name: str, to: str
) -> None:
    # To the group: the loader's workers get the signal as well, as they do from a terminal and from Slurm.
    told = story(*WORKERS, "--checkpoint", "1000")
    life = told.live("--signal", f"73:body:{name}:{to}", code=REQUEUE)
    assert told.steps_written()[-1] == 73
    assert "step 73" in life.words
    told.live()
    assert_each_step_once(told)
    assert_exact(told, reference(*WORKERS))


@pytest.mark.parametrize("persistent", [(), ("--persistent",)], ids=["new workers each epoch", "persistent"])
def test_signals_at_every_place_lose_nothing(
    story: Begin, reference: Begin, persistent: tuple[str, ...]
) -> None:
    # Warm-up, the last step of an epoch, the after-work, the first step of an epoch, the last step of all.
    told = story(*WORKERS, *persistent, "--evaluate", "--checkpoint", "1000")
    for point in (
        "1:before",
        "50:after",
        "0:evaluation",
        "51:before",
        "1:epoch-end",
        "150:body",
        "2:evaluation",
    ):
        told.live("--signal", f"{point}:TERM:group", code=REQUEUE)
    told.live()
    assert_each_step_once(told)
    assert_exact(told, reference(*WORKERS, *persistent, "--evaluate"))


def test_signals_during_saves_lose_nothing(story: Begin, reference: Begin) -> None:
    # A checkpoint each step; signals from outside at random instants. The seed picks only the instants.
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    instants = random.Random(seed)
    told = story(*WORKERS, "--checkpoint", "1", "--pause-ms", "1")
    for _ in range(4):
        begun = len(told.lines())
        life = told.start()
        wait_for_step(told, begun - (begun > 50) - (begun > 100) + 1, life)
        time.sleep(instants.uniform(0, 0.15))
        life.signal(signal.SIGTERM)
        if life.wait() == 0:
            break
    told.live()
    assert_each_step_once(told)
    assert_exact(told, reference(*WORKERS))


def test_the_requeue_code_can_be_chosen(story: Begin) -> None:
    told = story("--requeue-code", "99")
    told.live("--signal", "3:body:TERM:self", code=99)


def test_a_walltime_ends_in_time_with_everything_saved(story: Begin, reference: Begin) -> None:
    told = story("--pause-ms", "10", "--checkpoint", "1000")
    life = told.live("--walltime", "0:00:01", code=REQUEUE)
    assert "walltime" in life.words
    assert 0 < len(told.steps_written()) < STEPS
    told.live()
    assert_each_step_once(told)
    assert_exact(told, reference())


def test_the_end_of_a_slurm_job_is_a_walltime(story: Begin, reference: Begin) -> None:
    # Slurm gives the end as seconds since 1970; the run keeps two minutes in hand for the last step and the save.
    told = story("--pause-ms", "10", "--checkpoint", "1000")
    told.live(code=REQUEUE, SLURM_JOB_END_TIME=str(int(time.time()) + 122))
    assert len(told.steps_written()) < STEPS
    told.live()
    assert_each_step_once(told)
    assert_exact(told, reference())


def test_a_worker_that_dies_is_an_error_and_the_run_goes_on_from_its_checkpoint(
    story: Begin, reference: Begin
) -> None:
    told = story(*WORKERS, "--pause-ms", "5")
    life = told.start()
    wait_for_step(told, 60, life)
    children = Path(f"/proc/{life.pid}/task/{life.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert life.wait() == 1
    # Ours where the death is met at the next batch; torch's where its handler comes first, in the body of the loop.
    assert (
        f"DataLoader worker (pid {children[0]}) " in life.words or "DataLoader worker (pid(s) " in life.words
    )
    told.live()
    assert_exact(told, reference(*WORKERS))
