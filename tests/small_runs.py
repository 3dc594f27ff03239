"""Small runs written through the core alone: no torch, no training, every byte known."""

import ctypes
from pathlib import Path

from unbroken import _core


def record(run: _core.Run, step: int, loss: float) -> None:
    """Record a step; note a difference from an earlier life as a run that goes on does."""
    found = run.record(step, 0, 0, step, [("rng/python", bytes([step % 251] * 16)), ("log/loss", loss)])
    if found is not None:
        run.event("diverged", step, {"component": found.component})


def commit(run: _core.Run, step: int, keep: list[bytearray]) -> None:
    memory = bytearray(step.to_bytes(8, "little") * 64)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    tensor = _core.Tensor(dtype="int64", shape=[64], strides=[1], offset=0, storage=0)
    run.commit(
        step=step,
        phase=0,
        tree={"objects": {"w": tensor}},
        storages=[(address, len(memory))],
        identity={"plan.epochs": 1},
        environment={"torch": "2.15.0"},
        metrics={},
    )


def train(path: Path, steps: range, save: int, *, off_at: int | None = None) -> None:
    """Live one life: record these steps, save every so many; `off_at` gives one step another loss."""
    run = _core.Run.open(path, seed=7, settings={})
    keep: list[bytearray] = []
    run.begin()
    if run.resumed_from is None:
        commit(run, 0, keep)
    for step in steps:
        record(run, step, 1 / step + (0.5 if step == off_at else 0.0))
        if step % save == 0:
            commit(run, step, keep)
    run.close()
