"""Unbroken: exact, proven, durable resume of training.

    run = unbroken.Run("runs/digits", seed=1, model=net, optimizer=opt, scheduler=sched)
    for epoch in run.epochs(500):
        for batch in run.batches(loader):
            ...
            run.log(loss=loss)

Importing this package imports neither torch nor numpy; `Run` and `load` bring in what they need when first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unbroken import errors
from unbroken.errors import UnbrokenError

if TYPE_CHECKING:
    from unbroken.policy import Keep, Policy
    from unbroken.run import Run, load

__all__ = ["Keep", "Policy", "Run", "UnbrokenError", "errors", "load"]

_LAZY = {
    "Keep": "unbroken.policy",
    "Policy": "unbroken.policy",
    "Run": "unbroken.run",
    "load": "unbroken.run",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
