"""O16: each fault of a resume is named with the first step and component that differ, and with its likely cause.

The story: a training of 30 steps saves every fifth and is killed at step 18. Its next life starts from step
15 with one fault injected from outside. The journal of an uninterrupted run must convict it, and must
acquit a clean one.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import KILLED, Life, Nursery, command

SCRIPT = Path(__file__).parents[1] / "mutations" / "faulty.py"
REQUEUE = 75
# Up to the first boundary of the epoch after the one in which the fault strikes.
STEPS = 21
SAVED = "restored,16-0,17-0,18-0,20-1"


@dataclass
class Scene:
    """The reference, and a run that was killed at step 18, to be copied and resumed."""

    nursery: Nursery
    directory: Path
    reference: Path
    killed: Path

    def live(self, runs: Path, fault: str, *, code: int, **variables: str) -> str:
        """Go through one life in a directory of runs; return what it said."""
        runs.mkdir(parents=True, exist_ok=True)
        stdout, stderr = runs.parent / f"{runs.name}.out", runs.parent / f"{runs.name}.err"
        variables = {
            "UNBROKEN_PROVE_DIR": str(runs),
            "UNBROKEN_PROVE_STEPS": str(STEPS),
            "UNBROKEN_PROVE_SAVE": SAVED,
            "UNBROKEN_CRASH_AT": "",
            "UNBROKEN_ALLOW": "",
            **variables,
        }
        pid = self.nursery.ask(
            do="start",
            script=str(SCRIPT),
            arguments=[fault],
            environment=variables,
            stdout=str(stdout),
            stderr=str(stderr),
        )
        life = Life(pid, lambda: self.nursery.ask(do="poll", pid=pid), stdout, stderr)
        found = life.wait()
        assert found == code, f"exit code {found} instead of {code}:\n{life.words}"
        return life.words

    def resumed(self, fault: str, *, code: int = REQUEUE, **variables: str) -> tuple[Path, str]:
        """Resume a copy of the killed run with a fault."""
        runs = self.directory / fault
        shutil.copytree(self.killed, runs)
        words = self.live(runs, fault, code=code, **variables)
        return runs / "training", words

    def explain(self, found: Path, *, code: int) -> Any:
        done = command("explain", "--json", self.reference / "training", found, code=code)
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def scene(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    directory = tmp_path_factory.mktemp("faults")
    scene = Scene(nursery, directory, directory / "reference", directory / "killed")
    scene.live(scene.reference, "nothing", code=REQUEUE)
    scene.live(scene.killed, "nothing", code=KILLED, UNBROKEN_CRASH_AT="step:18", UNBROKEN_PROVE_SAVE="")
    return scene


@pytest.mark.parametrize(
    ("fault", "step", "phase", "component", "cause", "leaf"),
    [
        ("moment-off-by-one-ulp", 16, 0, "state/optimizer/optimizer", "rounded", "exp_avg"),
        ("moments-zeroed", 16, 0, "state/optimizer/optimizer", "moments-zeroed", "exp_avg"),
        ("weights-cast-to-bfloat16", 16, 0, "log/loss", "cast-to-bfloat16", "model"),
        ("parameters-not-restored", 16, 0, "log/loss", "not-restored", "model"),
        ("gradients-not-restored", 16, 0, "state/optimizer/optimizer", "not-restored", "gradients"),
        ("attribute-not-restored", 16, 0, "log/loss", "not-restored", "calls"),
        ("hidden-buffer-not-restored", 16, 0, "log/loss", "not-restored", "peak"),
        ("own-values-not-restored", 16, 0, "log/loss", "not-restored", "state/turns"),
        ("loader-not-restored", 16, 0, "position", "loader-not-restored", "position"),
        ("batch-norm-reset", 16, 0, "state/buffers/model", "batch-norm-reset", "running_"),
        ("ema-not-restored", 16, 0, "state/parameters/ema", "average-not-restored", "ema"),
        ("scaler-reset", 16, 0, "state/optimizer/optimizer", "scaler-reset", "scaler"),
        ("schedule-one-step-late", 16, 0, "lr/optimizer/0", "schedule-late", "scheduler"),
        ("python-generator-not-restored", 16, 0, "rng/python", "generator-not-restored", "generators/python"),
        ("numpy-generator-not-restored", 16, 0, "rng/numpy", "generator-not-restored", "generators/numpy"),
        ("torch-generator-not-restored", 16, 0, "rng/torch", "generator-not-restored", "generators/torch"),
        ("own-generator-not-restored", 16, 0, "log/loss", "not-restored", "noise"),
        ("worker-generators-not-restored", 16, 0, "data/batch", "worker-generator-not-restored", None),
        ("batches-swapped", 16, 0, "data/indices", "batches-swapped", None),
        ("batch-repeated", 17, 0, "data/indices", "batch-repeated", None),
        ("evaluation-draws", 20, 1, "rng/python", "evaluation-drew", None),
        ("operator-not-deterministic", 18, 0, "log/loss", "not-deterministic", None),
    ],
)
def test_a_fault_is_named_with_step_component_and_cause(
    scene: Scene, fault: str, step: int, phase: int, component: str, cause: str, leaf: str | None
) -> None:
    found, _ = scene.resumed(fault)
    answer = scene.explain(found, code=1)
    difference = answer["difference"]
    assert (difference["step"], difference["phase"], difference["component"]) == (step, phase, component), (
        difference
    )
    assert difference["cause"]["id"] == cause, difference
    assert difference["resumed_at"] == 15
    paths = [entry["path"] for entry in difference["restored"]]
    if leaf is None:
        assert paths == []
    else:
        assert any(leaf in path for path in paths), difference


def test_one_ulp_in_one_moment_is_counted_and_measured(scene: Scene) -> None:
    found = scene.directory / "moment-off-by-one-ulp" / "training"
    if not found.exists():
        found, _ = scene.resumed("moment-off-by-one-ulp")
    (entry,) = scene.explain(found, code=1)["difference"]["restored"]
    assert entry["path"].endswith("exp_avg")
    assert entry["change"] == "1 of 72 elements, at most 1 ulp"


def test_a_clean_resume_is_acquitted(scene: Scene) -> None:
    found, words = scene.resumed("nothing")
    assert scene.explain(found, code=0)["same"] is True
    assert "steps 16-18 executed again: identical" in words


def test_a_changed_thread_count_is_refused_and_if_allowed_named(scene: Scene) -> None:
    _, words = scene.resumed("threads-changed", code=1)
    assert "threads.intra_op" in words
    shutil.rmtree(scene.directory / "threads-changed")
    found, _ = scene.resumed("threads-changed", UNBROKEN_ALLOW="threads.*")
    difference = scene.explain(found, code=1)["difference"]
    assert (difference["step"], difference["component"]) == (16, "log/loss"), difference
    assert difference["cause"]["id"] == "threads-changed"


def test_the_journal_convicts_by_itself_without_a_reference(scene: Scene) -> None:
    # Outside a proof the run stops at the difference: the earlier life's records are the reference.
    runs = scene.directory / "alone"
    shutil.copytree(scene.killed, runs)
    words = scene.live(runs, "moments-zeroed", code=REQUEUE)
    assert "differs from the journal" in words
    events = command("log", "--json", runs / "training").stdout
    assert '"diverged"' in events
