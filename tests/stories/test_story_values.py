"""Values of every type come back with their types and bytes, and no part of a run is ever a pickle. Case O13."""

import io
import pickle
import zipfile
from collections.abc import Callable

import safetensors
import torch

from harness import KILLED, Story, assert_exact, command

Begin = Callable[..., Story]


def test_values_of_every_type_survive_without_pickle(story: Begin, reference: Begin) -> None:
    # The workload compares the values at every step with what they should be, by type and by bits, in processes in
    # which every use of pickle, torch.save and torch.load raises.
    told = story("--extra-state", "--forbid-pickle").killed_at("1:after", "49:body", "73:after")
    told.live()
    assert_exact(told, reference())


def test_no_file_of_a_run_can_be_unpickled(story: Begin) -> None:
    told = story("--extra-state")
    told.live("--kill", "73:body", code=KILLED)
    files = [path for path in told.run.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        assert not zipfile.is_zipfile(io.BytesIO(content)), path
        assert not content.startswith(pickle.PROTO), path
        if content:
            try:
                pickle.Unpickler(io.BytesIO(content)).load()
            except Exception:  # Whatever the bytes mean to pickle, it is not a value.
                continue
            raise AssertionError(f"{path} is a pickle")


def test_every_pack_is_a_safetensors_file(story: Begin) -> None:
    told = story("--extra-state")
    told.live("--kill", "30:body", code=KILLED)
    packs = list((told.run / "objects").iterdir())
    assert packs
    for pack in packs:
        with safetensors.safe_open(pack, "pt") as opened:
            assert opened.keys()


def test_a_checkpoint_opens_as_plain_tensors_and_values(story: Begin) -> None:
    import unbroken
    import workload

    told = story("--extra-state", "--checkpoint", "10").killed_at("25:body")
    content = unbroken.load(told.run)
    assert content["state"]["steps"] == 20
    assert workload.hashed(content["state"]["extra"]) == workload.hashed(workload.extra_state())
    assert isinstance(content["objects"], dict)


def test_an_exported_checkpoint_is_read_by_safetensors(story: Begin) -> None:
    told = story().killed_at("25:body")
    target = told.directory / "net.safetensors"
    command("export", told.run, target)
    with safetensors.safe_open(target, "pt") as opened:
        names = list(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names}
    [weight] = [name for name in names if name.endswith("first.weight") and tensors[name].shape == (24, 10)]
    assert tensors[weight].dtype == torch.float32
