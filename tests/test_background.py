"""Saving while the training goes on: one step in each checkpoint, failures heard, nothing left behind at an end."""

import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import unbroken
from unbroken import Policy, errors, room
from unbroken.policy import Cost
from unbroken.torch import fence, snapshot


class Counting:
    """A training in which every element of every tensor is the number of the step, optimizer state included."""

    def __init__(self, path: Path, *, tensors: int = 9, elements: int = 1 << 17, **options: Any) -> None:
        options = {"quiet": True, **options}
        self.parameters = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(tensors)]
        self.plain = [torch.zeros(1000) for _ in range(4)]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0, momentum=0.5)
        self.loader = DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=1)
        self.run = unbroken.Run(
            path,
            seed=1,
            weights=self.parameters,
            plain=self.plain,
            optimizer=self.optimizer,
            **options,
        )

    def step(self) -> None:
        """Each momentum becomes -1 and each parameter goes up by 1."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, -1.0)
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                parameter.grad -= 0.5 * buffer
        for tensor in self.plain:
            tensor += 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, epochs: int = 1, until: int = 10**9) -> None:
        for _ in self.run.epochs(epochs):
            for _ in self.run.batches(self.loader):
                self.step()
                if self.run.step + 1 >= until:
                    return


def values_in(path: Path) -> tuple[int, set[float]]:
    """Return a checkpoint's step, and every value that its tensors have."""
    found = unbroken.load(path)
    objects = found["objects"]
    tensors = [*objects["weights"]["value"], *objects["plain"]["value"]]
    return found["run"]["step"], {value for tensor in tensors for value in tensor.unique().tolist()}


def test_every_checkpoint_saved_in_the_background_holds_one_step_in_all_tensors(tmp_path: Path) -> None:
    life = Counting(tmp_path / "run", checkpoint=8, keep=100)
    life.train()
    life.run.close()
    infos = life.run.checkpoints()
    assert [info.step for info in infos] == [0, *range(8, 65, 8)]
    for info in infos:
        assert values_in(info.path) == (info.step, {float(info.step)})
    assert list((tmp_path / "run" / "tmp").iterdir()) == []
    journal = (tmp_path / "run" / "journal" / "000001.journal").read_bytes()
    assert journal.count(b"saved") >= 8


def test_what_is_written_before_the_optimizer_steps_is_right_like_what_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    at_least_s = fence.UntilStep.at_least_s
    monkeypatch.setattr(
        fence.UntilStep, "at_least_s", lambda known: told.append(at_least_s(known)) or told[-1]
    )
    life = Counting(tmp_path / "run", checkpoint=4, keep=100)
    pause_s = 0.2  # Long enough to be written in, on a machine that is not too busy; now and then it is far shorter.
    for _ in life.run.epochs(1):
        for _ in life.run.batches(life.loader):
            if life.run.step % 12 != 8:
                time.sleep(pause_s)
            life.step()
            if life.run.step == 24:
                break
    life.run.close()
    for info in life.run.checkpoints():
        assert values_in(info.path) == (info.step, {float(info.step)})
    assert told[0] is None
    assert any(seconds is not None and seconds > 0.5 * pause_s for seconds in told)


def test_how_long_it_is_until_a_step_is_the_shortest_of_the_last_ones_and_somewhat_less() -> None:
    known = fence.UntilStep()
    for begun, seconds in [(0, 9.0), (10, 3.0), (20, 2.0), (30, 4.0)]:
        assert known.at_least_s() is None
        known.begin(begun)
        known.reached(begun + seconds)
        known.reached(begun + 100)  # Another optimizer's step.
    assert known.at_least_s() == pytest.approx(0.8 * 2)
    for begun in (40, 50):
        known.begin(begun)
        known.reached(begun + 8)
    assert known.at_least_s() == pytest.approx(0.8 * 2)
    known.begin(60)
    known.begin(61)  # A boundary without a step of any optimizer.
    known.reached(67)
    assert known.at_least_s() == pytest.approx(0.8 * 4)


def digest_of(tensors: list[torch.Tensor]) -> list[int]:
    return [zlib.crc32(tensor.detach().numpy().tobytes()) for tensor in tensors]


def test_every_checkpoint_holds_weights_moments_and_counters_of_one_step(tmp_path: Path) -> None:
    # O12: 32 tensors of 4 MB under an optimizer with step counters, saved beside the training.
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(1 << 20)) for _ in range(32)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    loader = DataLoader(TensorDataset(torch.zeros(10, 1)), batch_size=1)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    expected: dict[int, list[int]] = {}
    run = unbroken.Run(
        tmp_path / "run", checkpoint=3, keep=100, quiet=True, weights=parameters, optimizer=optimizer
    )
    for _ in run.epochs(1):
        for _ in run.batches(loader):
            for parameter in parameters:
                parameter.grad = parameter.detach() * 0.1
            optimizer.step()
            optimizer.zero_grad()
            states = [optimizer.state[parameter][kind] for kind in kinds for parameter in parameters]
            expected[run.step + 1] = digest_of([*parameters, *states])
    run.close()
    saved = [info for info in run.checkpoints() if info.step > 0]
    assert [info.step for info in saved if info.phase == 0] == [3, 6, 9]
    for info in saved:
        objects = unbroken.load(info.path)["objects"]
        states = [state[kind] for kind in kinds for state in objects["optimizer"]["state"].values()]
        assert digest_of([*objects["weights"]["value"], *states]) == expected[info.step]


def test_a_checkpoint_that_is_due_while_another_is_written_waits_for_it(tmp_path: Path) -> None:
    life = Counting(tmp_path / "run", checkpoint=1, keep=2)
    life.train(until=20)
    life.run.close()
    assert [info.step for info in life.run.checkpoints()] == [18, 19]
    assert values_in(tmp_path / "run") == (19, {19.0})


@pytest.mark.parametrize("save", ["background", "sync"])
def test_a_file_that_keeps_packs_from_being_deleted_is_named_once(
    tmp_path: Path, save: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    life = Counting(tmp_path / "run", checkpoint=1, keep=1, save=save, quiet=False)
    checkpoints, objects = tmp_path / "run" / "checkpoints", tmp_path / "run" / "objects"
    (checkpoints / ".DS_Store").write_bytes(b"desktop")
    life.train()
    assert len(list(objects.iterdir())) < 4
    (checkpoints / "notes.txt").write_text("mine")
    life.run.close()
    assert "no checkpoint" not in capfd.readouterr().err
    again = Counting(tmp_path / "run", checkpoint=1, keep=1, save=save, quiet=False, allow=["plan.epochs"])
    again.train(epochs=2)
    again.run.close()
    assert len(list(objects.iterdir())) > 60
    assert capfd.readouterr().err.count("none is deleted while it is there; move it elsewhere") == 1


@pytest.mark.parametrize("save", ["background", "sync"])
def test_a_save_that_fails_is_reported_and_costs_only_itself(tmp_path: Path, save: Any) -> None:
    life = Counting(tmp_path / "run", checkpoint=5, keep=100, save=save)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(errors.StorageError) as caught:
            for _ in life.run.epochs(1):
                for _ in life.run.batches(life.loader):
                    if life.run.step == 9:
                        while len(life.run.checkpoints()) < 2:
                            time.sleep(0.01)
                        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
                    life.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 9 <= life.run.step <= 15
    assert "objects" in str(caught.value) or "tmp" in str(caught.value)
    life.run.close()
    assert [info.step for info in life.run.checkpoints()] == [0, 5]
    again = Counting(tmp_path / "run", checkpoint=5, keep=100, save=save)
    again.train()
    assert again.run.finished
    for info in again.run.checkpoints():
        assert values_in(info.path) == (info.step, {float(info.step)})


def test_a_copy_of_memory_that_somebody_wrote_to_is_thrown_away_and_the_next_boundary_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Counting(tmp_path / "run", checkpoint=5, keep=100)
    lent: set[int] = set()

    def changed(owned: fence.Owned) -> bool:
        if owned.keys:
            lent.add(id(owned))
        return not owned.keys

    monkeypatch.setattr(fence.Owned, "unchanged", changed)
    life.train()
    life.run.close()
    assert len(lent) == 1, "memory is lent no more after that"
    saved = [info.step for info in life.run.checkpoints()]
    missed = [step for step in range(5, 65, 5) if step not in saved]
    assert missed == [5]
    assert min(step for step in saved if step > 5) <= 10
    assert b"save torn" in (tmp_path / "run" / "journal" / "000001.journal").read_bytes()
    for info in life.run.checkpoints():
        assert values_in(info.path) == (info.step, {float(info.step)})


def test_a_run_that_ends_in_the_middle_of_a_save_has_it(tmp_path: Path) -> None:
    life = Counting(tmp_path / "run", checkpoint=7, keep=100)
    for _ in life.run.epochs(1):
        for _ in life.run.batches(life.loader):
            life.step()
            if life.run.step == 7:
                break
        break
    life.run.close()
    assert values_in(tmp_path / "run") == (7, {7.0})


def test_a_run_without_memory_for_a_copy_waits_for_each_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 1 << 20)
    life = Counting(tmp_path / "run", checkpoint=20, keep=100, quiet=False)
    life.train()
    life.run.close()
    assert capsys.readouterr().err.count("and 1.0 MB are free: the training waits for each checkpoint") == 1
    assert [info.step for info in life.run.checkpoints() if info.phase == 0] == [0, 20, 40, 60]
    assert values_in(tmp_path / "run") == (64, {64.0})


@pytest.mark.parametrize("save", ["background", "sync"])
def test_of_a_frozen_model_with_an_adapter_only_the_adapter_is_written_again(
    tmp_path: Path, save: Any
) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2000, 2000), torch.nn.Linear(2000, 100))
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(net[1].parameters())
    loader = DataLoader(TensorDataset(torch.randn(12, 2000)), batch_size=1)
    run = unbroken.Run(
        tmp_path / "run", checkpoint=3, keep=100, quiet=True, save=save, net=net, optimizer=optimizer
    )
    for _ in run.epochs(1):
        for (x,) in run.batches(loader):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    run.close()
    changed = 3 * sum(parameter.nbytes for parameter in net[1].parameters())
    first, *later = run.checkpoints()
    assert first.new_bytes > sum(parameter.nbytes for parameter in net.parameters())
    assert [info.step for info in later] == [3, 6, 9, 12]
    # The last one is the run's end: what it has was written after its step.
    assert all(changed <= info.new_bytes <= 1.05 * changed for info in later[:-1])


class Adapting:
    """A training of an adapter on a frozen base, beside an average of it: each element is the number of a step.

    The base is 0, until `unfreeze` makes it a parameter like the adapter.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        options = {"checkpoint": 4, "keep": 100, "quiet": True, **options}
        self.net = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(torch.zeros(1 << 18)) for name in ("base", "adapter", "average")}
        )
        self.net["base"].requires_grad_(False)
        self.net["average"].requires_grad_(False)
        self.net.register_buffer("seldom", torch.zeros(1 << 18))
        self.optimizer = torch.optim.SGD([self.net["adapter"]], lr=1.0)
        self.run = unbroken.Run(path, seed=1, net=self.net, optimizer=self.optimizer, **options)
        self.resting: list[int] = []
        lendable = snapshot.Snapshot.lendable

        def counted(taken: snapshot.Snapshot, owned: fence.Owned, unmoved: Any = frozenset()) -> Any:
            self.resting.append(len(unmoved))
            return lendable(taken, owned, unmoved)

        monkeypatch.setattr(snapshot.Snapshot, "lendable", counted)

    def train(self, before: Callable[[int], None] = lambda step: None) -> None:
        for _ in self.run.epochs(1):
            for _ in self.run.batches(DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=1)):
                before(self.run.step)
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.full_like(parameter, -1.0)
                self.optimizer.step()
                with torch.no_grad():
                    self.net["average"].copy_(self.net["adapter"])
        self.run.close()

    def saved(self) -> list[tuple[int, dict[str, set[float]]]]:
        """Return each checkpoint's step, and the values that its parameters have."""
        found = []
        for info in self.run.checkpoints():
            parameters = unbroken.load(info.path)["objects"]["net"]["parameters"]
            found.append(
                (info.step, {name: set(part.unique().tolist()) for name, part in parameters.items()})
            )
        return found


def test_frozen_parameters_are_not_copied_and_stand_in_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Adapting(tmp_path / "run", monkeypatch)
    life.train()
    assert life.resting[:9] == [1] * 9, "the base, and nothing that training writes to"
    assert [step for step, _ in life.saved()] == list(range(0, 41, 4))
    for step, values in life.saved():
        assert values == {"base": {0.0}, "adapter": {float(step)}, "average": {float(step)}}


def test_after_a_resume_frozen_parameters_rest_from_the_first_save_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: int) -> None:
        if step == 10:
            raise KeyboardInterrupt

    first = Adapting(tmp_path / "run", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    first.run.close()
    again = Adapting(tmp_path / "run", monkeypatch)
    with torch.no_grad():
        again.net["base"].fill_(9.0)
    again.train()
    assert again.resting[:7] == [1] * 7
    assert [step for step, _ in again.saved()] == list(range(0, 41, 4))
    for step, values in again.saved():
        assert values == {"base": {0.0}, "adapter": {float(step)}, "average": {float(step)}}


def test_a_frozen_parameter_that_is_written_to_past_torch_costs_one_checkpoint_and_none_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    life = Adapting(tmp_path / "run", monkeypatch, quiet=False)

    def before(step: int) -> None:
        if step == 18:
            life.run._saves.settle()
            life.net["base"].detach().numpy()[77777] = (
                5.0  # No version counter moves, and no window is there.
            )

    life.train(before)
    assert set(range(0, 41, 4)) - {step for step, _ in life.saved()} == {20}
    for step, values in life.saved():
        assert values["base"] == ({0.0} if step <= 18 else {0.0, 5.0})
        assert values["adapter"] == {float(step)}
    assert (
        capfd.readouterr().err.count(
            "the checkpoint of step 20 was thrown away: a parameter that requires no"
        )
        == 1
    )
    assert life.resting[-1] == 0, "nothing is taken for resting any more"
    assert b"save torn" in (tmp_path / "run" / "journal" / "000001.journal").read_bytes()


def test_a_frozen_parameter_that_is_unfrozen_is_trained_and_saved_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Adapting(tmp_path / "run", monkeypatch)

    def before(step: int) -> None:
        if step == 18:
            life.run._saves.settle()
            life.net["base"].requires_grad_(True)
            life.optimizer.add_param_group({"params": [life.net["base"]]})

    life.train(before)
    assert [step for step, _ in life.saved()] == list(range(0, 41, 4))
    for step, values in life.saved():
        assert values["base"] == {float(max(step - 18, 0))}


def test_a_resting_parameter_that_training_writes_to_while_it_is_saved_costs_one_checkpoint_and_rests_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    life = Adapting(tmp_path / "run", monkeypatch, quiet=False)

    def before(step: int) -> None:
        if step == 20:  # Its save has just begun, or is over: then this is a write like any other.
            with torch.no_grad():
                life.net["base"].fill_(3.0)

    life.train(before)
    lost = set(range(0, 41, 4)) - {step for step, _ in life.saved()}
    assert lost <= {20}
    for step, values in life.saved():
        assert values["base"] == ({0.0} if step <= 20 else {3.0})
    told = capfd.readouterr().err.count(
        "the checkpoint of step 20 was thrown away: a parameter that required no"
    )
    assert told == len(lost)
    assert life.resting[-1] > 0


def test_continuous_saves_follow_one_another_as_far_as_the_budget_allows(tmp_path: Path) -> None:
    def saves(name: str, part: float) -> int:
        policy = Policy(continuous=part, epoch_ends=False)
        life = Counting(tmp_path / name, elements=1000, checkpoint=policy, keep=100)
        life.train(epochs=6)
        return len(life.run.checkpoints())

    # Step 0, one to see what it costs, the run's end; and another where a save seems to have cost less than nothing.
    generous, mean = saves("generous", 1.0), saves("mean", 1e-9)
    assert 3 <= mean < generous


def test_what_training_does_between_epochs_is_not_part_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A save of the epoch's end may be under way when the next epoch's first step is over: it would bear all of that.
    noted: list[float] = []
    monkeypatch.setattr(Cost, "step", lambda cost, seconds, **more: noted.append(seconds))
    life = Counting(tmp_path / "run", elements=1000, checkpoint=Policy(continuous=0.01))
    for _ in life.run.epochs(3):
        for _ in life.run.batches(life.loader):
            life.step()
        time.sleep(1.0)
    assert len(noted) == 3 * 64
    assert max(noted) < 1.0


def test_what_the_capture_of_a_state_takes_is_a_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = snapshot.capture

    def slow(*arguments: Any, **options: Any) -> snapshot.Snapshot:
        time.sleep(0.1)
        return capture(*arguments, **options)

    monkeypatch.setattr(snapshot, "capture", slow)
    life = Counting(tmp_path / "run", elements=1000, checkpoint=Policy(continuous=1e-9))
    life.train(epochs=2)
    cost = life.run._saves._cost
    assert cost is not None and cost.spent >= 0.3, "the ends of two epochs and of the run at least"


@pytest.mark.parametrize("part", [0.0, -1.0, 1.5, float("nan")])
def test_a_budget_that_is_no_part_of_the_time_is_refused(part: float) -> None:
    with pytest.raises(errors.InvalidArgument, match="continuous"):
        Policy(continuous=part)


def test_a_mode_of_saving_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="save must be"):
        unbroken.Run(tmp_path, save="later")  # type: ignore[arg-type]
