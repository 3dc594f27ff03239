"""Runs that released versions wrote still open."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unbroken
from unbroken._core import read_journal

FIXTURES = Path(__file__).parent.parent / "fixtures"


def test_a_run_of_version_1_opens_with_the_weights_it_was_saved_with() -> None:
    loaded = unbroken.load(FIXTURES / "torch-net" / "run")
    model = loaded["objects"]["model"]
    found = {name: leaf for part in ("parameters", "buffers") for name, leaf in model[part].items()}
    expected = load_file(FIXTURES / "torch-net" / "weights.safetensors")
    assert expected.keys() == {name for name in found if not name.endswith("num_batches_tracked")}
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name
    assert loaded["run"]["step"] == 3 and loaded["run"]["finished"]


def test_a_journal_of_version_1_opens() -> None:
    boundaries = read_journal(FIXTURES / "torch-net" / "run")
    assert [(b["step"], b["phase"]) for b in boundaries] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    assert list(boundaries[0]["components"])[:2] == ["data/indices", "data/batch"]


@pytest.mark.filterwarnings("ignore:.*worker processes.*:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_keyed_mode_gives_the_order_and_the_keys_of_version_1(workers: int) -> None:
    # A test of the Rust loader reads the same file.
    record = runpy.run_path(str(FIXTURES / "keyed" / "make.py"))["record"]
    assert record(workers) == json.loads((FIXTURES / "keyed" / "keyed.json").read_text())
