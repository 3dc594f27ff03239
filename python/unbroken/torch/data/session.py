"""A session: one user's loader for the life of a run, epoch after epoch, resumable at every boundary.

Touches: what its mode touches (`native.py`, `keyed.py`, `iterable.py`); the user's loader object stays as it is.
"""

from typing import Any, Literal, Protocol

from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe
from torch.utils.data.dataloader import _DatasetKind

from unbroken.errors import InvalidArgument, MismatchError, NotExact
from unbroken.torch.data.iterable import NativeIterable
from unbroken.torch.data.keyed import KeyedMap
from unbroken.torch.data.native import NativeMap
from unbroken.torch.data.sampler import is_torchs_own, kind_of, length_of

Value = Any
Mode = Literal["native", "keyed"]

_SEAMS = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation", "__len__")


class Pass(Protocol):
    """What a mode does for a session."""

    position: int
    indices_digest: bytes | None

    def open(self, epoch: int) -> None:
        """Begin an epoch."""
        ...

    def next(self) -> Any:
        """Return the next batch."""
        ...

    def finish(self) -> None:
        """Let go of what an exhausted epoch held."""
        ...

    def abandon(self) -> None:
        """Leave the epoch before its end."""
        ...

    def state(self, *, is_open: bool) -> Value:
        """Return what a new process needs."""
        ...

    def settle(self, state: Value) -> None:
        """Take over a state between epochs."""
        ...

    def resume(self, state: Value, position: int) -> None:
        """Open the epoch that a state is in the middle of."""
        ...

    def close(self) -> None:
        """Let workers go."""
        ...


class Session:
    """One loader of the user's, wrapped.

    Args:
        loader: A `torch.utils.data.DataLoader`, as it is.
        name: How messages and states call it.
        mode: `native`: plain torch's numbers. `keyed`: order and generators derived from the seed.
        seed: Seed of keyed mode.

    Raises:
        NotExact: The loader, or a setting of it, cannot be resumed bit for bit.
    """

    def __init__(self, loader: Any, *, name: str, mode: Mode, seed: int) -> None:
        if mode not in ("native", "keyed"):
            raise InvalidArgument(f"mode must be 'native' or 'keyed', got {mode!r}")
        self.name = name
        self.mode: Mode = mode
        self._loader: DataLoader[Any] = _twin(checked(loader, mode))
        self._pass: Pass = _make_pass(self._loader, mode, seed)
        self._epoch = 0
        self._is_open = False
        self._restored: Value = None

    @property
    def position(self) -> int:
        """Batches handed out in this epoch."""
        return self._pass.position

    @property
    def indices_digest(self) -> bytes | None:
        """Digest (16 bytes) of the last batch's sample indices; None for iterable data sets."""
        return self._pass.indices_digest

    @property
    def batches_expected(self) -> int | None:
        """Batches of an epoch, where torch's own samplers say it; None where it is not certain."""
        if self._loader._dataset_kind == _DatasetKind.Iterable:
            return None
        sampler = self._loader.sampler if self._loader.batch_sampler is None else self._loader.batch_sampler
        return len(self._loader) if is_torchs_own(sampler) else None

    def identity(self) -> dict[str, Value]:
        """Return the facts that must be the same when a run resumes, by name."""
        loader = self._loader
        is_map = loader._dataset_kind == _DatasetKind.Map
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        facts: dict[str, Value] = {
            "mode": self.mode,
            "dataset.type": _type_name(type(loader.dataset)),
            "dataset.length": length_of(loader.dataset) if is_map else None,
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "sampler": kind_of(sampler),
            "sampler.length": length_of(sampler) if is_map else None,
            "collate": _function_name(loader.collate_fn),
        }
        if self.mode == "native":
            context = loader.multiprocessing_context
            facts["num_workers"] = loader.num_workers
            facts["prefetch_factor"] = loader.prefetch_factor
            facts["persistent_workers"] = loader.persistent_workers
            facts["context"] = None if context is None else context.get_start_method()
        return facts

    def open(self, epoch: int) -> None:
        """Start an epoch as `iter(loader)` would, or go on in the one that a restored state is in the middle of.

        Touches: the global generators as `iter(loader)` does, when the epoch is a fresh one. A resumed one moves
        none: the caller restores them after this call.

        Raises:
            NotExact: The recorded indices did not come out again.
        """
        if self._is_open:
            self.abandon()
        restored, self._restored = self._restored, None
        if restored is not None and restored["phase"] == "open":
            self._pass.resume(restored["pass"], restored["position"])
            self._epoch = restored["epoch"]
        else:
            self._pass.open(epoch)
            self._epoch = epoch
        self._is_open = True

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            StopIteration: The epoch is over.
        """
        if not self._is_open:
            raise StopIteration
        try:
            return self._pass.next()
        except StopIteration:
            self._is_open = False
            self._pass.finish()
            raise

    def state(self) -> Value:
        """Return everything that a new process needs to go on from this boundary. Moves nothing.

        Raises:
            NotExact: What was recorded of this epoch is not enough, or too much.
        """
        if self._restored is not None:
            return self._restored
        return {
            "mode": self.mode,
            "phase": "open" if self._is_open else "closed",
            "epoch": self._epoch,
            "position": self.position,
            "pass": self._pass.state(is_open=self._is_open),
        }

    def restore(self, state: Value) -> None:
        """Take over what `state` returned, before `open`.

        Raises:
            MismatchError: The state belongs to another mode or another kind of loader.
        """
        if state["mode"] != self.mode:
            raise MismatchError([(f"{self.name}.mode", state["mode"], self.mode)])
        if self._is_open:
            raise InvalidArgument("a session is restored before it is opened")
        if state["phase"] == "open":
            self._restored = state
        else:
            self._pass.settle(state["pass"])
            self._epoch = state["epoch"]

    def abandon(self) -> None:
        """Leave the epoch early: the user broke out of the loop."""
        if self._is_open:
            self._is_open = False
            self._pass.abandon()

    def close(self) -> None:
        """Let workers go. The session is not used again."""
        self._is_open = False
        self._pass.close()


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return an object that shares all attributes with the user's loader and does not keep it alive."""
    twin = object.__new__(type(loader))
    twin.__dict__ = loader.__dict__
    return twin


def checked(loader: Any, mode: Mode) -> DataLoader[Any]:
    """Return the loader, or refuse by name what cannot be exact."""
    kind = type(loader)
    name = _type_name(kind)
    if not isinstance(loader, DataLoader):
        raise NotExact(
            f"a loader of type `{name}`",
            "only torch.utils.data.DataLoader is known",
            hint="build a torch.utils.data.DataLoader over the same data set",
        )
    replaced = [seam for seam in _SEAMS if getattr(kind, seam) is not getattr(DataLoader, seam)]
    if replaced:
        raise NotExact(
            f"the loader class `{name}`",
            f"it replaces DataLoader's {', '.join(replaced)}",
            hint="use torch.utils.data.DataLoader itself",
        )
    if isinstance(loader.dataset, IterDataPipe | MapDataPipe):
        raise NotExact(
            f"the data pipe `{_type_name(type(loader.dataset))}`",
            "pipes shuffle under a generator that cannot be seen from outside",
            hint="use a Dataset or an IterableDataset",
        )
    if mode == "native" and loader.num_workers and not loader.in_order:
        raise NotExact(
            "`in_order=False` in native mode",
            "which worker reads which batch, and when it comes, depends on timing",
            hint='set in_order=True, or use data="keyed", where batches come in order all the same',
        )
    if loader._iterator is not None:
        raise NotExact(
            "a loader with persistent workers that was iterated over before the run",
            "how far its workers' generators are cannot be known",
            hint="give the run a loader of its own",
        )
    if mode == "keyed" and isinstance(loader.dataset, IterableDataset):
        raise NotExact(
            f"the iterable data set `{_type_name(type(loader.dataset))}` in keyed mode",
            "its samples have no positions to be keyed by",
            hint='use data="native" for this loader',
        )
    return loader


def _make_pass(loader: DataLoader[Any], mode: Mode, seed: int) -> Pass:
    if mode == "keyed":
        return KeyedMap(loader, seed)
    return NativeIterable(loader) if loader._dataset_kind == _DatasetKind.Iterable else NativeMap(loader)


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _function_name(function: Any) -> str:
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    return _type_name(type(function))
