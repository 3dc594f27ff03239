"""Runs the training with one fault in it: `python faulty.py FAULT`. The product is patched from outside, in memory.

Each fault is what a resume that forgets one thing would look like. Most strike right after everything was restored;
the training goes on from there as it is.

Touches: classes of the installed package, in this process and the workers it forks.
"""

import contextlib
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unbroken.run import Run
from unbroken.torch.data.session import Session
from unbroken.torch.data.worker import Runtime

Fault = Callable[[], None]
FAULTS: dict[str, Fault] = {}


def patch(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def fault(strike: Fault) -> Fault:
    FAULTS[strike.__name__.replace("_", "-")] = strike
    return strike


def after_restore(strike: Callable[[dict[str, Any]], None]) -> Fault:
    """Make a fault that strikes the tracked objects when everything has been put back."""

    def arm() -> None:
        restore = Run._restore_all

        def restore_and_strike(self: Run) -> None:
            restore(self)
            strike(self._objects)

        patch(Run, "_restore_all", restore_and_strike)

    FAULTS[strike.__name__.replace("_", "-")] = arm
    return arm


def skip_one_generator(read: Callable[[], Any], write: Callable[[Any], Any]) -> Fault:
    """Make a fault that leaves one generator where the program's own seeding left it."""

    def arm() -> None:
        restore = Run._restore_all

        def restore_all_but_one(self: Run) -> None:
            before = read()
            restore(self)
            write(before)

        patch(Run, "_restore_all", restore_all_but_one)

    return arm


@fault
def nothing() -> None:
    pass


@after_restore
def moment_off_by_one_ulp(objects: dict[str, Any]) -> None:
    moment = objects["optimizer"].state[objects["model"][0].weight]["exp_avg"]
    moment[0, 0] = torch.nextafter(moment[0, 0], torch.tensor(torch.inf))


@after_restore
def moments_zeroed(objects: dict[str, Any]) -> None:
    for state in objects["optimizer"].state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


@after_restore
def weights_cast_to_bfloat16(objects: dict[str, Any]) -> None:
    with torch.no_grad():
        for parameter in objects["model"].parameters():
            parameter.copy_(parameter.bfloat16().float())


@after_restore
def parameters_not_restored(objects: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in objects["model"].parameters():
            parameter.copy_(torch.rand_like(parameter))


@after_restore
def gradients_not_restored(objects: dict[str, Any]) -> None:
    for parameter in objects["model"].parameters():
        parameter.grad = None


@after_restore
def attribute_not_restored(objects: dict[str, Any]) -> None:
    objects["model"][4].calls = 0


@after_restore
def hidden_buffer_not_restored(objects: dict[str, Any]) -> None:
    objects["model"][4].peak.zero_()


@after_restore
def batch_norm_reset(objects: dict[str, Any]) -> None:
    objects["model"][1].reset_running_stats()


@after_restore
def ema_not_restored(objects: dict[str, Any]) -> None:
    averaged, net = objects["ema"], objects["model"]
    with torch.no_grad():
        for mean, parameter in zip(averaged.module.parameters(), net.parameters(), strict=True):
            mean.copy_(parameter)
    averaged.n_averaged.zero_()


@after_restore
def scaler_reset(objects: dict[str, Any]) -> None:
    objects["scaler"].load_state_dict(
        torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4).state_dict()
    )


@after_restore
def schedule_one_step_late(objects: dict[str, Any]) -> None:
    schedule, optimizer = objects["scheduler"], objects["optimizer"]
    schedule.last_epoch -= 1
    for group, base, factor in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)


@after_restore
def own_generator_not_restored(objects: dict[str, Any]) -> None:
    objects["noise"].manual_seed(8)


FAULTS["python-generator-not-restored"] = skip_one_generator(random.getstate, random.setstate)
FAULTS["numpy-generator-not-restored"] = skip_one_generator(np.random.get_state, np.random.set_state)
FAULTS["torch-generator-not-restored"] = skip_one_generator(torch.get_rng_state, torch.set_rng_state)


@fault
def worker_generators_not_restored() -> None:
    install = Runtime.install
    patch(
        Runtime,
        "install",
        lambda self, state: install(self, state._replace(python=None, numpy=None, torch=None)),
    )


@fault
def own_values_not_restored() -> None:
    restore = Run._restore_all

    def restore_objects_only(self: Run) -> None:
        restore(self)
        self.state.clear()

    patch(Run, "_restore_all", restore_objects_only)


@fault
def loader_not_restored() -> None:
    patch(Session, "restore", lambda self, state: None)


class _Shown:
    """What a session says of the batch that it handed out last, when the fault hands out another."""

    def __init__(self) -> None:
        self.batches = 0
        self.held: list[tuple[Any, Any]] = []
        self.digest: Any = None
        self.late = 0


def _patch_session(hand_out: Callable[[_Shown, Callable[[], tuple[Any, Any]]], tuple[Any, Any]]) -> None:
    shown = _Shown()
    following = Session.next
    position, digest = Session.position.fget, Session.indices_digest.fget
    assert position is not None and digest is not None

    def next_batch(self: Session) -> Any:
        batch, shown.digest = hand_out(shown, lambda: (following(self), digest(self)))
        shown.batches += 1
        return batch

    patch(Session, "next", next_batch)
    patch(Session, "position", property(lambda self: position(self) - shown.late))
    patch(Session, "indices_digest", property(lambda self: shown.digest))


@fault
def batches_swapped() -> None:
    def hand_out(shown: _Shown, fetch: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if shown.batches == 0:
            shown.held = [fetch()]
            shown.late = 1
            return fetch()
        shown.late = 0
        return shown.held.pop() if shown.held else fetch()

    _patch_session(hand_out)


@fault
def batch_repeated() -> None:
    def hand_out(shown: _Shown, fetch: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if shown.batches == 1:
            shown.late = -1
            return shown.held.pop()
        batch = fetch()
        shown.held = [batch]
        return batch

    _patch_session(hand_out)


@fault
def evaluation_draws() -> None:
    patch(Run, "aside", lambda self: contextlib.nullcontext())


@fault
def threads_changed() -> None:
    torch.set_num_threads(2)
    patch(torch, "set_num_threads", lambda count: None)


@fault
def operator_not_deterministic() -> None:
    forward, calls = torch.nn.Linear.forward, 0

    def wavering(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        out = forward(self, x)
        # Two linear layers: the third step of this life, about ten ulps.
        return out * 1.000001 if calls == 6 else out

    patch(torch.nn.Linear, "forward", wavering)


def main() -> None:
    FAULTS[sys.argv.pop(1)]()
    runpy.run_path(str(Path(__file__).with_name("training.py")), run_name="__main__")


if __name__ == "__main__":
    main()
