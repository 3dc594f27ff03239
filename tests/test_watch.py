"""What takes part in training and is not tracked is named; what is tracked, or only evaluates, is not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from unbroken.torch.watch import Watch


@pytest.fixture
def tracked() -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}


@pytest.fixture
def watch(tracked: dict[str, Any]) -> Iterator[Watch]:
    watch = Watch(tracked)
    watch.install()
    yield watch
    watch.uninstall()


def test_tracked_objects_are_not_named(tracked: dict[str, Any], watch: Watch) -> None:
    tracked["net"](torch.zeros(4, 3)).sum().backward()
    tracked["optimizer"].step()
    assert watch.untracked() == []


def test_an_untracked_optimizer_is_named_when_it_steps(tracked: dict[str, Any], watch: Watch) -> None:
    torch.optim.Adam(tracked["net"].parameters()).step()
    assert watch.untracked() == ["optimizer Adam with 4 parameters"]
    assert watch.untracked() == [], "each is named once"


@pytest.mark.parametrize("kind", ["ReduceLROnPlateau", "StepLR", "SequentialLR"])
def test_an_untracked_scheduler_of_any_kind_is_named(
    tracked: dict[str, Any], watch: Watch, kind: str
) -> None:
    optimizer = tracked["optimizer"]
    lr = torch.optim.lr_scheduler
    if kind == "ReduceLROnPlateau":
        lr.ReduceLROnPlateau(optimizer).step(1.0)
    elif kind == "StepLR":
        lr.StepLR(optimizer, 1).step()
    else:
        parts = [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)]
        watch.untracked()
        lr.SequentialLR(optimizer, parts, milestones=[5]).step()
    assert f"scheduler {kind}" in watch.untracked()


def test_the_parts_of_a_tracked_scheduler_are_tracked(tracked: dict[str, Any], watch: Watch) -> None:
    lr = torch.optim.lr_scheduler
    parts = [lr.ConstantLR(tracked["optimizer"]), lr.ExponentialLR(tracked["optimizer"], 0.9)]
    tracked["scheduler"] = lr.SequentialLR(tracked["optimizer"], parts, milestones=[5])
    tracked["scheduler"].step()
    assert watch.untracked() == []


def test_an_untracked_scaler_and_an_untracked_average_are_named(
    tracked: dict[str, Any], watch: Watch
) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(tracked["net"](torch.zeros(4, 3)).sum()).backward()
    scaler.step(tracked["optimizer"])
    scaler.update()
    torch.optim.swa_utils.AveragedModel(tracked["net"]).update_parameters(tracked["net"])
    assert watch.untracked() == ["averaged model AveragedModel", "gradient scaler GradScaler"]


def test_an_untracked_module_in_training_is_named_by_its_shapes(
    tracked: dict[str, Any], watch: Watch
) -> None:
    nn.Linear(3, 2)(torch.zeros(1, 3))
    assert watch.untracked() == ["module Linear (weight (2, 3), bias (2,))"]


def test_losses_frozen_modules_and_evaluation_are_not_named(tracked: dict[str, Any], watch: Watch) -> None:
    nn.CrossEntropyLoss(weight=torch.ones(3))(torch.zeros(2, 3), torch.tensor([0, 1]))
    nn.Linear(3, 2).eval()(torch.zeros(1, 3))
    nn.Linear(3, 2).requires_grad_(False)(torch.zeros(1, 3))
    watch.pause()
    nn.Linear(3, 2)(torch.zeros(1, 3))
    watch.resume()
    assert watch.untracked() == []


def test_uninstalling_puts_the_classes_back() -> None:
    before = torch.optim.lr_scheduler.LRScheduler.step
    watch = Watch({})
    watch.install()
    assert torch.optim.lr_scheduler.LRScheduler.step is not before
    watch.uninstall()
    assert torch.optim.lr_scheduler.LRScheduler.step is before
    nn.Linear(3, 2)(torch.zeros(1, 3))
    assert watch.untracked() == []
