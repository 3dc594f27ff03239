"""Keyed mode for map-style data sets: order and generators are a pure function of seed, epoch and position.

Touches: nothing of the training's generators. With workers, theirs; without, the global ones are put back after
each batch.

The same bits for any number of workers and any split into batches. A shuffled epoch is a random-access
permutation, so that a resumed one begins at its position without making the order before it.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from unbroken import _core
from unbroken.errors import NotExact
from unbroken.torch import rng
from unbroken.torch.data.attributes import Captured, Owned
from unbroken.torch.data.reading import read
from unbroken.torch.data.sampler import Recorder, indices_bytes, leaf_sampler
from unbroken.torch.data.shadow import IndexStream, Shadow
from unbroken.torch.data.tickets import Parcel, Ticket
from unbroken.torch.data.worker import InitProxy, KeyedCollateProxy, KeyedMapProxy

Value = Any


class OrderStream:
    """Index batches by position: constant memory, any position at once.

    Args:
        length: Samples of an epoch.
        batch_size: Samples of a batch; None gives single indices.
        drop_last: Leave out an incomplete last batch.
        order: Permutation of the epoch; None leaves samples in their order.
        start: Position of the first sample.
    """

    def __init__(
        self, length: int, batch_size: int | None, *, drop_last: bool, order: _core.Order | None, start: int
    ) -> None:
        self._batch_size = batch_size
        self._order = order
        self._next = start
        self._end = length - length % batch_size if batch_size and drop_last else length

    def pull(self) -> Any:
        """Return the next payload; StopIteration at the end."""
        start = self._next
        if start >= self._end:
            raise StopIteration
        if self._batch_size is None:
            self._next = start + 1
            return start if self._order is None else self._order.at(start)
        self._next = min(start + self._batch_size, self._end)
        if self._order is None:
            return list(range(start, self._next))
        return self._order.slice(start, self._next)


class KeyedMap:
    """One loader over a map-style data set, in keyed mode."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._by_position = _is_by_position(self._sampler)
        self._recorder = None
        if not self._by_position:
            self._recorder = Recorder(self._sampler, dataset=loader.dataset, keyed=True)
        self._shadow = Shadow(
            loader,
            dataset=KeyedMapProxy(loader.dataset, seed),
            collate=lambda collate: KeyedCollateProxy(collate, loader.dataset, seed),
            init=InitProxy,
            stream=IndexStream(self, self._sampler),
        )
        self._owned = Owned({"dataset": loader.dataset, "collate": loader.collate_fn})
        self._generators: list[Any] = []
        self._order: OrderStream | None = None
        self._pending: deque[Any] = deque()
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        self._is_fresh = False
        self._issued_samples = 0
        self._issued: deque[tuple[int, bytes]] = deque()
        self._samples = 0
        self.position = 0
        self.indices_digest: bytes | None = None

    # What torch asks of the index stream.

    def on_iter(self) -> None:
        """Answer `iter(index_sampler)`."""
        if self._recorder is not None and self._is_fresh:
            # torch asks twice where it makes workers; an epoch has one beginning, for any number of them.
            self._is_fresh = False
            self._recorder.start()

    def on_pull(self) -> Any:
        """Answer `next(index_sampler)`."""
        if self._order is not None:
            payload = self._order.pull()
        elif self._pending:
            payload = self._pending.popleft()
        else:
            assert self._recorder is not None, "a stream is by position or recorded"
            payload = self._recorder.pull()
        start = self._issued_samples
        count = len(payload) if self._loader.batch_sampler is not None else 1
        self._issued_samples += count
        self._issued.append((count, indices_bytes(payload)))
        return Ticket(payload, place=(self._epoch, start))

    # The session's side.

    def open(self, epoch: int) -> None:
        """Begin an epoch."""
        self._begin(epoch, position=0, samples=0)
        if self._recorder is not None:
            self._recorder.begin(self._sampler_key())
            self._is_fresh = True
        self._make_iterator()

    def next(self) -> Any:
        """Return the next batch."""
        assert self._iterator is not None, "an epoch is opened before it is read"
        with self._apart():
            found = next(self._iterator)
        if isinstance(found, Parcel):
            if found.refusal is not None:
                raise NotExact(
                    *found.refusal,
                    hint='use data="native", or keep what changes out of the data set',
                )
            found = found.batch
        count, data = self._issued.popleft()
        self._samples += count
        self.position += 1
        self.indices_digest = _core.digest_bytes(data)
        if self._recorder is not None:
            self._recorder.consumed()
        return found

    def finish(self) -> None:
        """Let go of what an exhausted epoch held."""
        self._iterator = None

    def abandon(self) -> None:
        """Leave the epoch before its end."""
        self._iterator = None

    def state(self, *, is_open: bool) -> Value:
        """Return what a new process needs to go on from here."""
        return {
            "kind": "keyed",
            "epoch": self._epoch,
            "samples": self._samples,
            "sampler": None if self._recorder is None else self._recorder.state(is_open=is_open),
            "owned": self._owned.capture()._replace(generators={}).to_value(),
        }

    def settle(self, state: Value) -> None:
        """Take over a state between epochs."""
        self._owned.install(Captured.from_value(state["owned"]), unless_set=True)
        if self._recorder is not None:
            self._recorder.settle(state["sampler"])

    def resume(self, state: Value, position: int) -> None:
        """Open the epoch that a state is in the middle of."""
        self._owned.install(Captured.from_value(state["owned"]))
        self._begin(state["epoch"], position=position, samples=state["samples"])
        if self._recorder is not None:
            with rng.preserved():
                pending = self._recorder.replay(state["sampler"], position, self._sampler_key())
            self._pending = deque(pending)
            self._is_fresh = False
        self._make_iterator()

    def close(self) -> None:
        """Let workers go."""
        self._iterator = None
        self._shadow.forget_workers()

    def _begin(self, epoch: int, *, position: int, samples: int) -> None:
        self._epoch = epoch
        self.position = position
        self.indices_digest = None
        self._samples = self._issued_samples = samples
        self._issued.clear()
        self._generators = self._owned.generators()
        self._pending = deque()
        if self._by_position:
            self._order = self._make_order(samples)

    def _make_order(self, start: int) -> OrderStream:
        leaf = leaf_sampler(self._sampler)
        length = len(leaf.data_source)
        order = _core.Order(self._seed, self._epoch, length) if type(leaf) is RandomSampler else None
        batches = self._sampler if type(self._sampler) is BatchSampler else None
        size = None if batches is None else batches.batch_size
        drop_last = batches is not None and batches.drop_last
        return OrderStream(len(leaf), size, drop_last=drop_last, order=order, start=start)

    def _make_iterator(self) -> None:
        # The workers' base seed comes from a generator of the epoch's own.
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(self._key("workers")[:8], "little"))
        self._shadow.refresh(generator=generator, in_order=True)
        with rng.preserved():
            self._iterator = read(self._shadow.loader)
        collate = self._shadow.loader.collate_fn
        if not self._loader.num_workers and isinstance(collate, KeyedCollateProxy):
            collate.watch()

    def _sampler_key(self) -> bytes:
        return self._key("sampler")

    def _key(self, purpose: str) -> bytes:
        return _core.derive_key(self._seed, purpose, self._epoch, 0)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep the training's generators where they are while the main process reads samples."""
        if self._loader.num_workers:
            yield
            return
        kept = [(generator, rng.capture_generator(generator)) for generator in self._generators]
        with rng.preserved():
            yield
        for generator, state in kept:
            rng.restore_generator(generator, state)


def _is_by_position(sampler: Any) -> bool:
    leaf = leaf_sampler(sampler)
    if sampler is not leaf and sampler.sampler is not leaf:
        return False
    if type(leaf) is SequentialSampler:
        return True
    return type(leaf) is RandomSampler and not leaf.replacement and leaf.num_samples <= len(leaf.data_source)
