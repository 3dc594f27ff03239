"""Checkpoints for other programs: as plain dicts of tensors and values, and as files that `torch.load` opens.

Touches: `load` reads a checkpoint; `write_pt` writes one file, atomically. Neither needs the program that trained.
"""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unbroken import _core, values
from unbroken._core import Object
from unbroken._core import Tensor as Leaf
from unbroken.errors import StorageError
from unbroken.torch import tensors
from unbroken.torch.tensors import Loader

if TYPE_CHECKING:
    from unbroken._core import Checkpoint, Value


def load(path: str | os.PathLike[str], *, missing: values.Missing = "record") -> dict[str, Any]:
    """Return a checkpoint's content as a plain dict of tensors and values.

    Args:
        path: A run directory (its newest whole checkpoint), or one checkpoint's manifest.
        missing: What to do with types that this program has not imported: put a `Record` in their place, or raise.

    Returns:
        The tree as saved, with tensors on the CPU; each has the strides it had, and tied ones share memory.

    Raises:
        DamagedCheckpoint, NoWholeCheckpoint, FormatError, StorageError.
    """
    return plain(_core.read_checkpoint(Path(path)), missing=missing)


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
