"""Schedulers and scalers go on bit for bit, whatever the order of construction, and restoring advances nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from state_memory import assert_resumes_exactly, restore, save
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from unbroken.torch import snapshot


class Decay:
    """A callable object with state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**self.calls


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e]),
    "LambdaLR object": lambda o: lr_scheduler.LambdaLR(o, [Decay(), Decay()]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "CyclicLR own scale": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5**x
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 5)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LinearLR(o, total_iters=4)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.7),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=4),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def optimizer_of(model: nn.Sequential) -> torch.optim.Optimizer:
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def step(objects: dict[str, Any], number: int) -> None:
    objects["optimizer"].zero_grad()
    loss = objects["model"](torch.randn(5, 4)).pow(2).mean()
    loss.backward()
    objects["optimizer"].step()
    scheduler = objects["scheduler"]
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 + number % 3)
    else:
        scheduler.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_bit_for_bit_in_new_objects(name: str) -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        optimizer = optimizer_of(model)
        return {"scheduler": SCHEDULERS[name](optimizer), "optimizer": optimizer, "model": model}

    _, resumed = assert_resumes_exactly(build, step, before=3, after=5)
    assert resumed["scheduler"].optimizer is resumed["optimizer"]


@pytest.mark.parametrize("before_restore", [True, False])
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_the_order_of_construction_and_of_restoring_does_not_matter(
    before_restore: bool, scheduler_first: bool
) -> None:
    # The constructor of a schedule writes `lr` and `initial_lr` into the groups, and may run after a restore of the
    # optimizer alone: what the checkpoint says is what holds in the end.
    model = net(1)
    optimizer = optimizer_of(model)
    scheduler = SCHEDULERS["SequentialLR"](optimizer)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for number in range(3):
        step(objects, number)
    memory = save(objects)
    other = net(2)
    fresh = optimizer_of(other)
    if not before_restore:
        partial = save({"model": model, "optimizer": optimizer})
        restore({"model": other, "optimizer": fresh}, partial)
    live = {"scheduler": SCHEDULERS["SequentialLR"](fresh), "model": other, "optimizer": fresh}
    if not scheduler_first:
        live = dict(reversed(live.items()))
    restore(live, memory)
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    step(objects, 3)
    step(live, 3)
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]


class Scaled(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(4, 2)


def test_a_scaler_resumes_with_scale_counter_and_skipped_steps() -> None:
    # O6: start scale 65536, growth interval 3, the first four losses infinite, checkpoint at step 9.
    skipped: dict[int, list[int]] = {}

    def build(seed: int) -> dict[str, Any]:
        model = Scaled(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
        return {"model": model, "optimizer": optimizer, "scaler": scaler}

    def scaled_step(objects: dict[str, Any], number: int) -> None:
        model, optimizer, scaler = objects["model"], objects["optimizer"], objects["scaler"]
        optimizer.zero_grad()
        loss = model.fc(torch.randn(3, 4)).pow(2).mean()
        loss = loss * float("inf") if number < 4 or number == 11 else loss
        scaler.scale(loss).backward()
        before = model.fc.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if torch.equal(before, model.fc.weight):
            skipped.setdefault(id(scaler), []).append(number)

    uninterrupted, resumed = assert_resumes_exactly(build, scaled_step, before=9, after=6)
    assert resumed["scaler"].get_scale() == uninterrupted["scaler"].get_scale() != 65536.0
    assert skipped[id(uninterrupted["scaler"])] == [0, 1, 2, 3, 11]
    assert skipped[id(resumed["scaler"])] == [11]


def test_restoring_a_scaler_between_unscale_and_update_keeps_what_it_found() -> None:
    model, other = Scaled(1), Scaled(2)
    optimizer, fresh = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, other))
    scaler, live = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    scaler.scale(model.fc(torch.ones(1, 4)).sum()).backward()
    scaler.unscale_(optimizer)
    memory = save({"model": model, "optimizer": optimizer, "scaler": scaler})
    restore({"model": other, "optimizer": fresh, "scaler": live}, memory)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        live.unscale_(fresh)
    live.step(fresh)
    live.update()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.fc.weight, other.fc.weight)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_averaged_model_goes_on(average: Any) -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        optimizer = optimizer_of(model)
        averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=average is not None)
        return {
            "model": model,
            "optimizer": optimizer,
            "averaged": averaged,
            "scheduler": SWALR(optimizer, 0.05),
        }

    def averaging_step(objects: dict[str, Any], number: int) -> None:
        step(objects, number)
        objects["averaged"].update_parameters(objects["model"])

    assert_resumes_exactly(build, averaging_step)


def test_a_changed_schedule_is_named_by_its_identity() -> None:
    def identity(total: int, factor: float, steps: int) -> dict[str, Any]:
        optimizer = optimizer_of(net(1))
        return snapshot.identity(
            {
                "lambda": lr_scheduler.LambdaLR(optimizer, lambda e: factor ** (e / total)),
                "cosine": lr_scheduler.CosineAnnealingLR(optimizer, steps),
            }
        )

    def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {name for name in one if one[name] != other[name]}

    assert identity(150, 0.9, 5) == identity(150, 0.9, 5)
    assert differing(identity(150, 0.9, 5), identity(150, 0.9, 6)) == {"cosine.T_max"}
    assert differing(identity(150, 0.9, 5), identity(300, 0.9, 5)) == {
        "lambda.lr_lambdas.0",
        "lambda.lr_lambdas.1",
    }
