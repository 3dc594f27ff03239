"""A checkpoint in memory, for tests of capture and restore that need no disk: the tree as bytes, storages as bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch

from unbroken import _core
from unbroken.torch import snapshot, tensors


class Memory:
    """Stands in for a committed checkpoint: what a snapshot was, whatever training does to its tensors after."""

    def __init__(self, taken: snapshot.Snapshot, identity: Mapping[str, Any] | None = None) -> None:
        self._tree = _core.encode(taken.tree)
        self.values = _core.decode(_core.encode(taken.values))
        self.data = [ctypes.string_at(address, length) for address, length in taken.regions()]
        self.storages = [(len(data), b"") for data in self.data]
        self.info = SimpleNamespace(identity=dict(identity or {}))

    @property
    def tree(self) -> Any:
        return _core.decode(self._tree)

    def read_into(self, targets: list[tuple[int, int, int]]) -> None:
        for index, address, length in targets:
            assert length == len(self.data[index])
            ctypes.memmove(address, self.data[index], length)

    def same_as(self, other: Memory) -> bool:
        return self._tree == other._tree and self.data == other.data


def save(objects: Mapping[str, object], **more: Any) -> Memory:
    return Memory(snapshot.capture(objects, **more), snapshot.identity(objects))


def restore(objects: Mapping[str, object], memory: Memory, **more: Any) -> None:
    plan(objects, memory, **more).apply()


def plan(objects: Mapping[str, object], memory: Memory, **more: Any) -> snapshot.RestorePlan:
    """Plan a restore as a run does: what is copied into live tensors was read into memory that is not torch's."""
    checkpoint = cast("_core.Checkpoint", memory)
    staging = tensors.Staging(lambda tree: snapshot.copied_leaves({"objects": tree}))
    memory.read_into(staging(checkpoint))
    tree, loader = staging.taken()
    return snapshot.plan_restore(objects, tree, checkpoint, loader=loader, **more)


def assert_resumes_exactly(
    build: Callable[[int], dict[str, Any]],
    step: Callable[[dict[str, Any], int], None],
    *,
    before: int = 3,
    after: int = 5,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, save, train on; build anew from another seed, restore, train on: every byte of the state is equal.

    Each step seeds torch by its number, so that what is compared is state and not luck.
    """
    uninterrupted = build(1)
    for number in range(before):
        torch.manual_seed(number)
        step(uninterrupted, number)
    memory = save(uninterrupted)
    resumed = build(2)
    restore(resumed, memory)
    assert save(resumed).same_as(memory), "restoring gives the state that was saved"
    for number in range(before, before + after):
        for objects in (uninterrupted, resumed):
            torch.manual_seed(number)
            step(objects, number)
        one, other = save(uninterrupted), save(resumed)
        if not one.same_as(other):
            assert one.tree == other.tree, f"trees after step {number}"
            assert one.data == other.data, f"bytes after step {number}"
    return uninterrupted, resumed
