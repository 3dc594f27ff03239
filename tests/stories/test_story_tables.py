"""An embedding table of which each step changes few rows: saved by chunks, killed, resumed exactly."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import unbroken
from harness import HERE, environment
from tables import ROWS, STEPS, WIDTH
from unbroken import _core

CHUNK = 8 << 10


def live(*arguments: str | Path | int) -> int:
    words = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, str(HERE / "tables.py"), *words], env=environment(), capture_output=True, timeout=120
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def tables_in(checkpoint: Path) -> list[np.ndarray]:
    """Return the table and its moments, as bytes in chunks."""
    found = unbroken.load(checkpoint, only="objects/*")
    tensors = [tensor for tensor in found.values() if getattr(tensor, "shape", ()) == (ROWS, WIDTH)]
    return [tensor.detach().numpy().view(np.uint8).reshape(-1, CHUNK) for tensor in tensors]


def test_a_table_with_sparse_gradients_is_saved_by_chunks_and_resumes_exactly(tmp_path: Path) -> None:
    plain, killed, run = tmp_path / "plain", tmp_path / "killed", tmp_path / "run"
    assert live(plain) == 0
    assert live(killed, run, 9) == -signal.SIGKILL
    assert live(killed, run, 19) == -signal.SIGKILL
    assert live(killed, run) == 0
    expected = dict(line.split() for line in plain.read_text().splitlines())
    assert len(expected) == STEPS + 1
    for line in killed.read_text().splitlines():
        step, value = line.split()
        assert value == expected.pop(step, value), f"step {step}"
    assert not expected

    paths = sorted((run / "checkpoints").iterdir())
    infos = [_core.read_checkpoint(path).info for path in paths]
    written, chunks = [], []
    for at in range(1, len(paths)):
        before, after = tables_in(paths[at - 1]), tables_in(paths[at])
        if len(before) == len(after) == 3:
            pairs = zip(before, after, strict=True)
            chunks.append(sum(int((old != new).any(axis=1).sum()) for old, new in pairs) * CHUNK)
            written.append(infos[at].new_bytes)
    assert len(written) >= STEPS // 2 - 1
    usual = sorted(new / changed for new, changed in zip(written, chunks, strict=True) if changed)
    assert usual[len(usual) // 2] < 1.05, usual
    # Now and then packs that are hardly used are given up; over the run, that stays small. No life writes all again.
    assert sum(written) < 1.5 * sum(chunks), usual
