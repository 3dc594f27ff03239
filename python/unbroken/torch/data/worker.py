"""What runs inside a loader's worker, or in the main process where there are no workers.

Touches: in a worker, its process's global generators, what tells it that its parent is gone, and the worker's
copies of the data set and of the collate function; `torch.utils.data.get_worker_info().dataset`, which is set to
the user's own data set. In the main process nothing is reported and nothing is installed.

torch sees three objects of ours, all at its public seams: a data set with `__getitems__`, a collate function and
a worker_init_fn. They hold the user's own, and are pickled under spawn and forkserver.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker

from unbroken import _core
from unbroken.torch import rng
from unbroken.torch.data.attributes import Captured, Owned, encode_hook, load_hook
from unbroken.torch.data.tickets import Fetched, Parcel, Place, Ticket, WorkerState

_HINT_CHANGED = "it changes as items are read, so that it would depend on which worker reads them"


class Runtime:
    """One worker's memory of what it has reported."""

    def __init__(self, number: int, dataset: Any, collate: Any, *, hooks: bool = True) -> None:
        self.number = number
        self.ended = False
        self.told = False  # Whether the end of an iterable data set's share has been reported.
        self.owned = Owned({"dataset": dataset, "collate": collate}, hooks=hooks)
        self._last = rng.Globals(b"", None, b"")
        self._generators: dict[str, bytes] = {}
        self._values: dict[str, bytes] = self.owned.tokens()[1]

    def report(self) -> WorkerState:
        """Return what has changed since the last report; everything at the first one."""
        now = rng.read_globals(cuda=False)
        last = self._last
        generators, plain = self.owned.tokens()
        changed = {path for path, data in generators.items() if self._generators.get(path) != data}
        kept = set(self.owned.changed(plain))
        moved = {path for path in kept if self._values.get(path) != plain.get(path)}
        encoded = self.owned.encode(moved)
        self._last, self._generators, self._values = now, generators, plain
        return WorkerState(
            None if now.python == last.python else now.python,
            None if now.numpy == last.numpy else now.numpy,
            None if now.torch == last.torch else now.torch,
            {path: generators[path] for path in changed},
            encoded,
        )

    def install(self, state: WorkerState) -> None:
        """Put a recorded state in place; later reports are relative to it."""
        self.owned.install(Captured(state.generators, state.values, {}))
        if state.python is not None and state.torch is not None:
            rng.write_globals(rng.Globals(state.python, state.numpy, state.torch))
        self._last = rng.read_globals(cuda=False)
        self._generators, self._values = self.owned.tokens()


_runtime: Runtime | None = None


def runtime() -> Runtime | None:
    """Return this worker's runtime, None in the main process."""
    return _runtime


class MapProxy:
    """A map-style data set as torch's fetcher in a worker sees it: takes indices, and tickets that are to be obeyed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset,)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, indices: Any) -> Any:
        if type(indices) is Ticket:
            return _obey(indices)
        dataset = self.dataset
        whole = getattr(dataset, "__getitems__", None)
        return whole(indices) if whole else [dataset[index] for index in indices]

    def __getitem__(self, index: Any) -> Any:
        return _obey(index) if type(index) is Ticket else self.dataset[index]


def _obey(ticket: Ticket) -> Fetched:
    """Do what a ticket says, which is anything but reading."""
    if ticket.install is not None:
        assert _runtime is not None, "only a worker is told to install a state"
        _runtime.install(ticket.install)
    return Fetched(None, ticket)


class CollateProxy:
    """The user's collate function in a worker; its result comes with the worker's report."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, data: Any) -> Any:
        """Collate what the data set's stand-in gave."""
        assert _runtime is not None, "this stands in for a collate function in workers only"
        if type(data) is Fetched:
            return Parcel(None, _runtime.number, empty=True)
        return Parcel(self.collate(data), _runtime.number, _runtime.report())


class KeyedMapProxy(MapProxy):
    """A map-style data set whose every sample is read under generators of its own: all it takes is tickets."""

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed
        self._generators: list[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset, self.seed)

    def __getitems__(self, ticket: Ticket) -> Fetched:
        return Fetched([self._read(ticket, turn, index) for turn, index in enumerate(ticket.payload)], ticket)

    def __getitem__(self, ticket: Ticket) -> Fetched:
        return Fetched(self._read(ticket, 0, ticket.payload), ticket)

    def _read(self, ticket: Ticket, turn: int, index: Any) -> Any:
        if self._generators is None:
            self._generators = Owned({"dataset": self.dataset}).generators()
        assert ticket.place is not None, "a ticket of keyed mode has a place"
        epoch, start = ticket.place
        rng.rekey(_core.derive_key(self.seed, "sample", epoch, start + turn), self._generators)
        return self.dataset[index]


class KeyedCollateProxy(CollateProxy):
    """The user's collate function under generators of the batch's own; refuses data sets that change."""

    def __init__(self, collate: Callable[[Any], Any], dataset: Any, seed: int) -> None:
        super().__init__(collate)
        self.dataset = dataset
        self.seed = seed
        self._owned: Owned | None = None
        self._generators: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.collate, self.dataset, self.seed)

    def watch(self) -> None:
        """Begin to watch what the data set owns; what it changes from here on is refused."""
        self._owned = Owned({"dataset": self.dataset, "collate": self.collate})
        self._generators = Owned({"collate": self.collate}, skip=(self.dataset,)).generators()

    def __call__(self, fetched: Fetched) -> Any:
        """Collate what the data set's stand-in gave, under the batch's key."""
        if self._owned is None:
            self.watch()
        assert fetched.ticket.place is not None, "a ticket of keyed mode has a place"
        epoch, start = fetched.ticket.place
        rng.rekey(_core.derive_key(self.seed, "collate", epoch, start), self._generators)
        batch = self.collate(fetched.data)
        refusal = self._changed()
        if _runtime is None and refusal is None:
            return batch
        return Parcel(batch, 0 if _runtime is None else _runtime.number, refusal=refusal)

    def _changed(self) -> tuple[str, str] | None:
        assert self._owned is not None, "watching begins before the first batch"
        paths = self._owned.changed(self._owned.tokens()[1])
        return (f"`{paths[0]}` in keyed mode", _HINT_CHANGED) if paths else None


class InitProxy:
    """The user's worker_init_fn, called with the user's own data set in sight; then the runtime begins."""

    def __init__(self, init: Callable[[int], None] | None, collate: CollateProxy) -> None:
        self.init = init
        self.collate = collate

    def __call__(self, number: int) -> None:
        """Begin the worker with this number."""
        global _runtime
        _end_with_parent()
        info = get_worker_info()
        assert info is not None, "torch calls worker_init_fn in a worker"
        stand_in: Any = info.dataset
        dataset = stand_in.dataset
        # The class is frozen to its users; what they find there must be the data set that they gave.
        object.__setattr__(info, "dataset", dataset)
        if self.init is not None:
            self.init(number)
        if isinstance(self.collate, KeyedCollateProxy):
            self.collate.watch()
        # An iterable data set's state_dict travels beside the report: it has to be loaded before `iter`.
        hooks = not isinstance(self.collate, IterableCollateProxy)
        _runtime = Runtime(number, dataset, self.collate.collate, hooks=hooks)


def _end_with_parent() -> None:
    """See to it that this worker ends with the process that made it, whenever that is killed.

    torch's worker asks who its parent is when it is set up, for the first time. One whose parent was killed before
    takes whoever adopted it for its parent, waits for work forever, and holds the training's output open.
    """
    parent = multiprocessing.parent_process()
    # A fork server is another process than the one that asked it.
    direct = getattr(multiprocessing.current_process(), "_start_method", None) in ("fork", "spawn")
    usual = getattr(worker, "ManagerWatchdog", None)
    if parent is None or usual is None or not direct:
        return

    def watchdog() -> Any:
        made = usual()
        made.manager_pid = parent.pid
        return made

    setattr(worker, "ManagerWatchdog", watchdog)  # noqa: B010 it is a class to the type checker


# Iterable data sets: with a state of their own, or in workers that outlive an epoch.

_NOTHING = "unbroken: read nothing"


class Start(NamedTuple):
    """What a worker over an iterable data set begins with.

    Args:
        state: Its generators and what its data set owns; None leaves them as they are.
        place: Where the data set is by its own words. Without one it is iterated over from its beginning.
        is_over: Its share of this epoch has been read.
    """

    state: WorkerState | None
    place: Place | None
    is_over: bool


class IterableProxy(IterableDataset[Any]):
    """An iterable data set whose workers begin where recorded ones stopped.

    Args:
        dataset: The user's.
        tells_end: Report once more when a share ends: a worker that outlives the epoch goes on from there.
    """

    def __init__(self, dataset: Any, *, tells_end: bool) -> None:
        self.dataset = dataset
        self.tells_end = tells_end
        self.starts: list[Start | None] | None = None
        self.turn = 0

    def begin(self, starts: list[Start | None] | None, *, turn: int = 0) -> None:
        """Set what the next workers that are made begin with; None for one that begins afresh.

        Args:
            starts: One for each worker.
            turn: The first workers, as many as this, answer their first ticket with nothing, so that the first batch
                comes from the worker whose turn it is.
        """
        self.starts, self.turn = starts, turn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __iter__(self) -> Iterator[Any]:
        assert _runtime is not None, "this stands in for a data set in workers only"
        # Each holds for the first epoch of a worker: this copy is the worker's own.
        starts, self.starts = self.starts, None
        turn, self.turn = self.turn, 0
        start = None if starts is None else starts[_runtime.number]
        nothing_first = _runtime.number < turn
        _runtime.ended = _runtime.told = False
        if start is None:
            return _Reader(iter(self.dataset), nothing_first, None, self.tells_end)
        if start.place is not None:
            load_hook(self.dataset, start.place.hook, "dataset")
        elif start.state is not None:
            # Iterating from the beginning is what drew next.
            _runtime.install(start.state)
            start = start._replace(state=None)
        iterator = iter(()) if start.is_over else iter(self.dataset)
        return _Reader(iterator, nothing_first, start.state, self.tells_end)


class _Reader:
    """Reads the user's iterator, after what has to come before; then, if that is told, the end."""

    def __init__(
        self, iterator: Iterator[Any], nothing_first: bool, state: WorkerState | None, tells_end: bool
    ) -> None:
        self._iterator = iterator
        self._nothing_first = nothing_first
        self._state = state
        self._tells_end = tells_end

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> Any:
        assert _runtime is not None, "this reads in workers only"
        if self._nothing_first:
            self._nothing_first = False
            return _NOTHING
        if self._state is not None:
            _runtime.install(self._state)
            self._state = None
        if not _runtime.ended:
            try:
                return next(self._iterator)
            except StopIteration:
                _runtime.ended = True
        if self._tells_end and not _runtime.told:
            return _NOTHING
        raise StopIteration


class EndNoter(IterableDataset[Any]):
    """An iterable data set read in the main process; notes whether its iterator has ended."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __iter__(self) -> Iterator[Any]:
        self.ended = False
        yield from self.dataset
        self.ended = True


class IterableCollateProxy(CollateProxy):
    """The user's collate function; its result comes with the worker's report and the data set's state.

    Args:
        collate: The user's.
        dataset: The user's, if it is to say where it is.
        drop_last: Leave out an incomplete last batch.
    """

    def __init__(self, collate: Callable[[Any], Any], dataset: Any | None, *, drop_last: bool) -> None:
        super().__init__(collate)
        self.dataset = dataset
        self.drop_last = drop_last

    def __call__(self, data: Any) -> Any:
        """Collate what the data set gave, unless it was told to give nothing."""
        assert _runtime is not None, "this stands in for a collate function in workers only"
        if data is _NOTHING:
            return self._nothing()
        if type(data) is list and data and data[-1] is _NOTHING:
            data = [item for item in data if item is not _NOTHING]
            if not data or self.drop_last:
                return self._nothing()
            _runtime.told = True
        batch = self.collate(data)
        place = None
        if self.dataset is not None:
            place = Place(encode_hook(self.dataset, "dataset"), _runtime.ended)
        return Parcel(batch, _runtime.number, _runtime.report(), place)

    def _nothing(self) -> Parcel:
        assert _runtime is not None, "this stands in for a collate function in workers only"
        if not _runtime.ended:
            return Parcel(None, _runtime.number, empty=True)
        _runtime.told = True
        return Parcel(None, _runtime.number, _runtime.report(), empty=True)
