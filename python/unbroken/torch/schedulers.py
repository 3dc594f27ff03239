"""Learning-rate schedulers and gradient scalers: counters, bests and scales, restored past every constructor.

Touches: on capture, reads. On restore, sets attributes in place; nothing is stepped, no learning rate is computed.
"""

from __future__ import annotations

import collections
import hashlib
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from unbroken import values
from unbroken.torch.objects import Capture, Restorer, dotted, is_code

if TYPE_CHECKING:
    from unbroken._core import Value


def is_scheduler(item: object) -> bool:
    """Tell whether an object is one of torch's schedulers or extends one."""
    return isinstance(item, LRScheduler)


def is_scaler(item: object) -> bool:
    """Tell whether an object is a gradient scaler."""
    return isinstance(item, GradScaler)


def capture_attributes(capture: Capture, item: object, path: str) -> Value:
    """Return the tree of an object that is all attributes."""
    return {"class": values.type_name(type(item)), "attributes": capture.attributes(item, path)}


def plan_attributes(restorer: Restorer, item: object, tree: Value, path: str) -> Callable[[], None]:
    """Return how to bring such an object to a recorded tree."""
    now = values.type_name(type(item))
    if tree["class"] != now:
        restorer.differs(dotted(path), tree["class"], now)
        return lambda: None
    lenient = type(item).__module__.split(".")[0] == "torch"
    return restorer.attributes(item, tree["attributes"], path, lenient=lenient)


def identity(name: str, item: object) -> dict[str, Value]:
    """Return what a scheduler or scaler is as constructed: its class, plain attributes, and its functions' code."""
    found: dict[str, Value] = {}
    _identify(found, name, item, set())
    return found


def _identify(found: dict[str, Value], name: str, value: Any, seen: set[int]) -> None:
    if isinstance(value, Optimizer) or id(value) in seen:
        return
    if type(value) in (type(None), bool, int, float, str):
        found[name] = value
    elif isinstance(value, torch.Tensor):
        found[name] = value.item() if value.numel() == 1 else str(tuple(value.shape))
    elif type(value) in (list, tuple) and all(
        type(part) in (type(None), bool, int, float, str) for part in value
    ):
        found[name] = type(value)(value)  # A copy: training goes on to change the live one.
    elif isinstance(value, collections.Counter | dict):
        plain = {key: part for key, part in value.items() if type(key) in (int, str)}
        if plain:
            found[name] = (
                repr(sorted(plain.items(), key=repr)) if _all_plain(plain) else f"{len(plain)} entries"
            )
    elif type(value) in (list, tuple):
        for index, part in enumerate(value):
            _identify(found, f"{name}.{index}", part, seen)
    elif is_code(value):
        found[name] = code_identity(value)
    elif hasattr(value, "__dict__"):
        seen.add(id(value))
        found[f"{name}.class"] = values.type_name(type(value))
        for key, part in vars(value).items():
            _identify(found, f"{name}.{key}", part, seen)


def _all_plain(plain: dict[Any, Any]) -> bool:
    return all(type(part) in (type(None), bool, int, float, str) for part in plain.values())


def code_identity(function: Any) -> str:
    """Return a function's name and a digest of what decides its result: code, defaults, closure, plain globals."""
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, types.FunctionType):
        parts = getattr(function, "func", None)
        if parts is not None:
            return f"{code_identity(parts)} with {function.args!r} {function.keywords!r}"
        return getattr(function, "__qualname__", type(function).__qualname__)
    digest = hashlib.blake2b(digest_size=8)
    for part in (*_code_parts(inner.__code__), *_surroundings(inner)):
        digest.update(part.encode())
        digest.update(b"\0")
    return f"{inner.__qualname__} {digest.hexdigest()}"


def _code_parts(code: types.CodeType) -> list[str]:
    # The order within a set of constants differs from process to process.
    constants = [
        sorted(map(repr, part)) if isinstance(part, frozenset) else part
        for part in code.co_consts
        if not isinstance(part, types.CodeType)
    ]
    parts = [code.co_code.hex(), repr(constants), repr(code.co_names)]
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            parts += _code_parts(inner)
    return parts


def _surroundings(function: types.FunctionType) -> list[str]:
    def plain(value: Any) -> str:
        return (
            repr(value)
            if type(value) in (type(None), bool, int, float, str, tuple)
            else type(value).__qualname__
        )

    parts = [plain(value) for value in function.__defaults__ or ()]
    for cell in function.__closure__ or ():
        try:
            parts.append(plain(cell.cell_contents))
        except ValueError:
            parts.append("empty")
    for name in function.__code__.co_names:
        if name in function.__globals__:
            parts.append(f"{name}={plain(function.__globals__[name])}")
    return parts
