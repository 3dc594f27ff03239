"""Native mode for iterable data sets: by their own state where they have one, by reading again where not.

Touches: the global generators exactly as the plain loader does; a resumed `open` puts them back.

A data set with `state_dict` and `load_state_dict` is taken at its word: after `load_state_dict`, iterating over it
goes on with the next sample and draws nothing before it. Without, the epoch is begun again under the generators
it began with, and the batches that were handed out are read again and dropped. Hugging Face streams keep no
exact state behind a shuffle buffer; those are read again too. So is the epoch of persistent workers, whatever the
data set: each tells how it stands when its share is over, and begins the next epoch from there.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from unbroken.errors import MismatchError, WorkerDied
from unbroken.torch import rng
from unbroken.torch.data.attributes import Captured, Owned, encode_hook, has_state_hook, load_hook
from unbroken.torch.data.reading import read
from unbroken.torch.data.sampler import LOG_BYTES, Recorder
from unbroken.torch.data.shadow import IndexStream, Preserved, Shadow, as_it_is, first
from unbroken.torch.data.tickets import Parcel, Place, WorkerState
from unbroken.torch.data.worker import EndNoter, InitProxy, IterableCollateProxy, IterableProxy, Start

Value = Any
Way = Literal["state", "replay"]

_EXACT_STAGES = {
    "ArrowExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "MappedExamplesIterable",
}
"""Stages of a Hugging Face stream whose saved state was seen to be exact."""


def way_of(dataset: Any) -> Way:
    """Return how an iterable data set is resumed."""
    if not has_state_hook(dataset):
        return "replay"
    if not any(kind.__module__.startswith("datasets.") for kind in type(dataset).__mro__):
        return "state"
    stage = getattr(dataset, "_ex_iterable", None)
    while stage is not None:
        if type(stage).__name__ not in _EXACT_STAGES:
            return "replay"
        stage = getattr(stage, "ex_iterable", None)
    return "state"


class NativeIterable:
    """One loader over an iterable data set, in native mode."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._workers_count = loader.num_workers
        self._persistent = loader.persistent_workers
        dataset = loader.dataset
        self._way: Way = "replay" if self._persistent else way_of(dataset)
        self._owned = Owned({"dataset": dataset, "collate": loader.collate_fn}, hooks=False)
        has_place = self._way == "state"
        self._ships = self._workers_count > 0 and (has_place or self._persistent)
        self._proxy = IterableProxy(dataset, tells_end=self._persistent) if self._ships else None
        self._noter = EndNoter(dataset) if has_place and not self._ships else None
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler

        def collates(collate: Any) -> IterableCollateProxy:
            return IterableCollateProxy(collate, dataset if has_place else None, drop_last=loader.drop_last)

        self._shadow = Shadow(
            loader,
            dataset=self._proxy or self._noter or dataset,
            collate=collates if self._ships else as_it_is,
            init=InitProxy if self._ships else first,
            stream=IndexStream(self, sampler),
        )
        self._indices = sampler
        self._recorder = None
        if self._way == "replay" and not self._workers_count:
            self._recorder = Recorder(
                self._shadow.loader,
                dataset=None,
                owned=Owned(
                    {"dataset": dataset, "collate": loader.collate_fn}, array_bytes=LOG_BYTES, hooks=False
                ),
                name=f"the iterable data set `{type(dataset).__qualname__}`",
                digest=lambda batch: b"",
            )
        self._iterator: Iterator[Any] | None = None
        self._index_iterator: Iterator[Any] = iter(())
        self._seed_state = b""
        self._is_resumed = False
        self._origin = Captured({}, {}, {})
        self._states: list[tuple[WorkerState, Place | None] | None] = []
        self._begun: list[
            tuple[WorkerState, Place | None] | None
        ] = []  # What they were when the epoch began.
        self._to_recreate: Value = None
        self._is_closed = False
        self._turn = 0
        self._nothings = 0
        self.position = 0
        self.indices_digest: bytes | None = None

    # What torch asks of the index stream.

    def on_iter(self) -> None:
        """Answer `iter(index_sampler)`: torch draws its base seed right after the first one."""
        self._index_iterator = iter(self._indices)
        if self._workers_count and not self._seed_state:
            self._seed_state = self._seed_generator().get_state().numpy().tobytes()
        elif self._workers_count and self._is_resumed:
            state = torch.frombuffer(bytearray(self._seed_state), dtype=torch.uint8)
            self._seed_generator().set_state(state)

    def on_pull(self) -> Any:
        """Answer `next(index_sampler)`: as many places as a batch has."""
        if self._is_closed:
            raise StopIteration
        if self._nothings:
            self._nothings -= 1
            return [None]
        return next(self._index_iterator)

    # The session's side.

    def open(self, epoch: int) -> None:
        """Begin an epoch as `iter(loader)` does."""
        if self._to_recreate is not None:
            with rng.preserved(), Preserved(self._loader.generator):
                self._recreate_workers(self._to_recreate)
            self._to_recreate = None
        self._begin(position=0)
        if not self._shadow.holds_workers:
            self._seed_state = b""
            self._origin = self._owned.capture()
            self._states = [None] * self._workers_count
            if self._proxy is not None:
                self._proxy.begin(None)
        self._begun = list(self._states)
        if self._recorder is not None:
            self._recorder.begin()
            self._recorder.start()
        else:
            self._iterator = read(self._shadow.loader)

    def next(self) -> Any:
        """Return the next batch."""
        if self._recorder is not None:
            found = self._recorder.pull()
            self._recorder.consumed()
        else:
            found = self._next_read()
        self.position += 1
        return found

    def _next_read(self) -> Any:
        while True:
            assert self._iterator is not None, "an epoch is opened before it is read"
            found = next(self._iterator)
            if not self._ships:
                return found
            batch = self._receive(found)
            if not found.empty:
                return batch

    def finish(self) -> None:
        """Let go of what an exhausted epoch held."""
        self._iterator = None

    def abandon(self) -> None:
        """Leave the epoch before its end."""
        if self._persistent:
            # torch would throw away what the workers have read ahead, and with it how far their generators are.
            self._is_closed = True
            while True:
                try:
                    self._next_read()
                except StopIteration:
                    break
                except WorkerDied:
                    raise
                except Exception:  # A batch that nobody asked for may fail: torch drops it too.
                    continue
        self._iterator = None
        if self._recorder is not None:
            self._recorder.begin()

    def state(self, *, is_open: bool) -> Value:
        """Return what a new process needs to go on from here."""
        found: dict[str, Value] = {
            "kind": f"iterable/{self._way}",
            "owned": self._owned.capture().to_value(),
            "generator": None
            if self._loader.generator is None
            else rng.capture_generator(self._loader.generator),
            "recorder": None,
            "place": None,
            "workers": None,
        }
        if self._persistent and (is_open or self._shadow.holds_workers or self._to_recreate is not None):
            found["workers"] = self._to_recreate or self._persistent_state(
                self._begun if is_open else self._states
            )
            return found
        if not is_open:
            return found
        if self._recorder is not None:
            found["recorder"] = self._recorder.state(is_open=True)
        elif not self._workers_count:
            assert self._noter is not None, "a data set with a state is read through its noter"
            found["place"] = tuple(Place(encode_hook(self._loader.dataset, "dataset"), self._noter.ended))
        else:
            found["workers"] = {
                "seed": self._seed_state,
                "origin": self._origin.to_value(),
                "states": [
                    None if entry is None else (entry[0].to_value(), *(entry[1] or ()))
                    for entry in self._states
                ],
                "turn": self._turn,
            }
        return found

    def _persistent_state(self, states: list[tuple[WorkerState, Place | None] | None]) -> Value:
        return {
            "seed": self._seed_state,
            "origin": self._origin.to_value(),
            "states": [None if entry is None else entry[0].to_value() for entry in states],
        }

    def settle(self, state: Value) -> None:
        """Take over a state between epochs."""
        self._check(state)
        self._to_recreate = state["workers"]
        self._owned.install(Captured.from_value(state["owned"]), unless_set=True)
        self._restore_loader_generator(state)

    def resume(self, state: Value, position: int) -> None:
        """Open the epoch that a state is in the middle of."""
        self._check(state)
        self._begin(position=position)
        with rng.preserved():
            if self._recorder is not None:
                self._recorder.replay(state["recorder"], position)
            elif self._persistent:
                self._remake_workers(state["workers"], is_over=False)
                self._begun = list(self._states)
                for _ in range(position):
                    self._next_read()
            elif self._workers_count:
                self._make_workers(state["workers"], position)
            else:
                place = Place(*state["place"])
                load_hook(self._loader.dataset, place.hook, "dataset")
                self._iterator = iter(()) if place.ended else read(self._shadow.loader)
        if self._way == "replay" or self._workers_count:
            self._owned.install(Captured.from_value(state["owned"]))
        else:
            self._owned.install(Captured(dict(state["owned"]["generators"]), {}, {}))
        self._restore_loader_generator(state)

    def close(self) -> None:
        """Let workers go."""
        self._iterator = None
        self._shadow.forget_workers()
        if self._recorder is not None:
            self._recorder.reset()

    def _begin(self, *, position: int) -> None:
        self._iterator = None
        self.position = position
        self._is_resumed = self._is_closed = False
        self._nothings = 0
        self._turn = 0
        self._shadow.refresh()

    def _recreate_workers(self, workers: Value) -> None:
        """Bring persistent workers back between two epochs, by an epoch that reads nothing."""
        kept = self._owned.capture()
        self._begin(position=0)
        self._remake_workers(workers, is_over=True)
        assert self._iterator is not None, "workers were just made"
        for parcel in self._iterator:
            assert parcel.empty, "a share that is over gives nothing"
        self._iterator = None
        self._owned.install(kept)

    def _remake_workers(self, workers: Value, *, is_over: bool) -> None:
        """Make persistent workers with the states that they had when an epoch began, or was over."""
        self._seed_state = workers["seed"]
        self._origin = Captured.from_value(workers["origin"])
        self._owned.install(self._origin)
        states = [None if state is None else WorkerState.from_value(state) for state in workers["states"]]
        self._states = [None if state is None else (state, None) for state in states]
        assert self._proxy is not None, "persistent workers read through a proxy"
        is_fresh = not is_over and all(state is None for state in states)
        self._proxy.begin(None if is_fresh else [Start(state, None, is_over) for state in states])
        self._is_resumed = True
        self._iterator = read(self._shadow.loader)
        self._is_resumed = False

    def _make_workers(self, workers: Value, position: int) -> None:
        self._seed_state = workers["seed"]
        self._origin = Captured.from_value(workers["origin"])
        self._owned.install(self._origin)
        self._states = [
            None if entry is None else (WorkerState.from_value(entry[0]), Place(*entry[1:]))
            for entry in workers["states"]
        ]
        self._is_resumed = True
        self._turn = self._nothings = workers["turn"] if self._ships else 0
        if self._proxy is not None:
            starts = [
                None if entry is None else Start(entry[0], entry[1], entry[1] is not None and entry[1].ended)
                for entry in self._states
            ]
            self._proxy.begin(starts, turn=self._turn)
        self._iterator = read(self._shadow.loader)
        self._is_resumed = False
        for _ in range(self._turn if self._ships else position):
            found = next(self._iterator)
            if self._ships:
                assert found.empty, "a worker before the turn answers its first ticket with nothing"

    def _receive(self, parcel: Parcel) -> Any:
        assert parcel.report is not None, "what is received comes with its worker's report"
        known = self._states[parcel.worker]
        state = parcel.report if known is None else known[0].merged(parcel.report)
        self._states[parcel.worker] = (state, parcel.extra)
        self._turn = (parcel.worker + 1) % self._workers_count
        return parcel.batch

    def _check(self, state: Value) -> None:
        if state["kind"] != f"iterable/{self._way}":
            raise MismatchError(
                [("way to resume the iterable data set", state["kind"], f"iterable/{self._way}")]
            )
        workers = state["workers"]
        if workers is not None and len(workers["states"]) != self._workers_count:
            raise MismatchError([("num_workers", len(workers["states"]), self._workers_count)])

    def _seed_generator(self) -> torch.Generator:
        return self._shadow.loader.generator or torch.default_generator

    def _restore_loader_generator(self, state: Value) -> None:
        if state["generator"] is not None and self._loader.generator is not None:
            rng.restore_generator(self._loader.generator, state["generator"])
