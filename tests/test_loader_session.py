"""What a session refuses by name, what it keeps besides generators, and several loaders side by side."""

import os
import random
import signal
import time
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from loader_trace import (
    Items,
    Pure,
    batch_bytes,
    check_exact,
    check_same_as_plain,
    disturb,
    seed_everything,
    wrapped,
)
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from unbroken import _core
from unbroken.errors import MismatchError, NotExact, WorkerDied
from unbroken.notices import UnbrokenWarning
from unbroken.torch import rng
from unbroken.torch.data import Session, reading, sampler

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes.*:UserWarning")


def open_session(loader: Any, mode: Any = "native") -> Session:
    return Session(loader, name="loader", mode=mode, seed=3)


def test_loaders_of_another_kind_are_refused_by_name():
    class Endless(DataLoader):
        def __iter__(self) -> Any:
            while True:
                yield from super().__iter__()

    with pytest.raises(NotExact, match="list"):
        open_session([1, 2])
    with pytest.raises(NotExact, match=r"Endless.*__iter__"):
        open_session(Endless(Pure()))


def test_arrival_order_is_refused_by_name_where_it_would_matter():
    loader = DataLoader(Pure(), num_workers=2, in_order=False)
    with pytest.raises(NotExact, match="in_order=False"):
        open_session(loader)
    open_session(loader, "keyed").close()
    open_session(DataLoader(Pure(), in_order=False)).close()


def test_workers_that_were_used_before_the_run_are_refused():
    loader = DataLoader(Pure(), num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(NotExact, match="before the run"):
        open_session(loader)


def test_the_loader_of_the_user_stays_as_it_was():
    loader = DataLoader(Items(), batch_size=4, shuffle=True)
    before = dict(vars(loader))
    session = open_session(loader)
    session.open(0)
    session.next()
    assert vars(loader) == before
    assert len(loader) == 6
    session.close()
    assert [len(batch["index"]) for batch in loader] == [4, 4, 4, 4, 4, 2]


def test_the_identity_names_what_must_stay_the_same():
    facts = open_session(DataLoader(Items(), batch_size=4, shuffle=True, num_workers=2)).identity()
    assert facts["dataset.length"] == 22
    assert facts["num_workers"] == 2
    assert facts["sampler"] == "BatchSampler(RandomSampler)"
    assert _core.decode(_core.encode(facts)) == facts
    keyed = open_session(DataLoader(Items(), batch_size=4, num_workers=2), "keyed").identity()
    assert "num_workers" not in keyed


def test_a_state_of_the_other_mode_is_refused():
    state = open_session(DataLoader(Pure(), batch_size=4)).state()
    with pytest.raises(MismatchError, match="mode"):
        open_session(DataLoader(Pure(), batch_size=4), "keyed").restore(state)


def test_another_number_of_workers_is_refused_in_native_mode():
    session = open_session(DataLoader(Pure(), batch_size=4, num_workers=2))
    session.open(0)
    session.next()
    state = session.state()
    session.close()
    other = open_session(DataLoader(Pure(), batch_size=4, num_workers=1))
    other.restore(state)
    with pytest.raises(MismatchError, match="num_workers"):
        other.open(0)


class Clock:
    """Depends on something that nobody can see."""

    ticks = 0

    def __len__(self) -> int:
        return 22

    def __iter__(self):
        for _ in range(22):
            Clock.ticks += 1
            yield Clock.ticks % 22


def test_a_sampler_that_cannot_be_turned_again_is_named():
    session = open_session(DataLoader(Pure(), batch_size=4, sampler=Clock()))
    session.open(0)
    session.next()
    state = session.state()
    other = open_session(DataLoader(Pure(), batch_size=4, sampler=Clock()))
    other.restore(state)
    with pytest.raises(NotExact, match="Clock"):
        other.open(0)


class Watching:
    """Holds weights that training writes at each step."""

    def __init__(self) -> None:
        self.weights = torch.ones(22)

    def __len__(self) -> int:
        return 22

    def __iter__(self):
        for _ in range(22):
            yield int(torch.multinomial(self.weights, 1))


def test_changes_beyond_the_budget_are_refused_when_the_state_is_taken(monkeypatch):
    monkeypatch.setattr(sampler, "LOG_BYTES", 20_000)
    watching = Watching()
    session = open_session(DataLoader(Pure(), batch_size=1, sampler=watching))
    session.open(0)
    with pytest.raises(NotExact, match=r"Watching.*weights"):
        for _ in range(20):
            session.next()
            watching.weights[3] += torch.rand(())
            session.state()


class Growing(Dataset):
    """Keeps everything it ever read."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 3_000

    def __getitem__(self, index: int) -> int:
        self.seen.append(index)
        return index


def test_what_is_too_large_to_keep_is_named_once():
    session = open_session(DataLoader(Growing(), batch_size=500))
    session.open(0)
    session.next()
    session.state()
    for _ in range(4):
        session.next()
    with pytest.warns(UnbrokenWarning, match="dataset/seen"):
        session.state()


class WithState(Items):
    """A data set that speaks for itself, and keeps what no walk would find."""

    hidden: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.recent = state["count"], list(state["recent"])


class Slotted:
    """A transform with a generator and a counter, without a `__dict__`."""

    __slots__ = ("calls", "generator")

    def __init__(self) -> None:
        self.generator = np.random.RandomState(3)
        self.calls = np.zeros(2, dtype=np.int64)

    def __call__(self, value: float) -> float:
        self.calls[0] += 1
        return value + self.generator.rand() + int(self.calls[0])


class Transformed(Dataset):
    """Items changed by transforms that have state, two of them the same object."""

    def __init__(self) -> None:
        shared = Slotted()
        self.transforms = [shared, Slotted(), {"again": shared}]

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> float:
        first, second, third = self.transforms
        return third["again"](second(first(float(index))))


class Mixing:
    """A collate function with a generator of its own."""

    def __init__(self) -> None:
        self.generator = random.Random(8)
        self.batches = 0

    def __call__(self, rows: list[Any]) -> torch.Tensor:
        self.batches += 1
        self.generator.shuffle(rows)
        return torch.tensor([*rows, self.batches], dtype=torch.float64)


def hugging_face() -> Any:
    return datasets.Dataset.from_dict({"index": list(range(14)), "text": [str(i) for i in range(14)]})


def jitter(rows: dict[str, list]) -> dict[str, list]:
    return {"index": [value + random.random() for value in rows["index"]]}


def make_loader(data: Any, *, collate: Any = None, **options: Any) -> DataLoader:
    return DataLoader(
        data(), batch_size=3, shuffle=True, collate_fn=None if collate is None else collate(), **options
    )


OWNERS: dict[str, Any] = {
    "data set with state_dict": partial(make_loader, WithState),
    "data set with state_dict, 2 persistent workers": partial(
        make_loader, WithState, num_workers=2, persistent_workers=True
    ),
    "transforms with state": partial(make_loader, Transformed),
    "transforms with state, 2 workers": partial(make_loader, Transformed, num_workers=2),
    "collate function with state": partial(make_loader, Transformed, collate=Mixing),
    "collate function with state, 2 persistent workers": partial(
        make_loader, Transformed, collate=Mixing, num_workers=2, persistent_workers=True
    ),
    "Hugging Face table": partial(make_loader, lambda: hugging_face().with_transform(jitter)),
    "Hugging Face table, 2 workers": partial(
        make_loader, lambda: hugging_face().with_transform(jitter), num_workers=2
    ),
}


@pytest.mark.parametrize("name", OWNERS)
def test_state_of_the_users_objects_is_kept(name):
    trace = wrapped(OWNERS[name], 2)
    check_same_as_plain(OWNERS[name], trace, epochs=2)
    check_exact(OWNERS[name], trace, epochs=2)


def pair_of_sessions() -> tuple[Session, Session]:
    first = DataLoader(Items(), batch_size=4, shuffle=True, num_workers=1)
    second = DataLoader(Items(14), batch_size=2, shuffle=True)
    return open_session(first), open_session(second)


def interleave(sessions: tuple[Session, Session], steps: range, opened: bool) -> list[Any]:
    """Take two batches of the second loader for each of the first, which is opened again when it ends."""
    first, second = sessions
    found = []
    for step in steps:
        if step == 0 and not opened:
            first.open(0)
        found.append(batch_bytes(first.next()))
        for _ in range(2):
            try:
                found.append(batch_bytes(second.next()))
            except StopIteration:
                second.open(step)
                found.append(batch_bytes(second.next()))
            found.append((float(torch.rand(1)), random.random(), float(np.random.randn())))
    return found


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_two_interleaved_loaders_resume_without_moving_each_other(at):
    seed_everything()
    sessions = pair_of_sessions()
    interleave(sessions, range(at), False)
    kept = _core.encode({"sessions": [session.state() for session in sessions], "generators": rng.capture()})
    expected = interleave(sessions, range(at, 6), True)

    disturb()
    again = pair_of_sessions()
    state = _core.decode(kept)
    for session, part in zip(again, state["sessions"], strict=True):
        session.restore(part)
    again[0].open(0)
    rng.restore(state["generators"])
    before = rng.digests()
    again[1].open(0)
    assert rng.digests() == before, "an auxiliary loader that is opened later moves nothing"
    assert interleave(again, range(at, 6), True) == expected
    for session in (*sessions, *again):
        session.close()


class Ending(Dataset[int]):
    """Gives numbers, and does what it is told to at the fourth."""

    def __init__(self, end: Any) -> None:
        self.end = end

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 4:
            self.end()
        return index


# torch's handler of SIGCHLD raises wherever the main process happens to be. Where that is the closing of a file
# while another error passes, Python can only print it.
a_worker_dies = pytest.mark.filterwarnings(
    r"ignore:(?s).*DataLoader worker \(pid \d+\) is killed by signal:pytest.PytestUnraisableExceptionWarning"
)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet_a_missing_file() -> None:
    raise FileNotFoundError(2, "no such file", "picture4.png")


@a_worker_dies
@pytest.mark.parametrize("mode", ["native", "keyed"])
def test_the_death_of_a_worker_is_told_with_its_signal_and_again_when_asked_again(mode: Any):
    session = open_session(DataLoader(Ending(be_killed), batch_size=2, num_workers=1), mode)
    session.open(0)
    with pytest.raises(
        WorkerDied, match=r"DataLoader worker \(pid \d+\) was killed by SIGKILL: .*out of memory"
    ):
        while True:
            session.next()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        session.next()
    session.close()


@a_worker_dies
@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_batch_cut_off_by_a_death_that_cannot_be_seen_yet_is_told_as_the_death(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    def cut_off(self: Any, timeout: float = 5) -> Any:
        os.kill(self._workers[1].pid, signal.SIGKILL)
        raise kind("cut off")

    session = open_session(DataLoader(Pure(), num_workers=2))
    session.open(0)
    session.next()
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", cut_off)
    with pytest.raises(WorkerDied, match="SIGKILL") as raised:
        while True:  # A batch that has overtaken another is there already, and is not fetched.
            session.next()
    assert isinstance(raised.value, RuntimeError), "what catches torch's error catches this one"
    assert isinstance(raised.value.__cause__, kind | RuntimeError)
    session.close()


def test_a_batch_cut_off_with_all_workers_alive_fails_as_it_did(monkeypatch: pytest.MonkeyPatch):
    def cut_off(self: Any, timeout: float = 5) -> Any:
        raise ConnectionRefusedError("cut off")

    monkeypatch.setattr(reading, "_MOST_WAIT_S", 0.2)
    session = open_session(DataLoader(Pure(), num_workers=2))
    session.open(0)
    session.next()
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", cut_off)
    with pytest.raises(ConnectionRefusedError, match="cut off"):
        while True:  # As above.
            session.next()
    session.close()


def test_what_a_data_set_raises_in_a_worker_arrives_as_torch_gives_it_and_at_once():
    session = open_session(DataLoader(Ending(meet_a_missing_file), batch_size=2, num_workers=1))
    session.open(0)
    session.next()
    session.next()
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"(?s)in DataLoader worker process 0.*picture4\.png"):
        session.next()
    assert time.monotonic() - begun < reading._MOST_WAIT_S
    session.close()


@a_worker_dies
def test_leaving_an_epoch_whose_worker_has_died_ends():
    loader = DataLoader(Ending(be_killed), batch_size=1, num_workers=2, persistent_workers=True)
    session = open_session(loader)
    session.open(0)
    session.next()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        session.abandon()
    session.close()
