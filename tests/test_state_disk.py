"""Captured state through a real run directory: committed, read in another object world, exported, damaged."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from state_memory import save
from test_state_tensors import everything
from torch import nn

from unbroken import _core
from unbroken.errors import DamagedCheckpoint, InvalidArgument, UnbrokenError
from unbroken.torch import export, snapshot, tensors


def build(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(torch.bfloat16)
    model[2].register_buffer("empty", torch.zeros(0, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def step(objects: dict[str, Any], number: int) -> None:
    torch.manual_seed(number)
    objects["optimizer"].zero_grad()
    objects["model"](torch.randn(5, 4).bfloat16()).pow(2).mean().backward()
    objects["optimizer"].step()
    objects["scheduler"].step()


def commit(path: Path, objects: dict[str, Any], number: int = 3) -> None:
    run = _core.Run.open(path, seed=1, settings={})
    run.begin()
    taken = snapshot.capture(objects, values={"state": {"best": 0.5, "curve": torch.arange(3)}})
    run.commit(
        step=number,
        phase=0,
        tree={"objects": taken.tree, "state": taken.values["state"]},
        storages=taken.regions(),
        identity=snapshot.identity(objects),
        environment={},
        metrics={},
    )
    run.close()


def test_a_committed_state_goes_on_in_new_objects(tmp_path: Path) -> None:
    uninterrupted, resumed = build(1), build(2)
    for number in range(3):
        step(uninterrupted, number)
    commit(tmp_path / "run", uninterrupted)
    checkpoint = _core.read_checkpoint(tmp_path / "run")
    snapshot.plan_restore(resumed, checkpoint.tree["objects"], checkpoint).apply()
    for number in range(3, 6):
        step(uninterrupted, number)
        step(resumed, number)
    assert save(uninterrupted).same_as(save(resumed))
    state = snapshot.raise_plain(checkpoint.tree["state"], checkpoint, path="state")
    assert (state["best"], state["curve"].tolist()) == (0.5, [0, 1, 2])


def test_one_flipped_bit_is_found_before_anything_is_touched(tmp_path: Path) -> None:
    objects, live = build(1), build(2)
    step(objects, 0)
    commit(tmp_path / "run", objects)
    checkpoint = _core.read_checkpoint(tmp_path / "run")
    tree = checkpoint.tree["objects"]
    pack = max((tmp_path / "run" / "objects").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    before = save(live)
    with pytest.raises(DamagedCheckpoint):
        snapshot.plan_restore(live, tree, checkpoint)
    assert save(live).same_as(before)


def test_another_program_loads_plain_tensors_and_values(tmp_path: Path) -> None:
    objects = build(1)
    commit(tmp_path / "run", objects)
    content = export.load(tmp_path / "run")
    weight = content["objects"]["model"]["parameters"]["0.weight"]
    assert torch.equal(weight, objects["model"][0].weight)
    assert content["state"]["best"] == 0.5
    path = export.write_pt(_core.read_checkpoint(tmp_path / "run"), tmp_path / "all.pt")
    safe = torch.load(path, weights_only=True)
    assert torch.equal(safe["objects"]["model"]["parameters"]["0.weight"], weight)


def test_loading_a_directory_without_a_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UnbrokenError, match=tmp_path.name):
        export.load(tmp_path)


def test_no_file_of_a_run_holds_a_pickle(tmp_path: Path) -> None:
    commit(tmp_path / "run", everything())
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and file.stat().st_size:
            with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
                list(pickletools.genops(file.read_bytes()))


def test_one_leaf_is_loaded_by_its_name_and_nothing_else_is_read(tmp_path: Path) -> None:
    objects = build(1)
    for number in range(3):
        step(objects, number)
    commit(tmp_path / "run", objects)
    name = "objects/model/parameters/2.weight"
    packs = list((tmp_path / "run" / "objects").iterdir())
    taken = export.load(tmp_path / "run", only=name)
    assert list(taken) == [name]
    assert torch.equal(taken[name], objects["model"][2].weight)
    assert isinstance(taken[name], torch.Tensor)
    moments = export.load(tmp_path / "run", only=["objects/optimizer/state/*/exp_avg", "state/best"])
    assert moments["state/best"] == 0.5
    assert len(moments) == 1 + len(list(objects["model"].parameters()))
    with pytest.raises(InvalidArgument, match="is called `objects/none`"):
        export.load(tmp_path / "run", only=["state/*", "objects/none"])
    # Every byte but those of the one leaf is damaged: it comes back, and its neighbours are refused.
    wanted = bytes(objects["model"][2].weight.detach().view(torch.uint8).numpy())
    for pack in packs:
        header = 8 + int.from_bytes(pack.read_bytes()[:8], "little")
        data = pack.read_bytes()
        at = data.index(wanted, header)
        rest = bytes(byte ^ 1 for byte in data)
        pack.write_bytes(data[:header] + rest[header:at] + wanted + rest[at + len(wanted) :])
    assert torch.equal(export.load(tmp_path / "run", only=name)[name], objects["model"][2].weight)
    with pytest.raises(DamagedCheckpoint, match=r"0\.weight"):
        export.load(tmp_path / "run", only="objects/model/parameters/0.weight")


def test_damage_met_while_a_run_is_loaded_leads_to_the_next_older_checkpoint(tmp_path: Path) -> None:
    objects = build(1)
    path = tmp_path / "run"
    with_step = []
    for number in range(2):
        step(objects, number)
        commit(path, objects, number)
        with_step.append(objects["model"][0].weight.detach().clone())
    newest = {pack.stat().st_mtime_ns: pack for pack in (path / "objects").iterdir()}
    pack = newest[max(newest)]
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    staging = tensors.Staging()
    run = _core.Run.open(path, seed=1, settings={}, memory=staging)
    assert [name[:9] for name, _ in run.rejected] == ["000000001"]
    tree, loader = staging.taken()
    weight = loader.tensor(tree["objects"]["model"]["parameters"]["0.weight"], path="w")
    assert torch.equal(weight, with_step[0])
    run.close()
    with pytest.raises(DamagedCheckpoint):
        _core.Run.open(path, seed=1, settings={}, strict=True, memory=tensors.Staging())


def test_memory_that_cannot_be_lent_is_the_callers_error(tmp_path: Path) -> None:
    commit(tmp_path / "run", build(1))

    def refuse(checkpoint: _core.Checkpoint) -> list[tuple[int, int, int]]:
        raise MemoryError(f"for {len(checkpoint.storages)} storages")

    for _ in range(2):  # The lock is given back.
        with pytest.raises(MemoryError, match="storages"):
            _core.Run.open(tmp_path / "run", seed=1, settings={}, memory=refuse)
    with pytest.raises(MemoryError, match="storages"):
        _core.read_checkpoint(tmp_path / "run", memory=refuse)
