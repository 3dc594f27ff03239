"""Optimizers captured by parameter name, with the dtypes and strides that their state has.

Touches: on capture, reads. On restore, writes state directly: torch's `load_state_dict` goes by position and casts.
`optimizer.defaults` is the program's and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from unbroken import values
from unbroken._core import Entries, States
from unbroken.torch import tensors
from unbroken.torch.objects import MISSING, Capture, Restorer, dotted

if TYPE_CHECKING:
    from unbroken._core import NameList, Names, Value

MACHINERY = frozenset(
    {
        "defaults",
        "state",
        "param_groups",
        "step",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
    }
)
"""An optimizer's attributes that are code, constants, or captured by name below."""


_MOMENTS: dict[str, Callable[[dict[str, Any]], int]] = {
    "SGD": lambda group: int(group["momentum"] != 0),
    "RMSprop": lambda group: 1 + int(group["momentum"] > 0) + int(group["centered"]),
    "Adagrad": lambda _: 1,
    "ASGD": lambda _: 1,
    "Muon": lambda _: 1,
    "Adafactor": lambda _: 1,
    "LBFGS": lambda group: 2 * group["history_size"] + 3,
}
"""Tensors of a parameter's size that torch's optimizers keep for each, where that is not two and one for `amsgrad`."""


def bytes_to_come(optimizer: Optimizer) -> int:
    """Return about how many bytes of state training will add: moments of parameters that have none yet, and gradients.

    Optimizers that are not torch's are taken for ones that keep two tensors a parameter.
    """
    moments = _MOMENTS.get(type(optimizer).__name__, lambda group: 2 + int(bool(group.get("amsgrad"))))
    to_come = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                kept = 0 if optimizer.state.get(parameter) else moments(group)
                to_come += parameter.nbytes * (kept + int(parameter.grad is None))
    return to_come


def parameter_names(optimizer: Optimizer, names: Names) -> list[list[str]]:
    """Return the name of each parameter of each group; those in no tracked module by group and index."""
    groups = enumerate(optimizer.param_groups)
    return [names.of_group(list(group["params"]), at).to_list() for at, group in groups]


def capture_optimizer(capture: Capture, optimizer: Optimizer, path: str) -> Value:
    """Return an optimizer's tree: `groups` with parameter names and options, `state` by parameter name."""
    groups: list[Value] = []
    state = Entries(f"{path}/state")
    others: dict[Value, Value] = {}
    states = States(optimizer.state)
    for at, group in enumerate(optimizer.param_groups):
        options = {
            key: capture.lower(value, f"{path}/groups/{at}/{key}")
            for key, value in group.items()
            if key != "params"
        }
        # Where `params` stands among the keys is the order of a dict that training can see.
        parameters = list(group["params"])
        names = capture.names.of_group(parameters, at)
        groups.append({"params": names, "options": options, "order": list(group)})
        _lower_states(capture, names, parameters, states, path, state)
    for key, value in states.rest():
        if not isinstance(key, torch.Tensor):
            others[capture.lower(key, f"{path}/state")] = capture.lower(value, f"{path}/state/{key}")
        else:
            name = capture.names.name(key, "tensor")
            if name is not None:
                state[name] = _lower_state(capture, value, path, name)
    return {
        "class": values.type_name(type(optimizer)),
        "groups": groups,
        "state": state,
        "others": others,
        "attributes": _lower_attributes(capture, optimizer, path),
    }


def _lower_attributes(capture: Capture, optimizer: Optimizer, path: str) -> Entries:
    # Wrappers such as Lookahead share these two with the optimizer that they wrap, which is captured as an attribute.
    return capture.attributes(optimizer, path, MACHINERY)


def _lower_states(
    capture: Capture,
    names: NameList,
    parameters: list[torch.Tensor],
    states: States,
    path: str,
    lowered: Entries,
) -> None:
    """Lower what there is for each parameter of a group, in their order. Nearly all are tensors under plain names."""
    at = 0
    while (at := capture.usual_states(names, parameters, at, states, lowered)) < len(parameters):
        found = states.take(parameters[at], MISSING)
        if found is not MISSING:
            lowered[names[at]] = _lower_state(capture, found, path, names[at])
        at += 1


def _lower_state(capture: Capture, state: Any, path: str, name: str) -> Value:
    path = f"{path}/state/{name}"
    if type(state) is not dict:
        return capture.lower(state, path)
    lowered: dict[Value, Value] = {}
    usual = capture.usual
    for key, value in state.items():
        under = key if type(key) is str and key.isascii() else capture.lower(key, path)
        leaf = usual(value) if type(value) is torch.Tensor else None
        lowered[under] = capture.lower(value, values.join_path(path, key)) if leaf is None else leaf
    return lowered


def plan_optimizer(restorer: Restorer, optimizer: Optimizer, tree: Value, path: str) -> Callable[[], None]:
    """Return how to bring a live optimizer to a recorded tree. Differences are noted with the restorer.

    Groups that training added are added again, from the recorded names.
    """
    name = dotted(path)
    now = values.type_name(type(optimizer))
    if tree["class"] != now:
        restorer.differs(name, tree["class"], now)
        return lambda: None
    live_names = parameter_names(optimizer, restorer.names)
    recorded = tree["groups"]
    parameters = {
        key: parameter
        for keys, group in zip(live_names, optimizer.param_groups, strict=True)
        for key, parameter in zip(keys, group["params"], strict=True)
    }
    for at in range(len(recorded), len(live_names)):
        restorer.differs(f"{name}.group{at}", "absent", f"{len(live_names[at])} parameters")
    plans = []
    for at, group in enumerate(recorded):
        have = live_names[at] if at < len(live_names) else []
        if group["params"][: len(have)] != have:
            _name_difference(restorer, f"{name}.group{at}", group["params"], have)
            continue
        added = {
            key: _find_parameter(restorer, key, f"{name}.group{at}") for key in group["params"][len(have) :]
        }
        if any(parameter is MISSING for parameter in added.values()):
            continue
        parameters.update(added)
        live_group = optimizer.param_groups[at] if at < len(live_names) else None
        plans.append(
            _plan_group(restorer, optimizer, live_group, group, parameters, f"{path}/groups/{at}", name, at)
        )
    state = _plan_state(restorer, optimizer, tree, parameters, path)
    attributes = restorer.attributes(optimizer, tree["attributes"], path, skip=MACHINERY, lenient=True)

    def apply() -> None:
        for plan in plans:
            plan()
        state()
        attributes()

    return apply


def _name_difference(restorer: Restorer, name: str, recorded: list[str], live: list[str]) -> None:
    missing = [key for key in recorded if key not in live]
    added = [key for key in live if key not in recorded]
    if missing or added:
        restorer.differs(name, ", ".join(missing) or "no others", ", ".join(added) or "no others")
    else:
        restorer.differs(name, f"order {', '.join(recorded[:4])}", f"order {', '.join(live[:4])}")


def _find_parameter(restorer: Restorer, key: str, name: str) -> Any:
    found = restorer.names.find("tensor", key, MISSING)
    if found is MISSING:
        restorer.differs(name, key, "absent")
    return found


def _plan_group(
    restorer: Restorer,
    optimizer: Optimizer,
    live: dict[str, Any] | None,
    recorded: Value,
    parameters: dict[str, Any],
    path: str,
    name: str,
    at: int,
) -> Callable[[], None]:
    makers = {}
    for key, value in recorded["options"].items():
        present = MISSING if live is None else live.get(key, MISSING)
        if present is not MISSING and restorer.kept(f"{name}.group{at}.{key}"):
            makers[key] = lambda present=present: present
        else:
            makers[key] = restorer.plan(present, value, f"{path}/{key}")

    def apply() -> None:
        options = {key: maker() for key, maker in makers.items()}
        members = [parameters[key] for key in recorded["params"]]
        if live is None:
            optimizer.add_param_group({"params": members, **options})
            group = optimizer.param_groups[-1]
        else:
            group = live
            group["params"][:] = members
        extra = {key: group[key] for key in group if key in optimizer.defaults and key not in options}
        whole = {**options, "params": group["params"]}
        group.clear()
        group.update({key: whole[key] for key in recorded["order"]})
        group.update(extra)

    return apply


def _plan_state(
    restorer: Restorer, optimizer: Optimizer, tree: Value, parameters: dict[str, Any], path: str
) -> Callable[[], None]:
    makers: list[tuple[Any, Callable[[], Any]]] = []
    for key, value in tree["state"].items():
        parameter = parameters.get(key, MISSING)
        if parameter is MISSING:
            parameter = restorer.names.find("tensor", key, MISSING)
        if parameter is MISSING:
            restorer.differs(f"{dotted(path)}.state", key, "absent")
            continue
        live = optimizer.state.get(parameter, MISSING)
        makers.append((parameter, restorer.plan(live, value, f"{path}/state/{key}")))
    for key, value in tree["others"].items():
        raised = restorer.plan(MISSING, key, f"{path}/state")()
        live = optimizer.state.get(raised, MISSING)
        makers.append((raised, restorer.plan(live, value, f"{path}/state/{raised}")))

    def apply() -> None:
        made = [(key, maker()) for key, maker in makers]
        optimizer.state.clear()
        for key, value in made:
            optimizer.state[key] = value

    return apply


def identity(name: str, optimizer: Optimizer, names: Names) -> dict[str, Value]:
    """Return what an optimizer is as constructed: its class, each group's parameters and options."""
    found: dict[str, Value] = {f"{name}.class": values.type_name(type(optimizer))}
    for at, (group, members) in enumerate(
        zip(optimizer.param_groups, parameter_names(optimizer, names), strict=True)
    ):
        found[f"{name}.group{at}.params"] = ", ".join(members)
        for key, value in group.items():
            if key != "params":
                found[f"{name}.group{at}.{key}"] = _plain(value)
    return found


def _plain(value: Any) -> Value:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else tensors.describe(value)
    if isinstance(value, tuple | list):
        return tuple(_plain(part) for part in value)
    return value if type(value) in (type(None), bool, int, float, str) else values.type_name(type(value))
