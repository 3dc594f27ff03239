"""What takes part in training without being tracked: optimizers, schedulers, scalers, averaged models, modules.

Touches: torch's global hooks for optimizer steps and module calls, and the `step` methods of scheduler classes, between
`install` and `uninstall`. Notes who came by and changes nothing. The optimizer hook stays for the whole run; the module
hook costs a little at every call of every module, so it is there for the first steps of each life only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

# Steps of a life during which every module call is looked at; what runs at all nearly always runs in these.
MODULE_WATCH_STEPS = 2


class Watch:
    """Names what takes part and is not tracked.

    Args:
        tracked: The run's objects by name; read anew at each check, so later additions count.
    """

    def __init__(self, tracked: Mapping[str, object]) -> None:
        self._tracked = tracked
        # What came by since the last call of `untracked` and was not known, by id.
        self.seen: dict[int, object] = {}
        # Ids of what was judged; weak, because an id passes on when its object dies.
        self._known: dict[int, weakref.ref[object]] = {}
        self._paused = 0
        self._handles: list[Any] = []
        self._module_handle: Any = None
        self._patched: list[tuple[type, str, Any]] = []

    def install(self) -> None:
        """Begin to look."""
        self._handles.append(register_optimizer_step_pre_hook(self._note))
        for cls in _with_subclasses(LRScheduler):
            self._patch(cls, "step")
        for cls in _with_subclasses(torch.amp.GradScaler):
            self._patch(cls, "update")
        for cls in _with_subclasses(AveragedModel):
            self._patch(cls, "update_parameters")
        self._module_handle = register_module_forward_pre_hook(lambda module, args: self._note_module(module))

    def uninstall(self) -> None:
        """Put everything back. Idempotent."""
        self.stop_watching_modules()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cls, name, original in self._patched:
            setattr(cls, name, original)
        self._patched.clear()

    def stop_watching_modules(self) -> None:
        """Take the module hook away: it has seen what runs. Idempotent."""
        if self._module_handle is not None:
            self._module_handle.remove()
            self._module_handle = None

    def pause(self) -> None:
        """Look away until `resume`: what runs in an evaluation is not training."""
        self._paused += 1

    def resume(self) -> None:
        """Look again."""
        self._paused -= 1

    def untracked(self) -> list[str]:
        """Return what was seen for the first time since the last call and is not tracked, in words."""
        if not self.seen:
            return []
        tracked = tracked_ids(self._tracked.values())
        found = [_describe(item) for key, item in self.seen.items() if key not in tracked]
        self._known.update((key, weakref.ref(item)) for key, item in self.seen.items())
        self.seen.clear()
        return sorted(set(found))

    def _note(self, item: object, *called_with: object) -> None:
        known = self._known.get(id(item))
        if (known is None or known() is not item) and not self._paused:
            self.seen[id(item)] = item

    def _is_known(self, item: object) -> bool:
        known = self._known.get(id(item))
        return known is not None and known() is item

    def _note_module(self, module: nn.Module) -> None:
        # Only what training can change: own parameters that take gradients, or buffers that a forward may update.
        if self._paused or not module.training or id(module) in self.seen or self._is_known(module):
            return
        own = module.parameters(recurse=False)
        if any(parameter.requires_grad for parameter in own) or _has_running_state(module):
            self.seen[id(module)] = module

    def _patch(self, cls: type, name: str) -> None:
        original = cls.__dict__.get(name)
        if original is None:
            return

        @functools.wraps(original)
        def seen(item: Any, *args: Any, **kwargs: Any) -> Any:
            self._note(item)
            return original(item, *args, **kwargs)

        self._patched.append((cls, name, original))
        setattr(cls, name, seen)


def tracked_ids(objects: Iterable[object]) -> set[int]:
    """Return the ids of the given objects and of what belongs to them: submodules, inner schedulers and optimizers."""
    ids: set[int] = set()
    pending = list(objects)
    while pending:
        item = pending.pop()
        if id(item) in ids:
            continue
        ids.add(id(item))
        if isinstance(item, nn.Module):
            ids.update(id(module) for module in item.modules())
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, (LRScheduler, Optimizer)) or hasattr(item, "state_dict"):
            for value in getattr(item, "__dict__", {}).values():
                inner = value if isinstance(value, (list, tuple)) else [value]
                pending.extend(v for v in inner if isinstance(v, (LRScheduler, Optimizer, nn.Module)))
    return ids


def _with_subclasses(cls: type) -> list[type]:
    found = [cls]
    for subclass in cls.__subclasses__():
        found.extend(_with_subclasses(subclass))
    return list(dict.fromkeys(found))


def _has_running_state(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def _describe(item: object) -> str:
    name = type(item).__name__
    if isinstance(item, Optimizer):
        sizes = sum(len(group["params"]) for group in item.param_groups)
        return f"optimizer {name} with {sizes} parameters"
    if isinstance(item, AveragedModel):
        return f"averaged model {name}"
    if isinstance(item, nn.Module):
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in item.named_parameters(recurse=False))
        return f"module {name}" + (f" ({shapes})" if shapes else "")
    if isinstance(item, LRScheduler):
        return f"scheduler {name}"
    return f"gradient scaler {name}" if isinstance(item, torch.amp.GradScaler) else name
