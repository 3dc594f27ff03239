"""An embedding table of which each step changes few rows: saved by chunks, killed, resumed exactly."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import unbroken
from harness import HERE, environment
from tables import ROWS, STEPS, WIDTH
from unbroken import _core
from unbroken._core import main

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


def assert_exact_through_kills(tmp_path: Path, run: Path, *compress: str) -> None:
    """Train once in peace and once in a run that is killed twice, and compare all losses and the end."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    assert live(plain) == 0
    assert live(killed, run, 9, *compress) == -signal.SIGKILL
    assert live(killed, run, 19, *compress) == -signal.SIGKILL
    assert live(killed, run, "", *compress) == 0
    expected = dict(line.split() for line in plain.read_text().splitlines())
    assert len(expected) == STEPS + 1
    for line in killed.read_text().splitlines():
        step, value = line.split()
        assert value == expected.pop(step, value), f"step {step}"
    assert not expected


@pytest.mark.parametrize("compress", ["alone", "differences"])
def test_a_table_is_saved_by_chunks_beside_a_compressed_head_and_resumes_exactly(
    tmp_path: Path, compress: str
) -> None:
    run = tmp_path / "run"
    assert_exact_through_kills(tmp_path, run, compress)
    packs = [path.read_bytes() for path in (run / "objects").iterdir()]
    assert any(b"head.weight (compressed)" in pack for pack in packs)
    assert any(b"table.weight (changed chunks)" in pack for pack in packs)
    assert main(["verify", str(run)]) == 0


def test_a_table_with_sparse_gradients_is_saved_by_chunks_and_resumes_exactly(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_exact_through_kills(tmp_path, run)
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
