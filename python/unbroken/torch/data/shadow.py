"""A second loader object with the user's settings and our seams, so that the user's own is never touched.

Touches: nothing of the user's. The shadow shares the user's generator, sampler and data set objects.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from unbroken.torch import rng


class Turned(Protocol):
    """What stands behind the index stream that torch pulls from."""

    def on_iter(self) -> None:
        """Answer `iter(index_sampler)`."""
        ...

    def on_pull(self) -> Any:
        """Answer `next`; StopIteration at the end."""
        ...


class IndexStream:
    """The index sampler as torch sees it. One object serves all epochs of a loader."""

    def __init__(self, behind: Turned, sampler: Any) -> None:
        self._behind = behind
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> "IndexStream":
        self._behind.on_iter()
        return self

    def __next__(self) -> Any:
        return self._behind.on_pull()


class Shadow:
    """The loader that torch iterates over in the user's loader's place.

    Args:
        loader: The user's loader.
        dataset: Stands in for its data set.
        collate: Makes what stands in for its collate function.
        init: Makes what stands in for its worker_init_fn, given that and the collate function's stand-in.
        stream: Stands in for its index sampler.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        dataset: Any,
        collate: Callable[[Any], Any],
        init: Callable[[Any, Any], Any],
        stream: IndexStream,
    ) -> None:
        self._loader = loader
        self._collate = collate
        self._init = init
        self.loader = copy.copy(loader)
        self._fields = self.loader.__dict__
        # `__dict__`, because assigning these to a loader is an error once it is made.
        self._fields["dataset"] = dataset
        seam = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._fields[seam] = stream
        self._fields["_iterator"] = None
        self._seen: tuple[Any, Any] | None = None
        self.refresh()

    @property
    def holds_workers(self) -> bool:
        """Whether persistent workers are alive."""
        return self._fields["_iterator"] is not None

    def refresh(self, **overrides: Any) -> None:
        """Take over what may be assigned to the user's loader between epochs."""
        for name in ("generator", "timeout", "pin_memory", "in_order", "prefetch_factor"):
            self._fields[name] = self._loader.__dict__[name]
        seen = (self._loader.collate_fn, self._loader.worker_init_fn)
        if self._seen is None or any(now is not then for now, then in zip(seen, self._seen, strict=True)):
            self._seen = seen
            self._fields["collate_fn"] = self._collate(seen[0])
            self._fields["worker_init_fn"] = self._init(seen[1], self._fields["collate_fn"])
        self._fields.update(overrides)

    def forget_workers(self) -> None:
        """Let persistent workers go."""
        self._fields["_iterator"] = None


def as_it_is(collate: Any) -> Any:
    """Stand in for a collate function by itself."""
    return collate


def first(init: Any, collate: Any) -> Any:
    """Stand in for a worker_init_fn by itself."""
    return init


class Preserved:
    """Puts one generator object back, if there is one."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def __enter__(self) -> None:
        self._state = None if self._generator is None else rng.capture_generator(self._generator)

    def __exit__(self, *exception: object) -> None:
        if self._state is not None:
            rng.restore_generator(self._generator, self._state)
