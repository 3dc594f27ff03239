"""The index stream of one epoch: pulled from the user's sampler, recorded, and pulled again after a kill.

Touches: the user's sampler; while it is replayed also the global generators (the caller preserves them).

A sampler's frame cannot be saved, so a resumed process turns the sampler again, as often as it was turned before.
Each turn (an `iter` or a `next`) is an event. What an event drew from is put back before it wherever something
else had moved it since the sampler's last draw, and so is an attribute that something else had changed. torch's
own samplers draw from the global generator at their first pull only, so that nothing is watched after it. The
indices that come out are compared with a digest of those that came out before.
"""

import array
import itertools
import marshal
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torch.utils.data.distributed import DistributedSampler

from unbroken import _core, values
from unbroken.errors import NotExact
from unbroken.torch import rng
from unbroken.torch.data.attributes import (
    Captured,
    Owned,
    encode_generator,
    encode_hook,
    has_state_hook,
    load_hook,
)

Value = Any

LOG_BYTES = 64 * 1024 * 1024
"""Most that one epoch's recorded generators and attributes may take."""

_LEAVES = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    _InfiniteConstantSampler,
)
_GLOBALS = ("python", "numpy", "torch")


def leaf_sampler(sampler: Any) -> Any:
    """Return the sampler below torch's own batch samplers."""
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return sampler


def kind_of(sampler: Any) -> str:
    """Return the kinds of a sampler and of those below it, such as `BatchSampler(RandomSampler)`."""
    names = []
    while type(sampler) is BatchSampler:
        names.append("BatchSampler")
        sampler = sampler.sampler
    kind = type(sampler)
    own = kind.__module__.startswith("torch.") or kind.__module__ == "builtins"
    names.append(kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}")
    return "(".join(names) + ")" * (len(names) - 1)


def is_torchs_own(sampler: Any) -> bool:
    """Tell whether a sampler is one of torch's, down to the leaf."""
    return type(leaf_sampler(sampler)) in _LEAVES


def indices_bytes(payload: Any) -> bytes:
    """Return bytes that determine what a sampler gave."""
    try:
        return array.array("q", payload if type(payload) is list else (payload,)).tobytes()
    except (TypeError, OverflowError):
        pass
    try:
        return marshal.dumps(payload, 2)
    except ValueError:
        return repr(payload).encode()


class Swap:
    """Generators of the sampler's own (keyed mode): put in place around each of its turns."""

    def __init__(self, owned: Owned) -> None:
        self._owned = owned
        self._private: rng.Globals | None = None
        self._objects: list[Value] = []

    def rekey(self, key: bytes) -> None:
        """Begin an epoch from its key."""
        outside = rng.read_globals(cuda=False)
        generators = self._owned.generators()
        kept = [rng.capture_generator(generator) for generator in generators]
        rng.rekey(key, generators)
        self._private = rng.read_globals(cuda=False)
        self._objects = [rng.capture_generator(generator) for generator in generators]
        rng.write_globals(outside, found=self._private)
        for generator, state in zip(generators, kept, strict=True):
            rng.restore_generator(generator, state)

    def run(self, turn: Callable[[], Any]) -> Any:
        """Run one turn under the private generators."""
        assert self._private is not None, "an epoch begins with its key"
        outside = rng.read_globals(cuda=False)
        generators = self._owned.generators()
        kept = [rng.capture_generator(generator) for generator in generators]
        rng.write_globals(self._private, found=outside)
        for generator, state in zip(generators, self._objects, strict=False):
            rng.restore_generator(generator, state)
        try:
            return turn()
        finally:
            self._private = rng.read_globals(cuda=False)
            self._objects = [rng.capture_generator(generator) for generator in generators]
            rng.write_globals(outside, found=self._private)
            for generator, state in zip(generators, kept, strict=True):
                rng.restore_generator(generator, state)


class Recorder:
    """Turns the user's index sampler and remembers what turning it again needs.

    Args:
        sampler: What the loader pulls indices from: its batch sampler, or its sampler where `batch_size=None`.
        dataset: Not looked into, though samplers hold it.
        keyed: Run the sampler under private generators instead of recording the global ones.
        owned: What it owns, where that is not to be found from the sampler itself.
        name: How messages call it.
        digest: Gives bytes that determine a payload; what comes out of a replay is compared by them.
    """

    def __init__(
        self,
        sampler: Any,
        *,
        dataset: Any,
        keyed: bool = False,
        owned: Owned | None = None,
        name: str | None = None,
        digest: Callable[[Any], bytes] = indices_bytes,
    ) -> None:
        self.sampler = sampler
        self.name = name or f"sampler `{kind_of(sampler)}`"
        self._digest = digest
        leaf = leaf_sampler(sampler)
        self._own = is_torchs_own(sampler)
        self._stateful = next((s for s in (sampler, leaf) if has_state_hook(s)), None)
        holder: dict[str, Any] = {} if type(sampler) in (list, tuple, range) else {"sampler": leaf}
        if sampler is not leaf:
            holder["batch_sampler"] = sampler
        skip = (dataset, self._stateful) if self._stateful is not None else (dataset,)
        self.owned = owned or Owned(holder, skip=skip, array_bytes=LOG_BYTES)
        self._swap = Swap(self.owned) if keyed else None
        self.reset()

    def reset(self) -> None:
        """Forget the epoch."""
        self._generators = self.owned.generators_by_path()
        # After its first pull nothing but indices comes, and nothing else is to be noted.
        self._is_simple = (
            self._own and not self._generators and self._stateful is None and self._digest is indices_bytes
        )
        self._iterator: Iterator[Any] | None = None
        self._log: list[tuple[int, dict[str, Any]]] = []
        self._log_bytes = 0
        self._overflow: str | None = None
        self._synced: dict[str, bytes] = {}
        self._values: dict[str, bytes] | None = None
        self._iters: list[int] = []
        self._events = 0
        self.pulls = 0
        self.exhausted = False
        self._issued = _core.IndexLog()
        self._pending: deque[Any] = deque()  # The payloads themselves, where they are saved.

    def begin(self, key: bytes | None = None) -> None:
        """Begin a fresh epoch; in keyed mode from its key."""
        self.reset()
        if self._swap is not None:
            assert key is not None, "keyed mode has a key for each epoch"
            self._swap.rekey(key)

    def start(self) -> None:
        """Do what `iter(sampler)` does."""
        self._iters.append(self._events)
        self._iterator = self._event(lambda: iter(self.sampler))

    def pull(self) -> Any:
        """Return the next payload; StopIteration at the end of the epoch, and ever after."""
        if self.exhausted:
            raise StopIteration
        iterator = self._iterator
        assert iterator is not None, "a stream is started before it is pulled"
        try:
            if self._is_simple and self.pulls > 0:
                # Nearly every step comes by here, on cold caches.
                self._events += 1
                payload = next(iterator)
                if self._issued.note(payload):
                    self.pulls += 1
                    return payload
            elif self._is_pure_now():
                self._events += 1
                payload = next(iterator)
            else:
                payload = self._event(iterator.__next__)
        except StopIteration:
            self.exhausted = True
            raise
        self._count(payload)
        return payload

    def consumed(self) -> bytes:
        """Note that the oldest issued payload was handed out; return its digest."""
        if self._pending:
            self._pending.popleft()
        digest = self._issued.hand_out()
        assert digest is not None, "a payload is issued before it is handed out"
        return digest

    def state(self, *, is_open: bool) -> Value:
        """Return what a later process needs to pull the same indices.

        Args:
            is_open: In the middle of an epoch; between epochs what the sampler owns is enough.

        Raises:
            NotExact: What changed beside the sampler is more than may be recorded.
        """
        stateful = self._stateful
        common = {
            "pulls": self.pulls,
            "exhausted": self.exhausted,
            "started": self._iterator is not None,
            "rolling": self._issued.rolling,
            "last": self._issued.last,
        }
        owned = self.owned.capture().to_value()
        if stateful is not None:
            pending = [values.lower(payload, path="sampler/pending") for payload in self._pending]
            hook = encode_hook(stateful, "sampler")
            return {**common, "kind": "state_dict", "hook": hook, "pending": pending, "owned": owned}
        if not is_open:
            return {**common, "kind": "owned", "owned": owned}
        if self._overflow is not None:
            raise NotExact(
                self.name,
                f"something else moves `{self._overflow}` between its turns, and what an epoch needs to be turned "
                f"again takes more than {LOG_BYTES // 2**20} MiB",
                hint="give it state_dict and load_state_dict, or a generator of its own",
            )
        log = [{"event": event, **entry} for event, entry in self._log]
        return {
            **common,
            "kind": "replay",
            "events": self._events,
            "iters": list(self._iters),
            "log": log,
            "owned": owned,
        }

    def settle(self, state: Value) -> None:
        """Put back what the sampler owned at a boundary between epochs."""
        if self._stateful is not None and state["kind"] == "state_dict":
            load_hook(self._stateful, state["hook"], "sampler")
        self.owned.install(Captured.from_value(state["owned"]), unless_set=True)

    def replay(self, state: Value, position: int, key: bytes | None = None) -> list[Any]:
        """Turn the sampler as often as it was turned before; return what was issued and not handed out.

        Moves the global generators; the caller puts them back.

        Args:
            state: What `state` returned.
            position: Payloads that were handed out.
            key: The epoch's key, in keyed mode.

        Raises:
            NotExact: Other indices came out than before.
        """
        self.begin(key)
        is_stateful = state["kind"] == "state_dict"
        pending = self._resume_stateful(state) if is_stateful else self._turn_again(state, position)
        self.owned.install(Captured.from_value(state["owned"]))
        self._values = None
        return pending

    def _resume_stateful(self, state: Value) -> list[Any]:
        if self._stateful is None:
            raise NotExact(self.name, "the checkpoint has its state_dict, and it has none now")
        load_hook(self._stateful, state["hook"], "sampler")
        # A sampler at the end of its epoch may take a new iterator for the next epoch's.
        is_over = state["exhausted"] or state["pulls"] == length_of(self.sampler)
        if state["started"]:
            self._iterator = iter(()) if is_over else iter(self.sampler)
        pending = [values.raise_(payload, path="sampler/pending") for payload in state["pending"]]
        for payload in pending:
            self._count(payload)
        self.pulls, self.exhausted, self._issued.rolling = (
            state["pulls"],
            state["exhausted"],
            state["rolling"],
        )
        return pending

    def _turn_again(self, state: Value, position: int) -> list[Any]:
        log = {entry["event"]: entry for entry in state["log"]}
        if type(self.sampler) is BatchSampler and self._own and not self._generators and state["pulls"] > 1:
            pending = self._skip_ahead(state, log, position)
        else:
            pending = self._repeat(state, log, position)
        found = (self.pulls, self.exhausted, self._issued.rolling, self._issued.last)
        if found != (state["pulls"], state["exhausted"], state["rolling"], state["last"]):
            raise NotExact(
                self.name,
                f"turned again, its {state['pulls']} turns of this epoch gave other indices than before",
                hint="it depends on something that is neither a generator nor an attribute of its own: "
                "give it state_dict and load_state_dict",
            )
        self._events = state["events"]
        self._iters = list(state["iters"])
        self._log = [
            (entry["event"], {k: v for k, v in entry.items() if k != "event"}) for entry in state["log"]
        ]
        self._log_bytes = sum(_entry_bytes(entry) for _, entry in self._log)
        # Only what was drawn from is known to be the same in every later replay.
        recorded = {
            name for _, entry in self._log for part in ("globals", "generators") for name in entry[part]
        }
        self._synced = {name: data for name, data in self._drawn_from().items() if name in recorded}
        return pending

    def _repeat(self, state: Value, log: dict[int, dict[str, Any]], position: int) -> list[Any]:
        """Turn the sampler once for each recorded event."""
        iters = set(state["iters"])
        pending: list[Any] = []
        for event in range(state["events"]):
            if event in log:
                self._put_back(log[event])
            if event in iters:
                self._iterator = self._turn(lambda: iter(self.sampler))
                continue
            assert self._iterator is not None, "a recorded stream begins with its iter"
            try:
                payload = self._turn(self._iterator.__next__)
            except StopIteration:
                self.exhausted = True
                continue
            self._count(payload)
            if self.pulls > position:
                pending.append(payload)
            else:
                self.consumed()
        return pending

    def _skip_ahead(self, state: Value, log: dict[int, dict[str, Any]], position: int) -> list[Any]:
        """Do as `_repeat` does where torch's own sampler draws once, without making each batch.

        The last payload stands for all before it: they come from the same one draw.
        """
        batches, leaf = self.sampler, self.sampler.sampler
        for event in sorted(log):
            self._put_back(log[event])
        first = min(position, state["pulls"] - 1)
        indices = self._turn(lambda: iter(leaf))
        self._turn(lambda: advance(indices, first * batches.batch_size))
        self._iterator = iter(BatchSampler(indices, batches.batch_size, batches.drop_last))
        self.pulls = first
        pending: list[Any] = []
        while self.pulls < state["pulls"]:
            payload = self._turn(self._iterator.__next__)
            self._count(payload)
            if self.pulls > position:
                pending.append(payload)
            else:
                self.consumed()
        if state["exhausted"]:
            self.exhausted = next(self._iterator, None) is None
        self._issued.rolling = state["rolling"]
        return pending

    def _turn(self, action: Callable[[], Any]) -> Any:
        return action() if self._swap is None or self._is_pure_now() else self._swap.run(action)

    def _is_pure_now(self) -> bool:
        """Tell whether the next pull neither draws nor looks at anything that could change."""
        return self._own and self.pulls > 0 and not self._generators

    def _count(self, payload: Any) -> None:
        self.pulls += 1
        if self._digest is not indices_bytes or not self._issued.note(payload):
            self._issued.note_bytes(self._digest(payload))
        if self._stateful is not None:
            self._pending.append(payload)

    def _event(self, action: Callable[[], Any]) -> Any:
        """Run one turn of the sampler and record what turning it again would miss."""
        event = self._events
        self._events += 1
        if self._swap is not None:
            self._note_values(event)
            try:
                return self._swap.run(action)
            finally:
                self._values = self.owned.tokens()[1]
        if self._stateful is not None:
            return action()
        before = self._drawn_from()
        changed = self._note_values(event)
        try:
            return action()
        finally:
            self._note_draws(event, before, changed)
            self._values = None if self._own else self.owned.tokens()[1]

    def _drawn_from(self) -> dict[str, bytes]:
        """Return what the sampler may draw from, as it is now."""
        found = {} if self._own and self.pulls > 0 else self._globals()
        for path, generator in self._generators.items():
            found[path] = encode_generator(generator)
        return found

    def _globals(self) -> dict[str, bytes]:
        state = rng.read_globals(cuda=False)
        return {"python": state.python, "numpy": state.numpy or b"", "torch": state.torch}

    def _note_values(self, event: int) -> dict[str, bytes]:
        """Return, encoded, the attributes that something else than the sampler has changed."""
        if self._own and self.pulls > 0:
            return {}
        now = self.owned.tokens()[1]
        if self._values is None:
            moved = set(self.owned.changed(now))
        else:
            before = self._values
            moved = {path for path in now.keys() | before.keys() if now.get(path) != before.get(path)}
            moved &= set(self.owned.changed(now))
        found = self.owned.encode(moved) if moved else {}
        if self._swap is not None and found:
            self._add(event, {"globals": {}, "generators": {}, "values": found})
        return found

    def _note_draws(self, event: int, before: dict[str, bytes], changed: dict[str, bytes]) -> None:
        after = self._drawn_from()
        globals_: dict[str, bytes] = {}
        owned: set[str] = set()
        for name, state in before.items():
            if after.get(name, state) == state and name in after:
                continue
            if self._synced.get(name) != state:
                if name in _GLOBALS:
                    globals_[name] = state
                else:
                    owned.add(name)
            if name in after:
                self._synced[name] = after[name]
        generators = {name: before[name] for name in owned}
        if globals_ or generators or changed:
            self._add(event, {"globals": globals_, "generators": generators, "values": changed})

    def _add(self, event: int, entry: dict[str, Any]) -> None:
        self._log_bytes += _entry_bytes(entry)
        if self._log_bytes > LOG_BYTES:
            names = [*entry["values"], *entry["generators"], *entry["globals"]]
            self._overflow = self._overflow or names[0]
            self._log.clear()
            return
        self._log.append((event, entry))

    def _put_back(self, entry: dict[str, Any]) -> None:
        kept = entry["globals"]
        if kept:
            live = rng.read_globals(cuda=False)
            rng.write_globals(
                rng.Globals(
                    kept.get("python", live.python),
                    kept.get("numpy", live.numpy),
                    kept.get("torch", live.torch),
                ),
                found=live,
            )
        self.owned.install(Captured(entry["generators"], entry["values"], {}))


def length_of(sized: Any) -> int | None:
    """Return the length of a sampler or a data set, or None where it has none.

    Many classes of users have a `__len__` that only raises, as older torch samplers had.
    """
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _entry_bytes(entry: dict[str, Any]) -> int:
    return sum(len(data) for part in entry.values() if isinstance(part, dict) for data in part.values())


_LIST_ITERATOR, _RANGE_ITERATOR = type(iter([])), type(iter(range(0)))


def advance(indices: Iterator[Any], count: int) -> None:
    """Drop `count` items, or all that are left.

    Torch's samplers are generators that hand on the iterator of a list. Such an iterator can be set to a position:
    a jump over millions of items instead of as many turns of a generator.
    """
    while count > 0:
        inner: Any = getattr(indices, "gi_yieldfrom", None) or indices
        left = inner.__length_hint__() if type(inner) in (_LIST_ITERATOR, _RANGE_ITERATOR) else 0
        if left:
            step = min(count, left)
            inner.__setstate__(inner.__reduce__()[2] + step)
            count -= step
        elif next(indices, _END) is _END:
            return
        else:
            count -= 1
            if getattr(indices, "gi_yieldfrom", None) is None:
                deque(itertools.islice(indices, count), maxlen=0)
                return


_END = object()
