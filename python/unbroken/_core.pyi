"""The border between Python and the Rust core: what the extension module offers, and nothing clever."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

Compress: TypeAlias = Literal["alone", "differences"] | None

Value: TypeAlias = Any
"""None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, `Tensor` or `Object`; nothing else.

Exact types only: a subclass (an IntEnum, a named tuple) is refused with TypeError naming its path; fronts lower it first.
On the way in, `Entries` stands for a dict and `NameList` for a list.
"""

@final
class Tensor:
    """A leaf that views the bytes of one storage. Immutable."""

    def __init__(
        self,
        *,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        offset: int,
        storage: int,
        device: str = "cpu",
        attrs: Mapping[str, Value] | None = None,
    ) -> None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def storage(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def attrs(self) -> dict[str, Value]: ...

@final
class Object:
    """A typed value that the core does not interpret. Immutable."""

    def __init__(self, kind: str, name: str, fields: Mapping[str, Value]) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def fields(self) -> dict[str, Value]: ...

@final
class Entries:
    """A dict of a tree as the core holds it: what is put in is converted at once. It only grows.

    Of a model's thousands of leaves none becomes a Python object that is made only to be read again.

    Args:
        path: Where it is in the tree, for errors.
    """

    def __init__(self, path: str = "") -> None: ...
    def __len__(self) -> int: ...
    def __setitem__(self, key: Value, value: Value) -> None:
        """Add an entry; its key must be none that is there already: the format refuses one that is there twice."""
    def take_plain(self, found: dict[Any, Any], first: int) -> int:
        """Add the entries of a dict, from number `first` on, up to one whose key or value is not plain.

        Plain are None, bools, numbers, bytes, text that UTF-8 can carry, and tuples of such without text. Returns the
        number of the first that is not, or how many there are.
        """

@final
class NameList:
    """A list of names in a tree as the core holds it. Immutable."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int) -> str: ...
    def to_list(self) -> list[str]:
        """Return them as a list of Python's."""

@final
class States:
    """What an optimizer keeps for each of its parameters and whatever else it has a key for, each taken once.

    Both are kept alive.
    """

    def __init__(self, states: Mapping[Any, Any]) -> None: ...
    def take(self, key: object, missing: Any) -> Any:
        """Return what is kept for a key, by identity; `missing` where that is nothing or was taken."""
    def rest(self) -> list[tuple[Any, Any]]:
        """Return (key, value) of what was not taken."""

@final
class Names:
    """Names of the live objects that others refer to: parameters and buffers, modules, and whatever is tracked.

    They are kept alive.
    """

    def __init__(self) -> None: ...
    def add(self, kind: str, name: str, item: object) -> None:
        """Name an object; the first name that it gets is its name, and all of them find it."""
    def add_members(self, kind: str, prefix: str, members: Mapping[Any, Any]) -> None:
        """Add objects, None left out, under their names behind a prefix. A model has thousands of parameters."""
    def name(self, item: object, kind: str) -> str | None:
        """Return an object's name, or None."""
    def of_group(self, parameters: list[Any], group: int) -> NameList:
        """Return the name of each parameter of an optimizer's group; of one that has none, `group{group}.{index}`."""
    def name_of_id(self, id: int) -> str | None:
        """Return the name, of whatever kind, of the object with that `id`, or None."""
    def reference(self, item: object) -> Object | None:
        """Return what stands for a named object in a tree, or None."""
    def find(self, kind: str, name: str, missing: Any) -> Any:
        """Return the object of that name, or `missing`."""

def encode(value: Value) -> bytes:
    """Return the canonical bytes of a value (docs/format.md, "Values")."""

def decode(data: bytes) -> Value:
    """Return the value of canonical bytes; `FormatError` where they are not canonical or too large."""

def digest_value(value: Value) -> bytes:
    """Return the BLAKE3 digest (32 bytes) of a value's canonical bytes."""

def digest_memory(regions: Sequence[tuple[int, int]]) -> bytes:
    """Return one xxh3-128 digest (16 bytes) over memory regions (address, length in bytes), GIL released.

    Each region's length is hashed before its bytes. The caller keeps the memory alive and unchanged.
    """

def copy_memory(copies: Sequence[tuple[int, int, int]]) -> None:
    """Copy memory (from address, to address, length in bytes) on several threads, GIL released.

    The caller keeps it alive and untouched. No two copies go to the same memory, and none comes from where one goes.
    """

@final
class Memory:
    """Memory for bytes that are copied from there to where they belong; given back in the background.

    Raises:
        MemoryError: There is none.
    """

    def __init__(self, length: int) -> None: ...
    @property
    def address(self) -> int: ...

def digest_bytes(*parts: bytes) -> bytes:
    """Return one xxh3-128 digest (16 bytes) over byte strings, each preceded by its length."""

@final
class GeneratorReader:
    """Reads digests of the global generators where they lie. None is advanced.

    Args:
        slow: Returns a generator's bytes by its name, where they cannot be read from memory.
    """

    def __init__(self, slow: Callable[[str], bytes]) -> None: ...
    def add_memory(
        self,
        name: str,
        rank: int,
        address: int,
        length: int,
        *,
        unset: tuple[object, str] | None = None,
        same: tuple[Callable[[], object], object] | None = None,
        zero: int | None = None,
    ) -> None:
        """Add a generator of `length` bytes at an address that stays readable.

        They are the whole state while the attribute `unset` is None, the call of `same` returns that object, and the
        32-bit word at the address `zero` is zero; otherwise the slow way is taken. Digests come in the order of ranks.
        """
    def add_state(self, name: str, rank: int, get_state: Callable[[], Any]) -> None:
        """Add a generator whose bytes are in the tensor (uint8, on the CPU, its own memory) that a call returns."""
    def add_slow(self, name: str, rank: int) -> None:
        """Add a generator that is always read the slow way."""
    def when(self, space: Mapping[str, Any], key: str, arrived: Callable[[], None]) -> None:
        """Call `arrived` once, at the first reading at which `space` has a true value under `key`."""
    def digests(self) -> list[tuple[str, bytes]]:
        """Return name and digest (16 bytes) of each generator."""

@final
class BatchReader:
    """Reads digests of batches that consist of tensors and plain values in lists, tuples and dicts.

    Args:
        tensor: torch.Tensor.
        strided: torch.strided.
        describe: Returns bytes that describe a tensor of a dtype and a shape.
        budget: Bytes of one tensor that are digested whole; of larger ones, windows that add up to it.
    """

    def __init__(
        self, *, tensor: type, strided: object, describe: Callable[[Any, Any], bytes], budget: int
    ) -> None: ...
    def digest(self, batch: object, *, full: bool) -> bytes | None:
        """Return 16 bytes, or None if there is anything else in the batch. `full` reads all of every tensor."""

@final
class IndexLog:
    """Digests (16 bytes) of the payloads that a sampler issued, until they are handed out, and of all together."""

    def __init__(self) -> None: ...
    def note(self, payload: object) -> bool:
        """Note a payload that was issued; False, and nothing noted, if it is no index or list of indices."""
    def note_bytes(self, data: bytes) -> None:
        """Note a payload by bytes that determine it; for indices, little-endian integers of 64 bits."""
    def hand_out(self) -> bytes | None:
        """Return the digest of the oldest payload that was issued and not handed out."""
    @property
    def rolling(self) -> bytes:
        """Digest of all payloads, each with the digest before it."""
    @rolling.setter
    def rolling(self, digest: bytes) -> None: ...
    @property
    def last(self) -> bytes:
        """Digest of the last payload."""

@final
class WatchedMemory:
    """The memory of the tensors among some members, found again only when a member was replaced, added or moved.

    The members are given as spaces: the values of each dict among them, and what is no dict by itself.

    Args:
        gather: Returns the regions of the tensors among the members and inside containers among them, each once, and
            whether a container holds any.
        tensors: Classes of tensors; the first is the base of all.
        data_ptr: Returns a tensor's address.
    """

    def __init__(
        self,
        *,
        gather: Callable[[list[Any]], tuple[list[tuple[int, int]], bool]],
        tensors: list[type],
        data_ptr: Callable[[Any], int],
    ) -> None: ...
    def changed(self, spaces: Iterable[Any]) -> bool:
        """Tell whether the members are others than at the last call of any method; True the first time."""
    def regions(self, spaces: Iterable[Any]) -> list[tuple[int, int]]:
        """Return (address, length in bytes) of the tensors among the members."""
    def window(self, spaces: Iterable[Any], turn: int, length: int) -> bytes:
        """Return one xxh3-128 digest (16 bytes) over `length` bytes of the regions laid end to end as a ring.

        Window number `turn` begins at `turn * length`.
        """

@final
class TensorReader:
    """How tensors are read: torch's classes, told once.

    Args:
        tensor: torch.Tensor.
        parameter: torch.nn.Parameter, and its name in leaves.
        exchange: torch.Tensor's `__dlpack_c_exchange_api__`. Without one of a known version each tensor is read on the
            long way, and none is found to be large.
    """

    def __init__(self, *, tensor: type, parameter: tuple[type, str], exchange: object | None) -> None: ...
    def large(self, tensors: list[Any], least_bytes: int) -> list[tuple[Any, int, int]]:
        """Return (tensor, address, length in bytes) of each whose storage on the CPU has at least so many bytes."""
    def versions(self, tensors: list[Any], least_bytes: int, regions: Regions) -> Versions:
        """Read the version counters of those among the tensors that `large` would return.

        A tensor that is all of a storage in `regions` is not asked for its storage again. One that was made in inference
        mode has no counter and is left out.
        """

@final
class Versions:
    """Tensors' version counters: whether anybody was seen to write to them since."""

    @property
    def storages(self) -> set[tuple[int, int]]:
        """(address, length in bytes) of their storages."""
    def unmoved_since(self, before: Versions) -> set[tuple[int, int]]:
        """Return the storages, as `storages` does, whose counters all were the same before."""
    def unchanged(self, among: Set[tuple[int, int]] | None = None) -> bool:
        """Tell whether no counter has moved; given storages, none of theirs."""

@final
class Lent:
    """The memory of a save, as `Run.save` takes it."""

    def __len__(self) -> int: ...

@final
class Regions:
    """The storages of one capture: their memory, in the order of their numbers."""

    def __init__(self, reader: TensorReader) -> None: ...
    def __len__(self) -> int: ...
    def add(self, address: int, length: int, *, private: bool) -> int:
        """Add memory that the caller keeps alive, and return its number. Private: nobody else writes to it."""
    def find(self, address: int, length: int) -> int | None:
        """Return the number of the region that a storage on the CPU is saved as."""
    def note(self, address: int, length: int, index: int | None) -> None:
        """Note which region a storage on the CPU is saved as; None: copies of its parts."""
    def leaf(self, tensor: Any, flags: dict[str, Value] | None = None) -> Tensor | None:
        """Return the leaf of a tensor that is all of its storage, on the CPU, of a usual dtype.

        The storage is added if it is new, and kept alive. None, and nothing added, for any other tensor, and where parts
        of the storage were copied. Without `flags`, its class and whether it requires a gradient are noted; else they.
        """
    def lone_leaf(self, tensor: Any) -> Tensor | None:
        """Return what `leaf` does without flags; None also for a tensor that holds a gradient."""
    def spans(self) -> list[tuple[int, int]]:
        """Return (address, length in bytes) of each."""
    def parameters(
        self,
        parameters: Mapping[str, Any],
        prefix: str,
        leaves: Entries,
        gradients: Entries,
    ) -> bool:
        """Put the leaf of each of a module's parameters into `leaves`, and that of its gradient into `gradients`, by name.

        None stands for no gradient; requires_grad and nothing else is noted. False, and none of them there, where they are
        no dict, one is none that `leaf` takes, or has a name that is no text.
        """
    def lone_states(
        self,
        names: NameList,
        parameters: list[Any],
        first: int,
        states: States,
        named: Names,
        lowered: Entries,
    ) -> int:
        """Take what an optimizer has for each parameter, and put it into `lowered` by name, from number `first` on.

        Some may have none. In it is what `lone_leaf` gives for each tensor, by its
        key, and plain values as they are. Returns the number of the first parameter whose state is anything else than a
        dict of those: one is a tensor that has a name, or something else, or has a key that is no ASCII text. How many
        there are where there is no such. That one's is not taken.
        """
    def settled(self) -> None:
        """Take note that all leaves were made: what is the same in the next capture is not made again."""
    def bytes(self) -> int:
        """Return how many bytes they are."""
    def have_live(self, least_bytes: int) -> bool:
        """Tell whether one of at least so many bytes is live memory, and not the capture's own."""
    def take_frozen(self) -> Versions:
        """Return the version counters of the large parameters that require no gradient, once."""
    def lent(self, owned: Versions | None = None, unmoved: Set[tuple[int, int]] = ...) -> Lent:
        """Return all of them for a save.

        What is the capture's own, or a storage of `owned`, stays as it is until an optimizer steps. To what is in
        `unmoved` nobody is known to have written since the last save.
        """

@final
class Recorder:
    """Gathers what belongs to a step and appends its record.

    Args:
        run: A run that has begun by the time of the first record.
        generators: Their digests are in every record; as "untouched" where they stand at their origins.
        batches: Digests what was handed out.
        full: Whether all bytes of a batch are digested.
        tensor: torch.Tensor.
    """

    def __init__(
        self, run: Run, *, generators: GeneratorReader, batches: BatchReader, full: bool, tensor: type
    ) -> None: ...
    def set_origins(self, origins: dict[str, bytes]) -> None:
        """Set the digest of each generator before the first step."""
    def set_optimizers(self, optimizers: list[tuple[str, Any]]) -> None:
        """Set the optimizers, by name, whose groups' learning rates are in every record."""
    @property
    def in_step(self) -> bool:
        """Whether a batch was handed out whose step has no record yet."""
    def begin_step(self, indices: bytes | None, batch: object) -> bool:
        """Note the indices' digest and the batch's; False, and nothing noted, if the reader cannot digest the batch."""
    def begin_digested_step(self, indices: bytes | None, batch: bytes) -> None:
        """Note the digests of what was handed out."""
    def log(self, name: str, value: object) -> int | float | None:
        """Log a number, a bool, or a tensor with one element, and return it; None, and nothing logged, for others."""
    def log_component(self, name: str, value: bytes | int | float | str) -> None:
        """Log a value as the journal holds it."""
    def forget_logged(self) -> None:
        """Drop what was logged since the last record."""
    def record(
        self, step: int, phase: int, epoch: int, position: int, state: list[tuple[str, bytes]]
    ) -> Difference | None:
        """Append the record: what was handed out, generators, learning rates, what was logged, digests of the state.

        Returns and raises as `Run.record`. After a `StorageError` the record is kept, and goes before the next one.
        """
    @property
    def unwritten(self) -> int:
        """How many records are kept that the disk did not take."""
    def write(self) -> Difference | None:
        """Append what is kept, up to and including the first record that differs from an earlier life's."""

def derive_key(seed: int, purpose: str, epoch: int, position: int) -> bytes:
    """Return 32 bytes, a pure function of the arguments (docs/format.md, "Keys")."""

@final
class Order:
    """A random-access permutation of range(length) for one epoch (docs/format.md, "Orders"). Constant memory."""

    def __init__(self, seed: int, epoch: int, length: int) -> None: ...
    def __len__(self) -> int: ...
    def at(self, position: int) -> int: ...
    def slice(self, start: int, stop: int) -> list[int]: ...

@final
class CheckpointInfo:
    """What a manifest says of its checkpoint, without its tensors."""

    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> int:
        """0: in an epoch, after a step. 1: an epoch's after-work is done. 2: the run is finished."""
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def run_id(self) -> str: ...
    @property
    def created(self) -> str: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def environment(self) -> dict[str, Value]: ...
    @property
    def identity(self) -> dict[str, Value]: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def size_bytes(self) -> int:
        """Bytes of all storages it refers to."""
    @property
    def new_bytes(self) -> int:
        """Bytes that this checkpoint added to the disk."""

@final
class Checkpoint:
    """One committed checkpoint, its manifest verified."""

    @property
    def info(self) -> CheckpointInfo: ...
    @property
    def tree(self) -> Value: ...
    @property
    def storages(self) -> list[tuple[int, bytes]]:
        """(length in bytes, BLAKE3 digest) of each storage."""
    def read(self, storage: int) -> bytes:
        """Return one storage's bytes, verified; `DamagedCheckpoint` names file and leaf."""
    def read_into(self, targets: Sequence[tuple[int, int, int]]) -> None:
        """Fill memory (storage index, address, length in bytes) with verified bytes, GIL released.

        On `DamagedCheckpoint` the memory's content is unspecified: give scratch memory, not live tensors.
        """
    def verify(self) -> None:
        """Read everything it refers to and compare each digest."""

@final
class Difference:
    """The first component in which a step executed again differs from the journal."""

    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> int: ...
    @property
    def component(self) -> str: ...
    @property
    def expected(self) -> str: ...
    @property
    def found(self) -> str: ...

@final
class Run:
    """A run on disk, held by one writer: directory, lock, journal and store."""

    @staticmethod
    def open(
        path: Path,
        *,
        seed: int | None,
        settings: Mapping[str, str | int | float | bool],
        strict: bool = False,
        compress: Compress = None,
        memory: Lend | None = None,
    ) -> Run:
        """Open or create a run directory and take its lock.

        Args:
            path: Directory; created with its parents if missing.
            seed: Seed of a new run; None draws one. A different seed than the recorded one raises `IdentityError`.
            settings: Recorded in run.toml at creation only.
            strict: Refuse a damaged newest checkpoint instead of falling back to the next older one.
            compress: Whether this life's checkpoints are compressed: `alone`, each tensor by itself; `differences`, to
                an earlier checkpoint where that is shorter, which takes memory for one more copy of the state.
            memory: Where the bytes of `resumed_from` go while they are verified, so that nothing is read twice. Asked
                again for an older checkpoint where one is damaged.

        Raises:
            RunLocked, FormatError, DamagedCheckpoint, StorageError.
        """
    def set_compression(self, compress: Compress) -> None:
        """Compress later checkpoints otherwise, or not. Waits for a commit that is under way."""
    @property
    def path(self) -> Path: ...
    @property
    def id(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def life(self) -> int:
        """Process lives before this one plus one."""
    @property
    def resumed_from(self) -> Checkpoint | None:
        """What this life starts from: the newest whole checkpoint at open, unless the run has gone back for a trial.

        None for a new run.
        """
    @property
    def rejected(self) -> list[tuple[str, str]]:
        """(checkpoint name, why) of each newer one that was not whole, newest first."""
    @property
    def warnings(self) -> list[str]:
        """What opening found and left alone: foreign checkpoints, journal damage, swept left-overs."""
    def take_notices(self) -> list[str]:
        """Return what was noticed since this was last asked: that a prune could not delete files, and why."""
    def put_on_trial(
        self, *, least: int, most: int, memory: Lend | None = None
    ) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Choose recorded steps to be executed again first, and go back to the checkpoint before them.

        Legal before `begin`, once. Nothing on disk is changed: the newest checkpoint stays what the next life starts
        from, and until the trial has come to it again nothing can be committed.

        Args:
            least: As many steps are wanted; fewer are taken where there are no more.
            most: More steps are not.
            memory: Where the bytes of the checkpoint that it goes back to go while they are verified. Asked again where
                that one is damaged, and not at all where the trial starts from the newest.

        Returns:
            Boundaries (step, phase) to start from and to compare up to; None, and no step back, where nothing can be
            tried.
        """
    def begin(self) -> None:
        """Start this life's journal segment at `resumed_from`. Nothing is written to the journal before."""
    def record(
        self,
        step: int,
        phase: int,
        epoch: int,
        position: int,
        components: Sequence[tuple[str, bytes | int | float | str]],
    ) -> Difference | None:
        """Append one boundary's record; compare it with what earlier lives recorded for the same boundary.

        Components come in causal order. Floats are kept by their bits. Durability: the operating system has it on
        return (it survives kill -9, not a power cut) and the next commit syncs it.
        """
    def event(self, kind: str, step: int, fields: Mapping[str, Value]) -> None:
        """Append what is not a step: an override, a signal, a resume, a mark. Same durability as `record`."""
    @property
    def recorded_until(self) -> int:
        """Highest step that earlier lives recorded after `resumed_from` (its own step if none)."""
    def commit(
        self,
        *,
        step: int,
        phase: int,
        tree: Value,
        storages: Lent | Sequence[tuple[int, int]],
        identity: Mapping[str, Value],
        environment: Mapping[str, Value],
        metrics: Mapping[str, float],
        pinned: bool = False,
    ) -> CheckpointInfo:
        """Write one checkpoint, storages given as (address, length in bytes), GIL released.

        Durability: on return the checkpoint survives a power cut. Equal storages of earlier checkpoints are not
        written again. On an error nothing that was committed before is touched.
        """
    def save(
        self,
        *,
        step: int,
        phase: int,
        tree: Value,
        storages: Lent | Sequence[tuple[int, int, bool]],
        identity: Mapping[str, Value],
        environment: Mapping[str, Value],
        metrics: Mapping[str, float],
        pinned: bool = False,
        keep: tuple[int | None, int | None, tuple[str, Literal["min", "max"], int] | None] | None = None,
        full: bool = False,
        lent_for_s: float | None = None,
        confirm: Callable[[], bool] | None = None,
    ) -> None:
        """Start a checkpoint in the background and return: `commit` and `prune` on a thread of their own.

        Args:
            storages: (address, length in bytes, lent). What is lent stays alive and unchanged until `fence` has returned;
                what is unmoved, alive until there is an outcome; the rest is copied before this returns.
            keep: (last, every, best) as for `prune`; None deletes nothing.
            full: Compare every lent byte with what it was, instead of windows of each region.
            lent_for_s: How long it will probably be until the fence, at the least: what is written by then is not copied.
            confirm: Asked on that thread, when all was read or copied, whether nothing is known to have changed.

        Waits for a save that is under way. Durability: none on return; `outcome` tells.
        """
    def know(self, storages: Sequence[tuple[int, int, bytes]]) -> None:
        """Take note of what memory holds, as (address, length in bytes, BLAKE3 digest): what does not change may rest."""
    def fence(self) -> None:
        """Return when no lent memory is read any more, copying what is left of it. GIL released."""
    def outcome(
        self, *, wait: bool
    ) -> tuple[Literal["saved"], CheckpointInfo] | tuple[Literal["torn", "stirred"], int] | None:
        """Tell once what became of the last save; None while it is under way (without `wait`), or if there is none.

        `torn` (with the step): lent memory changed before it was read or copied; `stirred`: unmoved memory is not what it
        was at the last save. Nothing is left of it.

        Raises:
            StorageError: It could not be written; older checkpoints are as they were.
        """
    def prune(
        self,
        *,
        last: int | None,
        every: int | None,
        best: tuple[str, Literal["min", "max"], int] | None,
        dry_run: bool = False,
    ) -> list[str]:
        """Delete checkpoints that the retention policy does not keep; return their names. Foreign ones stay."""
    def checkpoints(self) -> list[CheckpointInfo]:
        """This run's checkpoints, oldest first."""
    def close(self) -> None:
        """Wait for a save that is under way, close the journal and give the lock back. Idempotent."""

Lend: TypeAlias = Callable[[Checkpoint], Sequence[tuple[int, int, int]]]
"""Memory for a checkpoint about to be read: (storage index, address, length in bytes), for any of its storages.

It is lent until the call that it is given to returns, or asks again. The content is unspecified if that raises.
"""

def read_checkpoint(path: Path, *, memory: Lend | None = None) -> Checkpoint:
    """Open a checkpoint for reading, without a lock: a manifest's path, or a run directory (its newest whole one).

    With `memory` every byte is read, once; without, those of a run directory's.
    """

def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint for reading some of its tensors; none is read before it is asked for.

    Of a run directory, the newest one whose manifest is whole and whose packs are there.
    """

def read_journal(path: Path) -> list[dict[str, Value]]:
    """Return the joined journal of a run directory, one dict a boundary.

    Its keys: step, phase, epoch, position, components (bytes, int, float or str by name) and lives (that recorded it).
    """

def main(arguments: Sequence[str]) -> int:
    """Run the command-line program on arguments (without its own name); return its exit code."""

def build_info() -> dict[str, str]: ...
