"""Live objects walked attribute by attribute: captured as trees, checked against trees, and put back in place.

Touches: on capture, reads live objects. On restore, planning reads and the makers it returns write, so that everything
is checked before anything is touched. What is code (functions, classes, locks, loggers) is left as the program made it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextvars
import dataclasses
import functools
import io
import itertools
import logging
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from copyreg import _slotnames  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from unbroken import _core, values
from unbroken._core import Entries, Object
from unbroken._core import Tensor as Leaf
from unbroken.errors import UnsupportedState
from unbroken.torch import rng, tensors
from unbroken.torch.tensors import Loader, Storages

if TYPE_CHECKING:
    from unbroken._core import NameList, Names, States, Value

Maker = Callable[[], Any]
"""Does what was planned and returns the value for its place: the live object, brought up to date, or another."""

MISSING: Any = object()
"""A place that the program has nothing in."""

_CODE_TYPES: tuple[type, ...] = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.ModuleType,
    types.CodeType,
    types.GenericAlias,
    functools.partial,
    functools._lru_cache_wrapper,
    weakref.ReferenceType,
    weakref.ProxyType,
    weakref.CallableProxyType,
    logging.Logger,
    logging.LoggerAdapter,
    logging.Handler,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Thread,
    threading.Event,
    threading.Condition,
    threading.Semaphore,
    threading.local,
    contextvars.ContextVar,
    concurrent.futures.Executor,
    io.IOBase,
    re.Pattern,
    RemovableHandle,
    torch.jit.ScriptFunction,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
    torch.Stream,
    torch.Event,
    torch.utils.data.DataLoader,
)

# Trackers and process groups: what they hold belongs to the process, not to the training.
_CODE_MODULES = frozenset(
    {"tensorboard", "tensorboardX", "wandb", "mlflow", "tqdm", "rich", "torch.distributed"}
)

SKIP_ATTRIBUTE = "unbroken_skip"
"""A class may name, in this attribute, those attributes of its instances that are not state."""


def is_code(value: object) -> bool:
    """Tell whether a value is code or a resource of the process, which restoring leaves as it is."""
    if isinstance(value, _CODE_TYPES):
        return True
    module = type(value).__module__
    parts = module.split(".")
    return parts[0] in _CODE_MODULES or ".".join(parts[:2]) in _CODE_MODULES or "tensorboard" in parts


def code_name(value: object) -> str:
    """Return what a piece of code is called, as far as it says."""
    name = getattr(value, "__qualname__", None)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(name, str) and isinstance(module, str) else ""


def attributes_of(item: object, skip: Set[str] = frozenset()) -> dict[str, Any]:
    """Return an object's own attributes, those in slots included."""
    own = getattr(type(item), SKIP_ATTRIBUTE, ())
    skipped = {*skip, *own} if own else skip
    found = {name: value for name, value in getattr(item, "__dict__", {}).items() if name not in skipped}
    for name in _slotnames(type(item)):
        if name not in skipped and name not in found:
            value = getattr(item, name, MISSING)
            if value is not MISSING:
                found[name] = value
    return found


def set_attribute(item: object, name: str, value: object) -> None:
    """Set an attribute past the class's own `__setattr__`, properties and frozen flag."""
    if values.slot_of(type(item), name) is None and isinstance(getattr(item, "__dict__", None), dict):
        item.__dict__[name] = value
    else:
        object.__setattr__(item, name, value)


def dotted(path: str) -> str:
    """Return a tree's path as differences and identities name it."""
    return path.replace("/", ".")


class Capture:
    """One walk over live objects.

    Args:
        names: Objects that are captured in one place and referred to elsewhere.
        storages: Takes the tensors.
    """

    def __init__(self, names: Names, storages: Storages) -> None:
        self.names = names
        self.storages = storages
        self._usual_alone = storages.usual_alone  # Bound once: it is asked of many.
        self._seen: dict[int, tuple[str, Any]] = {}

    def lower(self, value: Any, path: str) -> Value:
        """Return any value lowered; objects of the user's own types by their attributes."""
        kind = type(value)
        # What thousands of are met, on a way of their own: neither can contain anything.
        if kind is torch.Tensor:
            return self.usual(value) or self._extend(value, path)
        if kind is str and value.isascii():
            return value
        return values.lower(value, path=path, extend=self._extend)

    def usual(self, value: torch.Tensor) -> Leaf | None:
        """Return what `lower` gives for a tensor that nobody else has and that is all of its storage; else None."""
        return None if self.names.name_of_id(id(value)) is not None else self._usual_alone(value)

    def usual_states(
        self,
        names: NameList,
        parameters: list[torch.Tensor],
        first: int,
        states: States,
        lowered: Entries,
    ) -> int:
        """Lower what an optimizer has for its parameters, as far as it is usual: see `Storages.usual_states`."""
        return self.storages.usual_states(names, parameters, first, states, self.names, lowered)

    def attributes(self, item: object, path: str, skip: Set[str] = frozenset()) -> Entries:
        """Return an object's attributes lowered, by name; code is noted as such."""
        lowered = Entries(path)
        found = attributes_of(item, skip)
        # A model has hundreds of modules, whose attributes are plain, mostly.
        at = lowered.take_plain(found, 0)
        items = list(found.items()) if at < len(found) else []
        while at < len(items):
            name, value = items[at]
            lowered[name] = self._attribute(item, name, value, values.join_path(path, name))
            at = lowered.take_plain(found, at + 1)
        return lowered

    def _attribute(self, item: object, name: str, value: Any, path: str) -> Value:
        if type(value) in _SHARED:
            return self._shared(value, path)
        if isinstance(item, GradScaler) and name == "_per_optimizer_states":
            return self._scaler_states(value, path)
        return self.lower(value, path)

    def _shared(self, value: Any, path: str) -> Value:
        again = self._again(value, path)
        return self.lower(value, path) if again is None else again

    def _again(self, value: Any, path: str) -> Object | None:
        """Return what stands for an object that this walk has met before; else remember it."""
        # The object is kept with its path: an id says nothing once its object is gone.
        first = self._seen.setdefault(id(value), (path, value))[0]
        return None if first == path else Object("again", values.type_name(type(value)), {"at": first})

    def _extend(self, value: Any, path: str) -> Any:
        named = self.names.reference(value)
        if named is not None:
            return named
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        constant = tensors.lower_constant(value, self.storages)
        if constant is not NotImplemented:
            return constant
        kind = type(value)
        if rng.is_generator(value):
            return Object("generator", values.type_name(kind), {"state": rng.capture_generator(value)})
        if is_code(value):
            return Object("code", values.type_name(kind), {"name": code_name(value)})
        if isinstance(value, torch.nn.Module):
            from unbroken.torch import modules

            again = self._again(value, path)
            tree = {"tree": modules.capture_module(self, value, path)} if again is None else {}
            return again or Object("module", values.type_name(kind), tree)
        if isinstance(value, Optimizer):
            from unbroken.torch import optimizers

            again = self._again(value, path)
            tree = {"tree": optimizers.capture_optimizer(self, value, path)} if again is None else {}
            return again or Object("optimizer", values.type_name(kind), tree)
        if isinstance(value, dict) and values.type_name(kind) not in _PLAIN_MAPPINGS:
            return self._live_dict(value, path)
        if kind is collections.defaultdict and not values.is_plain_factory(
            getattr(value, "default_factory", None)
        ):
            return self._live_dict(value, path)
        if isinstance(value, list):  # A subclass: `values` lowers plain lists without asking.
            items = [self.lower(part, values.join_path(path, index)) for index, part in enumerate(value)]
            return Object("live_list", values.type_name(kind), {"items": items, **self._more(value, path)})
        if values.is_known(value) and not (
            dataclasses.is_dataclass(value) and values.find_type(values.type_name(kind)) is not kind
        ):
            return (
                self._again(value, path) or NotImplemented
                if dataclasses.is_dataclass(value)
                else NotImplemented
            )
        if values.has_plain_layout(kind):
            again = self._again(value, path)
            return again or Object(
                "instance", values.type_name(kind), {"attributes": self.attributes(value, path)}
            )
        return NotImplemented

    def _more(self, value: Any, path: str) -> dict[str, Entries]:
        return {"attributes": self.attributes(value, path)}

    def _live_dict(self, value: Any, path: str) -> Object:
        again = self._again(value, path)
        if again is not None:
            return again
        # `dict.items` and not the method of a subclass, which could be anything.
        items = self.lower(dict(dict.items(value)), path)
        return Object("live_dict", values.type_name(type(value)), {"items": items, **self._more(value, path)})

    def _tensor(self, value: torch.Tensor, path: str) -> Value:
        lowered = self.storages.lower(value, path)
        if value.is_leaf and value.grad is not None:
            grad = self.storages.lower(value.grad, f"{path}/grad", flags={})
            return Object("with_grad", values.type_name(type(value)), {"tensor": lowered, "grad": grad})
        return lowered

    def _scaler_states(self, states: Mapping[int, dict[str, Any]], path: str) -> Object:
        """Return what a scaler knows of each optimizer between `unscale_` and `update`, by the optimizers' names."""
        entries: dict[str, Value] = {}
        for key, state in states.items():
            name = self.names.name_of_id(key)
            if name is None:
                raise UnsupportedState(
                    path,
                    "torch.amp.GradScaler",
                    why="it has unscaled the gradients of an optimizer that is not tracked",
                    hint="track that optimizer, or call `scaler.update()` before the step ends",
                )
            found = {
                str(device): self.lower(flag, path) for device, flag in state["found_inf_per_device"].items()
            }
            entries[name] = {"stage": state["stage"].name, "found_inf": found}
        return Object("scaler_states", "torch.amp.GradScaler", {"states": entries})


_SHARED = frozenset({list, dict, set, collections.deque, collections.OrderedDict, bytearray})

_PLAIN_MAPPINGS = frozenset(
    {"builtins.dict", "collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
)


class _Placement:
    """A tensor to be put in place or made anew: decided when all of them are known."""

    def __init__(self, live: Any, leaf: Leaf, path: str, *, fixed: bool) -> None:
        self.leaf = leaf
        self.live = live
        self.path = path
        self.fixed = fixed  # Parameters: never rebound.
        self.in_place = fixed
        self.written = False

    def live_key(self) -> tuple[Any, int]:
        return (str(self.live.device), self.live.untyped_storage().data_ptr())

    def delta(self) -> int:
        size = self.live.element_size()
        return (self.live.storage_offset() - self.leaf.offset) * size


class Restorer:
    """The plan of one restore. Planning changes nothing; differences are collected, not raised.

    Args:
        names: The live program's named objects.
        loader: Gives the recorded tensors.
        keep: Names of hyper-parameters whose live value stays.
        allow: Tells by name which differences are to be passed over, live value kept.
    """

    def __init__(
        self,
        names: Names,
        loader: Loader,
        *,
        keep: frozenset[str] = frozenset(),
        allow: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.names = names
        self.loader = loader
        self.differences: list[tuple[str, object, object]] = []
        self._keep = keep
        self._allow = allow
        self._placements: list[_Placement] = []
        self._made: dict[str, Any] = {}
        self._visited: set[int] = set()
        self._held: list[Any] = []
        self._homes: dict[int, tuple[_Placement, int]] = {}

    def differs(self, name: str, recorded: object, live: object) -> None:
        """Note a difference, unless the user allowed it."""
        if not self._allow(name):
            self.differences.append((name, recorded, live))

    def kept(self, path: str) -> bool:
        """Tell whether the live value of a hyper-parameter is to stay."""
        return dotted(path) in self._keep

    def plan(self, live: Any, value: Value, path: str) -> Maker:
        """Return how to bring a live value to a recorded one.

        Args:
            live: What the program has there, or `MISSING`.
            value: What the checkpoint has there.
            path: Where it is in the tree.
        """
        maker = self._plan(live, value, path)

        def make() -> Any:
            made = maker()
            self._made[path] = made
            return made

        return make

    def attributes(
        self,
        live: object,
        recorded: Mapping[str, Value],
        path: str,
        *,
        skip: Set[str] = frozenset(),
        lenient: bool = False,
    ) -> Callable[[], None]:
        """Return how to bring an object's attributes to the recorded ones.

        Args:
            live: The object.
            recorded: Its attributes as captured.
            path: Where it is in the tree.
            skip: Attributes that are not touched.
            lenient: Do not mind attributes that the checkpoint lacks.
        """
        present = attributes_of(live, skip)
        makers: dict[str, Maker] = {}
        for name, value in recorded.items():
            place = values.join_path(path, name)
            if self.kept(place) or (isinstance(value, Object) and value.kind == "code"):
                continue
            makers[name] = self.plan(present.get(name, MISSING), value, place)
        for name, value in present.items():
            if name not in recorded and not lenient and not is_code(value) and self._is_state(value):
                self.differs(dotted(values.join_path(path, name)), "absent", _shown(value))

        def apply() -> None:
            for name, maker in makers.items():
                made = maker()
                if made is not present.get(name, MISSING):
                    set_attribute(live, name, made)

        return apply

    def _is_state(self, value: Any) -> bool:
        return not isinstance(value, torch.nn.Module | Optimizer)

    def _plan(self, live: Any, value: Value, path: str) -> Maker:
        if isinstance(value, Leaf):
            return self.tensor(live, value, path)
        if isinstance(value, Object):
            special = _PLAN_OBJECT.get(value.kind)
            if special is not None:
                return special(self, live, value, path)
            return self._new(value, path)
        kind = type(value)
        if kind is list:
            return self._list(live, value, path)
        if kind is dict:
            return self._dict(live, value, path)
        if kind is set:
            return self._refill(live, self._raise(value, path), set)
        if kind is tuple:
            parts = live if type(live) is tuple and len(live) == len(value) else [MISSING] * len(value)
            pairs = zip(parts, value, strict=True)
            makers = [
                self.plan(part, item, values.join_path(path, i)) for i, (part, item) in enumerate(pairs)
            ]
            return lambda: tuple(maker() for maker in makers)
        return lambda: value

    def _raise(self, value: Value, path: str) -> Any:
        def extend(part: Any, place: str) -> Any:
            if isinstance(part, Leaf):
                return tensors.raise_leaf(self.loader, part, place, device=self._device(part, place))
            if part.kind in _PLAN_OBJECT and part.kind not in (
                "dataclass",
                "mapping",
                "defaultdict",
                "deque",
            ):
                return self.plan(MISSING, part, place)()
            return tensors.raise_constant(self.loader, part, place)

        return values.raise_(value, path=path, extend=extend)

    def _new(self, value: Value, path: str) -> Maker:
        try:
            made = self._raise(value, path)
        except UnsupportedState as error:
            self.differs(dotted(path), error.type_name, str(error))
            return lambda: MISSING
        return lambda: made

    def _claim(self, live: Any) -> bool:
        """Tell whether a live container may be refilled: the first place that reaches it has it."""
        if id(live) in self._visited:
            return False
        self._visited.add(id(live))
        self._held.append(live)
        return True

    def _refill(self, live: Any, made: Any, kind: type) -> Maker:
        if type(live) is not kind or not self._claim(live):
            return lambda: made

        def refill() -> Any:
            live.clear()
            if kind is collections.deque:
                live.extend(made)
            else:
                live.update(made)
            return live

        return refill

    def _items(self, live: list[Any], value: list[Value], path: str) -> list[Maker]:
        makers = []
        for index, item in enumerate(value):
            part = live[index] if index < len(live) else MISSING
            makers.append(self.plan(part, item, values.join_path(path, index)))
        return makers

    def _list(self, live: Any, value: list[Value], path: str) -> Maker:
        parts = list(live) if type(live) is list else []
        makers = self._items(parts, value, path)
        if type(live) is not list or not self._claim(live):
            return lambda: [maker() for maker in makers]

        def refill() -> Any:
            live[:] = [maker() for maker in makers]
            return live

        return refill

    def _dict_makers(self, live: Any, value: dict[Value, Value], path: str) -> dict[Any, Maker]:
        makers: dict[Any, Maker] = {}
        for key, item in value.items():
            raised = self._key(live, key, path)
            part = dict.get(live, raised, MISSING) if isinstance(live, dict) else MISSING
            makers[raised] = self.plan(part, item, values.join_path(path, raised))
        return makers

    def _key(self, live: Any, key: Value, path: str) -> Any:
        """Return a recorded key; for one that is code, such as a class, the live mapping's key of that name."""
        if isinstance(key, Object) and key.kind == "code":
            name = key.fields["name"]
            for known in live if isinstance(live, dict) else ():
                if is_code(known) and code_name(known) == name:
                    return known
        return self._raise(key, path)

    def _dict(self, live: Any, value: dict[Value, Value], path: str) -> Maker:
        makers = self._dict_makers(live, value, path)
        if type(live) is not dict or not self._claim(live):
            return lambda: {key: maker() for key, maker in makers.items()}
        return self._refill_dict(live, makers)

    def _refill_dict(self, live: Any, makers: dict[Any, Maker]) -> Maker:
        def refill() -> Any:
            made = {key: maker() for key, maker in makers.items()}
            dict.clear(live)
            # Past the methods of a subclass: filling an OrderedDict needs its own, and has none to hide.
            fill = collections.OrderedDict.__setitem__ if isinstance(live, collections.OrderedDict) else None
            for key, item in made.items():
                (fill or dict.__setitem__)(live, key, item)
            return live

        return refill

    # Objects.

    def _code(self, live: Any, value: Object, path: str) -> Maker:
        if live is MISSING:
            self.differs(dotted(path), f"code ({value.name})", "absent")
        return lambda: live

    def _reference(self, live: Any, value: Object, path: str) -> Maker:
        target = self.names.find(value.name, value.fields["to"], MISSING)
        if target is MISSING:
            self.differs(dotted(path), f"the {value.name} `{value.fields['to']}`", "absent")
        return lambda: target

    def _seen_again(self, live: Any, value: Object, path: str) -> Maker:
        first = value.fields["at"]
        return lambda: self._made.get(first, live)

    def _typed(self, live: Any, value: Object, path: str) -> bool:
        if live is not MISSING and values.type_name(type(live)) == value.name:
            return True
        self.differs(dotted(path), value.name, "absent" if live is MISSING else values.type_name(type(live)))
        return False

    def _instance(self, live: Any, value: Object, path: str) -> Maker:
        if not self._typed(live, value, path):
            return lambda: live
        recorded = value.fields["attributes"]
        lenient = type(live).__module__.split(".")[0] == "torch"
        apply = self.attributes(live, recorded, path, lenient=lenient)
        # Known from the start and not only when made: an attribute of its own may lead back to it.
        self._made[path] = live

        def bring() -> Any:
            apply()
            return live

        return bring

    def _dataclass(self, live: Any, value: Object, path: str) -> Maker:
        frozen = getattr(getattr(type(live), "__dataclass_params__", None), "frozen", True)
        if live is MISSING or frozen or values.type_name(type(live)) != value.name or not self._claim(live):
            return self._new(value, path)
        apply = self.attributes(live, value.fields, path)

        def bring() -> Any:
            apply()
            return live

        return bring

    def _mapping(self, live: Any, value: Object, path: str) -> Maker:
        items = value.fields["items"]
        if values.type_name(type(live)) != value.name or not self._claim(live):
            return self._new(value, path)
        return self._refill_dict(live, self._dict_makers(live, items, path))

    def _deque(self, live: Any, value: Object, path: str) -> Maker:
        fields = value.fields
        if type(live) is not collections.deque or live.maxlen != fields["maxlen"] or not self._claim(live):
            return self._new(value, path)
        makers = self._items(list(live), fields["items"], path)

        def refill() -> Any:
            made = [maker() for maker in makers]
            live.clear()
            live.extend(made)
            return live

        return refill

    def _live_dict(self, live: Any, value: Object, path: str) -> Maker:
        if not self._typed(live, value, path):
            return lambda: live
        fields = value.fields
        self._claim(live)
        fill = self._refill_dict(live, self._dict_makers(live, fields["items"], path))
        apply = self.attributes(live, fields["attributes"], path)

        def bring() -> Any:
            apply()
            return fill()

        return bring

    def _live_list(self, live: Any, value: Object, path: str) -> Maker:
        if not self._typed(live, value, path):
            return lambda: live
        fields = value.fields
        makers = self._items(list(live), fields["items"], path)
        apply = self.attributes(live, fields["attributes"], path)

        def bring() -> Any:
            apply()
            list.__setitem__(live, slice(None), [maker() for maker in makers])
            return live

        return bring

    def _generator(self, live: Any, value: Object, path: str) -> Maker:
        if not self._typed(live, value, path):
            return lambda: live
        state = value.fields["state"]

        def bring() -> Any:
            rng.restore_generator(live, state)
            return live

        return bring

    def _module(self, live: Any, value: Object, path: str) -> Maker:
        from unbroken.torch import modules

        if not isinstance(live, torch.nn.Module):
            self._typed(live, value, path)
            return lambda: live
        apply = modules.plan_module(self, live, value.fields["tree"], path)
        return lambda: (apply(), live)[1]

    def _optimizer(self, live: Any, value: Object, path: str) -> Maker:
        from unbroken.torch import optimizers

        if not isinstance(live, Optimizer):
            self._typed(live, value, path)
            return lambda: live
        apply = optimizers.plan_optimizer(self, live, value.fields["tree"], path)
        return lambda: (apply(), live)[1]

    def _with_grad(self, live: Any, value: Object, path: str) -> Maker:
        fields = value.fields
        maker = self.plan(live, fields["tensor"], path)
        grad = self.gradient(live, fields["grad"], path)

        def bring() -> Any:
            made = maker()
            grad(made)
            return made

        return bring

    def _scaler_states(self, live: Any, value: Object, path: str) -> Maker:
        states = value.fields["states"]
        entries: list[tuple[Any, dict[str, Any]]] = []
        for name, state in states.items():
            optimizer = self.names.find("object", name, MISSING)
            if optimizer is MISSING:
                self.differs(dotted(path), f"the optimizer `{name}`", "absent")
                continue
            found = {
                torch.device(device): self._raise(flag, path) for device, flag in state["found_inf"].items()
            }
            entries.append((optimizer, {"stage": OptState[state["stage"]], "found_inf_per_device": found}))

        def bring() -> Any:
            live.clear()
            live.update({id(optimizer): state for optimizer, state in entries})
            return live

        return bring

    # Tensors.

    def tensor(self, live: Any, leaf: Leaf, path: str, *, fixed: bool = False) -> Maker:
        """Return how to bring a live tensor to a leaf: in place where its memory is shared as it was, else anew.

        Args:
            live: The tensor the program has there, or anything else.
            leaf: What the checkpoint has.
            path: Where it is in the tree.
            fixed: It is a parameter, checked by the caller, and must stay the tensor that it is.
        """
        usable = (
            isinstance(live, torch.Tensor)
            and not is_lazy(live)
            and not live.is_quantized
            and tensors.same_layout(live, leaf)
            and live.device.type == _device_called(leaf.device).type
            and (fixed or _same_class(live, leaf))
        )
        placement = _Placement(live if usable else None, leaf, path, fixed=fixed and usable)
        self._placements.append(placement)
        if not placement.fixed:
            self._device(leaf, path)

        def make() -> Any:
            if placement.in_place:
                if not placement.written:
                    tensors.write(live, self.loader.tensor(leaf, path=path))
                if not fixed and live.is_leaf:
                    live.requires_grad_(bool(leaf.attrs.get("requires_grad", False)))
                return live
            return self._make_tensor(placement)

        return make

    def gradient(self, live: Any, value: Value, path: str) -> Callable[[Any], None]:
        """Return how to give a parameter its recorded gradient; None is not zeros."""
        if value is None:

            def remove(parameter: Any) -> None:
                parameter.grad = None

            return remove
        present = getattr(live, "grad", None) if not is_lazy(live) else None
        maker = self.plan(MISSING if present is None else present, value, f"{path}/grad")

        def install(parameter: Any) -> None:
            made = maker()
            if parameter.grad is made:
                return
            if parameter.grad_dtype not in (None, made.dtype):
                parameter.grad = None
                parameter.grad_dtype = made.dtype
            parameter.grad = made

        return install

    def _device(self, leaf: Leaf, path: str) -> torch.device:
        device = _device_called(leaf.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            self.differs(dotted(path), f"on {leaf.device}", "no such device")
            return torch.device("cpu")
        return device

    def _make_tensor(self, placement: _Placement) -> torch.Tensor:
        leaf = placement.leaf
        home = self._homes.get(leaf.storage)
        if home is not None and "quantizer" not in leaf.attrs and "strides" not in leaf.attrs:
            # Its memory lives on under another name: it is a view of that.
            other, delta = home
            size = tensors._CONSTANTS[f"torch.{leaf.dtype}"].itemsize
            offset, rest = divmod(leaf.offset * size + delta, size)
            storage = other.live.untyped_storage()
            end = (offset + tensors._span_elements(leaf.shape, leaf.strides)) * size
            if not rest and offset >= 0 and end <= storage.nbytes():
                dtype = tensors._CONSTANTS[f"torch.{leaf.dtype}"]
                made = tensors.view_storage(
                    storage, dtype, leaf.shape, leaf.strides, offset, None, placement.path
                )
                return tensors._dress(made, leaf.attrs, placement.path)
        device = self._device(leaf, placement.path)
        return tensors.raise_leaf(self.loader, leaf, placement.path, device=device)

    def copy_bytes(self) -> None:
        """Write all live tensors at once whose bytes are simply to be copied. Those that share memory are left."""
        found: dict[int, tuple[int, int, list[_Placement]]] = {}
        for item in self._placements:
            source = self.loader.source_of(item.leaf, item.live) if item.in_place else None
            if source is not None:
                origin, to, length = source
                known = found.setdefault(to, (origin, length, []))
                if known[:2] == (origin, length):
                    known[2].append(item)
                else:
                    known[2].clear()
        ordered = sorted(found.items())
        for (to, (_, length, items)), (following, (_, _, others)) in itertools.pairwise(ordered):
            if to + length > following:
                items.clear()
                others.clear()
        copies = [(origin, to, length) for to, (origin, length, items) in ordered if items]
        _core.copy_memory(copies)
        written = [item for _, (_, _, items) in ordered for item in items]
        torch.autograd.graph.increment_version([item.live for item in written])
        for item in written:
            item.written = True

    def resting(self) -> list[tuple[torch.Tensor, int]]:
        """Return parameters that require no gradient and have a whole storage's bytes, and which storage that is."""

        def is_whole(item: _Placement) -> bool:
            return (
                item.fixed
                and item.written
                and not item.live.requires_grad
                and item.leaf.offset == 0
                and item.live.storage_offset() == 0
                and item.live.untyped_storage().nbytes() == item.live.nbytes
            )

        return [(item.live, item.leaf.storage) for item in self._placements if is_whole(item)]

    def settle(self) -> None:
        """Decide which tensors are written in place: those whose memory is shared now as it was when saved.

        Parameters must share as they did; a tie that was lost, or gained, is a difference.
        """
        fixed = [item for item in self._placements if item.fixed and 0 not in item.leaf.shape]
        self._check_ties(fixed)
        free = [
            item
            for item in self._placements
            if item.live is not None and not item.fixed and 0 not in item.leaf.shape
        ]
        recorded_of: dict[Any, set[tuple[int, int]]] = {}
        live_of: dict[int, set[Any]] = {}
        for item in fixed + free:
            recorded_of.setdefault(item.live_key(), set()).add((item.leaf.storage, item.delta()))
            live_of.setdefault(item.leaf.storage, set()).add(item.live_key())
        for item in free:
            alone = len(recorded_of[item.live_key()]) == 1
            item.in_place = alone and len(live_of[item.leaf.storage]) == 1
        for item in fixed + [item for item in free if item.in_place]:
            if item.leaf.attrs.get("strides") is None:
                self._homes.setdefault(item.leaf.storage, (item, item.delta()))
        for item in self._placements:
            if item.live is not None and not item.fixed and 0 in item.leaf.shape:
                item.in_place = True

    def _check_ties(self, fixed: list[_Placement]) -> None:
        recorded: dict[int, list[_Placement]] = {}
        live: dict[Any, list[_Placement]] = {}
        for item in fixed:
            recorded.setdefault(item.leaf.storage, []).append(item)
            live.setdefault(item.live_key(), []).append(item)
        for item in fixed:
            was, now = recorded[item.leaf.storage], live[item.live_key()]
            if was[0] is not item and now[0] is not item:
                continue  # Each group is named once, by its first member.
            partners = {id(other) for other in was} ^ {id(other) for other in now}
            shifted = [other for other in was if other.delta() != was[0].delta()]
            if partners or shifted:
                self.differs(dotted(item.path), _tied(was), _tied(now))


# Thousands of leaves are on one or two devices.
_device_called = functools.cache(torch.device)


def _tied(group: list[_Placement]) -> str:
    names = ", ".join(dotted(item.path) for item in group)
    return "not tied" if len(group) == 1 else f"tied: {names}"


def _same_class(live: torch.Tensor, leaf: Leaf) -> bool:
    name = leaf.attrs.get("class")
    kind = type(live)
    return kind is torch.Tensor if name is None else values.type_name(kind) == name


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return tensors.describe(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def walk_leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested plain containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from walk_leaves(part)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for part in value:
            yield from walk_leaves(part)


_PLAN_OBJECT: dict[str, Callable[[Restorer, Any, Object, str], Maker]] = {
    "code": Restorer._code,
    "reference": Restorer._reference,
    "again": Restorer._seen_again,
    "instance": Restorer._instance,
    "dataclass": Restorer._dataclass,
    "mapping": Restorer._mapping,
    "defaultdict": Restorer._mapping,
    "deque": Restorer._deque,
    "live_dict": Restorer._live_dict,
    "live_list": Restorer._live_list,
    "generator": Restorer._generator,
    "module": Restorer._module,
    "optimizer": Restorer._optimizer,
    "with_grad": Restorer._with_grad,
    "scaler_states": Restorer._scaler_states,
}
