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


def arrays(step: int, total_bytes: int) -> list[np.ndarray]:
    """Return the state after a step: no two arrays, and no two steps, are alike in any page."""
    count = total_bytes // ARRAYS // 8
    base = np.arange(count, dtype=np.uint64)
    return [base * np.uint64(2 * index + 3) + np.uint64(step * 1_000_003 + index) for index in range(ARRAYS)]


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def commit(run: _core.Run, step: int, total_bytes: int) -> None:
    state = arrays(step, total_bytes)
    leaf = {"dtype": "uint64", "shape": [len(state[0])], "strides": [1], "offset": 0}
    tell(f"saving {step}")
    run.commit(
        step=step,
        phase=0,
        tree={"step": step, **{f"array{at}": _core.Tensor(storage=at, **leaf) for at in range(ARRAYS)}},
        storages=[(array.ctypes.data, array.nbytes) for array in state],
        identity={},
        environment={},
        metrics={},
    )
    tell(f"saved {step}")
    run.prune(last=2, every=None, best=None)


def main(path: Path, total_bytes: int, steps: int) -> None:
    run = _core.Run.open(path, seed=1, settings={})
    step = 0
    if run.resumed_from is not None:
        step = run.resumed_from.info.step
        for at, array in enumerate(arrays(step, total_bytes)):
            if run.resumed_from.read(at) != array.tobytes():
                tell(f"torn {step} in array {at}")
                raise SystemExit(3)
    if run.rejected:
        tell(f"rejected {run.rejected}")
        raise SystemExit(4)
    tell(f"resumed {step if run.resumed_from is not None else None}")
    run.begin()
    if run.resumed_from is None:
        commit(run, 0, total_bytes)
    for next_step in range(step + 1, step + 1 + steps):
        run.record(next_step, 0, 0, next_step, [("step", next_step)])
        commit(run, next_step, total_bytes)
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
