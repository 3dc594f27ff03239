"""What one step puts into the journal: digests of the batch, of the generators and of the state, in causal order.

Touches: reads live tensors on the training thread; writes nothing. CUDA tensors are digested in the journal's full
level only, because reading them makes the host wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from unbroken import _core

from . import memory, rng, snapshot

Level = Literal["sampled", "full"]

# Up to here a batch is digested whole (about 0.1 ms); of larger tensors, evenly spread windows that add up to it.
BATCH_BUDGET_BYTES = 1 << 20
_WINDOWS = 64
# What a step digests of each part of one object in the sampled level; objects take turns, and windows move on.
STATE_WINDOW_BYTES = 32 << 10
PLAIN_STATE_STEPS = 16


def batch_digest(batch: Any, *, level: Level) -> bytes:
    """Return a digest (16 bytes) of a batch as it is handed out: its structure, plain values and tensor bytes.

    Args:
        batch: Any nesting of tensors, arrays, containers and plain values. Objects of other types count by type name.
        level: `full` reads every byte; `sampled` reads at most about 1 MiB of each large tensor.
    """
    found = _batches.digest(batch, full=level == "full")
    return _digest_anything(batch, level) if found is None else found


def _digest_anything(batch: Any, level: Level) -> bytes:
    """Return what `batch_digest` does, of anything; where the core can read a batch, it gives the same digest."""
    parts: list[bytes] = []
    regions: list[tuple[int, int]] = []
    keep: list[Any] = []
    _walk(batch, level, parts, regions, keep)
    if regions:
        parts.append(_core.digest_memory(regions))
    return _core.digest_bytes(*parts)


def _walk(
    item: Any, level: Level, parts: list[bytes], regions: list[tuple[int, int]], keep: list[Any]
) -> None:
    if isinstance(item, torch.Tensor):
        parts.append(_tensor_head(item.dtype, item.shape))
        if item.layout is not torch.strided or (not item.is_cpu and level == "sampled"):
            return
        if not (item.is_cpu and item.is_contiguous()) or item.is_conj() or item.is_neg():
            item = item.detach().resolve_conj().resolve_neg().contiguous().cpu()
            keep.append(item)
        regions.extend(_windows(item.data_ptr(), item.nbytes, level))
    elif isinstance(item, (list, tuple)):
        parts.append(f"{type(item).__name__} {len(item)}".encode())
        for value in item:
            _walk(value, level, parts, regions, keep)
    elif isinstance(item, Mapping):
        parts.append(f"{type(item).__name__} {len(item)}".encode())
        for key, value in item.items():
            _walk(key, level, parts, regions, keep)
            _walk(value, level, parts, regions, keep)
    elif type(item) in (type(None), bool, int, float, complex, str, bytes):
        parts.append(_core.encode(item))
    elif type(item).__module__ == "numpy" and hasattr(item, "tobytes"):
        parts.append(f"{item.dtype} {item.shape}".encode())
        parts.append(item.tobytes())
    else:
        parts.append(f"object {type(item).__qualname__}".encode())
        fields = getattr(item, "__dict__", None)
        if fields:
            _walk(fields, level, parts, regions, keep)


def _tensor_head(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"tensor {dtype} {tuple(shape)}".encode()


_batches = _core.BatchReader(
    tensor=torch.Tensor, strided=torch.strided, describe=_tensor_head, budget=BATCH_BUDGET_BYTES
)


def _windows(address: int, length: int, level: Level) -> list[tuple[int, int]]:
    if level == "full" or length <= BATCH_BUDGET_BYTES:
        return [(address, length)]
    size = BATCH_BUDGET_BYTES // _WINDOWS
    stride = (length - size) // (_WINDOWS - 1)
    return [(address + i * stride, size) for i in range(_WINDOWS)]


def recorder(run: _core.Run, level: Level) -> _core.Recorder:
    """Return what gathers a run's records."""
    return _core.Recorder(
        run, generators=rng.reader(), batches=_batches, full=level == "full", tensor=torch.Tensor
    )


def optimizers(objects: Mapping[str, object]) -> list[tuple[str, Any]]:
    """Return the tracked optimizers, whose learning rates go into every record, by name."""
    return [(name, item) for name, item in objects.items() if isinstance(item, torch.optim.Optimizer)]


def logged(name: str, value: Any) -> bytes | int | float | str:
    """Return the journal's form of one logged value: numbers by their bits, larger tensors by digest.

    Raises:
        TypeError: The value is neither a number, a text nor a tensor.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.is_complex():
            number = value.detach().item()
            return number if isinstance(number, float) else int(number)
        return batch_digest(value, level="full")
    if isinstance(value, (int, float, str)):
        return int(value) if isinstance(value, int) else value
    if hasattr(value, "item") and getattr(value, "size", None) == 1:
        return logged(name, value.item())
    raise TypeError(f"run.log({name}=...) takes a number, a text or a tensor, got {type(value).__name__}")


class StateDigests:
    """Digests of the tracked state at a boundary, part by part, in causal order.

    In the full level every byte of every part. In the sampled level it is the turn of one object, of which each part
    contributes a window of its bytes, and every sixteenth step of the small plain state: pure functions of the step, so
    that two runs sample alike, and every byte comes round.

    Args:
        objects: What is tracked, by name; no longer changed.
        level: The journal's level.
    """

    def __init__(self, objects: Mapping[str, object], level: Level) -> None:
        self._objects = objects
        self._full = level == "full"
        self._watches = memory.watches(objects)

    def at(self, step: int) -> list[tuple[str, bytes]]:
        """Return the digests that belong to the boundary after a step."""
        watches = self._watches
        if self._full:
            parts = memory.regions(watches).items()
            digests = [(part, _core.digest_memory(regions)) for part, regions in parts]
            return [*digests, ("state/plain", snapshot.plain_digest(self._objects))]
        digests = []
        if watches:
            turn, index = divmod(step, len(watches))
            digests = watches[index].windows(turn, STATE_WINDOW_BYTES)
        if step % PLAIN_STATE_STEPS == 0:
            digests.append(("state/plain", snapshot.plain_digest(self._objects)))
        return digests
