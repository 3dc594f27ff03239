"""Modules come back whole and in place: every buffer, gradient, flag, attribute and tie; or they are refused."""

from __future__ import annotations

import collections
import dataclasses
import logging
import random
import threading
from typing import Any, cast

import numpy as np
import pytest
import torch
from state_memory import Memory, assert_resumes_exactly, plan, restore, save
from torch import nn

from unbroken.errors import MismatchError, UnsupportedState
from unbroken.torch import snapshot


def sgd_step(objects: dict[str, Any], number: int) -> None:
    model, optimizer = objects["model"], objects["optimizer"]
    optimizer.zero_grad()
    model(torch.randn(5, 4)).pow(2).mean().backward()
    optimizer.step()


def with_sgd(model: nn.Module) -> dict[str, Any]:
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def seeded(make: Any) -> Any:
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return with_sgd(make())

    return build


@dataclasses.dataclass
class Config:
    rate: float
    act: Any = torch.relu


class Tracker:
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.best = float("inf")
        self.me = self


class AttributeDict(dict[str, Any]):
    pass


class Everything(nn.Module):
    """State in all the places where users keep it, and code beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("fleeting", torch.zeros(4), persistent=False)
        self.register_buffer("later", None)
        self.plain = torch.zeros(4)
        self.cache: torch.Tensor | None = None
        self.queue: collections.deque[torch.Tensor] = collections.deque(maxlen=3)
        self.count = 0
        self.names = {"a": [1, (2, 3)], 4: {5}}
        self.tracker = Tracker()
        self.config = Config(0.5)
        self.options = AttributeDict(depth=1)
        self.counts: Any = collections.defaultdict(lambda: 10)
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(random.randrange(2**30))
        self.draws = random.Random(random.random())
        self.noise = np.random.default_rng(random.randrange(2**30))
        self.parts = [self.fc, nn.Linear(4, 4)]
        self.weights = [self.fc.weight]
        self.log = logging.getLogger("everything")
        self.lock = threading.Lock()
        self.act = torch.tanh
        self.hook = lambda x: x
        self.kind = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.parts[1](self.fc(x))) + self.plain + self.kept + self.fleeting
        with torch.no_grad():
            self.count += 1
            self.kept += out.mean(0)
            self.fleeting += torch.rand(4, generator=self.generator)
            self.plain = self.plain * 0.5 + self.draws.random() + float(self.noise.random())
            self.cache = out.detach()
            self.later = out.detach()[: self.count % 3 + 1]
            self.queue.append(out.detach().mean(0))
            self.names["a"].append(self.count)
            self.tracker.seen.append(float(out.detach().mean()))
            self.tracker.best = min(self.tracker.seen)
            self.config.rate *= 0.9
            self.options["depth"] += 1
            self.counts[self.count] += 1
            self.array += self.count
            self.fc.requires_grad_(self.count % 2 == 0)
            if self.count == 2:
                self.fc.eval()
        return out + sum(self.queue) * self.tracker.best * self.config.rate * self.counts[1]


def test_state_in_every_place_where_users_keep_it_goes_on() -> None:
    _, resumed = assert_resumes_exactly(seeded(Everything), sgd_step)
    model = resumed["model"]
    assert model.count == 8
    assert model.counts[99] == 10, "the factory, which is code, is the program's own"
    assert model.tracker.me is model.tracker
    assert model.weights[0] is model.fc.weight
    assert model.parts[0] is model.fc
    assert type(model.options) is AttributeDict
    assert "fleeting" in model._non_persistent_buffers_set
    assert (model.fc.training, model.training) == (False, True)


def test_parameters_and_containers_are_restored_in_place() -> None:
    random.seed(1)
    model, other = Everything(), Everything()
    model(torch.randn(2, 4))
    before = {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()}
    containers = (other.names, other.names["a"], other.queue, other.tracker, other.kept)
    restore({"model": other}, save({"model": model}))
    assert {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()} == before
    now = (other.names, other.names["a"], other.queue, other.tracker, other.kept)
    assert all(one is two for one, two in zip(containers, now, strict=True))


def spectral_old() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.utils.weight_norm(nn.Linear(4, 2)))


def parametrized() -> nn.Module:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(spectral, nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))


def batch_norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.3), nn.Linear(6, 2))


def tied() -> Any:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, 2, dropout=0.2, batch_first=True)
        self.state: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, state = self.lstm(x.unsqueeze(0), self.state)
        self.state = tuple(part.detach() for part in state)
        return out


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [spectral_old, parametrized, batch_norms, tied, Recurrent])
def test_a_module_whose_forward_changes_it_goes_on(make: Any) -> None:
    assert_resumes_exactly(seeded(make), sgd_step)


def test_tied_weights_stay_one_tensor_and_are_stored_once() -> None:
    model = tied()
    memory = save({"model": model})
    assert sum(len(data) == 64 for data in memory.data) == 1
    other = tied()
    restore({"model": other}, memory)
    assert other[2].weight is other[0].weight
    assert torch.equal(other[0].weight, model[0].weight)


def test_gradients_in_the_middle_of_an_accumulation_window_go_on() -> None:
    # O7: four micro-batches to a step, saved after each of 1, 2, 3 of the second window.
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2))
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)}

    def micro_step(objects: dict[str, Any], number: int) -> None:
        model, optimizer = objects["model"], objects["optimizer"]
        model[1](model[0](torch.randn(3, 4))).pow(2).mean().backward()
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    for before in (5, 6, 7):
        assert_resumes_exactly(build, micro_step, before=before, after=4)


def test_no_gradient_is_not_a_gradient_of_zeros() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.weight.grad = torch.zeros(2, 2)
    other.bias.grad = torch.ones(2)
    restore({"model": other}, save({"model": model}))
    assert other.bias.grad is None
    assert other.weight.grad is not None
    assert torch.equal(other.weight.grad, torch.zeros(2, 2))


def test_a_gradient_keeps_its_dtype_and_strides() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    model.weight.grad = torch.randn(3, 2).t()
    model.bias.grad_dtype = torch.float64  # type: ignore[attr-defined]
    model.bias.grad = torch.randn(2, dtype=torch.float64)
    restore({"model": other}, save({"model": model}))
    assert other.weight.grad is not None
    assert other.bias.grad is not None
    assert other.weight.grad.stride() == (1, 2)
    assert other.bias.grad.dtype is torch.float64


def test_channels_last_weights_and_their_optimizer_state_keep_their_strides() -> None:
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    def step(objects: dict[str, Any], number: int) -> None:
        objects["optimizer"].zero_grad()
        inputs = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
        objects["model"](inputs).pow(2).mean().backward()
        objects["optimizer"].step()

    _, resumed = assert_resumes_exactly(build, step)
    moment = resumed["optimizer"].state[resumed["model"][0].weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_another_memory_format_is_a_mismatch() -> None:
    memory = save({"model": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)})
    with pytest.raises(MismatchError, match=r"model\.weight.*strides"):
        plan({"model": nn.Conv2d(3, 4, 3)}, memory)


def lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(2))


def test_a_lazy_module_is_given_its_shapes_and_its_class() -> None:
    model, other = lazy(), lazy()
    model(torch.randn(3, 4))
    memory = save({"model": model})
    restore({"model": other}, memory)
    assert save({"model": other}).same_as(memory)
    assert [type(part) for part in other] == [nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Linear]
    model.eval()
    other.eval()
    inputs = torch.randn(2, 4)
    assert torch.equal(model(inputs), other(inputs))


def test_a_lazy_module_that_has_not_run_is_recorded_as_such() -> None:
    memory = save({"model": lazy()})
    restore({"model": lazy()}, memory)
    ran = lazy()
    ran(torch.randn(3, 4))
    with pytest.raises(MismatchError, match=r"`model\.0\.weight` was uninitialized, is float32\[5, 4\]"):
        plan({"model": ran}, memory)


def test_a_frozen_layer_that_training_unfroze_is_unfrozen() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    restore({"model": other}, save({"model": model}))
    assert other.weight.requires_grad
    assert other.bias.requires_grad


def test_names_are_the_users_own_inside_compiled_and_parallel_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inner: Any = torch.compile(nn.Linear(2, 2))
    wrapped = torch.compile(nn.DataParallel(nn.Sequential(inner, nn.Linear(2, 2))))
    restore({"model": wrapped}, save({"model": model}))
    assert list(save({"model": wrapped}).tree["model"]["parameters"]) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_module_goes_on() -> None:
    def scripted() -> nn.Module:
        layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        return cast("nn.Module", torch.jit.script(layers))

    assert_resumes_exactly(seeded(scripted), sgd_step)


# Differences: all of them named, nothing touched.


def untouched(objects: dict[str, Any], memory: Memory) -> MismatchError:
    before = save(objects)
    with pytest.raises(MismatchError) as refused:
        plan(objects, memory)
    assert save(objects).same_as(before), "nothing may be touched"
    return refused.value


def test_every_difference_is_named_and_nothing_is_touched() -> None:
    def build(width: int, dtype: torch.dtype, extra: str) -> dict[str, Any]:
        model = nn.ModuleDict(
            {"a": nn.Linear(4, width), "b": nn.Linear(4, 4, dtype=dtype), extra: nn.Linear(2, 2)}
        )
        return with_sgd(model)

    memory = save(build(3, torch.float32, "old"))
    error = untouched(build(5, torch.float64, "new"), memory)
    differences = {name: (recorded, live) for name, recorded, live in error.differences}
    assert differences["model.a.weight"] == ("float32[3, 4]", "float32[5, 4]")
    assert differences["model.a.bias"] == ("float32[3]", "float32[5]")
    assert differences["model.b.weight"] == ("float32[4, 4]", "float64[4, 4]")
    assert differences["model.old.weight"] == ("float32[2, 2]", "absent")
    assert differences["model.new.weight"] == ("absent", "float32[2, 2]")
    assert differences["optimizer.group0"] == (
        "model.old.weight, model.old.bias",
        "model.new.weight, model.new.bias",
    )


def test_a_lost_tie_and_a_gained_one_are_mismatches() -> None:
    free = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    lost = untouched({"model": free}, save({"model": tied()}))
    assert ("model.0.weight", "tied: model.0.weight, model.2.weight", "not tied") in lost.differences
    gained = untouched({"model": tied()}, save({"model": free}))
    assert ("model.0.weight", "not tied", "tied: model.0.weight, model.2.weight") in gained.differences


def test_objects_that_are_not_tracked_any_more_are_named() -> None:
    model = nn.Linear(2, 2)
    memory = save({"model": model, "old": nn.Linear(1, 1)})
    error = untouched({"model": model, "new": nn.Linear(1, 1)}, memory)
    assert {name for name, _, _ in error.differences} == {"old", "new"}


def test_another_class_under_a_name_is_a_mismatch() -> None:
    error = untouched({"model": nn.Sequential(nn.Tanh())}, save({"model": nn.Sequential(nn.ReLU())}))
    assert [name for name, _, _ in error.differences] == ["model.0"]


def test_an_attribute_that_the_checkpoint_lacks_is_a_mismatch() -> None:
    memory = save({"model": Recurrent()})
    live: Any = Recurrent()
    live.added = 3
    assert untouched({"model": live}, memory).differences == (("model.added", "absent", "3"),)


def test_an_allowed_difference_is_passed_over() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    memory = save({"model": model})
    gate = nn.Parameter(torch.ones(1))
    other.register_parameter("gate", gate)
    restore({"model": other}, memory, allow=lambda name: name == "model.gate")
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(gate, torch.ones(1))


# What cannot be saved.


class Holding(nn.Module):
    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held


class Slotted(int):
    pass


@pytest.mark.parametrize(
    ("held", "path"),
    [
        ({"deep": [Slotted(3)]}, "model/held/deep/0"),
        (np.array([object()]), "model/held"),
        ((x for x in ()), "model/held"),
        (torch.empty(2, device="meta"), "model/held"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_its_path(held: object, path: str) -> None:
    with pytest.raises(UnsupportedState) as refused:
        snapshot.capture({"model": Holding(held)})
    assert refused.value.path == path


def test_a_class_may_name_attributes_that_are_no_state() -> None:
    class Skipping(Holding):
        unbroken_skip = ("held",)

    memory = save({"model": Skipping(x for x in ())})
    live = Skipping("mine")
    restore({"model": live}, memory)
    assert live.held == "mine"


# Other things that can be tracked.


class Protocol:
    def __init__(self, value: int) -> None:
        self.value = value
        self.handle = open

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.full((2,), float(self.value)), "pair": (1, None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["pair"] == (1, None)
        self.value = int(state["tensor"][0])


def test_anything_with_a_state_dict_is_welcome() -> None:
    live = Protocol(1)
    restore({"thing": live}, save({"thing": Protocol(7)}))
    assert live.value == 7


def test_generators_and_containers_come_back_in_place() -> None:
    def build(seed: int) -> dict[str, Any]:
        return {
            "torch": torch.Generator().manual_seed(seed),
            "python": random.Random(seed),
            "numpy": np.random.default_rng(seed),
            "legacy": np.random.RandomState(seed),
            "list": [seed, {"x": torch.full((2,), seed)}],
            "dict": {"best": seed, "when": None},
            "deque": collections.deque([seed], maxlen=4),
            "set": {seed},
            "tracker": Tracker(),
        }

    def draw(objects: dict[str, Any]) -> list[Any]:
        return [
            torch.rand(1, generator=objects["torch"]).item(),
            objects["python"].random(),
            objects["numpy"].random(),
            objects["legacy"].random_sample(),
        ]

    one, other = build(1), build(2)
    draw(one)
    inner = other["list"][1]
    restore(other, save(one))
    assert draw(one) == draw(other)
    assert other["list"][0] == 1
    assert other["list"][1] is inner
    assert inner["x"].tolist() == [1, 1]
    assert (other["dict"], other["deque"], other["set"]) == (
        {"best": 1, "when": None},
        collections.deque([1]),
        {1},
    )


def test_a_plain_number_cannot_be_tracked_and_the_hint_says_where_it_belongs() -> None:
    with pytest.raises(UnsupportedState) as refused:
        snapshot.capture({"best": 3})
    assert "run.state" in str(refused.value.hint)


def test_evaluation_leaves_training_flags_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    flags = snapshot.training_flags({"model": model})
    model.train()
    snapshot.restore_training_flags(flags)
    assert [part.training for part in model.modules()] == [True, True, False]


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.by_class = {nn.Linear: 0, nn.Conv2d: 0}
        self.by_parameter = {self.fc.weight: torch.zeros(1)}


def test_keys_that_are_classes_or_parameters_find_their_own() -> None:
    model, other = Keyed(), Keyed()
    model.by_class.update({nn.Linear: 1, nn.Conv2d: 2})
    model.by_parameter[model.fc.weight] += 5
    restore({"model": other}, save({"model": model}))
    assert other.by_class == {nn.Linear: 1, nn.Conv2d: 2}
    assert other.by_parameter[other.fc.weight].item() == 5


BUILTIN: dict[str, Any] = {
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
    "gru": lambda: nn.GRU(3, 4, bidirectional=True),
    "losses": lambda: nn.ModuleList([nn.CrossEntropyLoss(torch.rand(3)), nn.TripletMarginWithDistanceLoss()]),
    "adaptive": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]),
    "embeddings": lambda: nn.ModuleList([nn.Embedding(5, 2, 0), nn.EmbeddingBag(5, 2)]),
    "lists": lambda: nn.ParameterDict(
        {"a": nn.Parameter(torch.rand(2)), "b": nn.ParameterList([torch.rand(1)])}
    ),
    "norms": lambda: nn.ModuleList(
        [nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3), nn.RMSNorm(4)]
    ),
    "shared": lambda: nn.ModuleList([nn.ReLU()] * 2),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BUILTIN)
def test_torchs_own_modules_come_back(name: str) -> None:
    torch.manual_seed(1)
    memory = save({"model": BUILTIN[name]()})
    live = BUILTIN[name]()
    restore({"model": live}, memory)
    assert save({"model": live}).same_as(memory)


def test_an_allowed_change_of_structure_leaves_the_programs_part_as_it_is() -> None:
    memory = save(with_sgd(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    live = with_sgd(nn.Sequential(nn.Linear(2, 2)))
    restore(live, memory, allow=lambda name: True)
    assert len(live["optimizer"].param_groups[0]["params"]) == 2


class Sharing(nn.Module):
    """Two lists that are one at construction and part in training, and two that become one."""

    def __init__(self) -> None:
        super().__init__()
        self.one: list[int] = [0]
        self.other = self.one
        self.left: list[int] = []
        self.right: list[int] = []

    def train_on(self) -> None:
        self.other = [7]
        self.one.append(1)
        self.right = self.left
        self.left.append(5)


def test_containers_that_parted_or_joined_in_training_stay_so() -> None:
    model, other = Sharing(), Sharing()
    model.train_on()
    restore({"model": other}, save({"model": model}))
    assert (other.one, other.other, other.left) == ([0, 1], [7], [5])
    assert other.right is other.left


def test_an_attribute_tensor_that_became_a_view_of_a_parameter_is_one_again() -> None:
    model, other = Holding(None), Holding(None)
    model.fc, other.fc = nn.Linear(4, 4), nn.Linear(4, 4)
    model.held = model.fc.weight.detach()[1:]
    restore({"model": other}, save({"model": model}))
    with torch.no_grad():
        other.fc.weight.fill_(3)
    assert isinstance(other.held, torch.Tensor)
    assert torch.equal(other.held, torch.full((3, 4), 3.0))
