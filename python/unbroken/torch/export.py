"""Checkpoints for other programs: as plain dicts of tensors and values, and as files that `torch.load` opens.

Touches: `load` reads a checkpoint; `write_pt` writes one file, atomically. Neither needs the program that trained.
"""

from __future__ import annotations

import collections
import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unbroken import _core, values
from unbroken._core import Object
from unbroken._core import Tensor as Leaf
from unbroken.errors import InvalidArgument, StorageError
from unbroken.torch import tensors
from unbroken.torch.tensors import Loader, Staging

if TYPE_CHECKING:
    from unbroken._core import Checkpoint, Value


def load(
    path: str | os.PathLike[str],
    *,
    only: str | Iterable[str] | None = None,
    missing: values.Missing = "record",
) -> dict[str, Any]:
    """Return a checkpoint's content as a plain dict of tensors and values.

    Args:
        path: A run directory (its newest whole checkpoint), or one checkpoint's manifest.
        only: Names of leaves, or patterns with `*`, `?` and `[...]`, as `unbroken show` lists them. Nothing else is
            read, and of a run directory the newest checkpoint whose manifest and packs are there is taken.
        missing: What to do with types that this program has not imported: put a `Record` in their place, or raise.

    Returns:
        The tree as saved, with tensors on the CPU; each has the strides it had, and tied ones share memory. With
        `only` each leaf by its name.

    Raises:
        DamagedCheckpoint, NoWholeCheckpoint, FormatError, StorageError.
        InvalidArgument: No leaf has a name that was asked for.
    """
    if only is not None:
        return _load_leaves(Path(path), [only] if isinstance(only, str) else list(only), missing)
    staging = Staging()
    with tensors.kept():
        _core.read_checkpoint(Path(path), memory=staging)
        tree, loader = staging.taken()
        return values.raise_(tree, path="", extend=tensors.extend_raise(loader), missing=missing)


def _load_leaves(path: Path, patterns: list[str], missing: values.Missing) -> dict[str, Any]:
    checkpoint = _core.open_checkpoint(path)
    unmatched = set(patterns)
    chosen: dict[str, Value] = {}
    for name, value in tensors.find(checkpoint.tree):
        matching = [p for p in patterns if p == name or fnmatch.fnmatchcase(name, p)]
        unmatched.difference_update(matching)
        if matching:
            chosen[name] = value
    if unmatched:
        raise InvalidArgument(
            f"no leaf of checkpoint {checkpoint.info.name} is called `{min(unmatched)}`",
            hint="`unbroken show` lists the names",
        )
    loader = Loader(checkpoint)
    loader.prepare(chosen)
    extend = tensors.extend_raise(loader)
    return {
        name: values.raise_(value, path=name, extend=extend, missing=missing)
        for name, value in chosen.items()
    }


def plain(checkpoint: Checkpoint, *, missing: values.Missing = "record") -> dict[str, Any]:
    """Return an open checkpoint's content as `load` does."""
    tree = checkpoint.tree
    loader = Loader(checkpoint)
    loader.prepare(tree)
    return values.raise_(tree, path="", extend=tensors.extend_raise(loader), missing=missing)


def write_pt(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Path:
    """Write a checkpoint's content to a file that `torch.load(path, weights_only=True)` opens.

    Values that have no plain form in such a file become dicts of their parts.

    Returns:
        The path.

    Raises:
        StorageError: The file cannot be written.

    Durability:
        On return the file and its name survive a power cut. On an error, what was under the name before is still there.
    """
    tree = checkpoint.tree
    loader = Loader(checkpoint)
    loader.prepare(tree)
    content = _Plain(loader).lower(tree, "")
    target = Path(path)
    write_atomically(target, lambda file: torch.save(content, file))
    return target


def write_atomically(target: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name, then rename: the target is the old file or the whole new one."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # A temporary file is private; the exported one is like any other.
        temporary.replace(target)
        temporary = None
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StorageError(
            f"cannot write `{target}`: {error.strerror or error}",
            hint="give a file name in a directory that exists and can be written to",
            path=target,
            doing="write",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class _Plain:
    """Lowers a tree to what torch's safe unpickler makes: dicts, lists, tuples, sets, text, numbers and tensors."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def lower(self, value: Value, path: str) -> Any:
        if isinstance(value, Leaf):
            return tensors.raise_leaf(self._loader, value, path)
        if isinstance(value, Object):
            return self._object(value, path)
        if isinstance(value, dict):
            return {
                self._key(key, path): self.lower(part, values.join_path(path, key))
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            parts = [self.lower(part, values.join_path(path, index)) for index, part in enumerate(value)]
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, set | frozenset):
            return {self._key(part, path) for part in value}
        return value

    def _key(self, key: Value, path: str) -> Any:
        lowered = self.lower(key, path)
        return repr(lowered) if isinstance(lowered, dict | list | set) else lowered

    def _object(self, value: Object, path: str) -> Any:
        constant = tensors.raise_constant(self._loader, value, path)
        if isinstance(constant, torch.Tensor | torch.Size | torch.dtype) and value.kind != "uninitialized":
            return constant
        if value.kind == "mapping":
            items = self.lower(value.fields["items"], path)
            return (
                collections.OrderedDict(items)
                if value.name.endswith("OrderedDict")
                else collections.Counter(items)
            )
        fields = {name: self.lower(part, values.join_path(path, name)) for name, part in value.fields.items()}
        return {"kind": value.kind, "name": value.name, **fields}
