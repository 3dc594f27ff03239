"""A changed environment is put on trial: recorded steps are executed again under it before anything new is trained.

The story: a training of 48 steps saves every fourth and is asked to stop at step 30. What it goes on with has another
version of torch, or another source; the journal says whether that makes a difference.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import KILLED, Life, Nursery
from unbroken import _core

REQUEUE, REFUSED = 75, 1

SCRIPT = """
import os, random, torch
import unbroken

if "TORCH" in os.environ:
    torch.__version__ = os.environ["TORCH"]
random.seed(1)
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
opt = torch.optim.AdamW(net.parameters())
data = torch.utils.data.TensorDataset(torch.sin(torch.arange(96.0)).reshape(24, 4))
loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
keep = int(os.environ.get("KEEP", "9"))
run = unbroken.Run("run", seed=1, model=net, optimizer=opt, checkpoint=4, keep=keep)
for _ in run.epochs(8):
    for (x,) in run.batches(loader):
        loss = net(x * random.random()).square().mean()
        loss = loss * float(os.environ.get("FACTOR", "1"))  # what another release may do
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(loss=loss)
"""


@dataclass
class Told:
    """One run in a directory of its own."""

    nursery: Nursery
    directory: Path

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def live(self, *, code: int, **variables: str) -> str:
        out = self.directory / "out"
        out.write_text("")
        variables = {
            "UNBROKEN_PROVE_DIR": "",
            "UNBROKEN_STOP_AT": "",
            "UNBROKEN_CRASH_AT": "",
            "UNBROKEN_ALLOW": "",
            "TORCH": "2.15.0",
            "FACTOR": "1",
            "KEEP": "9",
            **variables,
        }
        pid = self.nursery.ask(
            do="start",
            script=str(self.directory / "train.py"),
            arguments=[],
            environment=variables,
            directory=str(self.directory),
            stdout=str(out),
            stderr=str(out),
        )
        life = Life(pid, lambda: self.nursery.ask(do="poll", pid=pid), out, out)
        found = life.wait()
        words = out.read_text()
        assert found == code, f"exit code {found} instead of {code}:\n{words}"
        return words

    def edit(self, old: str, new: str) -> None:
        script = self.directory / "train.py"
        text = script.read_text()
        assert old in text
        script.write_text(text.replace(old, new))

    def steps(self) -> list[int]:
        return [int(path.name.partition("-")[0]) for path in sorted((self.run / "checkpoints").iterdir())]


@pytest.fixture(scope="module")
def scene(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, Told]:
    """The uninterrupted run, and one that was stopped at step 30."""
    whole, stopped = (Told(nursery, tmp_path_factory.mktemp(name)) for name in ("whole", "stopped"))
    for told in (whole, stopped):
        (told.directory / "train.py").write_text(SCRIPT)
    whole.live(code=0)
    stopped.live(code=REQUEUE, UNBROKEN_STOP_AT="step:30")
    return whole, stopped


@pytest.fixture
def told(scene: tuple[Told, Told], tmp_path: Path) -> Told:
    """A copy of the run that was stopped at step 30."""
    shutil.copytree(scene[1].directory, tmp_path, dirs_exist_ok=True)
    return Told(scene[1].nursery, tmp_path)


@pytest.fixture
def whole(scene: tuple[Told, Told]) -> Told:
    return scene[0]


def assert_same(whole: Told, told: Told) -> None:
    assert _core.main(["diff", str(whole.run), str(told.run)]) == 0


def files_of(run: Path) -> dict[str, bytes]:
    paths = (path for part in ("checkpoints", "objects") for path in sorted((run / part).iterdir()))
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def test_a_changed_version_that_changes_no_number_is_tried_and_goes_on(told: Told, whole: Told) -> None:
    words = told.live(code=0, TORCH="2.16.0")
    # Sixteen steps at least: the newest checkpoint that has as many behind it is that of step 12.
    assert "at step 12" in words
    assert "torch was 2.15.0, is 2.16.0" in words
    assert (
        "the environment changed (torch 2.15.0 -> 2.16.0): steps 13-30 executed again: still exact" in words
    )
    assert_same(whole, told)
    # What passed is the environment of the checkpoint at which it did: the next life has nothing to try.
    assert "environment" not in told.live(code=0, TORCH="2.16.0")


def test_a_changed_version_that_changes_numbers_is_refused_and_nothing_is_lost(
    told: Told, whole: Told
) -> None:
    before = files_of(told.run)
    for _ in range(2):
        words = told.live(code=REFUSED, TORCH="2.16.0", FACTOR="1.0001")
        assert "torch was 2.15.0, is 2.16.0" in words
        assert "step 13, executed again, differs from the journal in `log/loss`" in words
        assert files_of(told.run) == before
    told.live(code=0)
    assert_same(whole, told)


def test_a_changed_version_may_be_allowed_by_name(told: Told) -> None:
    words = told.live(code=0, TORCH="2.16.0", FACTOR="1.0001", UNBROKEN_ALLOW="environment.torch")
    assert "at step 30" in words
    assert "nothing was executed again under it" in words
    names = [path.name for path in (told.run / "journal").iterdir()]
    assert any(b"environment.torch" in (told.run / "journal" / name).read_bytes() for name in names)


@pytest.mark.parametrize("end", ["crash", "stop"])
def test_a_life_that_ends_during_the_trial_changes_nothing(told: Told, whole: Told, end: str) -> None:
    before = files_of(told.run)
    if end == "crash":
        told.live(code=KILLED, TORCH="2.16.0", UNBROKEN_CRASH_AT="step:20")
    else:
        words = told.live(code=REQUEUE, TORCH="2.16.0", UNBROKEN_STOP_AT="step:20")
        assert "stopped by SIGTERM at step 20, on trial" in words
    assert files_of(told.run) == before
    assert "steps 13-30 executed again: still exact" in told.live(code=0, TORCH="2.16.0")
    assert_same(whole, told)


def test_changed_source_is_tried_and_comments_are_no_change(told: Told, whole: Told) -> None:
    told.edit("# what another release may do", "\n        # moved, and said differently")
    told.live(code=REQUEUE, UNBROKEN_STOP_AT="step:34")
    assert "environment" not in (told.directory / "out").read_text()
    told.edit("net(x * random.random()).square().mean()", "net(random.random() * x).pow(2).mean()")
    words = told.live(code=REQUEUE, UNBROKEN_STOP_AT="step:36")
    assert "code.train.py" in words
    assert "steps 19-34 executed again: still exact" in words
    told.edit("random.random() * x", "random.random() * x * 1.0001")
    words = told.live(code=REFUSED)
    assert "code.train.py" in words
    assert "differs from the journal in `log/loss`" in words
    told.edit("random.random() * x * 1.0001", "random.random() * x")
    told.live(code=0)
    assert_same(whole, told)


def test_what_a_kill_left_to_be_executed_again_is_a_trial_for_free(told: Told, whole: Told) -> None:
    told.edit("checkpoint=4", "checkpoint=unbroken.Policy(every_steps=31, epoch_ends=False)")
    told.live(code=KILLED, UNBROKEN_CRASH_AT="step:47")
    words = told.live(code=0, TORCH="2.16.0")
    assert "at step 31" in words
    assert "steps 32-47 executed again: still exact" in words
    assert_same(whole, told)


def test_without_an_older_checkpoint_the_run_says_that_nothing_was_tried(told: Told) -> None:
    shutil.rmtree(told.run)
    told.live(code=REQUEUE, UNBROKEN_STOP_AT="step:30", KEEP="1")
    assert len(told.steps()) == 1
    words = told.live(code=0, TORCH="2.16.0", KEEP="1")
    assert "nothing was executed again under it: the numbers may be others from here on" in words


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([12], "steps 9-30 executed again: still exact"),
        (range(30), "nothing was executed again under it"),
    ],
)
def test_a_trial_starts_from_no_damaged_checkpoint(
    told: Told, whole: Told, steps: Sequence[int], said: str
) -> None:
    # The newest's state is given up for that of an older checkpoint, before that one turns out to be damaged.
    found = told.steps()
    for step, path in zip(found, sorted((told.run / "checkpoints").iterdir()), strict=True):
        if step in steps:
            for name in re.findall(rb"[0-9a-f]+\.safetensors", path.read_bytes()):
                pack = told.run / "objects" / name.decode()
                pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    assert said in told.live(code=0, TORCH="2.16.0")
    assert_same(whole, told)


def test_retention_during_a_trial_deletes_nothing(told: Told) -> None:
    before = told.steps()
    told.live(code=REFUSED, TORCH="2.16.0", FACTOR="1.0001", KEEP="1")
    assert told.steps() == before
    told.live(code=0, TORCH="2.16.0", KEEP="1")
    assert told.steps() == [48]
