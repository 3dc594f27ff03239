"""A training with a large state that saves after every step, to be killed in its saves. No torch: the core alone.

Each array of step k is a function of k only, so that whoever opens a checkpoint can tell whether it is one of a step
and of one step only. A line on stdout says when a save begins and when it was acknowledged.

Touches: the run directory through the core, and stdout.
"""

import os
import sys
from pathlib import Path

import numpy as np

from unbroken import _core

ARRAYS = 8


def array(step: int, index: int, count: int) -> np.ndarray:
    """Return one array of the state after a step: no two arrays, and no two steps, are alike in any page."""
    base = np.arange(count, dtype=np.uint64)
    return base * np.uint64(2 * index + 3) + np.uint64(step * 1_000_003 + index)


class Training:
    """A state that is changed in place, and saved in the way that is asked for.

    Args:
        run: Where to.
        total_bytes: Of all arrays.
        mode: `sync`, or `background`: all memory is lent until the state changes again.
    """

    def __init__(self, run: _core.Run, total_bytes: int, mode: str) -> None:
        self.run, self.mode = run, mode
        self.count = total_bytes // ARRAYS // 8
        self.state = [np.zeros(self.count, dtype=np.uint64) for _ in range(ARRAYS)]
        self.under_way: int | None = None

    def execute(self, step: int) -> None:
        if self.mode == "background":
            self.run.fence()
        for index, kept in enumerate(self.state):
            kept[:] = array(step, index, self.count)

    def record(self, step: int) -> None:
        sums = [(f"array{index}", int(kept.sum() >> np.uint64(1))) for index, kept in enumerate(self.state)]
        difference = self.run.record(step, 0, 0, step, sums)
        if difference is not None:
            tell(f"diverged {difference}")
            raise SystemExit(5)

    def save(self, step: int) -> None:
        leaf = {"dtype": "uint64", "shape": [self.count], "strides": [1], "offset": 0}
        self.settle()
        tell(f"saving {step}")
        boundary = {
            "step": step,
            "phase": 0,
            "tree": {
                "step": step,
                **{f"array{at}": _core.Tensor(storage=at, **leaf) for at in range(ARRAYS)},
            },
            "identity": {},
            "environment": {},
            "metrics": {},
        }
        regions = [(kept.ctypes.data, kept.nbytes) for kept in self.state]
        if self.mode == "background":
            self.run.save(**boundary, storages=[(*region, True) for region in regions], keep=(2, None, None))
            self.under_way = step
        else:
            self.run.commit(**boundary, storages=regions)
            tell(f"saved {step}")
            self.run.prune(last=2, every=None, best=None)

    def settle(self) -> None:
        """Wait for what is under way; its older checkpoints are gone then, too."""
        if self.under_way is not None:
            outcome = self.run.outcome(wait=True)
            if outcome is None or outcome[0] != "saved":
                tell(f"failed {outcome}")
                raise SystemExit(6)
            tell(f"saved {self.under_way}")
            self.under_way = None


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main(path: Path, total_bytes: int, steps: int, mode: str) -> None:
    run = _core.Run.open(path, seed=1, settings={})
    training = Training(run, total_bytes, mode)
    step = 0
    if run.resumed_from is not None:
        step = run.resumed_from.info.step
        for at in range(ARRAYS):
            if run.resumed_from.read(at) != array(step, at, training.count).tobytes():
                tell(f"torn {step} in array {at}")
                raise SystemExit(3)
    if run.rejected:
        tell(f"rejected {run.rejected}")
        raise SystemExit(4)
    tell(f"resumed {step if run.resumed_from is not None else None}")
    run.begin()
    if run.resumed_from is None:
        training.execute(0)
        training.save(0)
        training.settle()  # A journal without any checkpoint is no run.
    for next_step in range(step + 1, step + 1 + steps):
        training.execute(next_step)
        training.record(next_step)
        training.save(next_step)
    training.settle()
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
