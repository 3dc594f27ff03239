"""All tracked objects as one tree, and the plan that brings the live objects back to one.

Touches: `capture`, `identity`, `regions` and `plain_digest` read live objects. `plan_restore` reads the checkpoint and
checks; only `RestorePlan.apply` writes. The order is fixed, whatever the order of construction was: modules,
optimizers, schedulers, scalers, others. The process's own generators are not here: they come last, from `rng`.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from unbroken import _core, values
from unbroken._core import Names, Object
from unbroken._core import Tensor as Leaf
from unbroken.errors import MismatchError, UnsupportedState
from unbroken.torch import modules, optimizers, rng, schedulers, tensors
from unbroken.torch.objects import Capture, Restorer
from unbroken.torch.tensors import Loader, Storages

if TYPE_CHECKING:
    from unbroken._core import Checkpoint, Value
    from unbroken.torch.fence import Owned

_CONTAINERS = (list, dict, set, collections.deque, bytearray)


@dataclass
class Snapshot:
    """The state of all tracked objects at one boundary.

    Args:
        tree: Object name -> its tree.
        values: Name -> plain values lowered along with the objects.
        storages: Keeps the memory alive that the regions name.
    """

    tree: dict[str, Value]
    values: dict[str, Value]
    storages: Storages

    def regions(self) -> list[tuple[int, int]]:
        """Return (address, length in bytes) of each storage, in the order of the leaves' indices."""
        return self.storages.regions()

    def nbytes(self) -> int:
        """Return how many bytes the storages are."""
        return self.storages.nbytes()

    def memory(self) -> _core.Lent:
        """Return the regions for a save that is waited for."""
        return self.storages.lent()

    def lendable(self, owned: Owned, unmoved: Set[tuple[int, int]] = frozenset()) -> _core.Lent:
        """Return the regions for a save, and of each whether it stays as it is until the next optimizer step.

        Args:
            owned: What only optimizers write to.
            unmoved: (address, length in bytes) of what nobody is known to have written to since the last save.
        """
        return self.storages.lent(owned.versions, unmoved)


def capture(
    objects: Mapping[str, object],
    *,
    values: Mapping[str, object] | None = None,
    own_copies: bool = False,
) -> Snapshot:
    """Return the state of all objects. Changes none of them, draws nothing.

    Args:
        objects: What is tracked, by name.
        values: Plain values to lower along with them, so that tensors in both are stored once.
        own_copies: Copy all tensors, so that training may go on while the snapshot is written. Otherwise the
            regions are live memory.

    Raises:
        UnsupportedState: Something cannot be saved exactly; its path names it.
    """
    storages = Storages(own_copies=own_copies)
    with tensors.uncollected():
        while True:
            found = _capture(objects, values or {}, storages)
            if storages.settled():
                return found
            storages = Storages(own_copies=own_copies, whole=storages.whole)


def _capture(objects: Mapping[str, object], plain: Mapping[str, object], storages: Storages) -> Snapshot:
    walk = Capture(names_of(objects), storages)
    trees = {name: _capture_one(walk, name, objects[name]) for name in _in_order(objects)}
    lowered = {
        name: values.lower(value, path=name, extend=tensors.extend_lower(storages))
        for name, value in plain.items()
    }
    return Snapshot({name: trees[name] for name in objects}, lowered, storages)


def _rank(item: object) -> int:
    if isinstance(item, torch.nn.Module):
        return 0
    if isinstance(item, Optimizer):
        return 1
    if schedulers.is_scheduler(item):
        return 2
    return 3 if schedulers.is_scaler(item) else 4


def _in_order(objects: Mapping[str, object]) -> list[str]:
    return sorted(objects, key=lambda name: _rank(objects[name]))


def names_of(objects: Mapping[str, object]) -> Names:
    """Return the names of all live objects that trees refer to."""
    names = Names()
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module):
            modules.add_names(names, name, item)
        elif isinstance(item, torch.Tensor):
            names.add("tensor", name, item)
        elif type(item) in (list, tuple):
            _name_members(names, name, enumerate(item))  # type: ignore[arg-type]
        elif type(item) is dict:
            _name_members(names, name, item.items())
    for name, item in objects.items():
        if not isinstance(item, (*_CONTAINERS, torch.nn.Module, torch.Tensor)):
            names.add("object", name, item)
    return names


def _name_members(names: Names, name: str, members: Iterable[tuple[Any, Any]]) -> None:
    for key, member in members:
        if isinstance(member, torch.Tensor):
            names.add("tensor", f"{name}.{key}", member)


def _capture_one(walk: Capture, name: str, item: Any) -> Value:
    if isinstance(item, torch.nn.Module):
        return {"kind": "module", **modules.capture_module(walk, item, name)}
    if isinstance(item, Optimizer):
        return {"kind": "optimizer", **optimizers.capture_optimizer(walk, item, name)}
    if schedulers.is_scheduler(item) or schedulers.is_scaler(item):
        kind = "scheduler" if schedulers.is_scheduler(item) else "scaler"
        return {"kind": kind, **schedulers.capture_attributes(walk, item, name)}
    if isinstance(item, torch.Tensor):
        grad = (
            None
            if item.grad_fn is not None or item.grad is None
            else walk.storages.lower(item.grad, name, flags={})
        )
        return {"kind": "tensor", "tensor": walk.storages.lower(item, name), "grad": grad}
    if rng.is_generator(item):
        return {"kind": "generator", "state": rng.capture_generator(item)}
    if isinstance(item, _CONTAINERS):
        return {"kind": "container", "value": _lower_container(walk, item, name)}
    if _has_protocol(item) and not _holds_optimizer(item):
        state = values.lower(item.state_dict(), path=name, extend=tensors.extend_lower(walk.storages))
        return {"kind": "state_dict", "class": values.type_name(type(item)), "state": state}
    if hasattr(item, "__dict__") and values.has_plain_layout(type(item)) and not isinstance(item, enum.Enum):
        return {"kind": "object", **schedulers.capture_attributes(walk, item, name)}
    raise UnsupportedState(
        name,
        values.type_name(type(item)),
        why="it cannot be brought back in place: it is neither a container nor has it `state_dict`/`load_state_dict`",
        hint="keep plain values in `run.state`",
    )


def _lower_container(walk: Capture, item: Any, path: str) -> Value:
    if type(item) in (list, dict):
        # Its own tensors have names of its own here; by reference they would be nowhere.
        pairs = enumerate(item) if isinstance(item, list) else item.items()
        lowered = {}
        for key, part in pairs:
            place = values.join_path(path, key)
            owned = isinstance(part, torch.Tensor) and walk.names.name(part, "tensor") == f"{path}.{key}"
            lowered[walk.lower(key, path)] = walk._tensor(part, place) if owned else walk.lower(part, place)
        return list(lowered.values()) if isinstance(item, list) else lowered
    return walk.lower(item, path)


def _has_protocol(item: object) -> bool:
    return callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))


def _holds_optimizer(item: object) -> bool:
    # Such as Lookahead: its own `load_state_dict` ends in torch's, which casts.
    return any(isinstance(value, Optimizer) for value in getattr(item, "__dict__", {}).values())


# Restoring.


@dataclass
class RestorePlan:
    """What brings the live objects to a checkpoint's state; everything has been checked and read."""

    restorer: Restorer
    actions: list[Callable[[], object]] = field(default_factory=list)

    def apply(self) -> None:
        """Write the state into the live objects."""
        self.restorer.copy_bytes()
        for action in self.actions:
            action()

    def resting(self) -> list[tuple[torch.Tensor, int]]:
        """Return parameters that require no gradient and hold a whole storage now, and which one that is."""
        return self.restorer.resting()


def plan_restore(
    objects: Mapping[str, object],
    tree: Value,
    checkpoint: Checkpoint,
    *,
    loader: Loader | None = None,
    allow: Callable[[str], bool] = lambda name: False,
) -> RestorePlan:
    """Check live objects against a checkpoint and read what is needed. Touches no live object.

    Args:
        objects: The live objects by name, as constructed.
        tree: What `capture` made of them.
        checkpoint: Where the tensors are.
        loader: Has what was read of the checkpoint. Its memory becomes that of tensors that do not exist yet.
        allow: Tells by name which differences are passed over. Of hyper-parameters that differ and are allowed,
            the program's value stays; all other state comes from the checkpoint.

    Raises:
        MismatchError: Names every difference: parameters that are absent on either side, have another shape, dtype or
            strides, or lost a tie; objects that are not tracked any more.
        DamagedCheckpoint: Bytes differ from those committed.
    """
    loader = loader or Loader(checkpoint)
    loader.prepare(tree)
    names = names_of(objects)
    restorer = Restorer(names, loader, keep=_overrides(objects, checkpoint, allow), allow=allow)
    for name in [*tree, *(name for name in objects if name not in tree)]:
        if name not in objects:
            restorer.differs(name, f"tracked ({tree[name]['kind']})", "absent")
        elif name not in tree:
            restorer.differs(name, "absent", f"tracked ({values.type_name(type(objects[name]))})")
    plan = RestorePlan(restorer)
    for name in _in_order(objects):
        if name in tree:
            plan.actions.append(_plan_one(restorer, name, objects[name], tree[name]))
    restorer.settle()
    if restorer.differences:
        raise MismatchError(
            restorer.differences,
            hint="make the program build what the checkpoint holds, or start a run in another directory",
        )
    return plan


def copied_leaves(tree: Value) -> Iterator[Leaf]:
    """Yield the leaves of a run's tree whose live tensors exist before anything is restored, mostly: parameters."""
    objects = tree.get("objects") if isinstance(tree, dict) else None
    for item in objects.values() if isinstance(objects, dict) else ():
        if isinstance(item, dict) and item.get("kind") in ("module", "tensor"):
            yield from tensors.leaves(item)


def _overrides(
    objects: Mapping[str, object], checkpoint: Checkpoint, allow: Callable[[str], bool]
) -> frozenset[str]:
    recorded = checkpoint.info.identity
    live = identity(objects)
    return frozenset(
        name for name, value in live.items() if recorded.get(name, value) != value and allow(name)
    )


def _plan_one(restorer: Restorer, name: str, item: Any, tree: Value) -> Callable[[], object]:
    kind = tree["kind"]
    if kind == "module" and isinstance(item, torch.nn.Module):
        return modules.plan_module(restorer, item, tree, name)
    if kind == "optimizer" and isinstance(item, Optimizer):
        return optimizers.plan_optimizer(restorer, item, tree, name)
    if kind in ("scheduler", "scaler", "object") and hasattr(item, "__dict__"):
        return schedulers.plan_attributes(restorer, item, tree, name)
    if kind == "tensor" and isinstance(item, torch.Tensor):
        return _plan_tensor(restorer, name, item, tree)
    if kind == "generator" and rng.is_generator(item):
        return _plan_generator(restorer, name, item, tree["state"])
    if kind == "container":
        return _plan_container(restorer, name, item, tree["value"])
    if kind == "state_dict" and _has_protocol(item):
        now = values.type_name(type(item))
        if tree["class"] == now:
            # Raised now, so that what cannot be raised is found before anything is touched; loaded as its own copy.
            state = values.raise_(tree["state"], path=name, extend=tensors.extend_raise(restorer.loader))
            return lambda: item.load_state_dict(state)
        restorer.differs(name, tree["class"], now)
        return lambda: None
    restorer.differs(name, kind, values.type_name(type(item)))
    return lambda: None


def _plan_tensor(restorer: Restorer, name: str, item: torch.Tensor, tree: Value) -> Callable[[], object]:
    leaf = tree["tensor"]
    if not isinstance(leaf, Leaf) or not tensors.same_layout(item, leaf):
        restorer.differs(name, tensors.describe(leaf), tensors.describe(item))
        return lambda: None
    write = restorer.tensor(item, leaf, name, fixed=True)
    grad = restorer.gradient(item, tree["grad"], name)

    def apply() -> None:
        write()
        if item.is_leaf:
            item.requires_grad_(bool(leaf.attrs.get("requires_grad", False)))
            grad(item)

    return apply


def _plan_generator(restorer: Restorer, name: str, item: Any, state: Value) -> Callable[[], object]:
    live = rng.capture_generator(item)
    for key in ("kind", "device"):
        if state.get(key) != live.get(key):
            restorer.differs(f"{name}.{key}", state.get(key), live.get(key))
    return lambda: rng.restore_generator(item, state)


def _plan_container(restorer: Restorer, name: str, item: Any, value: Value) -> Callable[[], object]:
    kind = value.name if isinstance(value, Object) else values.type_name(type(value))
    now = values.type_name(type(item))
    if kind.removeprefix("builtins.") != now.removeprefix("builtins."):
        restorer.differs(name, kind, now)
        return lambda: None
    maker = restorer.plan(item, value, name)

    def apply() -> None:
        made = maker()
        if made is item:
            return
        item.clear()
        (item.extend if hasattr(item, "extend") else item.update)(made)

    return apply


def raise_plain(value: Value, checkpoint: Checkpoint, *, path: str, loader: Loader | None = None) -> Any:
    """Return plain values that `capture` lowered along with the objects; tensors as copies on the CPU."""
    with tensors.kept():
        loader = (loader or Loader(checkpoint)).copied(value)
        return values.raise_(value, path=path, extend=tensors.extend_raise(loader))


# Identity.


def identity(objects: Mapping[str, object]) -> dict[str, Value]:
    """Return what the objects are as constructed, before training, by dotted names.

    Classes, parameter shapes and dtypes, settings of torch's layers, options of each parameter group, schedules
    (functions by name and code), scaler settings. Two runs of one program give equal ones; a difference can be named
    by its key.
    """
    with tensors.kept():
        return _identity(objects)


def _identity(objects: Mapping[str, object]) -> dict[str, Value]:
    names = names_of(objects)
    found: dict[str, Value] = {}
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module):
            found.update(modules.identity(name, item))
        elif isinstance(item, Optimizer):
            found.update(optimizers.identity(name, item, names))
        elif schedulers.is_scheduler(item) or schedulers.is_scaler(item):
            found.update(schedulers.identity(name, item))
        elif isinstance(item, torch.Tensor):
            found[name] = tensors.describe(item)
        else:
            found[name] = values.type_name(type(item))
    return found


# Flags.


def training_flags(objects: Mapping[str, object]) -> list[tuple[torch.nn.Module, bool]]:
    """Return each tracked module's `training` flag, for `restore_training_flags`."""
    found = []
    for item in objects.values():
        if isinstance(item, torch.nn.Module):
            found += [(module, module.training) for module in item.modules()]
    return found


def count_gradients(objects: Mapping[str, object]) -> int:
    """Return how many parameters of tracked modules hold a gradient."""
    found = [item for item in objects.values() if isinstance(item, torch.nn.Module)]
    held = {id(p) for module in found for p in module.parameters() if p.grad is not None}
    return len(held)


def restore_training_flags(flags: list[tuple[torch.nn.Module, bool]]) -> None:
    """Put `training` flags back to what `training_flags` returned."""
    for module, flag in flags:
        module.training = flag


# What every step digests of the small state.


def plain_digest(objects: Mapping[str, object]) -> bytes:
    """Return a digest (16 bytes) of the small state that is no tensor: group options, scheduler counters, scales.

    Reads one-element tensors on the CPU only: reading others makes the host wait.
    """
    parts: list[Any] = []
    for name, item in objects.items():
        if isinstance(item, Optimizer):
            parts.append(name)
            for group in item.param_groups:
                parts.append([(key, _small(value)) for key, value in group.items() if key != "params"])
        elif _rank(item) in (2, 3):
            parts.append((name, _small_attributes(item)))
        elif rng.is_generator(item):
            parts.append((name, rng.generator_digest(item)))
    return _core.digest_bytes(repr(parts).encode("utf-8", "surrogatepass"))


def _small_attributes(item: object) -> list[tuple[str, Any]]:
    return [(key, _small(value)) for key, value in vars(item).items()]


def _small(value: Any) -> Any:
    """Return what a value contributes: plain values by their repr, which tells floats apart to the last bit."""
    kind = type(value)
    if kind in (int, float, bool, str) or value is None:
        return value
    if kind in (list, tuple):
        return [_small(part) for part in value]
    if isinstance(value, dict):
        return [(key, _small(part)) for key, part in value.items() if type(key) in (int, str)]
    if isinstance(value, torch.Tensor):
        return value.item() if value.device.type == "cpu" and value.numel() == 1 else None
    return _small_attributes(value) if schedulers.is_scheduler(value) else None


def bytes_to_come(objects: Mapping[str, object]) -> int:
    """Return about how many bytes the state will have more when all optimizers have stepped."""
    return sum(optimizers.bytes_to_come(item) for item in objects.values() if isinstance(item, Optimizer))
