"""What can go wrong, as exceptions that carry their facts: what happened, where, and what to do next.

Touches: nothing. The extension module raises the first group, from the core's errors and with the same
fields; Python alone raises the second.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbroken._core import Difference


class UnbrokenError(Exception):
    """Any refusal of ours.

    ``str`` gives the message: what happened and where. ``hint`` says what to do next, or is None; a traceback shows it
    below the message. Every other keyword becomes an attribute.
    """

    hint: str | None

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses have constructors of their own; a copy must not run them again on the message alone.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[UnbrokenError], args: tuple[Any, ...], attributes: dict[str, Any]) -> UnbrokenError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


# Raised by the extension module, one class for each kind of core error.


class DamagedCheckpoint(UnbrokenError):
    """Bytes read back differ from the bytes committed."""

    path: Path
    part: str
    expected: str
    found: str


class FormatError(UnbrokenError):
    """Bytes that do not follow docs/format.md, or follow a version of it that this release does not know.

    ``path`` is the file that holds them, or None for bytes in memory.
    """

    path: Path | None
    what: str


class RunLocked(UnbrokenError):
    """Another process holds the run; ``holder`` is its process id, where that could be found out."""

    path: Path
    holder: int | None


class StorageError(UnbrokenError):
    """The operating system refused; ``errno`` is its number for why."""

    doing: str
    path: Path
    needed_bytes: int | None
    free_bytes: int | None
    errno: int | None


class IdentityError(UnbrokenError):
    """The run directory holds another run than the one asked for.

    ``differences`` has (name, recorded value, given value) of each.
    """

    path: Path
    differences: list[tuple[str, str, str]]


class NoWholeCheckpoint(UnbrokenError):
    """There are checkpoints, and none of them is whole; a fresh start in their place would hide that.

    ``rejected`` has (checkpoint name, why) of each, newest first.
    """

    path: Path
    rejected: list[tuple[str, str]]


class UnsupportedError(UnbrokenError):
    """Something that this platform, file system or release does not offer."""

    what: str


class InvalidArgument(UnbrokenError, ValueError):
    """A call that cannot mean anything."""

    what: str


# Raised by Python alone.


class UnsupportedState(UnbrokenError, TypeError):
    """A value that a checkpoint cannot hold exactly.

    Args:
        path: Where in the state it is, parts separated by ``/``.
        type_name: Its type, module and qualified name.
        why: What about it cannot be held; by default that its type is not one that can be stored.
        hint: What to do instead.
    """

    path: str
    type_name: str

    def __init__(self, path: str, type_name: str, *, why: str | None = None, hint: str | None = None) -> None:
        reason = why or "a type that a checkpoint cannot hold exactly"
        super().__init__(f"`{path}` is a `{type_name}`: {reason}", hint=hint, path=path, type_name=type_name)


class MismatchError(UnbrokenError):
    """The program is not the one that the checkpoint was taken from; nothing has been changed.

    Args:
        differences: What differs: name, value in the checkpoint, value in the program.
        hint: How to go on in spite of it, if that can be.
    """

    differences: tuple[tuple[str, object, object], ...]

    _SHOWN = 8

    def __init__(self, differences: Sequence[tuple[str, object, object]], *, hint: str | None = None) -> None:
        kept = tuple((name, expected, found) for name, expected, found in differences)
        parts = [f"`{name}` was {expected}, is {found}" for name, expected, found in kept[: self._SHOWN]]
        if len(kept) > self._SHOWN:
            parts.append(f"and {len(kept) - self._SHOWN} more")
        super().__init__(
            f"the program differs from its checkpoint: {'; '.join(parts)}", hint=hint, differences=kept
        )


class NotTracked(UnbrokenError):
    """Something takes part in the training that the run was not told of.

    Args:
        what: What it is, for a person: ``optimizer SGD (net.fc.weight, ...)``.
        hint: How to track it.
    """

    what: str

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"{what} takes part in the training and is not tracked by the run", hint=hint, what=what
        )


class WorkerDied(UnbrokenError, RuntimeError):
    """A worker process of a loader has died; what it had read went with it.

    Args:
        pid: Its process id.
        exitcode: As multiprocessing gives it: negative for a signal.
    """

    pid: int
    exitcode: int

    def __init__(self, pid: int, exitcode: int) -> None:
        name = _signal_name(-exitcode) if exitcode < 0 else None
        how = f"was killed by {name}" if name else f"ended with exit code {exitcode}"
        likely = _LIKELY_CAUSES.get(name or "", "")
        super().__init__(
            f"DataLoader worker (pid {pid}) {how}{likely}",
            hint="nothing is lost: start the same command to go on from the last checkpoint",
            pid=pid,
            exitcode=exitcode,
        )


# Words after the signal's name.
_LIKELY_CAUSES = {
    "SIGKILL": ": the machine was out of memory, unless somebody sent it",
    "SIGBUS": ": shared memory is full, as a rule (see `df /dev/shm`)",
    "SIGSEGV": ": a fault in a native library that the data set uses",
    "SIGABRT": ": a native library that the data set uses gave up",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class DivergedFromJournal(UnbrokenError):
    """A step that was executed again did not come out as an earlier life recorded it.

    Args:
        difference: The first component that differs.
        hint: What to do next.
    """

    difference: "Difference"

    def __init__(self, difference: "Difference", *, hint: str | None = None) -> None:
        super().__init__(
            f"step {difference.step}, executed again, differs from the journal in `{difference.component}`: "
            f"was {difference.expected}, is {difference.found}",
            hint=hint,
            difference=difference,
        )


class FailedTrial(DivergedFromJournal):
    """Under a changed environment a recorded step came out differently. Nothing was lost; nothing new was trained.

    Args:
        difference: The first component that differs.
        changes: What changed: name, recorded value, value now.
        hint: What to do next.
    """

    changes: tuple[tuple[str, object, object], ...]

    def __init__(
        self,
        difference: "Difference",
        changes: Sequence[tuple[str, object, object]],
        *,
        hint: str | None = None,
    ) -> None:
        super().__init__(difference, hint=hint)
        self.changes = tuple(changes)

    def __str__(self) -> str:
        """Return the message, with what changed in front."""
        changed = ", ".join(f"{name} was {old}, is {new}" for name, old, new in self.changes)
        return f"the environment changed ({changed}): {super().__str__()}"


class NotExact(UnbrokenError):
    """A configuration that cannot be resumed bit for bit, refused before the first step.

    Args:
        what: The setting or object, by the name its user gave it.
        why: The reason it cannot be exact.
        hint: What to use instead.
    """

    what: str

    def __init__(self, what: str, why: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what} cannot be resumed exactly: {why}", hint=hint, what=what)
