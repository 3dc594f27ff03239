"""An embedding table of which each step changes few rows: saved by chunks, killed, resumed exactly."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import unbroken
from harness import KILLED, TABLES, Story, assert_exact
from tables import ROWS, STEPS, WIDTH
from unbroken import _core
from unbroken._core import main

Begin = Callable[..., Story]

CHUNK = 8 << 10


def tables_in(checkpoint: Path) -> list[np.ndarray]:
    """Return the table and its moments, as bytes in chunks."""
    found = unbroken.load(checkpoint, only="objects/*")
    tensors = [tensor for tensor in found.values() if getattr(tensor, "shape", ()) == (ROWS, WIDTH)]
    return [tensor.detach().numpy().view(np.uint8).reshape(-1, CHUNK) for tensor in tensors]


def through_kills(story: Begin, reference: Begin, *flags: str) -> Path:
    """Return a run that was killed twice, and whose losses and end are those of the plain loop."""
    told = story(*flags, script=TABLES)
    told.live("--kill", "9", code=KILLED)
    told.live("--kill", "19", code=KILLED)
    told.live()
    assert_exact(told, reference(script=TABLES))
    return told.run


@pytest.mark.parametrize("compress", ["alone", "differences"])
def test_a_table_is_saved_by_chunks_beside_a_compressed_head_and_resumes_exactly(
    story: Begin, reference: Begin, compress: str
) -> None:
    run = through_kills(story, reference, "--compress", compress)
    packs = [path.read_bytes() for path in (run / "objects").iterdir()]
    assert any(b"head.weight (compressed)" in pack for pack in packs)
    assert any(b"table.weight (changed chunks)" in pack for pack in packs)
    assert main(["verify", str(run)]) == 0


def test_a_table_with_sparse_gradients_is_saved_by_chunks_and_resumes_exactly(
    story: Begin, reference: Begin
) -> None:
    run = through_kills(story, reference)
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
