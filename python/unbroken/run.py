"""`Run`: one training over any number of process lives, from the user's loop to the core and back.

Touches: the run directory through the core; the tracked objects at boundaries only; torch's hooks, the stop signals'
handlers and loader workers' signal masks from the first epoch or batch until `close`.

How a life goes: the constructor opens the directory and reads; the first `epochs` or `batches` checks everything and
restores what lies between epochs; the first batch of a resumed epoch restores the rest, generators last, when the
loader is open and the user's code before the loop has run.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fnmatch
import gc
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import _core, notices
from .batches import Batches, Stream
from .errors import (
    DivergedFromJournal,
    FailedTrial,
    FormatError,
    InvalidArgument,
    MismatchError,
    NotExact,
    NotTracked,
    StorageError,
    UnbrokenError,
)
from .full import FullDisk, OnFull, estimate, is_full
from .policy import Keep, Policy, as_policy, walltime_deadline
from .proving import Instructions
from .saving import Compression, Mode, Saves
from .stop import StopRequest
from .torch import digests, environment, rng, shield, snapshot, tensors
from .torch.data import Session
from .torch.watch import MODULE_WATCH_STEPS, Watch

if TYPE_CHECKING:
    from .torch.trace import Tracer

# Exit code after a stop request: EX_TEMPFAIL, "try again later", which requeueing launchers can be told to act on.
REQUEUE_CODE = 75

# A changed environment is tried on this many recorded steps: as many as the sampled journal takes to look at everything
# that is small. Where checkpoints lie far apart it may be more, and is never more than the second number.
TRIAL_STEPS = 16
TRIAL_STEPS_MOST = 10_000

_IN_EPOCH, _BETWEEN_EPOCHS, _FINISHED = 0, 1, 2

# Steps that a run goes on for without its journal on a full disk.
_MOST_UNWRITTEN = 10_000


class State(dict[str, Any]):
    """The user's own values, saved with every checkpoint: `run.state["best"]` or `run.state.best`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"run.state has no value {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


@dataclass
class _Place:
    """Where the run is.

    `openings` names the loops of this epoch so far, the last one open if `in_loop`. `planned_steps` is known once a
    loader with a length was opened.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    in_loop: bool = False
    openings: list[str] = field(default_factory=list)
    planned_steps: int | None = None
    finished: bool = False

    def lowered(self) -> dict[str, Any]:
        return dict(vars(self), openings=list(self.openings))


@dataclass(frozen=True)
class _Trial:
    """A changed environment that recorded steps are executed again under, before anything new is trained."""

    changes: list[tuple[str, Any, Any]]
    first: int
    until: tuple[int, int]
    newest: str

    def words(self) -> str:
        changed = ", ".join(f"{name} {_text(old)} -> {_text(new)}" for name, old, new in self.changes)
        return f"the environment changed ({changed}): {self.steps()} executed again"

    def steps(self) -> str:
        last = self.until[0]
        return f"step {last}" if self.first >= last else f"steps {self.first}-{last}"


@dataclass
class _LoaderSlot:
    """One tracked loader: its session, and how often it was opened in which epoch. A stream outlasts epochs.

    The reference is weak: a script that builds a new loader every epoch lets the old one go, and its name with it.
    `remade` tells that a name has passed to a new loader before, so that no state is to be handed on.
    """

    session: Session
    loader: weakref.ref[Any]
    stream: bool
    remade: bool = False
    epoch: int = -1
    ordinal: int = 0
    active: bool = False


class Run:
    """A training that survives anything: the same command starts it and goes on with it.

    Args:
        path: Run directory, made if missing.
        seed: Seed of keyed data order and augmentation; drawn and recorded if None. Seeds no global generator.
        data: `native` keeps every number that plain PyTorch gives; `keyed` derives order and augmentation from the
            seed, the same for any number of workers.
        checkpoint: A `Policy`, or a number of steps. By default once a minute and at epoch ends.
        keep: A `Keep`, or how many of the newest steps. By default the newest three.
        save: `background` goes on training while a checkpoint is written; it is durable some time after its boundary,
            and a failure is raised at the next one. `copy` does too, and first copies all state at the boundary. `sync`
            waits at the boundary until it is durable, and takes no memory for a copy.
        compress: `alone` compresses each tensor that gets shorter by it; `differences` writes it as the difference to
            an earlier checkpoint where that is shorter still, and keeps one more copy of the state in memory. Bits stay
            what they are. Worth it where the disk is slow or small; each life may do otherwise.
        walltime: Seconds or `H:MM:SS` from now after which to stop as on a signal; Slurm's own end time by default.
        requeue_code: Exit code after a stop request.
        allow: Names of differences (shell patterns) that do not refuse the resume; the journal records them.
        journal: `sampled` digests a rotating window of the state each step, `full` all of it.
        data_fingerprint: Text that identifies the content of the data; compared on resume.
        on_divergence: `stop` raises when a step executed again differs from the journal; `continue` marks the run.
        on_full: What to do when the disk is full: `stop` raises, `wait` pauses until there is room, `continue` trains
            on and tries again when the next checkpoint is due. The last one of a life is never left out.
        strict: Refuse a damaged newest checkpoint instead of falling back to the next older one.
        quiet: Say nothing on stderr.
        objects: What to track, by name: modules, optimizers, schedulers, scalers, generators, samplers, anything with
            `state_dict` and `load_state_dict`.

    Raises:
        RunLocked: Another process holds the run.
        NoWholeCheckpoint, DamagedCheckpoint, FormatError, StorageError: The directory cannot be used as it is.

    Durability: a checkpoint that `checkpoints` lists survives a power cut; a step's journal record survives a kill.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        seed: int | None = None,
        data: Literal["native", "keyed"] = "native",
        checkpoint: Policy | int | None = None,
        keep: Keep | int | None = None,
        save: Mode = "background",
        compress: Compression | None = None,
        walltime: str | float | None = None,
        requeue_code: int = REQUEUE_CODE,
        allow: Iterable[str] = (),
        journal: digests.Level | None = None,
        data_fingerprint: str | None = None,
        on_divergence: Literal["stop", "continue"] = "stop",
        on_full: OnFull = "stop",
        strict: bool = False,
        quiet: bool = False,
        **objects: Any,
    ) -> None:
        if data not in ("native", "keyed"):
            raise InvalidArgument(f"data must be 'native' or 'keyed', got {data!r}")
        self._proof = proof = Instructions.read(os.environ, Path(path).name)
        self._is_proof = proof != Instructions()
        if proof.directory is not None:
            # What is compared needs every byte and every checkpoint, and goes on at a difference to show its extent.
            journal = journal if proof.own_journal else "full"
            keep, on_divergence = Keep(last=None), "continue"
            requeue_code = REQUEUE_CODE
            seed = proof.seed if seed is None else seed
        level = journal if journal is not None else os.environ.get("UNBROKEN_JOURNAL", "sampled")
        if level not in ("sampled", "full"):
            raise InvalidArgument(f"journal must be 'sampled' or 'full', got {level!r}")
        if on_divergence not in ("stop", "continue"):
            raise InvalidArgument(f"on_divergence must be 'stop' or 'continue', got {on_divergence!r}")
        if save not in get_args(Mode):
            raise InvalidArgument(f"save must be 'background', 'copy' or 'sync', got {save!r}")
        if compress is not None and compress not in get_args(Compression):
            raise InvalidArgument(f"compress must be None, 'alone' or 'differences', got {compress!r}")
        if isinstance(allow, str):
            allow = [allow]
        self.path = proof.place(Path(path))
        self.policy = as_policy(checkpoint)
        self.keep = keep if isinstance(keep, Keep) else Keep() if keep is None else Keep(last=keep)
        self.requeue_code = requeue_code
        self.state = State()
        self._data: Literal["native", "keyed"] = data
        self._level: digests.Level = level
        self._allow = [*allow, *filter(None, os.environ.get("UNBROKEN_ALLOW", "").split(","))]
        self._fingerprint = data_fingerprint
        self._on_divergence = on_divergence
        self._say = notices.speaker(quiet=quiet)
        self._stop = StopRequest(
            deadline=walltime_deadline(walltime, now=time.time(), environment=os.environ)
        )
        self._full = FullDisk(on_full, say=self._say, stopping=lambda: self._stop.reason is not None)
        self._objects: dict[str, Any] = {}
        self.track(**objects)

        staging = tensors.Staging(snapshot.copied_leaves)
        with tensors.kept():
            self._core = _core.Run.open(
                self.path,
                seed=seed,
                settings={"front": "pytorch"},
                strict=strict,
                compress=compress,
                memory=staging,
            )
        self._saves = Saves(
            self._core,
            self._objects,
            policy=self.policy,
            keep=self.keep,
            mode=save,
            compress=compress,
            level=level,
            disk=self._full,
            say=self._say,
        )
        self._watch = Watch(self._objects)
        self._slots: dict[str, _LoaderSlot] = {}
        self._saved_loaders: dict[str, dict[str, Any]] = {}
        self._retired: set[str] = set()
        self._loops_seen: set[tuple[CodeType, int]] = set()
        # Digest of each generator at step 0.
        self._origins: dict[str, bytes] = {}
        self._identity: dict[str, Any] = {}
        self._recorded_identity: dict[str, Any] = {}
        self._versions: dict[str, Any] = {}
        self._recorder = digests.recorder(self._core, level)
        self._state_digests: digests.StateDigests | None = None
        self._trial: _Trial | None = None
        self._metrics: dict[str, float] = {}
        self._place = _Place()
        self._resume_place: _Place | None = None
        self._checkpoint: _core.Checkpoint | None = self._core.resumed_from
        self._restore: snapshot.RestorePlan | None = None
        # Weak: the loop's own reference is the only one, and it goes the moment the user breaks out.
        self._primary: weakref.ref[Batches] | None = None
        self._primary_session: Session | None = None
        self._tracer: Tracer | None = None
        self._started = self._closed = False
        self._replayed_from: int | None = None
        self._has_diverged = False
        self._overridden = False
        self._steps_of_this_life = 0
        self._training_since = time.monotonic()
        for text in self._core.warnings:
            self._say(text)
        for name, why in self._core.rejected:
            self._say(f"checkpoint {name} is not whole and was passed over: {why}")
        # Its tree, and what was read of it while it was verified, until it has been put back.
        self._tree: dict[str, Any] = {}
        self._loader: tensors.Loader | None = None
        if self._checkpoint is not None:
            self._read_place(self._checkpoint, *staging.taken())
        atexit.register(self._at_exit)

    # What the user asks.

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._core.seed

    @property
    def step(self) -> int:
        """Steps done: turns of the user's loop, over all lives."""
        return self._place.step

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return self._place.epoch

    @property
    def position(self) -> int:
        """Batches handed out in the current epoch's loop; where a progress bar should begin."""
        return self._place.position

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self._place.finished

    def checkpoints(self) -> list[_core.CheckpointInfo]:
        """Return this run's committed checkpoints, oldest first."""
        return self._core.checkpoints()

    def __repr__(self) -> str:
        done = ", finished" if self.finished else ""
        return f"Run({str(self.path)!r}, step={self.step}, checkpoints={len(self.checkpoints())}{done})"

    # What the user's script calls.

    def track(self, **objects: Any) -> None:
        """Track more objects by name. Legal until training starts.

        Raises:
            InvalidArgument: The name is taken, or training has started.
        """
        if getattr(self, "_started", False):
            raise InvalidArgument(
                "run.track() comes too late: training has started and state may be restored"
            )
        for name, item in objects.items():
            if name in self._objects or name == "state":
                raise InvalidArgument(f"the name {name!r} is taken in this run")
            if item is None:
                raise InvalidArgument(f"{name}=None: there is nothing to track, leave the argument out")
            self._objects[name] = item

    def epochs(self, count: int) -> Iterator[int]:
        """Iterate over the epochs that are left of `count`; the end of the iteration completes the run.

        Durability: what comes after the last epoch's work is committed when the iteration ends.
        """
        if count < 0:
            raise InvalidArgument(f"epochs must be at least 0, got {count}")
        self._start({"epochs": count})
        if self._place.finished:
            return
        while self._place.epoch < count:
            epoch = self._place.epoch
            yield epoch
            self._settle()
            self._epoch_done(epoch)
        self._complete()

    def batches(
        self,
        loader: Any,
        *,
        name: str | None = None,
        data: Literal["native", "keyed"] | None = None,
        until_step: int | None = None,
        progress: bool | Callable[..., Any] = False,
    ) -> Batches:
        """Return the loader's batches of this epoch that are left; each turn of the loop is a step.

        Opened while another loop of this run is open (with `zip`, or inside its body), it is an auxiliary loop: its
        position is saved with each checkpoint, and it counts no steps.

        Args:
            loader: A `torch.utils.data.DataLoader`, as it is.
            name: Name of the loader in checkpoints; needed only where several alike ones cannot be told apart.
            data: Overrides the run's data mode for this loader.
            until_step: Outside `epochs`: go through the loader again and again until the run has made this many
                steps, then complete it.
            progress: True for a tqdm bar that continues where it was, or a class to call like tqdm.

        Raises:
            NotExact: The loader is of a kind that cannot be resumed bit for bit.
            MismatchError: The loader is not the one of the checkpoint.
        """
        return Batches(
            self,
            loader,
            name=name,
            data=data or self._data,
            until_step=until_step,
            progress=progress,
            positions=False,
        )

    def enumerate(
        self,
        loader: Any,
        *,
        name: str | None = None,
        data: Literal["native", "keyed"] | None = None,
        until_step: int | None = None,
        progress: bool | Callable[..., Any] = False,
    ) -> Batches:
        """Return pairs (position in the epoch, batch), like `enumerate`, but counting on after a resume.

        Arguments and errors are those of `batches`.
        """
        return Batches(
            self,
            loader,
            name=name,
            data=data or self._data,
            until_step=until_step,
            progress=progress,
            positions=True,
        )

    def stream(
        self, loader: Any, *, name: str | None = None, data: Literal["native", "keyed"] | None = None
    ) -> Stream:
        """Return an endless iterator over a second loader, for `next()` in the body; its position is saved."""
        return Stream(self, loader, name=name, data=data or self._data)

    def log(self, **logged: Any) -> None:
        """Put numbers (by their bits), texts or tensors (by digest) of this step into the journal.

        The last finite value under each name is kept in the checkpoint, for `Keep(best=...)`.
        """
        for name, value in logged.items():
            number = self._recorder.log(name, value)
            if number is None:
                number = digests.logged(name, value)
                self._recorder.log_component(name, number)
            if isinstance(number, (int, float)):
                self._metrics[name] = float(number)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run an evaluation that leaves training as it was: generators and `training` flags are put back after."""
        flags = snapshot.training_flags(self._objects)
        self._watch.pause()
        try:
            with rng.preserved():
                yield
        finally:
            snapshot.restore_training_flags(flags)
            self._watch.resume()

    def pin(self) -> None:
        """Save the next boundary and keep that checkpoint whatever the retention says."""
        self._saves.pin_next = True

    def finish(self) -> None:
        """Complete the run here, before its planned end: early stopping. Starting it again trains nothing."""
        self._settle()
        if not self._place.finished:
            self._complete()

    def close(self) -> None:
        """Give the run back: lock, hooks, signal handlers, loaders. Idempotent; commits nothing.

        A checkpoint that is under way is waited for.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._saves.close()
        for slot in self._slots.values():
            slot.session.close()
        self._watch.uninstall()
        shield.uninstall()
        self._stop.uninstall()
        self._core.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._say_incomplete(failed=kind is not None)
        self.close()

    # Starting: everything is checked before anything live is touched.

    def _read_place(self, checkpoint: _core.Checkpoint, tree: Any, loader: tensors.Loader) -> None:
        if not isinstance(tree, dict) or "run" not in tree:
            self._core.close()
            raise FormatError(
                f"`{self.path}` holds a checkpoint that no training wrote, such as an imported one",
                hint="give what `unbroken.load` returns to your objects, and train in a run of its own",
                path=self.path,
            )
        self._place = _Place(**tree["run"])
        self._metrics = dict(checkpoint.info.metrics)
        self._saved_loaders = dict(tree["loaders"])
        self._origins = dict(tree["untouched"]["origins"])
        self._recorded_identity = checkpoint.info.identity
        self._tree, self._loader = tree, loader
        self.state.update(self._recorded_state())

    def _recorded_state(self) -> dict[str, Any]:
        assert self._checkpoint is not None, "something was recorded"
        return snapshot.raise_plain(self._tree["state"], self._checkpoint, path="state", loader=self._loader)

    def _start(self, plan: dict[str, Any]) -> None:
        if self._closed:
            raise InvalidArgument("this run is closed")
        if self._started:
            if any(self._identity.get(f"plan.{name}") != value for name, value in plan.items()):
                raise InvalidArgument(
                    "a run has one plan: epochs() or batches(until_step=...), with one number"
                )
            return
        self._refuse_distributed()
        self._identity = {f"plan.{name}": value for name, value in plan.items()}
        self._identity["data.fingerprint"] = self._fingerprint
        self._identity.update(environment.settings())
        self._identity.update(snapshot.identity(self._objects))
        self._versions = environment.versions()
        allowed = self._check_identity()
        changes = [] if self._place.finished else self._changes()
        if changes and not allowed:
            self._put_on_trial(changes)
        allowed += [(f"environment.{name}", old, new) for name, old, new in changes if self._may_change(name)]
        checkpoint = self._checkpoint
        if checkpoint is not None:
            with tensors.kept():
                self._restore = snapshot.plan_restore(
                    self._objects,
                    self._tree["objects"],
                    checkpoint,
                    loader=self._loader,
                    allow=self._allowed,
                )
        self._started = True
        self._recorder.set_optimizers(digests.optimizers(self._objects))
        self._recorder.set_origins(self._origins)
        self._state_digests = digests.StateDigests(self._objects, self._level)
        self._training_since = time.monotonic()
        if checkpoint is not None and self._place.finished and not allowed:
            self._restore_all()
            self._say(f"{self.path}: {self._complete_words()}; nothing to do")
            return
        self._place.finished = False
        self._stop.install()
        shield.install()
        self._watch.install()
        self._core.begin()
        for name, recorded, current in allowed:
            self._overridden = True
            self._core.event(
                "override", self.step, {"name": name, "recorded": _text(recorded), "current": _text(current)}
            )
        if checkpoint is None:
            self._origins = dict(rng.digests())
            self._recorder.set_origins(self._origins)
            self._commit(_IN_EPOCH, required=True)
            self._proof.reached("saved:0")
            return
        self._say_resumed(checkpoint, changes)
        if self._place.in_loop:
            self._resume_place = self._place
            self._place = dataclasses.replace(self._place, in_loop=False, openings=[])
        else:
            self._restore_all()
            self._record_restored()
            self._save_restored(_BETWEEN_EPOCHS)

    def _check_identity(self) -> list[tuple[str, Any, Any]]:
        """Return the allowed differences; refuse all others by name."""
        if self._checkpoint is None:
            return []
        recorded = {n: v for n, v in self._recorded_identity.items() if not n.startswith("loader/")}
        differences = environment.changed(recorded, self._identity)
        self._refuse(differences)
        return differences

    def _changes(self) -> list[tuple[str, Any, Any]]:
        """Return what is another environment than the newest checkpoint's: name, recorded, now."""
        if self._checkpoint is None:
            return []
        recorded = self._checkpoint.info.environment
        known = {name: value for name, value in self._versions.items() if name in recorded}
        return environment.changed({name: recorded[name] for name in known}, known)

    def _may_change(self, name: str) -> bool:
        return self._allowed(f"environment.{name}")

    def _put_on_trial(self, changes: list[tuple[str, Any, Any]]) -> None:
        """Go back to where the journal holds enough steps, if what changed is not allowed to change the numbers."""
        proving = self._proof.directory is not None
        if proving or self._on_divergence != "stop" or any(self._may_change(name) for name, _, _ in changes):
            return
        newest = self._checkpoint
        assert newest is not None, "what changed has changed since a checkpoint"
        staging = tensors.Staging(snapshot.copied_leaves)

        def lend(checkpoint: _core.Checkpoint) -> list[tuple[int, int, int]]:
            # Two states at a time are enough: what is live, and this one.
            self._tree, self._loader = {}, None
            return staging(checkpoint)

        with tensors.kept():
            trial = self._core.put_on_trial(least=TRIAL_STEPS, most=TRIAL_STEPS_MOST, memory=lend)
        checkpoint = self._checkpoint = self._core.resumed_from
        assert checkpoint is not None, "a trial starts from a checkpoint"
        if checkpoint.info.name != newest.info.name:
            self._read_place(checkpoint, *staging.taken())
        elif self._loader is None:
            self._tree, self._loader = newest.tree, tensors.Loader(newest)  # The older ones are damaged.
        if trial is not None:
            (step, _), until = trial
            self._trial = _Trial(changes, step + 1, until, newest.info.name)

    def _on_trial(self, phase: int) -> bool:
        """Tell whether this boundary is still one of a trial: what it could save is saved already."""
        trial = self._trial
        if trial is None:
            return False
        if (self.step, phase) < trial.until:
            return True
        self._trial = None
        self._say(f"{trial.words()}: still exact")
        return False

    def _refuse(self, differences: list[tuple[str, Any, Any]], *, also: str = "") -> None:
        refused = [d for d in differences if not self._allowed(d[0])]
        if refused:
            names = ",".join(name for name, _, _ in refused[:4])
            raise MismatchError(
                refused,
                hint=f"make them equal again; {also}or go on knowingly with "
                f"Run(allow=[...]) or UNBROKEN_ALLOW={names}; the journal will record it",
            )

    def _allowed(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allow)

    def _refuse_distributed(self) -> None:
        size = environment.ranks()
        if size > 1:
            raise NotExact(
                f"torch.distributed with {size} ranks",
                "this release saves one process; several ranks would write over each other's run",
                hint="train in one process, or give each rank a run directory of its own",
            )

    def _restore_all(self) -> None:
        """Put back everything, generators last. Called when no more of the user's or the loader's code comes before."""
        plan, tree = self._restore, self._tree
        assert plan is not None, "a restore has a plan"
        recorded = self._recorded_state()
        with tensors.kept():
            plan.apply()
        if self._checkpoint is not None:
            self._saves.resumed(plan.resting(), self._checkpoint)
        self.state.clear()
        self.state.update(recorded)
        rng.restore({**tree["generators"], **tree["untouched"]["generators"]})
        self._restore, self._tree, self._loader = None, {}, None

    def _record_restored(self) -> None:
        # Inside an accumulation window the partial gradients are part of the state: the journal shows that they are.
        assert self._checkpoint is not None, "something was restored"
        fields = {
            "checkpoint": self._checkpoint.info.name,
            "gradients": snapshot.count_gradients(self._objects),
        }
        self._core.event("restored", self.step, fields)

    def _say_resumed(self, checkpoint: _core.Checkpoint, changes: list[tuple[str, Any, Any]]) -> None:
        place = self._place
        where = f"epoch {place.epoch}" + (f", batch {place.position}" if place.in_loop else "")
        info = checkpoint.info
        self._say(
            f"resumed {self.path} at step {place.step} ({where}) from checkpoint {info.name}: "
            f"{notices.size(info.size_bytes)} verified"
        )
        self._say_space(info.size_bytes)
        for name, recorded, current in changes:
            self._say(f"the environment changed: {name} was {_text(recorded)}, is {_text(current)}")
        if self._trial is not None:
            self._say(
                f"{self._trial.steps()} are executed again under it first, and compared with the journal"
            )
        elif changes:
            self._say("nothing was executed again under it: the numbers may be others from here on")
        if self._fingerprint is None:
            self._say("the data's content was not compared: no data_fingerprint was given")

    # Loaders: which one is meant, and opening it.

    def _open_primary(self, batches: Batches) -> bool:
        """Open the loop's loader; False if this loop was already over at the checkpoint that the run resumed from."""
        self._settle()
        resume = self._resume_place
        index = len(self._place.openings)
        expected = None
        if resume is not None and resume.epoch == self._place.epoch and index < len(resume.openings):
            expected = resume.openings[index]
        name, slot = self._slot(batches, expected)
        self._place.openings.append(name)
        if resume is not None and index < len(resume.openings) - 1:
            return False
        batches.attach(slot.session)
        if resume is not None:
            self._resume_place = None
            slot.session.open(self._epoch_key(slot, count=False))
            self._restore_all()
            self._record_restored()
            # What the user's code before the loop logged belongs to the epoch's first step, which is done.
            self._recorder.forget_logged()
        else:
            self._open_fresh(slot)
        slot.active = True
        self._place.in_loop = True
        self._place.position = slot.session.position
        self._primary = weakref.ref(batches)
        self._primary_session = slot.session
        epochs, expected_batches = self._identity.get("plan.epochs"), slot.session.batches_expected
        if epochs is not None and expected_batches is not None and len(self._place.openings) == 1:
            self._place.planned_steps = epochs * expected_batches
        if resume is not None:
            self._save_restored(_IN_EPOCH)
        if self._saves.weighs:
            self._saves.step_begins()
        return True

    def _loop_is_open(self) -> bool:
        batches = self._primary() if self._primary is not None else None
        return batches is not None

    def _open_fresh(self, slot: _LoaderSlot) -> None:
        if slot.active:
            slot.session.abandon()
        slot.session.open(self._epoch_key(slot, count=True))

    def _open_auxiliary(self, batches: Batches | Stream) -> None:
        name, slot = self._slot(batches, None)
        saved = self._saved_loaders.pop(name, None)
        batches.attach(slot.session)
        resumed = saved is not None and saved["active"]
        if resumed:
            with rng.preserved():
                slot.session.open(self._epoch_key(slot, count=False))
        else:
            self._open_fresh(slot)
        slot.active = True

    def _reopen(self, session: Session) -> None:
        slot = next(s for s in self._slots.values() if s.session is session)
        session.open(self._epoch_key(slot, count=True))

    def _epoch_key(self, slot: _LoaderSlot, *, count: bool) -> int:
        """Return the number that keys this pass: the epoch, and how often the loader was opened in it before."""
        if count:
            slot.ordinal = slot.ordinal + 1 if slot.epoch == self._place.epoch else 0
            slot.epoch = self._place.epoch
        return slot.epoch | slot.ordinal << 32

    def _slot(self, batches: Batches | Stream, expected: str | None) -> tuple[str, _LoaderSlot]:
        """Return name and slot of a loader, made and given its saved state at first sight."""
        loader = batches.loader
        for name, slot in self._slots.items():
            if slot.loader() is loader:
                return name, slot
        self._retire_loaders()
        name = batches.name or expected
        probe = None
        if name is None:
            probe = Session(loader, name="loader", mode=batches.data, seed=0).identity()
            name = self._name_like(probe)
        elif name in self._slots:
            raise InvalidArgument(f"two loaders of this run are named {name!r}")
        seed = int.from_bytes(_core.derive_key(self.seed, f"loader/{name}", 0, 0)[:8], "little")
        session = Session(loader, name=name, mode=batches.data, seed=seed)
        slot = _LoaderSlot(session, weakref.ref(loader), stream=isinstance(batches, Stream))
        slot.remade = name in self._retired
        identity = {f"loader/{name}.{key}": value for key, value in session.identity().items()}
        saved = self._saved_loaders.get(name)
        if saved is not None:
            prefix = f"loader/{name}."
            recorded = {n: v for n, v in self._recorded_identity.items() if n.startswith(prefix)}
            differences = environment.changed(recorded, identity)
            self._refuse(
                differences,
                also="or, if this is another loader, give it a name: run.batches(..., name=...); ",
            )
            for key, old, new in differences:
                self._overridden = True
                self._core.event(
                    "override", self.step, {"name": key, "recorded": _text(old), "current": _text(new)}
                )
            slot.remade = slot.remade or saved["remade"]
            if saved["active"] or not slot.remade:
                session.restore(saved["state"])
                slot.epoch, slot.ordinal = saved["epoch"], saved["ordinal"]
        self._identity.update(identity)
        self._slots[name] = slot
        return name, slot

    def _retire_loaders(self) -> None:
        for name, slot in list(self._slots.items()):
            if slot.loader() is None and not slot.active:
                slot.session.close()
                del self._slots[name]
                self._saved_loaders.pop(name, None)
                self._retired.add(name)

    def _name_like(self, identity: Mapping[str, Any]) -> str:
        """Return the saved, not yet taken name whose loader looked like this one, or the next free name."""
        for name in self._saved_loaders:
            prefix = f"loader/{name}."
            recorded = {
                n[len(prefix) :]: v for n, v in self._recorded_identity.items() if n.startswith(prefix)
            }
            if name not in self._slots and recorded == dict(identity):
                return name
        # A changed loader must be named as such, never be taken for a new one that starts from the beginning.
        left = [name for name in self._saved_loaders if name not in self._slots]
        if left:
            kind = identity["dataset.type"]
            alike = [n for n in left if self._recorded_identity.get(f"loader/{n}.dataset.type") == kind]
            return (alike or left)[0]
        taken = self._slots.keys()
        number = 1
        while (name := "loader" if number == 1 else f"loader{number}") in taken:
            number += 1
        return name

    # Boundaries.

    def _handed_out(self, session: Session, batch: Any) -> None:
        """Note what goes into the step that begins now, before the user's code can change it."""
        indices = session.indices_digest
        if not self._recorder.begin_step(indices, batch):
            self._recorder.begin_digested_step(indices, digests.batch_digest(batch, level=self._level))
        self._place.position = session.position
        if self._is_proof and self._proof.trace_step == self._place.step + 1:
            self._trace(batch)

    def _trace(self, batch: Any) -> None:
        from .torch.trace import Tracer

        self._tracer = Tracer(self._proof.trace_file, self._objects)
        self._tracer.begin(self.step + 1, batch)

    def _step_done(self) -> None:
        """The boundary after a step, inside the loop: record, save if due, stop if asked.

        The step's own work has emptied the processor's caches: a Python call costs microseconds here, so few are made.
        """
        self._record_step()
        if self._watch.seen:
            self._check_tracked()
        if self._is_proof:
            # The same kill is to find the same checkpoints each time: what it does to a save, `saving:K` is for.
            if self._proof.awaits(f"step:{self.step}"):
                self._saves.settle()
            self._proof.reached(f"step:{self.step}")
        if self._saves.has_news:
            self._saves.hear()
        reason = self._stop.reason
        if reason is None and self._is_proof:
            reason = self._proof_ends()
        if reason is not None or self._due(_IN_EPOCH):
            # What is to happen when this checkpoint is durable, happens at its own boundary.
            wait = self._proof.awaits(f"saved:{self.step}")
            self._commit(_IN_EPOCH, wait=wait, required=reason is not None)
            self._proof.reached(f"saved:{self.step}")
        if reason is not None:
            self._exit_for(reason)
        if self._saves.weighs:
            self._saves.step_begins()

    def _record_step(self) -> None:
        if self._tracer is not None:
            self._tracer.end()
            self._tracer = None
        assert self._recorder.in_step, "a step ends only after its batch was handed out"
        self._place.step += 1
        self._steps_of_this_life += 1
        self._record(_IN_EPOCH)
        if self._steps_of_this_life == MODULE_WATCH_STEPS:
            self._watch.stop_watching_modules()

    def _settle(self) -> None:
        """Close what an early `break` left open. Its step is recorded here, at the next thing that the run hears of."""
        session, self._primary_session = self._primary_session, None
        batches = self._primary() if self._primary is not None else None
        self._primary = None
        if session is None:
            return
        if self._recorder.in_step:
            self._record_step()
            self._check_tracked()
        if batches is not None:
            batches.abandon()
        else:
            session.abandon()
        self._set_inactive(session)

    def _loop_ended(self, batches: Batches) -> None:
        """The loop ran to its end."""
        session = batches.session
        primary = session is not None and session is self._primary_session
        if primary:
            self._primary = self._primary_session = None
        if session is not None:
            self._set_inactive(session)
        if primary:
            self._proof.reached(f"work:{self._place.epoch}")

    def _set_inactive(self, session: Session) -> None:
        for slot in self._slots.values():
            if slot.session is session:
                slot.active = False

    def _epoch_done(self, epoch: int) -> None:
        """The boundary at which an epoch's after-work is done."""
        if self._resume_place is not None:
            raise UnbrokenError(
                f"epoch {epoch} was resumed in mid-epoch at batch {self._resume_place.position}, "
                "but the program opened no run.batches() in it",
                hint="the loop over run.batches(...) must be reached in each epoch as it was before",
            )
        for slot in self._slots.values():
            if slot.active and not slot.stream:
                slot.session.abandon()
                slot.active = False
        self._place = _Place(step=self.step, epoch=epoch + 1, planned_steps=self._place.planned_steps)
        self._record(_BETWEEN_EPOCHS)
        self._check_tracked()
        self._proof.reached(f"epoch:{epoch}")
        reason = self._stop.reason
        if reason is not None or self._due(_BETWEEN_EPOCHS):
            self._commit(_BETWEEN_EPOCHS, required=reason is not None)
        if reason is not None:
            self._exit_for(reason)

    def _next_pass(self) -> None:
        """Without epochs of the user's: the loader is exhausted and begins again."""
        self._place.epoch += 1
        self._place.position = 0
        self._place.openings = self._place.openings[-1:]

    def _complete(self) -> None:
        trial = self._trial
        if self._on_trial(_FINISHED) and trial is not None:
            raise UnbrokenError(
                f"{trial.words()}, and the run ended at step {self.step}, before the journal does",
                hint=f"nothing was lost: checkpoint {trial.newest} is as it was",
            )
        self._place.finished = True
        self._place.in_loop = False
        self._commit(_FINISHED, required=True)
        self._say(f"{self.path}: {self._complete_words()}")
        self._stop.uninstall()

    def _complete_words(self) -> str:
        planned = self._place.planned_steps
        return f"complete, {self.step} of {planned} steps" if planned else f"complete, {self.step} steps"

    def _record(self, phase: int) -> None:
        place, state = self._place, self._state_digests
        assert state is not None, "a boundary comes after the start"
        try:
            difference = self._recorder.record(
                place.step, phase, place.epoch, place.position, state.at(place.step)
            )
        except StorageError as error:
            if not is_full(error):
                raise
            self._full.attempt(self._write_records, required=self._recorder.unwritten > _MOST_UNWRITTEN)
        else:
            if difference is not None and not self._has_diverged:
                self._diverged(difference)
        if place.step <= self._core.recorded_until and not self._has_diverged:
            self._executed_again(phase)

    def _write_records(self) -> None:
        """Write what a full disk did not take."""
        while self._recorder.unwritten:
            difference = self._recorder.write()
            if difference is not None and not self._has_diverged:
                self._diverged(difference)

    def _executed_again(self, phase: int) -> None:
        if self._replayed_from is None:
            self._replayed_from = self.step
        if self.step == self._core.recorded_until and phase == _IN_EPOCH and not self._recorder.unwritten:
            begin, last = self._replayed_from, self.step
            steps = f"step {last}" if begin == last else f"steps {begin}-{last}"
            self._say(f"{steps} executed again: identical")

    def _captured_generators(self) -> dict[str, Any]:
        # Comparisons of checkpoints leave the entry "untouched" out (docs/format.md, "Trees").
        captured = rng.capture()
        unused = self._untouched(["python", "numpy", "torch"])
        return {
            "generators": {name: state for name, state in captured.items() if name not in unused},
            "untouched": {"generators": {name: captured[name] for name in unused}, "origins": self._origins},
        }

    def _untouched(self, names: Iterable[str]) -> list[str]:
        now, origins = dict(rng.digests()), self._origins
        return [name for name in names if (key := f"rng/{name}") in origins and now.get(key) == origins[key]]

    def _diverged(self, difference: _core.Difference) -> None:
        self._has_diverged = True
        error = self._divergence(difference)
        try:
            self._core.event(
                "diverged",
                difference.step,
                {
                    "component": difference.component,
                    "expected": difference.expected,
                    "found": difference.found,
                    "went_on": self._on_divergence == "continue" or self._overridden,
                },
            )
        except StorageError as full:
            if not is_full(full):
                raise
            # It must not hide what is told here.
            self._say(f"the journal has no room for a word about what follows: {full}")
        # What was allowed to differ may well give other numbers: that was asked for by name, and is in the journal.
        if self._on_divergence == "stop" and not self._overridden:
            raise error
        notices.warn(str(error))

    def _divergence(self, difference: _core.Difference) -> DivergedFromJournal:
        trial = self._trial
        if trial is None:
            return DivergedFromJournal(
                difference,
                hint="the run is not exact from here; compare with `unbroken log` and `unbroken diff`, or go on with "
                'Run(on_divergence="continue"), which marks the run',
            )
        names = ",".join(f"environment.{name}" for name, _, _ in trial.changes)
        return FailedTrial(
            difference,
            trial.changes,
            hint=f"nothing was lost: checkpoint {trial.newest} is as it was. Make the environment what it was, or go "
            f"on from there knowingly with Run(allow=[...]) or UNBROKEN_ALLOW={names}; the journal will record it",
        )

    def _check_tracked(self) -> None:
        untracked = [text for text in self._watch.untracked() if not self._allowed(f"untracked:{text}")]
        if untracked:
            raise NotTracked(
                " and ".join(untracked),
                hint="add it to Run(...) or run.track(...), by any name; what only evaluates belongs in run.aside(); "
                'allow=["untracked:*"] goes on without',
            )

    def _due(self, phase: int) -> bool:
        if self._trial is not None:
            # At its end there is a checkpoint to be made: the first under the environment that passed.
            return not self._on_trial(phase)
        step = self._place.step
        if self._is_proof and f"{step}-{phase}" in self._proof.save:
            return True
        return self._saves.due(step, phase)

    def _commit(self, phase: int, *, wait: bool = False, required: bool = False) -> None:
        """Save this boundary: see `Saves.save`."""
        if self._on_trial(phase):
            return
        with self._saves.standing(), _collector_paused():
            self._commit_now(phase, wait=wait, required=required)

    def _commit_now(self, phase: int, *, wait: bool, required: bool) -> None:
        captured = snapshot.capture(self._objects, values={"state": dict(self.state)})
        tree = {
            "run": self._place.lowered(),
            "objects": captured.tree,
            "state": captured.values["state"],
            **self._captured_generators(),
            "loaders": {**self._unopened_loaders(), **self._loader_states()},
        }
        self._proof.reached(f"saving:{self.step}")
        if self._checkpoint is None and self.step == 0:
            now = captured.nbytes()
            self._say_space(now + snapshot.bytes_to_come(self._objects))
        checkpoint = {
            "step": self.step,
            "phase": phase,
            "tree": tree,
            "identity": {**self._unopened_identity(), **self._identity},
            "environment": self._versions,
            "metrics": self._metrics,
        }
        self._saves.save(captured, checkpoint, before=self._write_records, wait=wait, required=required)

    def _say_space(self, checkpoint_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self.path).free
        self._say(f"{self.path}: {estimate(checkpoint_bytes, self.keep.last, free_bytes)}")

    def _loader_states(self) -> dict[str, Any]:
        self._retire_loaders()
        return {
            name: {
                "state": slot.session.state(),
                "active": slot.active,
                "epoch": slot.epoch,
                "ordinal": slot.ordinal,
                "remade": slot.remade,
            }
            for name, slot in self._slots.items()
        }

    def _unopened_loaders(self) -> dict[str, Any]:
        # A loader that this life has not come to yet keeps the state that an earlier life left it in.
        return {name: saved for name, saved in self._saved_loaders.items() if name not in self._slots}

    def _unopened_identity(self) -> dict[str, Any]:
        prefixes = tuple(f"loader/{name}." for name in self._unopened_loaders())
        return {n: v for n, v in self._recorded_identity.items() if prefixes and n.startswith(prefixes)}

    # Ends.

    def _exit_for(self, reason: str) -> None:
        self._core.event("stopped", self.step, {"reason": reason})
        trial = self._trial
        saved = "which is saved" if trial is None else f"on trial; checkpoint {trial.newest} is as it was"
        self._say(
            f"stopped by {reason} at step {self.step}, {saved}; start the same command to go on "
            f"(exit code {self.requeue_code})"
        )
        self.close()
        raise SystemExit(self.requeue_code)

    def _save_restored(self, phase: int) -> None:
        if "restored" in self._proof.save:
            self._commit(phase, required=True)

    def _proof_ends(self) -> str | None:
        if self._proof.directory is None:
            return None
        place = self._place
        elapsed = time.monotonic() - self._training_since
        is_last = self._proof.is_last(
            place.step, epoch=place.epoch, position=place.position, elapsed_s=elapsed
        )
        return "the last step to prove" if is_last else None

    def _say_incomplete(self, *, failed: bool) -> None:
        if self._started and not self._closed and not self.finished:
            how = "failed" if failed else "ended"
            refused = self._has_diverged and self._on_divergence == "stop" and not self._overridden
            # Nothing would be different the next time.
            go_on = "" if refused else "; start the same command to go on"
            self._say(f"{self.path} {how} before its planned end, at step {self.step}{go_on}")

    def _at_exit(self) -> None:
        self._say_incomplete(failed=False)
        self.close()


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Put off Python's collection of cycles: a tree of thousands of leaves would set it off while training waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def load(path: str | os.PathLike[str], *, only: str | Iterable[str] | None = None) -> dict[str, Any]:
    """Return a checkpoint's content as a plain dict of tensors and values, for other programs.

    Args:
        path: A run directory (its newest whole checkpoint), or one checkpoint's manifest.
        only: Names of leaves as `unbroken show` lists them, or patterns such as `objects/model/*`. Nothing else is
            read, nor looked at for damage.

    Returns:
        {"objects": {...}, "state": {...}, "run": {...}, ...}; with `only`, each leaf by its name. Tensors are on the
        CPU; values of types that this program does not know are `unbroken.values.Record`.

    Raises:
        DamagedCheckpoint, NoWholeCheckpoint, FormatError, StorageError.
        InvalidArgument: No leaf has a name that was asked for.
    """
    from .torch import export

    return export.load(path, only=only)


__all__ = ["Keep", "Policy", "Run", "State", "load"]
