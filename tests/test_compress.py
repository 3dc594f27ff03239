"""Checkpoints compressed on request: the same bits, fewer bytes, and never more memory than there is."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import unbroken
from unbroken import errors, room
from unbroken.saving import Compression

MODES = get_args(Compression)


def train(
    path: Path, *, until: int = 100, dtype: torch.dtype = torch.float32, **options: Any
) -> unbroken.Run:
    """Train a small net in a run for two epochs of eight steps, or until a step, and close the run."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)).to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    loader = DataLoader(TensorDataset(data), batch_size=4, shuffle=True)
    options = {"checkpoint": 1, "keep": 100, "quiet": True, **options}
    with unbroken.Run(path, seed=1, net=net, optimizer=optimizer, loader=loader, **options) as run:
        for _ in run.epochs(2):
            for (x,) in run.batches(loader):
                loss = (net(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.log(loss=loss)
                if run.step + 1 >= until:
                    return run
    return run


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a run's newest checkpoint, by name."""
    found = unbroken.load(path, only="objects/*")
    tensors = {name: leaf for name, leaf in found.items() if isinstance(leaf, torch.Tensor)}
    return {
        name: leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, leaf in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", ["background", "copy", "sync"])
def test_a_compressed_run_holds_the_same_state_in_fewer_bytes(
    tmp_path: Path, dtype: torch.dtype, save: Any
) -> None:
    bytes_of: dict[str | None, int] = {}
    expected: dict[str, bytes] = {}
    for compress in (None, *MODES):
        path = tmp_path / str(compress)
        run = train(path, compress=compress, save=save, dtype=dtype)
        bytes_of[compress] = sum(info.new_bytes for info in run.checkpoints())
        found = contents(path)
        assert len(found) > 12
        expected = expected or found
        assert found == expected
        for info in run.checkpoints():
            assert unbroken.load(info.path)["run"]["step"] == info.step
    assert bytes_of["alone"] < 0.95 * bytes_of[None]
    assert bytes_of["differences"] < 0.95 * bytes_of["alone"]


@pytest.mark.parametrize("compress", MODES)
def test_a_life_may_compress_what_the_one_before_did_not_and_goes_on_exactly(
    tmp_path: Path, compress: Any
) -> None:
    train(tmp_path / "peace")
    for until, mode in [(3, None), (9, compress), (12, None), (100, compress)]:
        run = train(tmp_path / "run", until=until, compress=mode)
    assert run.finished
    assert contents(tmp_path / "run") == contents(tmp_path / "peace")


def test_without_memory_for_it_checkpoints_are_written_as_they_are_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Enough for a copy of the state and one more, not for what differences take.
    plain = train(tmp_path / "plain").checkpoints()
    monkeypatch.setattr(room, "free_bytes", lambda: int(2.5 * max(info.size_bytes for info in plain)))
    run = train(tmp_path / "run", compress="differences", quiet=False)
    assert capsys.readouterr().err.count("they are written as they are") == 1
    assert contents(tmp_path / "run") == contents(tmp_path / "plain")
    # Before the first step there is no optimizer's state: for what there is, the memory does.
    assert run.checkpoints()[0].new_bytes < plain[0].new_bytes
    assert [info.new_bytes for info in run.checkpoints()[1:]] == [info.new_bytes for info in plain[1:]]
    compressed = [
        pack for pack in (tmp_path / "run" / "objects").iterdir() if b"(compressed)" in pack.read_bytes()
    ]
    assert len(compressed) == 1
    assert run.finished


@pytest.mark.parametrize("compress", [True, "zstd", ""])
def test_a_compression_that_does_not_exist_is_refused(tmp_path: Path, compress: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="compress must be"):
        unbroken.Run(tmp_path / "run", compress=compress)
    assert not (tmp_path / "run").exists()
