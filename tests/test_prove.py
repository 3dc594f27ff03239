"""`unbroken prove` on whole programs: what it says, what it exits with, what it leaves behind.

Each trial is a few real processes that import torch, so that there are few trials here; the faults that a proof
tells apart are in tests/stories/test_story_faults.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unbroken.testing
from unbroken.proving import Instructions

EXACT = """
import random, torch
from torch import nn
import unbroken

random.seed(1)
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
opt = torch.optim.AdamW(net.parameters())
data = torch.utils.data.TensorDataset(torch.sin(torch.arange(96.0)).reshape(24, 4))
loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
run = unbroken.Run("anywhere/run", seed=1, model=net, optimizer=opt, checkpoint=4)
for _ in run.epochs(2):
    for (x,) in run.batches(loader):
        loss = net(x * random.random()).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(loss=loss)
"""
FORGETS = EXACT.replace("x * random.random()", "x * memory.draw()").replace(
    "import unbroken\n",
    """import unbroken

class Memory:
    # A generator that nothing captures: it starts again with each process.
    def __init__(self):
        self.value = 1
    def draw(self):
        self.value = self.value * 16807 % 2147483647
        return self.value / 2147483647

memory = Memory()
""",
    1,
)
WAVERS = EXACT.replace("import random, torch", "import os, random, torch").replace(
    "x * random.random()", "x * int.from_bytes(os.urandom(4), 'little')"
)


# Two runs, each with a network that nobody seeded: no two processes would begin either of them alike.
TWO_RUNS = """
import torch
from torch import nn
import unbroken

for name in ("first", "second"):
    net = nn.Linear(4, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.sin(torch.arange(32.0)).reshape(8, 4))
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
    with unbroken.Run(f"anywhere/{name}", model=net, optimizer=opt, checkpoint=2) as run:
        for _ in run.epochs(2):
            for (x,) in run.batches(loader):
                loss = net(x).square().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
                run.log(loss=loss)
"""


def write(directory: Path, text: str) -> Path:
    script = directory / "train.py"
    script.write_text(text)
    return script


def test_a_script_that_is_exact_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = write(tmp_path, EXACT)
    proof = unbroken.testing.assert_exact(script, kills=2, environment={"TMPDIR": str(tmp_path)})
    assert (proof.exact, proof.boundaries, proof.stops) == (True, 14, 2)
    assert all(trial["identical"] for trial in proof.details["trials"])
    assert proof.details["directory"] is None
    # Neither the run directory that the script names nor the trials' own.
    assert not list(tmp_path.glob("unbroken-prove-*"))
    assert not list(tmp_path.rglob("run.toml"))


def test_a_script_that_forgets_something_fails_with_the_first_difference(tmp_path: Path) -> None:
    script = write(tmp_path, FORGETS)
    with pytest.raises(AssertionError) as failure:
        # This seed kills at step 7: the next life starts from the first epoch's end.
        unbroken.testing.assert_exact(script, kills=1, steps=8, seed=4, environment={"TMPDIR": str(tmp_path)})
    words = str(failure.value)
    assert "not exact: 1 of 1 trials" in words
    assert "first difference at step 7, resumed from step 6" in words
    assert "`log/loss`" in words
    assert "likely cause: " in words
    kept = Path(words.rpartition("kept in ")[2])
    assert (kept / "trial-1" / "runs" / "run" / "run.toml").exists()


def test_every_run_of_a_script_gets_a_start_and_stops_of_its_own(tmp_path: Path) -> None:
    script = write(tmp_path, TWO_RUNS)
    proof = unbroken.testing.prove(script, kills=4, environment={"TMPDIR": str(tmp_path)})
    assert proof.exact, proof.details
    # Trials take turns at the runs, and each is stopped in the one it is aimed at.
    trials = {trial["trial"].rpartition(" of ")[2]: trial for trial in proof.details["trials"]}
    assert {"`first`", "`second`"} <= trials.keys()
    assert all(trials[run]["lives"] == 2 and not trials[run]["too_late"] for run in ("`first`", "`second`"))
    # Four steps and two ends of epochs, twice.
    assert proof.boundaries == 12


def test_a_script_that_is_not_deterministic_is_told_from_one_that_resumes_wrongly(tmp_path: Path) -> None:
    proof = unbroken.testing.prove(
        write(tmp_path, WAVERS), kills=1, steps=3, environment={"TMPDIR": str(tmp_path)}
    )
    assert not proof.exact
    assert proof.verdict.startswith("not deterministic")
    assert proof.details["trials"] == []
    assert proof.details["difference"]["component"] == "log/loss"
    assert proof.details["difference"]["cause"]["id"] == "not-deterministic"


def test_a_program_without_a_run_leaves_the_question_open(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-m", "unbroken", "prove", "--dir", directory, "--", sys.executable, "-c", "pass"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "recorded no step of an unbroken.Run" in done.stderr
    failing = subprocess.run(
        [
            sys.executable,
            "-m",
            "unbroken",
            "prove",
            "--",
            sys.executable,
            "-c",
            "raise SystemExit('no data')",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"TMPDIR": str(tmp_path), "PATH": ""},
    )
    assert failing.returncode == 2
    assert "does not run to its end uninterrupted: it ended with exit code 1: no data" in failing.stderr


def test_a_replay_executes_history_again_and_finds_changed_code(tmp_path: Path) -> None:
    program = EXACT.replace("checkpoint=4", "checkpoint=4, keep=10")
    script = write(tmp_path, program)
    train = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert train.returncode == 0, train.stderr
    run = tmp_path / "anywhere" / "run"
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))

    def replay(code: int) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "unbroken", "replay", run, "--from", "8", "--", sys.executable, script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "steps 8 to 12 executed again: identical in 4 boundaries" in replay(0)
    script.write_text(program.replace(".mean()", ".sum()"))
    assert "step 9, resumed from step 8: `log/loss` should be" in replay(1)
    script.write_text(program.replace("AdamW(net.parameters())", "AdamW(net.parameters(), eps=1e-7)"))
    assert "eps` was 1e-08, is 1e-07" in replay(2)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


def test_a_proof_limited_in_time_ends_behind_an_epochs_end_if_one_comes_soon() -> None:
    limited = Instructions.read({"UNBROKEN_PROVE_SECONDS": "10"})

    def is_last(epoch: int, position: int, elapsed_s: float) -> bool:
        return limited.is_last(99, epoch=epoch, position=position, elapsed_s=elapsed_s)

    assert not is_last(3, 7, 9.9)
    assert is_last(3, 7, 10.1)
    assert not is_last(3, 1, 10.1)
    assert not is_last(0, 500, 59.9)
    assert is_last(0, 500, 60.1)
    steps = Instructions.read({"UNBROKEN_PROVE_STEPS": "8"})
    assert [steps.is_last(step, epoch=0, position=step, elapsed_s=0.0) for step in (7, 8, 9)] == [
        False,
        True,
        True,
    ]
    assert not Instructions.read({}).is_last(10**6, epoch=9, position=9, elapsed_s=1e6)
