"""Native mode for iterable data sets: by their own state where they have one, by reading again where not.

Touches: the global generators exactly as the plain loader does; a resumed `open` puts them back.

A data set with `state_dict` and `load_state_dict` is taken at its word: after `load_state_dict`, iterating over it
goes on with the next sample and draws nothing before it. Without, the epoch is begun again under the generators
it began with, and the batches that were handed out are read again and dropped. Hugging Face streams keep no
exact state behind a shuffle buffer; those are read again too.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from unbroken.errors import MismatchError, NotExact
from unbroken.torch import rng
from unbroken.torch.data.attributes import Captured, Owned, encode_hook, has_state_hook, load_hook
from unbroken.torch.data.sampler import LOG_BYTES, Recorder
from unbroken.torch.data.shadow import IndexStream, Shadow, as_it_is, first
from unbroken.torch.data.tickets import Parcel, Place, WorkerState
from unbroken.torch.data.worker import EndNoter, InitProxy, IterableCollateProxy, IterableProxy

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
        if loader.persistent_workers:
            raise NotExact(
                "persistent workers over an iterable data set",
                "what a worker's generators do at the end of its share is not reported",
                hint="set persistent_workers=False",
            )
        self._loader = loader
        self._workers_count = loader.num_workers
        dataset = loader.dataset
        self._way: Way = way_of(dataset)
        self._owned = Owned({"dataset": dataset, "collate": loader.collate_fn}, hooks=False)
        self._ships = self._way == "state" and self._workers_count > 0
        self._proxy = IterableProxy(dataset) if self._ships else None
        self._noter = EndNoter(dataset) if self._way == "state" and not self._ships else None
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._shadow = Shadow(
            loader,
            dataset=self._proxy or self._noter or dataset,
            collate=(lambda collate: IterableCollateProxy(collate, dataset)) if self._ships else as_it_is,
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
        self._states: list[tuple[WorkerState, Place] | None] = []
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
        if self._nothings:
            self._nothings -= 1
            return [None]
        return next(self._index_iterator)

    # The session's side.

    def open(self, epoch: int) -> None:
        """Begin an epoch as `iter(loader)` does."""
        self._begin(position=0)
        self._seed_state = b""
        self._origin = self._owned.capture()
        self._states = [None] * self._workers_count
        if self._proxy is not None:
            self._proxy.starts, self._proxy.turn = None, 0
        if self._recorder is not None:
            self._recorder.begin()
            self._recorder.start()
        else:
            self._iterator = iter(self._shadow.loader)

    def next(self) -> Any:
        """Return the next batch."""
        if self._recorder is not None:
            found = self._recorder.pull()
            self._recorder.consumed()
        else:
            assert self._iterator is not None, "an epoch is opened before it is read"
            found = next(self._iterator)
        if self._ships:
            found = self._receive(found)
        self.position += 1
        return found

    def finish(self) -> None:
        """Let go of what an exhausted epoch held."""
        self._iterator = None

    def abandon(self) -> None:
        """Leave the epoch before its end."""
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
                    None if entry is None else (entry[0].to_value(), *entry[1]) for entry in self._states
                ],
                "turn": self._turn,
            }
        return found

    def settle(self, state: Value) -> None:
        """Take over a state between epochs."""
        self._check(state)
        self._owned.install(Captured.from_value(state["owned"]), unless_set=True)
        self._restore_loader_generator(state)

    def resume(self, state: Value, position: int) -> None:
        """Open the epoch that a state is in the middle of."""
        self._check(state)
        self._begin(position=position)
        with rng.preserved():
            if self._recorder is not None:
                self._recorder.replay(state["recorder"], position)
            elif self._workers_count:
                self._make_workers(state["workers"], position)
            else:
                place = Place(*state["place"])
                load_hook(self._loader.dataset, place.hook, "dataset")
                self._iterator = iter(()) if place.ended else iter(self._shadow.loader)
        if self._way == "replay" or self._workers_count:
            self._owned.install(Captured.from_value(state["owned"]))
        else:
            self._owned.install(Captured(dict(state["owned"]["generators"]), {}, {}))
        self._restore_loader_generator(state)

    def close(self) -> None:
        """Let workers go."""
        self._iterator = None
        if self._recorder is not None:
            self._recorder.reset()

    def _begin(self, *, position: int) -> None:
        self._iterator = None
        self.position = position
        self._is_resumed = False
        self._nothings = 0
        self._turn = 0
        self._shadow.refresh()

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
            self._proxy.starts, self._proxy.turn = list(self._states), self._turn
        self._iterator = iter(self._shadow.loader)
        self._is_resumed = False
        for _ in range(self._turn if self._ships else position):
            found = next(self._iterator)
            if self._ships:
                assert found.empty, "a worker before the turn answers its first ticket with nothing"

    def _receive(self, parcel: Parcel) -> Any:
        assert parcel.report is not None and parcel.extra is not None, (
            "a batch comes with its worker's report"
        )
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
