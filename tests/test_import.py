"""`unbroken import`: what torch.save wrote comes back from `unbroken.load` as torch.load would give it.

The judge is torch itself. Hostile files are made here by hand, and must leave nothing behind.
"""

import argparse
import collections
import io
import json
import pathlib
import pickle
import random
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import unbroken
from unbroken.__main__ import main

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]

FORMATS: dict[str, dict[str, Any]] = {
    "archive": {},
    "old format": {"_use_new_zipfile_serialization": False},
    "protocol 3": {"pickle_protocol": 3},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
}


def recipe() -> dict[str, Any]:
    """Return the checkpoint that articles recommend: counters, generators, state dicts."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 6)).sum().backward()
        optimizer.step()
    return {
        "epoch": 7,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def values() -> dict[Any, Any]:
    shared = torch.arange(24.0).reshape(4, 6)
    return {
        "texts": ["", "ä€😀", "x" * 300, b"", b"\x00\xff" * 200, bytearray(b"ab")],
        "numbers": [0, -1, 255, 256, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64, -(10**40), 1.5, 3 + 4j],
        "odd floats": [-0.0, float("inf")],
        "sets": [{1, "a", (2, 3)}, frozenset({4}), set()],
        (1, "key"): {None: True, 2.5: False, 7: "int key"},
        "named": collections.OrderedDict(b=1, a=[2]),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, {1: [2]}),
        "deque": collections.deque([1, 2], maxlen=3),
        "simple": types.SimpleNamespace(rate=0.1),
        "range": range(2, 9, 3),
        "slice": slice(1, None, 2),
        "dots": ...,
        "path": pathlib.PurePosixPath("/a/b"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "arrays": [
            np.arange(6.0).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
            np.zeros((0, 2), "u1"),
            np.array("text"),
            np.arange(3000),
        ],
        "numpy numbers": [np.float32(1.5), np.int64(-2), np.bool_(True), np.complex128(1j)],
        "numpy dtype": np.dtype(">f8"),
        "tied": [shared, shared[1:3, ::2], shared.t()],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "conj": torch.tensor([1 + 2j]).conj(),
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def assert_same(expected: Any, found: Any, path: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected), path
        assert (found.dtype, found.shape, found.stride(), found.requires_grad) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
            expected.requires_grad,
        ), path
        assert found.is_conj() == expected.is_conj(), path
        raw = [item.detach().resolve_conj().contiguous().reshape(-1) for item in (expected, found)]
        old, new = (item.view(torch.uint8).tolist() for item in raw)
        assert old == new, path
    elif isinstance(expected, np.ndarray | np.generic):
        assert type(found) is type(expected), path
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), path
    elif isinstance(expected, dict):
        assert type(found) is type(expected), path
        assert list(found) == list(expected), path
        for key, part in expected.items():
            assert_same(part, found[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple) and not isinstance(expected, torch.Size):
        assert type(found) is type(expected) and len(found) == len(expected), path
        for index, part in enumerate(expected):
            assert_same(part, found[index], f"{path}/{index}")
    else:
        assert type(found) is type(expected), path
        assert repr(found) == repr(expected) or found == expected, path


def imported(tmp_path: Path, content: Any, **how: Any) -> Any:
    file, run = tmp_path / "old.pt", tmp_path / "run"
    torch.save(content, file, **how)
    assert main(["import", str(file), str(run), "--step", "12"]) == 0
    assert main(["verify", str(run)]) == 0
    return unbroken.load(run)


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("make", [recipe, values], ids=["recipe", "values"])
def test_import_gives_what_torch_load_gives(
    tmp_path: Path, make: Callable[[], Any], how: dict[str, Any]
) -> None:
    content = make()
    assert_same(content, imported(tmp_path, content, **how))


def test_the_generators_of_a_recipe_go_on_where_they_were(tmp_path: Path) -> None:
    content = recipe()
    expected = (torch.rand(3), np.random.random(3), random.random())
    found = imported(tmp_path, content)
    torch.set_rng_state(content["torch"])
    np.random.set_state(content["numpy"])
    random.setstate(content["python"])
    expected = (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random())
    torch.set_rng_state(found["torch"])
    np.random.set_state(found["numpy"])
    random.setstate(found["python"])
    assert (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()) == expected


@pytest.mark.parametrize(
    "how", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "old format"]
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, how: dict[str, Any]) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    old = "_use_new_zipfile_serialization" in how
    content = {str(dtype): raw.clone().view(dtype) for dtype in DTYPES if dtype is not torch.bool}
    content["bool"] = raw % 2 == 0
    if old:  # Only dtypes with a storage class of their own could be saved in it.
        content = {name: item for name, item in content.items() if hasattr(torch, f"{item.dtype}"[6:])}
    assert_same(content, imported(tmp_path, content, **how))


def test_tied_tensors_come_back_tied_and_are_stored_once(tmp_path: Path) -> None:
    weight = torch.arange(1000.0)
    found = imported(tmp_path, {"a": weight, "b": weight, "half": weight[:500]})
    assert found["a"].data_ptr() == found["b"].data_ptr() == found["half"].data_ptr()
    assert unbroken._core.read_checkpoint(tmp_path / "run").info.size_bytes == 4000


def test_a_namespace_of_options_comes_back_as_its_attributes(tmp_path: Path) -> None:
    found = imported(tmp_path, {"args": argparse.Namespace(lr=0.1, layers=[1, 2])})
    assert vars(found["args"]) == {"lr": 0.1, "layers": [1, 2]}


def test_an_imported_run_can_be_shown_and_exported_and_is_not_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = recipe()
    imported(tmp_path, content)
    run = tmp_path / "run"
    capfd.readouterr()
    assert main(["show", str(run), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["step"] == 12
    assert "net/items/0.weight" in {leaf["path"] for leaf in shown["leaves"]}
    target = tmp_path / "net.safetensors"
    assert main(["export", str(run), str(target), "--prefix", "net/items/"]) == 0
    from safetensors.torch import load_file

    assert_same(dict(sorted(content["net"].items())), dict(sorted(load_file(target).items())))
    with pytest.raises(unbroken.UnbrokenError, match="imported"):
        unbroken.Run(run, net=nn.Linear(1, 1))


# Hostile files.


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def archive(pickled: bytes, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", pickled)
        for name, data in entries.items():
            made.writestr(f"a/{name}", data)
    return file.getvalue()


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * 0 + b"]" * depth + b"a" * (depth - 1) + b"."


def doubling(levels: int) -> bytes:
    """A list of the same list twice, and so on: small in the file, 2 to the power of `levels` written out."""
    body = b"\x80\x02]q\x00"
    for level in range(levels):
        body += b"]" + b"h" + bytes([level]) + b"ah" + bytes([level]) + b"aq" + bytes([level + 1])
    return body + b"."


def repeated_conversion() -> bytes:
    """The same megabyte of text made bytes again and again, with ten bytes of pickle each time."""
    text = b"\x00" * 1_000_000
    head = (
        b"\x80\x02c_codecs\nencode\nq\x00X"
        + struct.pack("<I", len(text))
        + text
        + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    )
    return head + b"h\x00h\x01h\x02\x86R" * 2000 + b"."


def of_shape(count: int, offset: int, size: int, stride: int) -> bytes:
    """One float32 tensor over a storage of `count` elements."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    number = lambda value: b"\x8a\x09" + value.to_bytes(9, "little", signed=True)  # noqa: E731
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(count)
        + b"tQ"
        + number(offset)
        + number(size)
        + b"\x85"
        + number(stride)
        + b"\x85\x89}tR."
    )


def with_entry_changed(change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(archive(pickle.dumps({"a": 1}, 2)))
    change(data)
    return bytes(data)


def compress() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"N.")
    return file.getvalue()


def overlap() -> bytes:
    """Two entries of the directory that point at the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", pickle.dumps({}, 2))
        first = made.getinfo("a/data.pkl")
        made.writestr("a/data/0", b"x" * 40)
        second = made.getinfo("a/data/0")
        second.header_offset = first.header_offset
    return file.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a call of os.system": (
        archive(pickle.dumps(Evil(__import__("os").system, "touch /tmp/x"), 2)),
        "posix.system",
    ),
    "a call of eval": (archive(pickle.dumps(Evil(eval, "1"), 4)), "builtins.eval"),
    "getattr": (archive(pickle.dumps(Evil(getattr, 1, "real"), 2)), "getattr"),
    "a class of the user's": (archive(pickle.dumps(Evil(pathlib.Path.cwd), 2)), "names"),
    "a list as a key": (archive(b"\x80\x02}]Ns."), "that can change"),
    "a list in a set": (archive(b"\x80\x04\x8f(]\x90."), "that can change"),
    "an array of objects": (archive(pickle.dumps(np.array([None]), 2)), "O8"),
    "deep nesting": (archive(nested(100_000)), "nested more than"),
    "a list that contains itself": (archive(b"\x80\x02]q\x00h\x00a."), "nested more than"),
    "doubling": (archive(doubling(60)), "more than"),
    "conversions without end": (archive(repeated_conversion()), "many times larger"),
    "too many objects": (archive(b"\x80\x02(" + b"]" * (5 << 20) + b"t."), "more than"),
    "a huge number": (
        archive(b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b"."),
        "integer of",
    ),
    "a text longer than the file": (archive(b"\x80\x02X\xff\xff\xff\xff."), "ends early"),
    "an empty stack": (archive(b"\x80\x020."), "stack"),
    "no end": (archive(b"\x80\x02N"), "ends early"),
    "an unknown opcode": (archive(b"\x80\x02\xfe."), "0xfe"),
    "a tensor beyond its storage": (
        archive(of_shape(4, 1, 4, 1), **{"data/0": b"\0" * 16}),
        "beyond its storage",
    ),
    "a tensor of the whole address space": (
        archive(of_shape(4, 0, 2**62, 2**62), **{"data/0": b"\0" * 16}),
        "beyond its storage",
    ),
    "a negative stride": (archive(of_shape(4, 3, 2, -1), **{"data/0": b"\0" * 16}), "shape"),
    "a storage that is not there": (archive(of_shape(4, 0, 4, 1)), "no entry"),
    "a storage of another length": (archive(of_shape(4, 0, 4, 1), **{"data/0": b"\0" * 12}), "16 bytes"),
    "a compressed entry": (compress(), "compressed"),
    "entries over each other": (overlap(), "not where"),
    "no pickle": (archive(b"N.")[:20] + b"", "not"),
    "two pickles": (archive(b"\x80\x02N.", **{"b/data.pkl": b"\x80\x02N."}), "not one"),
    "a program": (archive(b"\x80\x02N.", **{"constants.pkl": b"N."}), "TorchScript"),
    "the other byte order": (archive(b"\x80\x02N.", byteorder=b"big"), "byte order"),
    "a tar": (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar"),
    "nothing": (b"", "not a file"),
    "text": (b"hello", "not a file"),
    "a flipped bit": (with_entry_changed(lambda data: data.__setitem__(45, data[45] ^ 1)), "checksum"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], data: bytes, words: str
) -> None:
    file = tmp_path / "old.pt"
    file.write_bytes(data)
    assert main(["import", str(file), str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert words in error and "old.pt" in error, error
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.pt"]


def test_a_link_to_a_file_is_followed_as_in_a_model_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    torch.save({"a": torch.arange(5)}, tmp_path / "blobs" / "9f3c51")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.bin"
    link.symlink_to("../blobs/9f3c51")
    assert main(["import", str(link), str(tmp_path / "run")]) == 0
    assert torch.equal(unbroken.load(tmp_path / "run")["a"], torch.arange(5))


def test_only_a_file_that_is_refused_for_what_it_names_is_said_to_need_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, new = tmp_path / "old.pt", tmp_path / "run"
    torch.save({"a": nn.Linear(2, 2)}, file)
    assert main(["import", str(file), str(new)]) == 2
    assert "load it with torch" in capfd.readouterr().err
    assert main(["import", str(tmp_path), str(new)]) == 2
    error = capfd.readouterr().err
    assert "a directory, not a plain file" in error and "load it with torch" not in error
    torch.save({"a": 1}, file)
    new.mkdir()
    (new / "mine").touch()
    assert main(["import", str(file), str(new)]) == 2
    error = capfd.readouterr().err
    assert "is there already" in error and "load it with torch" not in error


def test_a_file_that_was_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    for how in ({}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save({"a": torch.arange(5), "b": [1, "x"]}, file, **how)
        data = file.getvalue()
        for length in range(0, len(data), 37):
            (tmp_path / "old.pt").write_bytes(data[:length])
            assert main(["import", str(tmp_path / "old.pt"), str(tmp_path / "run")]) == 2, length
