"""Every tensor that torch can make comes back with its bits, dtype, shape, strides and ties; or is refused by name."""

from __future__ import annotations

import collections
import gc
import io
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_memory import Memory, restore, save
from torch import nn

from unbroken import _core
from unbroken.errors import FormatError, UnsupportedState
from unbroken.torch import export, memory, snapshot, tensors

DTYPES = sorted(
    {
        item
        for item in vars(torch).values()
        if isinstance(item, torch.dtype) and not str(item).startswith("torch.q")
    },
    key=str,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning"),
]


class Checked:
    """The checkpoint of plain values, and what they come back as."""

    def __init__(self, value: object) -> None:
        taken = snapshot.capture({}, values={"v": value})
        self.memory = Memory(taken)
        self.leaf = self.memory.values["v"]
        self.back = raised(self.leaf, self.memory)


def raised(value: Any, memory: Memory) -> Any:
    return snapshot.raise_plain(value, cast("_core.Checkpoint", memory), path="v")


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in logical order."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return b""
    if tensor.element_size() < 16:
        tensor = tensor.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        )
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(back: Any, tensor: torch.Tensor) -> None:
    assert type(back) is type(tensor)
    assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert back.stride() == tensor.stride()
    assert bits(back) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_with_its_bits(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3,), (2, 5)):
        tensor = torch.empty(shape, dtype=dtype)
        raw = torch.randint(0, 256, (tensor.untyped_storage().nbytes(),), dtype=torch.uint8)
        tensor.untyped_storage().copy_(raw.untyped_storage())
        assert_same(Checked(tensor).back, tensor)


def test_the_payload_of_a_nan_survives_a_restore_in_place() -> None:
    words = torch.tensor([0x7FC0_1234, 0x7F80_0001, -1, -(2**31)], dtype=torch.int32)
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        tensors.write(model.weight, words.view(torch.float32).view(2, 2))
    restore({"model": other}, save({"model": model}))
    assert torch.equal(other.weight.view(torch.int32).flatten(), words)


LAYOUTS: dict[str, Any] = {
    "transposed": lambda t: t.t(),
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(3, -1),
    "expanded scalar": lambda t: t[0, 0].expand(4, 2),
    "overlapping": lambda t: t.as_strided((3, 3), (1, 1)),
    "offset": lambda t: t.flatten()[3:],
    "column": lambda t: t[:, 1],
    "conjugate": lambda t: torch.complex(t, t + 1).conj(),
    "negative": lambda t: torch.complex(t, t + 1).conj().imag,
    "parameter": lambda t: nn.Parameter(t.clone()),
    "frozen": lambda t: nn.Parameter(t.clone(), requires_grad=False),
    "buffer": lambda t: nn.Buffer(t.clone()),
    "leaf": lambda t: t.clone().requires_grad_(),
    "empty with strides": lambda t: torch.empty_strided((0, 3), (7, 2)),
    "inference": lambda t: torch.inference_mode()(lambda: t * 2)(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_views_and_flags_come_back(name: str) -> None:
    tensor = LAYOUTS[name](torch.randn(4, 6))
    if tensor.is_inference():
        assert torch.equal(Checked(tensor).back, tensor)
        return
    back = Checked(tensor).back
    assert (back.is_conj(), back.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    assert_same(back, tensor)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_live_tensor_of_any_layout_is_written_in_place(name: str) -> None:
    source = LAYOUTS[name](torch.randn(4, 6))
    target = LAYOUTS[name](torch.randn(4, 6))
    tensors.write(target, source)
    assert bits(target) == bits(source)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_view_comes_back_with_its_strides(sizes: list[int], draw: random.Random) -> None:
    base = torch.arange(1000)
    strides = [draw.choice([0, 1, 2, 5, 7, 40]) for _ in sizes]
    tensor = base.as_strided(sizes, strides, draw.randrange(100))
    assert_same(Checked(tensor).back, tensor)


def test_views_of_one_storage_come_back_tied() -> None:
    base = torch.randn(6)
    back = Checked([base, base[2:], base.view(2, 3).t()]).back
    back[0].zero_()
    assert back[1].abs().sum() == back[2].abs().sum() == 0


def test_a_small_view_does_not_drag_its_storage_along() -> None:
    base = torch.randn(100_000)
    checked = Checked([base[10:20], base[10:20]])
    assert sum(map(len, checked.memory.data)) == 40
    checked.back[0].zero_()
    assert checked.back[1].abs().sum() == 0, "the same view twice stays tied"
    column = torch.randn(1000, 100)[:, 3]
    assert sum(map(len, Checked(column).memory.data)) == 4000
    assert_same(Checked(column).back, column)


def test_small_views_that_share_a_storage_come_back_tied() -> None:
    base = torch.randn(1000)
    one, other = Checked([base[:10], base[5:15]]).back
    one.zero_()
    assert other[:5].abs().sum() == 0
    assert other[5:].abs().sum() > 0


def test_an_own_copy_does_not_follow_training() -> None:
    weight = torch.zeros(4)
    live, own = (snapshot.capture({}, values={"w": weight}, own_copies=copies) for copies in (False, True))
    weight.fill_(1)
    assert Memory(own).data == [bytes(16)]
    assert Memory(live).data == [bits(weight)]


@pytest.mark.parametrize("scheme", ["tensor", "channel", "half bytes"])
def test_quantized_tensors_come_back_with_their_quantizer(scheme: str) -> None:
    source = torch.randn(4, 6)
    if scheme == "tensor":
        tensor = torch.quantize_per_tensor(source, 0.1, 3, torch.quint8)
    else:
        scales, zeros = torch.rand(4).double() + 0.1, torch.arange(4)
        kind = torch.qint8
        if scheme == "half bytes":
            scales, zeros, kind = scales.float(), zeros.float(), torch.quint4x2
        tensor = torch.quantize_per_channel(source, scales, zeros, 0, kind)
    back = Checked(tensor).back
    assert (back.dtype, back.shape, back.qscheme()) == (tensor.dtype, tensor.shape, tensor.qscheme())
    assert torch.equal(back.dequantize(), tensor.dequantize())
    model, other = nn.Module(), nn.Module()
    model.register_buffer("q", tensor)
    other.register_buffer("q", torch.quantize_per_tensor(source, 0.5, 0, torch.qint8))
    restore({"model": other}, save({"model": model}))
    assert torch.equal(cast("torch.Tensor", other.q).dequantize(), tensor.dequantize())


SPARSE: dict[str, Any] = {
    "coo": lambda t: t.to_sparse_coo(),
    "coo not coalesced": lambda t: torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0]), (3,)
    ),
    "coo hybrid": lambda t: t.to_sparse_coo(1) if False else t.to_sparse(1),
    "csr": lambda t: t.to_sparse_csr(),
    "csc": lambda t: t.to_sparse_csc(),
    "bsr": lambda t: t.to_sparse_bsr((2, 2)),
    "bsc": lambda t: t.to_sparse_bsc((2, 2)),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_come_back_by_their_parts(name: str) -> None:
    tensor = SPARSE[name](torch.randn(4, 6).relu())
    back = Checked(tensor).back
    assert (back.layout, back.dtype, back.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert torch.equal(back.to_dense(), tensor.to_dense())
    if tensor.layout is torch.sparse_coo:
        assert (back._nnz(), back.is_coalesced()) == (tensor._nnz(), tensor.is_coalesced())


def test_dtypes_sizes_devices_formats_and_large_arrays_are_values() -> None:
    value = {
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "any": torch.device("cpu"),
        "format": torch.channels_last,
        "layout": torch.sparse_csr,
        torch.float32: "a key",
    }
    back = Checked(value).back
    assert back == value
    assert [type(part) for part in back.values()] == [type(part) for part in value.values()]
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(40, 30)))
    checked = Checked({"array": array})
    assert len(_core.encode(checked.leaf)) < 1000, "a large array is a storage, not part of the tree"
    assert checked.back["array"].tobytes() == array.tobytes()
    assert checked.back["array"].flags.f_contiguous


def test_a_tensor_without_values_or_with_a_graph_is_refused_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2)
    graph = torch.ones(2, requires_grad=True) * 2
    for tensor, why in ((torch.empty(2, device="meta"), "meta"), (fake, "fake"), (graph, "autograd graph")):
        with pytest.raises(UnsupportedState, match=rf"`v/0`.*{why}"):
            snapshot.capture({}, values={"v": [tensor]})


class Marked(torch.Tensor):
    pass


def test_a_subclass_of_tensor_comes_back_as_one() -> None:
    back = Checked(torch.arange(3).as_subclass(Marked)).back
    assert type(back) is Marked


@pytest.mark.parametrize(
    "leaf",
    [
        {"shape": (5,), "strides": (1,)},
        {"shape": (2, 2), "strides": (3, 1)},
        {"shape": (1,), "strides": (1,), "offset": 4},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (2,), "strides": (1,), "dtype": "float31"},
        {"shape": (2,), "strides": (1,), "dtype": "channels_last"},
        {"shape": (2,), "strides": (1,), "storage": 7},
        {
            "shape": (2,),
            "strides": (1,),
            "dtype": "qint8",
            "attrs": {"quantizer": {"scale": "x", "zero_point": 0}},
        },
    ],
)
def test_a_leaf_that_does_not_fit_its_storage_is_a_format_error(leaf: dict[str, Any]) -> None:
    memory = Checked(torch.zeros(4)).memory
    bad = _core.Tensor(**{"dtype": "float32", "offset": 0, "storage": 0, **leaf})
    with pytest.raises(FormatError):
        raised(bad, memory)


def test_sparse_indices_from_a_file_cannot_point_outside() -> None:
    checked = Checked(torch.eye(3).to_sparse_coo())
    fields = {**checked.leaf.fields, "shape": (2, 2)}
    with pytest.raises(FormatError):
        raised(_core.Object("sparse", "torch.sparse_coo", fields), checked.memory)


def test_tensors_that_share_memory_are_restored_as_they_were_saved() -> None:
    # Tied, one inside the other, and interleaved: bytes that are copied at once must not miss or cross any of them.
    def objects(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        flat = torch.randn(12)
        grid = torch.randn(6, 4)
        return {
            "flat": flat,
            "views": [flat[:5], flat[3:9], flat[9:]],
            "columns": [grid[:, ::2], grid[:, 1::2]],
            "turned": nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
            "tied": [weight := nn.Parameter(torch.randn(3, 3)), weight],
        }

    saved, live = objects(1), objects(2)
    versions = live["turned"]._version
    memory = save(saved)
    restore(live, memory)
    assert save(live).same_as(memory)
    assert live["turned"]._version > versions
    assert live["tied"][0] is live["tied"][1]
    assert live["views"][1].data_ptr() == live["flat"].data_ptr() + 3 * 4


def test_scratch_memory_is_aligned_as_torchs_own() -> None:
    memory = Checked([torch.randn(3), torch.randn(5), torch.randn(7)]).memory
    loader = tensors.Loader(cast("_core.Checkpoint", memory))
    for leaf in memory.values["v"]:
        assert loader.tensor(leaf, path="v").data_ptr() % tensors.ALIGNMENT_BYTES == 0


def test_what_was_read_to_be_copied_can_be_had_as_a_tensor_all_the_same() -> None:
    objects = {"model": nn.Linear(300, 7)}
    memory = save(objects)
    staging = tensors.Staging(lambda tree: snapshot.copied_leaves({"objects": tree}))
    memory.read_into(staging(cast("_core.Checkpoint", memory)))
    tree, loader = staging.taken()
    leaf, live = tree["model"]["parameters"]["weight"], objects["model"].weight
    source = loader.source_of(leaf, live)
    made = loader.tensor(leaf, path="weight")
    assert source is not None
    assert source[0] != made.data_ptr(), "what torch frees and resizes is its own"
    assert made.data_ptr() % tensors.ALIGNMENT_BYTES == 0
    assert bits(made) == bits(live)
    assert loader.tensor(leaf, path="weight").data_ptr() == made.data_ptr(), "tensors of one storage share it"


def test_the_collector_does_not_look_at_what_a_resume_made_nor_at_what_somebody_froze() -> None:
    seen: list[int] = []

    def collected(phase: str, info: dict[str, int]) -> None:
        seen.append(info["generation"])

    with tensors.kept():
        made = [[number] for number in range(100_000)]
        assert not gc.isenabled()
    gc.callbacks.append(collected)
    more = [[number] for number in range(100)]
    gc.callbacks.remove(collected)
    assert gc.isenabled()
    assert not seen
    assert gc.is_tracked(made[0])
    assert gc.is_tracked(more[0])
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with tensors.kept():
            others = [[number] for number in range(1000)]
        assert len(others) == 1000
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


# Other programs, and no pickle (O13).


def everything() -> dict[str, Any]:
    return {
        "legacy": np.random.RandomState(1),
        "generator": np.random.default_rng(2),
        "python": random.Random(3),
        "model": nn.Linear(3, 3).bfloat16(),
        "values": {
            "scalar": np.float32(1.5),
            "nested": {"tuple": (1, None, [2.5]), 3: {"x"}},
            "half": torch.randn(3).bfloat16(),
            "zero": torch.tensor(4),
            "deque": collections.deque([1], maxlen=2),
            "ordered": collections.OrderedDict(a=1),
            "bytes": b"\x00\xff",
            "complex": 1 + 2j,
            "big": 2**70,
            "nan": struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0],
        },
    }


def test_capture_and_restore_never_touch_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> Any:
        raise AssertionError("pickle was used")

    for name in ("Pickler", "Unpickler", "dumps", "loads", "dump", "load"):
        monkeypatch.setattr(pickle, name, forbidden)
    one, other = everything(), everything()
    memory = save(one)
    restore(other, memory)
    assert save(other).same_as(memory)
    assert type(other["values"]["nested"]["tuple"]) is tuple
    assert type(other["values"]["scalar"]) is np.float32
    for data in [_core.encode(memory.tree), *memory.data]:
        assert not data.startswith(b"\x80"), "no pickle stream"


def test_an_exported_file_opens_under_torchs_safe_default(tmp_path: Path) -> None:
    one = everything()
    memory = save(one)
    path = export.write_pt(cast("_core.Checkpoint", memory), tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["model"]["parameters"]["weight"], one["model"].weight)
    assert content["values"]["value"]["nested"] == {"tuple": (1, None, [2.5]), 3: {"x"}}
    assert content["values"]["value"]["big"] == 2**70
    assert content["values"]["value"]["deque"]["items"] == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail(file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="No space left"):
        export.write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_another_program_gets_plain_values_and_records() -> None:
    memory = save(everything())
    content = export.plain(cast("_core.Checkpoint", memory))
    assert content["model"]["parameters"]["weight"].dtype is torch.bfloat16
    assert content["values"]["value"]["deque"] == collections.deque([1], maxlen=2)


# What every step pays for.


def test_regions_follow_tensors_that_are_replaced_added_or_moved() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    watches = memory.watches({"model": model, "optimizer": optimizer})

    def components() -> dict[str, Any]:
        return {name: list(part) for name, part in memory.regions(watches).items()}

    def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
        return [name for name in one if one[name] != other[name]]

    first = components()
    assert list(first) == ["state/optimizer/optimizer", "state/parameters/model", "state/buffers/model"]
    assert first["state/optimizer/optimizer"] == []
    assert (model[0].weight.data_ptr(), 64) in first["state/parameters/model"]
    assert components() == first
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    second = components()
    assert differing(first, second) == ["state/optimizer/optimizer"]
    assert len(second["state/optimizer/optimizer"]) == 3 * 4
    keep = model[0].weight.data
    model[0].weight.data = keep.clone()
    third = components()
    assert differing(second, third) == ["state/parameters/model"]
    old = model[1].running_mean
    model[1].running_mean = torch.zeros(4)
    fourth = components()
    assert differing(third, fourth) == ["state/buffers/model"]
    model.append(nn.Linear(2, 2))
    assert differing(fourth, components()) == ["state/parameters/model"]
    del old


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[torch.Tensor] = []
        self.mean: torch.Tensor | None = None


def test_regions_see_tensors_in_plain_attributes_of_the_users_modules() -> None:
    model = Caching()
    watches = memory.watches({"model": model})
    assert memory.regions(watches)["state/buffers/model"] == []
    model.mean = torch.zeros(3)
    model.cache.append(torch.zeros(5))
    found = memory.regions(watches)["state/buffers/model"]
    assert sorted(length for _, length in found) == [12, 20]
    model.cache[0] = torch.zeros(6)
    assert sorted(length for _, length in memory.regions(watches)["state/buffers/model"]) == [12, 24]


def test_the_plain_digest_changes_with_counters_options_and_scales() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.5**e)
    scaler = torch.amp.GradScaler("cpu")
    objects = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    seen = [snapshot.plain_digest(objects)]
    assert snapshot.plain_digest(objects) == seen[0]
    optimizer.param_groups[0]["weight_decay"] = 0.1
    seen.append(snapshot.plain_digest(objects))
    scheduler.last_epoch += 1
    seen.append(snapshot.plain_digest(objects))
    scaler.scale(torch.ones(1))
    seen.append(snapshot.plain_digest(objects))
    assert len(set(seen)) == 4


def flip_grad(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.requires_grad_(not tensor.requires_grad)


def give_grad(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.grad = torch.ones_like(tensor) if tensor.grad is None else None


def rebound(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor.grad = None
        tensor.data = make(tensor.data)

    return change


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "another storage": rebound(torch.clone),
    "another dtype": rebound(lambda data: data.to(torch.float64)),
    "half the bits": rebound(lambda data: data.to(torch.bfloat16)),
    "another memory format": rebound(lambda data: data.t().contiguous().t()),
    "a view of itself": rebound(lambda data: data[1:]),
    "a view of more": rebound(lambda data: torch.cat([data, data]).narrow(0, 1, data.shape[0])),
    "transposed": rebound(torch.t),
    "another shape": rebound(lambda data: data.reshape(1, -1)),
    "a stride that is never used": rebound(
        lambda data: data.reshape(-1).clone().as_strided((1, data.numel()), (977, 1))
    ),
    "expanded": rebound(lambda data: data[:1].expand(4, -1)),
    "negated when read": rebound(lambda data: tensors._neg_view(data)),
    "flag": flip_grad,
    "gradient": give_grad,
    "values": lambda tensor: tensors.write(tensor, tensor.detach() + 1),
    "values past the counter": lambda tensor: tensors.write(tensor.data, tensor.data + 1),
}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(CHANGES))), max_size=6))
def test_whatever_becomes_of_a_tensor_is_in_the_next_capture(changes: list[tuple[int, str]]):
    """Nothing that changed is taken from the capture before, and the short way gives what the long one does."""
    layer = nn.Linear(3, 4)
    layer.register_buffer("buffer", torch.randn(5, 2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    live = [
        layer.weight,
        cast("torch.Tensor", layer.buffer),
        optimizer.state[layer.weight]["momentum_buffer"],
    ]
    live.append(optimizer.state[layer.bias]["momentum_buffer"].unsqueeze(0))
    objects = {"layer": layer, "optimizer": optimizer, "other": {"tensor": live[3]}}
    for which, name in [*changes, (0, "values")]:
        snapshot.capture(objects)
        if live[which].dim() == 2 and live[which].numel() >= 4:
            CHANGES[name](live[which])
        short = snapshot.capture(objects)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors.Storages, "usual", property(lambda _: tensors._unusual))
            patch.setattr(tensors.Storages, "usual_alone", property(lambda _: tensors._unusual))
            patch.setattr(tensors.Storages, "usual_parameters", lambda *_: False)
            patch.setattr(tensors.Storages, "usual_states", lambda _, names, parameters, first, *rest: first)
            long = snapshot.capture(objects)
        assert Memory(short).same_as(Memory(long))


def test_an_unusual_tensor_among_others_keeps_its_place():
    usual = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    unusual = [nn.Parameter(torch.randn(2, 3).t()), nn.Parameter(torch.zeros(1).expand(5))]
    parameters = nn.ParameterList([usual[0], unusual[0], usual[1], unusual[1], usual[2], usual[3]])
    optimizer = torch.optim.SGD([*usual, *unusual], lr=0.1, momentum=0.9)
    optimizer.state.update(
        {p: {"momentum_buffer": p.detach().clone()} for p in parameters if p is not usual[2]}
    )
    optimizer.state[usual[1]].update(count=3, last=[0.5])
    usual[3].grad = torch.ones(3, 2)
    captured = snapshot.capture({"model": parameters, "optimizer": optimizer})
    tree = Memory(captured).tree
    model, state = tree["model"], tree["optimizer"]["state"]
    names = ["0", "1", "2", "3", "4", "5"]
    assert list(model["parameters"]) == list(model["gradients"]) == names
    assert [model["parameters"][name].storage for name in names] == [0, 1, 2, 3, 4, 5]
    assert [name for name in names if model["gradients"][name] is not None] == ["5"]
    assert [name.rpartition(".")[2] for name in state] == ["0", "2", "5", "1", "3"]
    assert list(state.values())[1]["last"] == [0.5]
    assert [type(parts["momentum_buffer"]) for parts in state.values()] == [_core.Tensor] * 5
    assert list(state.values())[1]["count"] == 3


def test_a_storage_counts_as_large_by_what_it_is_and_not_by_what_is_seen_of_it():
    large, small = torch.zeros(1000), torch.zeros(10)
    found = tensors.READER.large(
        [large[:2], small, large.view(torch.complex64), torch.zeros(9, 9).to_sparse()], 4000
    )
    assert [(address, length) for _, address, length in found] == [(large.data_ptr(), 4000)] * 2


def test_a_torch_without_a_known_way_to_be_asked_is_read_on_the_long_way(monkeypatch: pytest.MonkeyPatch):
    objects = {"layer": nn.Linear(3, 4), "other": {"tensor": torch.arange(6.0).view(2, 3)}}
    known = snapshot.capture(objects)
    slow = _core.TensorReader(
        tensor=torch.Tensor, parameter=(nn.Parameter, "torch.nn.parameter.Parameter"), exchange=None
    )
    monkeypatch.setattr(tensors, "READER", slow)
    assert Memory(snapshot.capture(objects)).same_as(Memory(known))
    assert slow.large([torch.zeros(1000)], 4) == []
