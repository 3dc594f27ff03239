"""Native mode for map-style data sets: plain torch's numbers, and a way back into the middle of an epoch.

Touches: the global generators exactly as `iter(loader)` and `next` of the plain loader do. A resumed `open` puts
them back where it found them; restoring the training's is the caller's business.

A resumed loader makes its workers under the base seed that they had, so that `worker_init_fn` and
`get_worker_info().seed` see the same values, gives each worker its recorded state by a ticket that reads nothing,
and lets a few more such tickets turn the round-robin until the next batch goes to the worker whose turn it is.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from unbroken.errors import MismatchError, WorkerDied
from unbroken.torch import rng
from unbroken.torch.data.attributes import Captured, Owned
from unbroken.torch.data.reading import read
from unbroken.torch.data.sampler import Recorder
from unbroken.torch.data.shadow import IndexStream, Preserved, Shadow, as_it_is, first
from unbroken.torch.data.tickets import Parcel, Ticket, WorkerState
from unbroken.torch.data.worker import CollateProxy, InitProxy, MapProxy

Value = Any


class NativeMap:
    """One loader over a map-style data set, in native mode."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._workers_count = loader.num_workers
        self._persistent = loader.persistent_workers
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.recorder = Recorder(sampler, dataset=loader.dataset)
        # Without workers the user's own objects do: what they move is the process's, and read there.
        is_apart = self._workers_count > 0
        self._shadow = Shadow(
            loader,
            dataset=MapProxy(loader.dataset) if is_apart else loader.dataset,
            collate=CollateProxy if is_apart else as_it_is,
            init=InitProxy if is_apart else first,
            stream=IndexStream(self, sampler),
        )
        self._owned = Owned({"dataset": loader.dataset, "collate": loader.collate_fn})
        self._iterator: Iterator[Any] | None = None
        self._source: Literal["fresh", "resumed", "tokens", "closed"] = "closed"
        self._queue: deque[Any] = deque()  # What the index stream gives first: tickets and indices.
        self._making_workers = False
        self._seed_state: bytes = b""  # What base_seed was drawn from, at the making of the workers.
        self._origin = Captured({}, {}, {})  # What the data set owned then.
        self._states: list[WorkerState | None] = []
        self._to_recreate: Value = None
        self.position = 0
        self.indices_digest: bytes | None = None

    # What torch asks of the index stream.

    def on_iter(self) -> None:
        """Answer `iter(index_sampler)`: torch draws its base seed right after the first one."""
        if self._source == "fresh":
            self.recorder.start()
        if self._making_workers:
            self._making_workers = False
            if self._source == "fresh":
                self._seed_state = self._seed_generator().get_state().numpy().tobytes()
            else:
                state = torch.frombuffer(bytearray(self._seed_state), dtype=torch.uint8)
                self._seed_generator().set_state(state)

    def on_pull(self) -> Any:
        """Answer `next(index_sampler)`: tickets that were prepared, then what the user's sampler gives."""
        if self._queue:
            return self._queue.popleft()
        if self._source in ("tokens", "closed"):
            raise StopIteration
        return self.recorder.pull()

    # The session's side.

    def open(self, epoch: int) -> None:
        """Begin an epoch as `iter(loader)` does."""
        if self._to_recreate is not None:
            with rng.preserved(), self._private_preserved():
                self._recreate_workers(self._to_recreate)
            self._to_recreate = None
        self.position = 0
        self.indices_digest = None
        self._shadow.refresh()
        self.recorder.begin()
        self._queue.clear()
        self._source = "fresh"
        if self._workers_count and not self._shadow.holds_workers:
            self._making_workers = True
            self._origin = self._owned.capture()
            self._states = [None] * self._workers_count
        self._iterator = read(self._shadow.loader)

    def next(self) -> Any:
        """Return the next batch."""
        assert self._iterator is not None, "an epoch is opened before it is read"
        found = next(self._iterator)
        if self._workers_count:
            found = self._receive(found)
        self.position += 1
        self.indices_digest = self.recorder.consumed()
        return found

    def finish(self) -> None:
        """Let go of what an exhausted epoch held."""
        self._iterator = None

    def abandon(self) -> None:
        """Leave the epoch before its end."""
        if self._persistent:
            # torch would throw away what the workers have read ahead, and with it how far their generators are.
            self._source = "closed"
            self._queue.clear()
            while True:
                try:
                    self._receive(next(self._iterator))  # pyright: ignore[reportArgumentType]
                except StopIteration:
                    break
                except WorkerDied:
                    raise
                except Exception:  # A batch that nobody asked for may fail: torch drops it too.
                    continue
        self._iterator = None

    def state(self, *, is_open: bool) -> Value:
        """Return what a new process needs to go on from here."""
        workers = None
        if self._to_recreate is not None:
            workers = self._to_recreate
        elif self._workers_count and (is_open or self._shadow.holds_workers):
            workers = {
                "seed": self._seed_state,
                "origin": self._origin.to_value(),
                "states": [None if state is None else state.to_value() for state in self._states],
            }
        return {
            "kind": "native",
            "sampler": self.recorder.state(is_open=is_open),
            "owned": self._owned.capture().to_value(),
            "generator": None
            if self._loader.generator is None
            else rng.capture_generator(self._loader.generator),
            "workers": workers,
        }

    def settle(self, state: Value) -> None:
        """Take over a state between epochs."""
        self._check(state)
        self._owned.install(Captured.from_value(state["owned"]), unless_set=True)
        self.recorder.settle(state["sampler"])
        self._restore_loader_generator(state)
        self._to_recreate = state["workers"]

    def resume(self, state: Value, position: int) -> None:
        """Open the epoch that a state is in the middle of."""
        self._check(state)
        self._shadow.refresh()
        with rng.preserved():
            pending = self.recorder.replay(state["sampler"], position)
            self._source = "resumed"
            self._queue = deque(pending)
            if self._workers_count:
                self._make_workers(state["workers"], turn=position % self._workers_count)
            else:
                self._iterator = read(self._shadow.loader)
        self._owned.install(Captured.from_value(state["owned"]))
        self._restore_loader_generator(state)
        self.position = position

    def close(self) -> None:
        """Let workers go."""
        self._iterator = None
        self._shadow.forget_workers()

    def _check(self, state: Value) -> None:
        workers = state["workers"]
        if workers is not None and len(workers["states"]) != self._workers_count:
            raise MismatchError([("num_workers", len(workers["states"]), self._workers_count)])

    def _recreate_workers(self, workers: Value) -> None:
        """Bring persistent workers back between two epochs, by an epoch that reads nothing."""
        kept = self._owned.capture()
        self._source = "tokens"
        self._queue.clear()
        self._make_workers(workers, turn=0)
        for _ in self._iterator or ():
            raise AssertionError("an epoch of tokens gives nothing")
        self._iterator = None
        self._owned.install(kept)

    def _make_workers(self, workers: Value, *, turn: int) -> None:
        self._seed_state = workers["seed"]
        self._origin = Captured.from_value(workers["origin"])
        self._states = [
            None if state is None else WorkerState.from_value(state) for state in workers["states"]
        ]
        tokens = [Ticket(None, install=state, skip=True) for state in self._states]
        tokens += [Ticket(None, skip=True)] * turn
        if not turn and all(state is None for state in self._states):
            tokens = []
        self._queue.extendleft(reversed(tokens))
        self._owned.install(self._origin)
        self._making_workers = True
        self._iterator = read(self._shadow.loader)
        for _ in tokens:
            parcel = next(self._iterator)
            assert parcel.empty, "a worker answers a token with an empty parcel"

    def _receive(self, parcel: Parcel) -> Any:
        if parcel.report is not None:
            known = self._states[parcel.worker]
            self._states[parcel.worker] = parcel.report if known is None else known.merged(parcel.report)
        return parcel.batch

    def _seed_generator(self) -> torch.Generator:
        return self._shadow.loader.generator or torch.default_generator

    def _restore_loader_generator(self, state: Value) -> None:
        if state["generator"] is not None and self._loader.generator is not None:
            rng.restore_generator(self._loader.generator, state["generator"])

    def _private_preserved(self) -> Preserved:
        return Preserved(self._loader.generator)
