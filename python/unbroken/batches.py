"""The iterators that the user's loop turns: the loop that counts steps, and endless streams beside it.

Touches: nothing by itself; each turn asks the run for its boundary and the session for its batch.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from .errors import InvalidArgument, NotExact, UnbrokenError

if TYPE_CHECKING:
    from .run import Run
    from .torch.data import Session


class Batches(Iterator[Any]):
    """One loop over one loader in one epoch. Its turns are the run's steps, unless another loop is open already."""

    def __init__(
        self,
        run: Run,
        loader: Any,
        *,
        name: str | None,
        data: Literal["native", "keyed"],
        until_step: int | None,
        progress: bool | Callable[..., Any],
        positions: bool,
    ) -> None:
        if until_step is not None and until_step < 0:
            raise InvalidArgument(f"until_step must be at least 0, got {until_step}")
        self.run = run
        self.loader = loader
        self.name = name
        self.data: Literal["native", "keyed"] = data
        self.session: Session | None = None
        self._until_step = until_step
        self._progress = progress
        self._positions = positions
        self._bar: Any = None
        self._role: Literal["new", "steps", "beside", "over"] = "new"
        self._is_turned_by_loop = False

    def __len__(self) -> int:
        """Batches of the whole epoch, as the loader says."""
        return len(self.loader)

    def __iter__(self) -> Batches:
        if self._role == "new":
            self._is_turned_by_loop = _is_at(sys._getframe(1), "GET_ITER")
        return self

    def __next__(self) -> Any:
        if self._role == "new":
            self._begin()
        elif self._role == "steps":
            self.run._step_done()
            if self._bar is not None or self._until_step is not None:
                self._step_counted()
        if self._role == "over":
            raise StopIteration
        session = self.session
        assert session is not None, "a loop that is not over has a session"
        try:
            batch = session.next()
        except StopIteration:
            if self._role != "steps" or self._until_step is None:
                self._check_complete(session)
                self._finish()
                raise
            batch = self._next_pass(session)
        if self._role == "steps":
            self.run._handed_out(session, batch)
        return (session.position - 1, batch) if self._positions else batch

    def attach(self, session: Session) -> None:
        """Give the loop its session, when the run has found or made it."""
        self.session = session

    def abandon(self) -> None:
        """The user broke out of the loop."""
        if self.session is not None and self._role != "over":
            self._role = "over"
            self._close_bar()
            self.session.abandon()

    def _begin(self) -> None:
        run = self.run
        if self._until_step is not None:
            run._start({"until_step": self._until_step})
            if run.finished:
                self._role = "over"
                return
            if run.step >= self._until_step:
                run._complete()
                self._role = "over"
                return
        elif not run._started:
            raise InvalidArgument(
                "run.batches() was reached outside run.epochs()",
                hint="loop over run.epochs(n) around it, or give until_step=",
            )
        if run._loop_is_open():
            self._role = "beside"
            run._open_auxiliary(self)
            return
        self._refuse_enumerate()
        self._role = "steps" if run._open_primary(self) else "over"
        if self._role == "steps":
            self._open_bar()

    def _step_counted(self) -> None:
        if self._bar is not None:
            self._bar.update(1)
        if self._until_step is not None and self.run.step >= self._until_step:
            self.run._loop_ended(self)
            self._close_bar()
            assert self.session is not None, "a step ended, so the loop has a session"
            self.session.abandon()
            self._role = "over"
            self.run._complete()

    def _next_pass(self, session: Session) -> Any:
        self._check_complete(session)
        self.run._next_pass()
        self.run._reopen(session)
        try:
            return session.next()
        except StopIteration:
            raise UnbrokenError(
                "the loader gave no batch in a whole pass: until_step= can never be reached"
            ) from None

    def _finish(self) -> None:
        self._role = "over"
        self._close_bar()
        self.run._loop_ended(self)

    def _check_complete(self, session: Session) -> None:
        expected = session.batches_expected
        if expected is not None and session.position != expected:
            raise UnbrokenError(
                f"the epoch ended after {session.position} of {expected} batches",
                hint="the sampler gave fewer indices than its length says, or a worker stopped early",
            )

    def _refuse_enumerate(self) -> None:
        # enumerate() counts from 0 in each process, so code that uses the number does other things after a resume.
        if self._is_turned_by_loop:
            return
        # Looking for the holder walks the heap, so each place in the program is looked at once.
        frame = sys._getframe(3)
        place = (frame.f_code, frame.f_lineno)
        if self._positions or place in self.run._loops_seen or self.run._allowed("enumerate"):
            return
        self.run._loops_seen.add(place)
        if any(type(holder) is enumerate for holder in gc.get_referrers(self)):
            raise NotExact(
                "enumerate(run.batches(...))",
                "its count starts again at 0 in a resumed process",
                hint='use run.enumerate(loader), which counts on; or allow=["enumerate"] if the number is only printed',
            )

    def _open_bar(self) -> None:
        if not self._progress:
            return
        if callable(self._progress):
            factory = self._progress
        else:
            try:
                from tqdm.auto import tqdm as factory
            except ImportError:
                raise InvalidArgument(
                    "progress=True needs tqdm", hint="install tqdm, or give progress=False"
                ) from None
        total = self._until_step
        initial = self.run.step
        if total is None:
            initial = self.run.position
            total = self.session.batches_expected if self.session is not None else None
        self._bar = factory(total=total, initial=initial, desc=f"epoch {self.run.epoch}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_at(frame: FrameType, operation: str) -> bool:
    """Tell whether a frame is at this operation: a `for` statement asks for its iterator in another way than a call."""
    return frame.f_lasti >= 0 and frame.f_code.co_code[frame.f_lasti] == dis.opmap.get(operation)


class Stream(Iterator[Any]):
    """An endless pass over a second loader, opened again whenever it is exhausted; its position is saved."""

    def __init__(self, run: Run, loader: Any, *, name: str | None, data: Literal["native", "keyed"]) -> None:
        self.run = run
        self.loader = loader
        self.name = name
        self.data: Literal["native", "keyed"] = data
        self.session: Session | None = None

    def __iter__(self) -> Stream:
        return self

    def attach(self, session: Session) -> None:
        """Give the stream its session."""
        self.session = session

    def __next__(self) -> Any:
        if self.session is None:
            self.run._open_auxiliary(self)
        session = self.session
        assert session is not None, "opening attaches a session"
        try:
            return session.next()
        except StopIteration:
            self.run._reopen(session)
        try:
            return session.next()
        except StopIteration:
            raise UnbrokenError("a stream's loader gave no batch in a whole pass") from None
