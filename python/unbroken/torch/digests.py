"""What one step puts into the journal: digests of the batch, of the generators and of the state, in causal order.

Touches: reads live tensors on the training thread; writes nothing. CUDA tensors are digested in the journal's full
level only, because reading them makes the host wait.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch

from unbroken import _core

from . import snapshot

Level = Literal["sampled", "full"]
Component = tuple[str, "bytes | int | float | str"]

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


@functools.lru_cache(maxsize=256)
def _tensor_head(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"tensor {dtype} {tuple(shape)}".encode()


def _windows(address: int, length: int, level: Level) -> list[tuple[int, int]]:
    if level == "full" or length <= BATCH_BUDGET_BYTES:
        return [(address, length)]
    size = BATCH_BUDGET_BYTES // _WINDOWS
    stride = (length - size) // (_WINDOWS - 1)
    return [(address + i * stride, size) for i in range(_WINDOWS)]


def logged(name: str, value: Any) -> Component:
    """Return the journal's form of one logged value: numbers by their bits, larger tensors by digest.

    Raises:
        TypeError: The value is neither a number, a text nor a tensor.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.is_complex():
            number = value.detach().item()
            return f"log/{name}", number if isinstance(number, float) else int(number)
        return f"log/{name}", batch_digest(value, level="full")
    if isinstance(value, bool):
        return f"log/{name}", int(value)
    if isinstance(value, (int, float, str)):
        return f"log/{name}", int(value) if isinstance(value, int) else value
    if hasattr(value, "item") and getattr(value, "size", None) == 1:
        return logged(name, value.item())
    raise TypeError(f"run.log({name}=...) takes a number, a text or a tensor, got {type(value).__name__}")


def learning_rates(objects: Mapping[str, object]) -> list[Component]:
    """Return the learning rate of each group of each tracked optimizer, by its bits."""
    rates: list[Component] = []
    for name, item in objects.items():
        if isinstance(item, torch.optim.Optimizer):
            for index, group in enumerate(item.param_groups):
                rate = group.get("lr")
                if rate is not None:
                    rates.append((f"lr/{name}/{index}", float(rate)))
    return rates


def state_digests(objects: Mapping[str, object], *, step: int, level: Level) -> list[Component]:
    """Return digests of tracked state at a boundary, part by part, in causal order.

    In the full level every byte of every part. In the sampled level it is the turn of one object, of which each part
    contributes a window of its bytes, and every sixteenth step of the small plain state: pure functions of the step, so
    that two runs sample alike, and every byte comes round.
    """
    if level == "full":
        digests: list[Component] = [
            (f"state/{name}", _core.digest_memory(regions))
            for name, regions in snapshot.regions(objects).items()
        ]
        return [*digests, ("state/plain", snapshot.plain_digest(objects))]
    sampled = [name for name, item in objects.items() if isinstance(item, _SAMPLED)]
    digests = []
    if sampled:
        turn, name = step // len(sampled), sampled[step % len(sampled)]
        for part, regions in snapshot.regions({name: objects[name]}).items():
            total = sum(length for _, length in regions)
            window = min(total, STATE_WINDOW_BYTES)
            start = (turn * STATE_WINDOW_BYTES) % total if total else 0
            digests.append((f"state/{part}", _core.digest_window(regions, start, window)))
    if step % PLAIN_STATE_STEPS == 0:
        digests.append(("state/plain", snapshot.plain_digest(objects)))
    return digests


_SAMPLED = (torch.nn.Module, torch.optim.Optimizer, torch.Tensor)
