"""What travels between the main process and the workers: tickets out, parcels back.

Touches: nothing. Both sides import this module, under every start method.
"""

from typing import Any, NamedTuple

import torch.utils.data._utils.pin_memory as torch_pinning


class WorkerState(NamedTuple):
    """One worker's generators and what its copies of the data set and of the collate function own.

    Canonical bytes by path; None where a generator has not been reported.
    """

    python: bytes | None
    numpy: bytes | None
    torch: bytes | None
    generators: dict[str, bytes]
    values: dict[str, bytes]

    def merged(self, later: "WorkerState") -> "WorkerState":
        """Return this state with what a later report changed."""
        return WorkerState(
            self.python if later.python is None else later.python,
            self.numpy if later.numpy is None else later.numpy,
            self.torch if later.torch is None else later.torch,
            {**self.generators, **later.generators} if later.generators else self.generators,
            {**self.values, **later.values} if later.values else self.values,
        )

    def to_value(self) -> dict[str, Any]:
        """Return it in the core's algebra."""
        return self._asdict()

    @staticmethod
    def from_value(value: dict[str, Any]) -> "WorkerState":
        """Return what `to_value` was given."""
        return WorkerState(**value)


class Place(NamedTuple):
    """Where an iterable data set is, by its own words: canonical bytes of its `state_dict()`.

    A data set whose iterator has ended may say what the next epoch begins with; so the end is noted beside it.
    """

    hook: bytes
    ended: bool


class Ticket:
    """One turn of the index sampler, with what the worker is to do besides reading, or instead.

    Args:
        payload: What the user's sampler gave.
        install: A worker's state to put in place. The ticket reads nothing then.
        skip: Read nothing.
        place: In keyed mode the key's epoch and the position of the first sample.
    """

    __slots__ = ("install", "payload", "place", "skip")

    def __init__(
        self,
        payload: Any,
        install: WorkerState | None = None,
        skip: bool = False,
        place: tuple[int, int] | None = None,
    ) -> None:
        self.payload = payload
        self.install = install
        self.skip = skip
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self.payload, self.install, self.skip, self.place)


class Fetched:
    """What a data set gave for one ticket, on its way to the collate function."""

    __slots__ = ("data", "ticket")

    def __init__(self, data: Any, ticket: Ticket) -> None:
        self.data = data
        self.ticket = ticket


class Parcel:
    """One batch from a worker, with the worker's report.

    Args:
        batch: What the user's collate function gave; None for a ticket that read nothing.
        worker: The worker's number.
        report: What changed in the worker since its last report.
        extra: Where an iterable data set is.
        refusal: Subject and reason of a `NotExact` found in the worker.
        empty: The ticket read nothing.
    """

    __slots__ = ("batch", "empty", "extra", "refusal", "report", "worker")

    def __init__(
        self,
        batch: Any,
        worker: int,
        report: WorkerState | None = None,
        extra: Place | None = None,
        refusal: tuple[str, str] | None = None,
        empty: bool = False,
    ) -> None:
        self.batch = batch
        self.worker = worker
        self.report = report
        self.extra = extra
        self.refusal = refusal
        self.empty = empty

    def __reduce__(self) -> tuple[Any, ...]:
        if self.extra is None and self.refusal is None and not self.empty:
            return Parcel, (self.batch, self.worker, self.report)
        return Parcel, (self.batch, self.worker, self.report, self.extra, self.refusal, self.empty)

    def pin_memory(self) -> "Parcel":
        """Pin the batch as torch's pinning thread would."""
        pinned = torch_pinning.pin_memory(self.batch)
        return Parcel(pinned, self.worker, self.report, self.extra, self.refusal, self.empty)
