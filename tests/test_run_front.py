"""What a person meets at the front of a run: refusals by name, state, bars, evaluations, divergence, ends."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unbroken
from unbroken import Keep, Policy, errors
from unbroken.notices import UnbrokenWarning


@dataclass
class Score:
    """A user's own type, in `run.state`."""

    best: float
    at: tuple[int, int]


class Killed(Exception):
    """The life ends here."""


class Life:
    """One life of a small training."""

    def __init__(self, path: Path, *, batches: int = 6, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.loader = DataLoader(TensorDataset(torch.randn(batches * 2, 3)), batch_size=2, shuffle=True)
        options = {"quiet": True, "checkpoint": 2, **options}
        self.run = unbroken.Run(path, seed=1, model=self.net, optimizer=self.optimizer, **options)

    def step(self, batch: list[torch.Tensor], scale: float = 1.0) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.net(batch[0]).square().mean() * scale
        loss.backward()
        self.optimizer.step()
        self.run.log(loss=loss)
        return loss

    def train(self, epochs: int = 2, kill_at: int | None = None, scale: float = 1.0, **options: Any) -> None:
        try:
            for _ in self.run.epochs(epochs):
                for batch in self.run.batches(self.loader, **options):
                    self.step(batch, scale)
                    if self.run.step + 1 == kill_at:
                        raise Killed
        except Killed:
            pass
        finally:
            self.run.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


class Bar:
    """What a tqdm-like class is called with."""

    made: list["Bar"]

    def __init__(self, *, total: int | None, initial: int, desc: str) -> None:
        self.total, self.n, self.desc, self.closed = total, initial, desc, False
        self.initial = initial
        Bar.made.append(self)

    def update(self, count: int) -> None:
        self.n += count

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def bars() -> Iterator[list[Bar]]:
    Bar.made = []
    yield Bar.made


def test_a_progress_bar_goes_on_where_it_was(path: Path, bars: list[Bar]) -> None:
    Life(path).train(kill_at=10, progress=Bar)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 6, 6), (0, 3, 6)]
    bars.clear()
    Life(path).train(progress=Bar)
    assert [(bar.initial, bar.n, bar.total, bar.desc) for bar in bars] == [(2, 6, 6, "epoch 1")]
    assert bars[0].closed


def test_tqdm_itself_is_used_where_progress_is_true(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Life(path).train(epochs=1, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_the_repr_answers_where_the_run_is(path: Path) -> None:
    life = Life(path)
    assert repr(life.run) == f"Run({str(path)!r}, step=0, checkpoints=0)"
    life.train(epochs=1)
    assert "step=6" in repr(life.run) and "finished" in repr(life.run)


def test_user_state_comes_back_with_its_types_and_can_be_read_before_training(path: Path) -> None:
    life = Life(path)
    life.run.state.score = Score(0.0, (0, 0))
    for epoch in life.run.epochs(2):
        for batch in life.run.batches(life.loader):
            life.run.state.score = Score(life.step(batch).item(), (epoch, life.run.position))
            if life.run.step + 1 == 9:
                break
        if epoch == 1:
            break
    expected = Score(life.run.state.score.best, (1, 3))
    assert life.run.state["score"] == expected
    life.run.close()
    again = Life(path)
    assert isinstance(again.run.state.score, Score), "step 8 is the newest checkpoint"
    assert again.run.state.score.at == (1, 2)
    again.run.close()
    with pytest.raises(AttributeError, match="no value 'missing'"):
        again.run.state.missing  # noqa: B018


def test_what_the_script_sets_before_training_does_not_win_over_the_checkpoint(path: Path) -> None:
    life = Life(path)
    life.run.state.count = 0
    for _ in life.run.epochs(1):
        for batch in life.run.batches(life.loader):
            life.step(batch)
            life.run.state.count += 1
            if life.run.step + 1 == 4:
                break
        break
    life.run.close()
    again = Life(path)
    again.run.state.count = 0
    for _ in again.run.epochs(1):
        for batch in again.run.batches(again.loader):
            again.step(batch)
            again.run.state.count += 1
    assert again.run.state.count == 6
    again.run.close()


def test_a_finished_run_says_so_and_trains_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Life(path).train()
    trained = Life(path, quiet=False)
    before = [p.clone() for p in trained.net.parameters()]
    trained.train()
    assert "complete, 12 of 12 steps; nothing to do" in capsys.readouterr().err
    assert trained.run.finished and trained.run.step == 12
    changed = [not torch.equal(a, b) for a, b in zip(before, trained.net.parameters(), strict=True)]
    assert all(changed), "the trained weights are there, for what comes after the loop"


def test_a_run_that_ended_early_says_that_it_is_not_complete(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    life = Life(path, quiet=False)
    with life.run:
        for _ in life.run.epochs(2):
            for batch in life.run.batches(life.loader):
                life.step(batch)
            break
    said = capsys.readouterr().err
    assert "before its planned end, at step" in said
    assert "complete," not in said


def test_early_stopping_completes_the_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    life = Life(path)
    for epoch in life.run.epochs(5):
        for batch in life.run.batches(life.loader):
            life.step(batch)
        if epoch == 1:
            life.run.finish()
            break
    life.run.close()
    again = Life(path)
    assert list(again.run.epochs(5)) == []
    assert again.run.finished and again.run.step == 12
    again.run.close()


def test_enumerate_around_batches_is_refused_in_the_first_run(path: Path) -> None:
    life = Life(path)
    with pytest.raises(errors.NotExact, match="enumerate") as caught:
        for _ in life.run.epochs(1):
            for _ in enumerate(life.run.batches(life.loader)):
                pass
    assert "run.enumerate" in (caught.value.hint or "")
    life.run.close()
    allowed = Life(path, allow=["enumerate"])
    for _ in allowed.run.epochs(1):
        assert [i for i, _ in enumerate(allowed.run.batches(allowed.loader))] == list(range(6))
    allowed.run.close()


def test_an_untracked_optimizer_ends_the_run_at_its_first_step_by_name(path: Path) -> None:
    life = Life(path)
    other = torch.optim.Adam(life.net.parameters())
    with pytest.raises(errors.NotTracked, match="optimizer Adam with 4 parameters"):
        for _ in life.run.epochs(1):
            for batch in life.run.batches(life.loader):
                life.step(batch)
                other.step()
    assert life.run.step == 1
    life.run.close()


def test_an_evaluation_aside_leaves_generators_and_flags_as_they_were(path: Path) -> None:
    life = Life(path)
    before = torch.get_rng_state()
    with life.run.aside():
        life.net.eval()
        torch.rand(10)
        other = nn.Linear(3, 1)
        other(torch.zeros(1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert life.net.training and life.net[1].training
    life.run.close()


def test_a_changed_program_is_refused_at_the_first_step_that_differs(path: Path) -> None:
    Life(path).train(kill_at=10)
    with pytest.raises(errors.DivergedFromJournal, match="step 9, executed again") as caught:
        Life(path).train(scale=1.5)
    assert caught.value.difference.component == "log/loss"
    with pytest.raises(errors.DivergedFromJournal):
        Life(path).train(scale=1.5)
    Life(path).train()


class NoRoomForTheWord:
    """A run's core on a disk that is full when the journal is to say that a step differs."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def event(self, kind: str, *fields: Any) -> None:
        if kind != "diverged":
            return self._core.event(kind, *fields)
        raise errors.StorageError("cannot write", doing="write", path=Path("journal"), errno=errno.ENOSPC)


@pytest.mark.parametrize("on_full", ["wait", "continue"])
def test_a_full_disk_does_not_hide_that_a_step_differs(path: Path, on_full: str) -> None:
    Life(path).train(kill_at=10)
    life = Life(path, on_full=on_full)
    life.run._core = NoRoomForTheWord(life.run._core)  # type: ignore[assignment]
    with pytest.raises(errors.DivergedFromJournal, match="step 9, executed again"):
        life.train(scale=1.5)


def test_a_changed_program_goes_on_marked_where_that_was_asked_for(path: Path) -> None:
    Life(path).train(kill_at=10)
    with pytest.warns(UnbrokenWarning, match="step 9, executed again"):
        Life(path, on_divergence="continue").train(scale=1.5)
    again = Life(path)
    assert again.run.finished
    again.run.close()


def test_a_hyper_parameter_that_changed_is_refused_with_both_values(path: Path) -> None:
    Life(path).train(kill_at=10)
    life = Life(path)
    life.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(errors.MismatchError, match=r"optimizer.group0.momentum` was 0(\.0)?, is 0.9"):
        life.train()
    life = Life(path, allow=["optimizer.group0.momentum"])
    life.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.warns(UnbrokenWarning):
        life.train()


def test_the_planned_length_is_part_of_the_run(path: Path) -> None:
    Life(path).train(epochs=2)
    with pytest.raises(errors.MismatchError, match=r"plan.epochs` was 2, is 4"):
        Life(path).train(epochs=4)
    longer = Life(path, allow=["plan.epochs"])
    longer.train(epochs=4)
    assert longer.run.step == 24


def test_pinned_and_best_checkpoints_stay_with_the_newest(path: Path) -> None:
    life = Life(
        path, keep=Keep(last=1, best=("score", "max", 1)), checkpoint=Policy(every_steps=1, epoch_ends=False)
    )
    for _ in life.run.epochs(1):
        for batch in life.run.batches(life.loader):
            life.step(batch)
            step = life.run.step + 1
            life.run.log(score=10.0 if step == 3 else float(step))
            if step == 2:
                life.run.pin()
    kept = [(info.step, info.phase, info.pinned) for info in life.run.checkpoints()]
    life.run.close()
    assert kept == [(2, 0, True), (3, 0, False), (6, 2, False)]


def test_another_program_loads_a_checkpoint_as_a_plain_dict(path: Path) -> None:
    life = Life(path)
    life.run.state.note = "ours"
    life.train()
    loaded = unbroken.load(path)
    assert loaded["state"] == {"note": "ours"}
    assert loaded["run"]["step"] == 12
    tensors = [v for v in _leaves(loaded["objects"]["model"]) if isinstance(v, torch.Tensor)]
    for parameter in life.net.parameters():
        assert any(t.shape == parameter.shape and torch.equal(t, parameter) for t in tensors)


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        for value in item.values():
            yield from _leaves(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _leaves(value)
    else:
        yield item


def test_a_second_run_on_the_same_directory_is_refused(path: Path) -> None:
    life = Life(path)
    with pytest.raises(errors.RunLocked):
        Life(path)
    life.run.close()
    Life(path).run.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": "nativ"},
        {"journal": "none"},
        {"on_divergence": "ignore"},
        {"walltime": "soon"},
        {"checkpoint": 0},
        {"keep": 0},
        {"state": object()},
        {"ema": None},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_argument_is_refused_before_the_directory_is_made(path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        Life(path, **wrong)
    assert not path.exists()


def test_batches_outside_epochs_say_what_to_write(path: Path) -> None:
    life = Life(path)
    with pytest.raises(errors.InvalidArgument, match=r"outside run\.epochs") as caught:
        next(life.run.batches(life.loader))
    assert "until_step" in (caught.value.hint or "")
    life.run.close()


def test_tracking_after_the_start_comes_too_late(path: Path) -> None:
    life = Life(path)
    for _ in life.run.epochs(1):
        with pytest.raises(errors.InvalidArgument, match="too late"):
            life.run.track(other=life.net)
        break
    life.run.close()


def test_a_custom_sampler_may_give_fewer_batches_than_its_length_says(path: Path) -> None:
    life = Life(path)

    class Short(torch.utils.data.SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    loader = DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=2, sampler=Short(range(12)))
    for _ in life.run.epochs(1):
        steps = 0
        for batch in life.run.batches(loader):
            life.step(batch)
            steps += 1
        assert steps == 2
    life.run.close()


def test_the_journal_shows_that_partial_gradients_were_put_back(path: Path) -> None:
    life = Life(path, checkpoint=1)
    for _ in life.run.epochs(1):
        for batch in life.run.batches(life.loader):
            life.net(batch[0]).sum().backward()
            if life.run.step + 1 == 3:
                break
        break
    life.run.close()
    again = Life(path)
    for _ in again.run.epochs(1):
        for _batch in again.run.batches(again.loader):
            assert all(p.grad is not None for p in again.net.parameters())
            break
        break
    again.run.close()
    shown = subprocess.run(
        [sys.executable, "-m", "unbroken", "log", "--json", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    restored = [
        line for line in map(json.loads, shown.stdout.splitlines()) if line.get("event") == "restored"
    ]
    assert [line["fields"]["gradients"] for line in restored] == [4]
