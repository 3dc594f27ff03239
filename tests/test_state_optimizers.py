"""Every optimizer goes on bit for bit in new objects: state by parameter name, with its own dtype and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from state_memory import assert_resumes_exactly, plan, restore, save
from torch import nn

from unbroken.errors import MismatchError
from unbroken.torch import snapshot


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def step(objects: dict[str, Any], number: int) -> None:
    optimizer, model = objects["optimizer"], objects["model"]
    inputs = torch.randn(5, 4, dtype=next(model.parameters()).dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).float().pow(2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW with a learning rate in a tensor": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01), foreach=False
    ),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "LBFGS line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=2),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit_in_new_objects(name: str) -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        return {"model": model, "optimizer": OPTIMIZERS[name](model.parameters())}

    assert_resumes_exactly(build, step)


def test_the_state_of_a_sparse_optimizer_goes_on() -> None:
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Embedding(10, 3, sparse=True)
        return {"model": model, "optimizer": torch.optim.SparseAdam(model.parameters())}

    def sparse_step(objects: dict[str, Any], number: int) -> None:
        objects["optimizer"].zero_grad()
        objects["model"](torch.randint(0, 10, (4,))).pow(2).sum().backward()
        objects["optimizer"].step()

    assert_resumes_exactly(build, sparse_step)


class Mixed(torch.optim.Optimizer):
    """Keeps a master copy and a moment in float32 for bfloat16 parameters, as mixed-precision optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.updates += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float()
                    state["moment"] = torch.zeros_like(state["master"]).t().contiguous().t()
                    state["seen"] = (0, "words", {1: None})
                state["seen"] = (state["seen"][0] + 1, "words", {1: None})
                state["moment"].lerp_(parameter.grad.float(), 0.1)
                state["master"].add_(state["moment"], alpha=-group["lr"])
                parameter.copy_(state["master"])


def test_float32_state_of_bfloat16_parameters_keeps_dtype_strides_and_plain_values() -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed).bfloat16()
        return {"model": model, "optimizer": Mixed(model.parameters())}

    _, resumed = assert_resumes_exactly(build, step)
    state = resumed["optimizer"].state[resumed["model"][0].weight]
    assert state["master"].dtype is torch.float32
    assert state["moment"].stride() == (1, 6)
    assert state["seen"] == (8, "words", {1: None})
    assert resumed["optimizer"].updates == 8


def test_a_parameter_group_added_in_training_is_added_again() -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        model[2].requires_grad_(False)
        return {"model": model, "optimizer": torch.optim.AdamW(model[0].parameters(), lr=0.01)}

    def unfreezing_step(objects: dict[str, Any], number: int) -> None:
        if number == 2:
            objects["model"][2].requires_grad_(True)
            objects["optimizer"].add_param_group(
                {"params": objects["model"][2].parameters(), "lr": 0.5, "own": [1]}
            )
        step(objects, number)

    _, resumed = assert_resumes_exactly(build, unfreezing_step)
    assert resumed["model"][2].weight.requires_grad
    assert [group["lr"] for group in resumed["optimizer"].param_groups] == [0.01, 0.5]
    assert resumed["optimizer"].param_groups[1]["own"] == [1]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_a_parameter_that_is_in_a_group_twice_has_one_state() -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        twice: list[Any] = [model[0].weight, model[2].weight, model[0].weight, model[2].bias]
        return {"model": model, "optimizer": torch.optim.SGD(twice, lr=0.01, momentum=0.9)}

    _, resumed = assert_resumes_exactly(build, step)
    assert len(resumed["optimizer"].state) == 3
    assert len(resumed["optimizer"].param_groups[0]["params"]) == 4


def test_state_is_bound_by_name_and_not_by_position() -> None:
    model = net(1)
    optimizer = torch.optim.Adam(model.parameters())
    step({"model": model, "optimizer": optimizer}, 0)
    memory = save({"model": model, "optimizer": optimizer})
    other: Any = net(2)
    swapped = [other[2].weight, other[2].bias, other[0].weight, other[0].bias]
    with pytest.raises(MismatchError, match=r"optimizer\.group0"):
        plan({"model": other, "optimizer": torch.optim.Adam(swapped)}, memory)


def test_defaults_stay_the_programs_own_and_options_come_back() -> None:
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(lr=0.25, own=("x", 1))
    memory = save({"model": model, "optimizer": optimizer})
    live = torch.optim.SGD(model.parameters(), lr=0.1)
    restore({"model": model, "optimizer": live}, memory)
    assert live.param_groups[0]["lr"] == 0.25
    assert live.param_groups[0]["own"] == ("x", 1)
    assert live.defaults["lr"] == 0.1
    assert list(live.param_groups[0]) == list(optimizer.param_groups[0])


def test_a_hyper_parameter_that_the_user_allowed_to_differ_stays_the_programs() -> None:
    model = net(1)
    memory = save(
        {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)}
    )
    live = torch.optim.AdamW(model.parameters(), lr=0.2, weight_decay=0.3)
    restore(
        {"model": model, "optimizer": live},
        memory,
        allow=lambda name: name == "optimizer.group0.weight_decay",
    )
    assert (live.param_groups[0]["weight_decay"], live.param_groups[0]["lr"]) == (0.3, 0.1)


def test_two_models_and_two_optimizers_keep_apart() -> None:
    def build(seed: int) -> dict[str, Any]:
        one, other = net(seed), net(seed + 10)
        return {
            "optimizer_d": torch.optim.Adam(other.parameters(), lr=0.02),
            "generator": one,
            "discriminator": other,
            "optimizer_g": torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9),
        }

    def both(objects: dict[str, Any], number: int) -> None:
        step({"model": objects["generator"], "optimizer": objects["optimizer_g"]}, number)
        step({"model": objects["discriminator"], "optimizer": objects["optimizer_d"]}, number)

    assert_resumes_exactly(build, both)


def test_a_learnable_tensor_of_no_module_goes_on_with_its_optimizer() -> None:
    def build(seed: int) -> dict[str, Any]:
        temperature = torch.full((1,), float(seed), requires_grad=True)
        return {"temperature": temperature, "optimizer": torch.optim.Adam([temperature], lr=0.1)}

    def own_step(objects: dict[str, Any], number: int) -> None:
        objects["optimizer"].zero_grad()
        (objects["temperature"] * torch.randn(1)).pow(2).sum().backward()
        objects["optimizer"].step()

    assert_resumes_exactly(build, own_step)


class Lookahead:
    """Not an Optimizer: has one, slow weights of its own, and a `state_dict` that would cast."""

    def __init__(self, inner: torch.optim.Optimizer, every: int = 2) -> None:
        self.inner = inner
        self.every = every
        self.count = 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        with torch.enable_grad():
            self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.inner.param_groups, self.slow, strict=True):
                for parameter, weight in zip(group["params"], slow, strict=True):
                    weight.lerp_(parameter, 0.5)
                    parameter.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("this casts, and is not for us")


class Wrapping(torch.optim.Optimizer):
    """An Optimizer around another, whose groups and state it shares."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.defaults = inner.defaults
        self.sums: dict[int, torch.Tensor] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.sums[index] = self.sums.get(index, 0) + parameter.detach()


@pytest.mark.parametrize("kind", [Lookahead, Wrapping])
def test_an_optimizer_around_another_goes_on(kind: Any) -> None:
    def build(seed: int) -> dict[str, Any]:
        model = net(seed)
        return {"model": model, "optimizer": kind(torch.optim.AdamW(model.parameters(), lr=0.05))}

    assert_resumes_exactly(build, step)


def test_names_of_options_and_state_are_part_of_the_identity() -> None:
    model = net(1)
    one = snapshot.identity(
        {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), weight_decay=0.1)}
    )
    other = snapshot.identity(
        {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), weight_decay=0.2)}
    )
    differing = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    assert differing == {"optimizer.group0.weight_decay": (0.1, 0.2)}
