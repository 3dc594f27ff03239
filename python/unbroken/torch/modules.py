"""Modules captured by name, whole: parameters, gradients, every buffer, flags, and attributes that are not code.

Touches: on capture, reads. On restore, copies into the live tensors: a parameter is never rebound, because an optimizer
holds it and because its address is part of what decides the bits. Wrappers (DDP, `torch.compile`) have no names.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from unbroken import values
from unbroken._core import Entries, Object
from unbroken._core import Tensor as Leaf
from unbroken.torch import tensors
from unbroken.torch.objects import MISSING, Capture, Restorer, dotted

if TYPE_CHECKING:
    from unbroken._core import Names, Value

MACHINERY = frozenset(vars(torch.nn.Module())) | {
    "_compiled_call_impl",
    "_initialize_hook",
    "_load_hook",
    "_c",
    "_concrete_type",
}
"""What torch keeps in a module's own attributes and is not state, or is captured by name below."""


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the user's module inside DDP, DataParallel and `torch.compile` wrappers."""
    while (inside := _wrapped_in(type(module))) is not None:
        module = getattr(module, inside)
    return module


@functools.lru_cache(maxsize=1024)
def _wrapped_in(kind: type) -> str | None:
    """Return the attribute in which a wrapper of this type has the user's module; None where it is none."""
    if issubclass(kind, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        return "module"
    # Looked up and not imported: a program that compiles has it, and for the others it costs seconds.
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if frame is not None and issubclass(kind, frame.OptimizedModule) else None


def walk(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (path, module) of a module and all below it, each once, wrappers left out of the paths."""
    seen: set[int] = set()
    ahead = [("", unwrap(module))]
    while ahead:
        path, part = ahead.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        if part._modules:
            below = [
                (_join(path, name), unwrap(child))
                for name, child in part._modules.items()
                if child is not None
            ]
            ahead.extend(reversed(below))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _place(path: str, place: str) -> str:
    return f"{path}/{place}" if place else path


def parameters_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (name, parameter), tied ones under each of their names."""
    for path, part in walk(module):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield _join(path, name), parameter


def add_names(names: Names, name: str, module: torch.nn.Module) -> None:
    """Name a tracked module's parts, so that others can refer to them."""
    for path, part in walk(module):
        place = _join(name, path)
        names.add("module", place, part)
        prefix = f"{place}." if place else ""
        for members in (part._parameters, part._buffers):
            if members:
                names.add_members("tensor", prefix, members)
    names.add("module", name, module)


def capture_module(capture: Capture, module: torch.nn.Module, path: str) -> Value:
    """Return a module's tree: `parameters`, `gradients` and `buffers` by name, `modules` by path.

    Raises:
        UnsupportedState: An attribute cannot be saved; its path says whose.
    """
    parameters, gradients = Entries(f"{path}/parameters"), Entries(f"{path}/gradients")
    buffers: dict[str, Value] = {}
    parts: dict[str, Value] = {}
    lower = capture.storages.lower
    for place, part in walk(module):
        prefix = f"{place}." if place else ""
        own = part._parameters
        if own and not capture.storages.usual_parameters(own, prefix, parameters, gradients):
            _lower_parameters(capture, part, path, prefix, (parameters, gradients))
        for key, buffer in part._buffers.items():
            name = _join(place, key)
            flags = {"persistent": key not in part._non_persistent_buffers_set}
            if buffer is None:
                buffers[name] = None
            elif is_lazy(buffer):
                buffers[name] = lower(buffer, f"{path}/buffers/{name}")
            else:
                flags["requires_grad"] = buffer.requires_grad and buffer.is_leaf
                buffers[name] = lower(buffer, f"{path}/buffers/{name}", flags=flags)
        parts[place] = {
            "class": values.type_name(type(part)),
            "training": part.training,
            "attributes": capture.attributes(part, _place(path, place), MACHINERY),
        }
    return {"parameters": parameters, "gradients": gradients, "buffers": buffers, "modules": parts}


def _lower_parameters(
    capture: Capture,
    part: torch.nn.Module,
    path: str,
    prefix: str,
    lowered: tuple[Entries, Entries],
) -> None:
    """Lower a module's own parameters and their gradients, whatever they are."""
    parameters, gradients = lowered
    lower = capture.storages.lower
    for key, parameter in part._parameters.items():
        if parameter is None:
            continue
        name = f"{prefix}{key}"
        if is_lazy(parameter):
            parameters[name] = lower(parameter, f"{path}/parameters/{name}")
            gradients[name] = None
            continue
        flags: dict[str, Value] = {"requires_grad": parameter.requires_grad}
        parameters[name] = lower(parameter, f"{path}/parameters/{name}", flags=flags)
        grad = parameter.grad
        gradients[name] = None if grad is None else lower(grad, f"{path}/gradients/{name}", flags={})


def plan_module(restorer: Restorer, module: torch.nn.Module, tree: Value, path: str) -> Callable[[], None]:
    """Return how to bring a live module to a recorded tree. Differences are noted with the restorer.

    Names of differences are dotted: ``model.layers.0.weight``.
    """
    recorded = tree["modules"]
    live = dict(walk(module))
    actions: list[Callable[[], None]] = []
    for place in [*recorded, *(place for place in live if place not in recorded)]:
        _check_class(restorer, live.get(place), recorded.get(place), _join(dotted(path), place))
    actions += _plan_parameters(restorer, module, tree, path)
    buffers: dict[str, dict[str, Value]] = {}
    for name, value in tree["buffers"].items():
        place, _, key = name.rpartition(".")
        buffers.setdefault(place, {})[key] = value
    for place, part in live.items():
        if place in recorded:
            actions += _plan_buffers(restorer, part, place, buffers.get(place, {}), path)
            actions.append(_plan_part(restorer, part, recorded[place], _place(path, place)))

    def apply() -> None:
        for action in actions:
            action()

    return apply


def _check_class(restorer: Restorer, part: Any, recorded: Value, name: str) -> None:
    if part is None or recorded is None:
        was = "absent" if recorded is None else recorded["class"]
        restorer.differs(name, was, "absent" if part is None else values.type_name(type(part)))
        return
    now = values.type_name(type(part))
    becomes = getattr(part, "cls_to_become", None) if isinstance(part, LazyModuleMixin) else None
    if recorded["class"] != now and (becomes is None or recorded["class"] != values.type_name(becomes)):
        restorer.differs(name, recorded["class"], now)


def _plan_parameters(
    restorer: Restorer, module: torch.nn.Module, tree: Value, path: str
) -> Iterator[Callable[[], None]]:
    live = dict(parameters_of(module))
    recorded = tree["parameters"]
    for name in [*recorded, *(name for name in live if name not in recorded)]:
        parameter, value = live.get(name), recorded.get(name)
        full = f"{path}/{name}"
        if parameter is None or value is None:
            restorer.differs(dotted(full), tensors.describe(value), tensors.describe(parameter))
            continue
        yield from _plan_parameter(restorer, parameter, value, tree["gradients"][name], full)


def _plan_parameter(
    restorer: Restorer, parameter: torch.nn.Parameter, value: Value, grad: Value, path: str
) -> Iterator[Callable[[], None]]:
    lazy = is_lazy(parameter)
    if isinstance(value, Object) and value.kind == "uninitialized":
        if not lazy:
            restorer.differs(dotted(path), "uninitialized", tensors.describe(parameter))
        return
    if not isinstance(value, Leaf) or (not lazy and not tensors.same_layout(parameter, value)):
        restorer.differs(dotted(path), tensors.describe(value), tensors.describe(parameter))
        return
    if lazy:
        if str(parameter.dtype) != f"torch.{value.dtype}":
            restorer.differs(dotted(path), tensors.describe(value), f"uninitialized {parameter.dtype}")
            return

        def materialize() -> None:
            parameter.materialize(value.shape)  # type: ignore[attr-defined]
            strides = value.attrs.get("strides", value.strides)
            if not tensors.same_layout(parameter, value):
                like = parameter.data
                parameter.data = torch.empty_strided(
                    value.shape, strides, dtype=like.dtype, device=like.device
                )
            tensors.write(parameter, restorer.loader.tensor(value, path=path))

        yield materialize
    else:
        write = restorer.tensor(parameter, value, path, fixed=True)
        yield lambda: (write(), None)[1]
    install = restorer.gradient(parameter, grad, path)
    flag = bool(value.attrs.get("requires_grad", True))

    def finish() -> None:
        parameter.requires_grad_(flag)
        install(parameter)

    yield finish


def _plan_buffers(
    restorer: Restorer, part: torch.nn.Module, place: str, here: dict[str, Value], path: str
) -> Iterator[Callable[[], None]]:
    for key, live in part._buffers.items():
        if key not in here and live is not None:
            restorer.differs(_join(dotted(path), _join(place, key)), "absent", tensors.describe(live))
    for key, value in here.items():
        yield _plan_buffer(restorer, part, key, value, f"{path}/{_join(place, key)}")


def _plan_buffer(
    restorer: Restorer, part: torch.nn.Module, key: str, value: Value, path: str
) -> Callable[[], None]:
    live: Any = part._buffers[key] if key in part._buffers else MISSING  # noqa: SIM401 scripted modules have no dict
    if isinstance(value, Object) and value.kind == "uninitialized":
        if not is_lazy(live):
            restorer.differs(
                dotted(path), "uninitialized", "absent" if live is MISSING else tensors.describe(live)
            )
        return lambda: None
    if is_lazy(live) and isinstance(value, Leaf):

        def materialize() -> None:
            live.materialize(value.shape)
            tensors.write(live, restorer.loader.tensor(value, path=path))  # type: ignore[arg-type]

        return materialize
    attrs = value.attrs if isinstance(value, Leaf) else {}
    maker = restorer.plan(live, value, path)

    def apply() -> None:
        made = maker()
        if made is not live:
            part._buffers[key] = made
            if attrs.get("persistent", True):
                part._non_persistent_buffers_set.discard(key)
            else:
                part._non_persistent_buffers_set.add(key)

    return apply


def _plan_part(restorer: Restorer, part: torch.nn.Module, recorded: Value, path: str) -> Callable[[], None]:
    if restorer.kept(path):
        return lambda: None
    lenient = type(part).__module__.startswith("torch.")
    attributes = restorer.attributes(part, recorded["attributes"], path, skip=MACHINERY, lenient=lenient)

    def apply() -> None:
        part.training = recorded["training"]
        if isinstance(part, LazyModuleMixin) and recorded["class"] != values.type_name(type(part)):
            _become(part)
        attributes()

    return apply


def _become(part: Any) -> None:
    """Do what a lazy module does after its first forward: it is an ordinary one from here on."""
    part._initialize_hook.remove()
    part._load_hook.remove()
    del part._initialize_hook, part._load_hook
    part.__class__ = part.cls_to_become


def identity(name: str, module: torch.nn.Module) -> dict[str, Value]:
    """Return what each part of a module is as constructed: class, names, shapes and dtypes, and torch's settings."""
    found: dict[str, Value] = {}
    for path, part in walk(module):
        parts = [
            f"{key}: {tensors.describe(tensor)}"
            for key, tensor in [*part._parameters.items(), *part._buffers.items()]
            if tensor is not None
        ]
        if type(part).__module__.startswith("torch.nn."):
            parts += [
                f"{key}={value!r}"
                for key, value in vars(part).items()
                if key not in MACHINERY and type(value) in (bool, int, float, str)
            ]
        found[_join(name, path)] = f"{values.type_name(type(part))}({', '.join(parts)})"
    return found
