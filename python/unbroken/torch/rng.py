"""Every generator that a training step can draw from: read, put back, compared, re-keyed.

Touches: python's `random`, numpy's legacy global generator (only where numpy is imported already), torch's
CPU generator and, once CUDA is initialised, the generator of each device. Reading never advances a generator;
putting back is all or nothing: everything is checked before the first generator is written.

Public functions read slowly: python's and numpy's states go through hundreds of Python integers, 10 and 45
microseconds. The fast path reads the same bytes from memory, at offsets that are found by looking for a known
state in a generator of our own; where they are not found exactly once, the public way is taken.
"""

import ctypes
import random
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from unbroken import _core
from unbroken.errors import MismatchError, UnsupportedState

Value = Any

_WORDS = 624
_PYTHON_BYTES = 4 * (_WORDS + 1)
_NUMPY_BYTES = 4 * (_WORDS + 1)
_TWISTER = "MT19937"


# Python's generator. Its bytes: position (u32), 624 words (u32), the cached normal (f64) if there is one.


def _find_python_words() -> int | None:
    """Return where an instance of `random.Random` keeps position and words, or None where unclear."""
    if sys.implementation.name != "cpython" or sys.byteorder != "little":
        return None
    size = random.Random.__basicsize__
    offset = None
    for seed, draws in ((1, 0), (2, 3), (3, 700)):
        probe = random.Random(seed)
        for _ in range(draws):
            probe.random()
        expected = _python_words_slow(probe)
        memory = ctypes.string_at(id(probe), size)
        if memory.count(expected) != 1 or offset not in (None, memory.index(expected)):
            return None
        offset = memory.index(expected)
    return offset


def _python_words_slow(generator: random.Random) -> bytes:
    state = generator.getstate()[1]
    return struct.pack(f"<{_WORDS + 1}I", state[-1], *state[:-1])


_PYTHON_OFFSET = _find_python_words()
_PYTHON_GLOBAL: random.Random = random.getstate.__self__  # pyright: ignore[reportFunctionMemberAccess]


def _read_python(generator: random.Random) -> bytes:
    if _PYTHON_OFFSET is None:
        words = _python_words_slow(generator)
    else:
        words = ctypes.string_at(id(generator) + _PYTHON_OFFSET, _PYTHON_BYTES)
    cached = generator.gauss_next  # pyright: ignore[reportAttributeAccessIssue]
    return words if cached is None else words + struct.pack("<d", cached)


def _write_python(generator: random.Random, data: bytes) -> None:
    words = struct.unpack_from(f"<{_WORDS + 1}I", data)
    cached = struct.unpack_from("<d", data, _PYTHON_BYTES)[0] if len(data) > _PYTHON_BYTES else None
    generator.setstate((3, (*words[1:], words[0]), cached))


# numpy's global generator. Its bytes: 624 words (u32), position (u32), the cached normal (f64) or nothing.
# Another bit generator than the Mersenne Twister: b"\0" and the canonical bytes of its state.


class _Numpy:
    """numpy's legacy global generator, reached through documented names where there is a fast one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.random = module.random
        self.state: Any = module.random.get_state.__self__
        self.gauss_offset = self._find_gauss()

    def _find_gauss(self) -> int | None:
        """Return where a RandomState keeps its cached normal (flag, 8 bytes further the number), or None."""
        kind = self.random.RandomState
        if sys.implementation.name != "cpython" or sys.byteorder != "little":
            return None
        offset = None
        for number in (1.2345678901234567, -0.7654321098765432):
            probe = kind(7)
            twister = probe.get_state(legacy=False)
            probe.set_state({**twister, "has_gauss": 1, "gauss": number})
            memory = ctypes.string_at(id(probe), kind.__basicsize__)
            mark = struct.pack("<d", number)
            if memory.count(mark) != 1:
                return None
            found = memory.index(mark) - 8
            if found < 0 or memory[found : found + 4] != b"\1\0\0\0" or offset not in (None, found):
                return None
            offset = found
            probe.set_state({**twister, "has_gauss": 0, "gauss": 0.0})
            if ctypes.string_at(id(probe) + found, 4) != bytes(4):
                return None
        return offset

    def place(self) -> tuple[int, Any, int] | None:
        """Return address, bit generator and address of a flag; None where the state takes more than its memory.

        What lies at the first address is what `read` returns, while the bit generator is the global one and the flag
        (32 bits) is zero.
        """
        bits = self.random.get_bit_generator()
        if type(bits).__name__ != _TWISTER or self.gauss_offset is None:
            return None
        return bits.ctypes.state_address, bits, id(self.state) + self.gauss_offset

    def read(self) -> bytes:
        bits = self.random.get_bit_generator()
        if type(bits).__name__ != _TWISTER or self.gauss_offset is None:
            return self._read_slow()
        words = ctypes.string_at(bits.ctypes.state_address, _NUMPY_BYTES)
        flag = ctypes.string_at(id(self.state) + self.gauss_offset, 16)
        return words if flag[:4] == bytes(4) else words + flag[8:]

    def _read_slow(self) -> bytes:
        state = self.random.get_state(legacy=False)
        if state["bit_generator"] != _TWISTER:
            return b"\0" + _core.encode(_lower_bits(state))
        words = state["state"]["key"].astype("<u4").tobytes() + struct.pack("<I", state["state"]["pos"])
        return words + struct.pack("<d", state["gauss"]) if state["has_gauss"] else words

    def write(self, data: bytes) -> None:
        if data[:1] == b"\0" and len(data) not in (_NUMPY_BYTES, _NUMPY_BYTES + 8):
            self.random.set_state(_raise_bits(_core.decode(data[1:])))
            return
        bits = self.random.get_bit_generator()
        if type(bits).__name__ != _TWISTER:
            raise MismatchError([("numpy's global bit generator", _TWISTER, type(bits).__name__)])
        offset = self.gauss_offset if len(data) == _NUMPY_BYTES else None
        if offset is not None and ctypes.string_at(id(self.state) + offset, 4) == bytes(4):
            ctypes.memmove(bits.ctypes.state_address, data, _NUMPY_BYTES)
            return
        cached = len(data) > _NUMPY_BYTES
        self.random.set_state(
            {
                "bit_generator": _TWISTER,
                "state": {
                    "key": self.module.frombuffer(data, dtype="<u4", count=_WORDS).astype(self.module.uint32),
                    "pos": struct.unpack_from("<I", data, 4 * _WORDS)[0],
                },
                "has_gauss": int(cached),
                "gauss": struct.unpack_from("<d", data, _NUMPY_BYTES)[0] if cached else 0.0,
            }
        )

    def seed(self, words: tuple[int, ...]) -> None:
        bits = self.random.get_bit_generator()
        if type(bits).__name__ == _TWISTER:
            self.random.seed(words)
        else:
            bits.state = type(bits)(words).state


_numpy_global: _Numpy | None = None


def _numpy() -> _Numpy | None:
    global _numpy_global
    if _numpy_global is None and "numpy.random" in sys.modules:
        _numpy_global = _Numpy(sys.modules["numpy"])
    return _numpy_global


def _lower_bits(state: Any) -> Value:
    """Return a bit generator's state dict with its arrays as (dtype, shape, bytes)."""
    if isinstance(state, dict):
        return {str(key): _lower_bits(item) for key, item in state.items()}
    if hasattr(state, "tobytes") and hasattr(state, "shape"):
        return {"dtype": state.dtype.str, "shape": tuple(state.shape), "data": state.tobytes()}
    if isinstance(state, bool | int | float | str):
        return state.item() if hasattr(state, "item") else state  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(state, "item"):
        return state.item()
    raise UnsupportedState("bit generator", type(state).__qualname__)


def _raise_bits(value: Value) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "shape", "data"}:
            import numpy

            return numpy.frombuffer(value["data"], dtype=value["dtype"]).reshape(value["shape"]).copy()
        return {key: _raise_bits(item) for key, item in value.items()}
    return value


# torch's generators. Their bytes are what `get_state` gives.


def _torch_bytes(generator: torch.Generator) -> bytes:
    state = generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.numel())


def _write_torch(generator: torch.Generator, data: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _cuda_generators() -> tuple[torch.Generator, ...]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return tuple(torch.cuda.default_generators)
    return ()


class Globals(NamedTuple):
    """The bytes of the global generators at one instant; equal bytes draw equal numbers."""

    python: bytes
    numpy: bytes | None
    torch: bytes
    cuda: tuple[bytes, ...] = ()


def read_globals(*, cuda: bool = True) -> Globals:
    """Return the bytes of every global generator; none is advanced."""
    numpy = _numpy()
    return Globals(
        _read_python(_PYTHON_GLOBAL),
        None if numpy is None else numpy.read(),
        _torch_bytes(torch.default_generator),
        tuple(_torch_bytes(generator) for generator in _cuda_generators()) if cuda else (),
    )


def write_globals(state: Globals, *, found: Globals | None = None) -> None:
    """Put bytes that `read_globals` returned back; those equal to ``found`` are left alone."""
    if found is None or found.python != state.python:
        _write_python(_PYTHON_GLOBAL, state.python)
    if state.numpy is not None and (found is None or found.numpy != state.numpy):
        numpy = _numpy()
        if numpy is not None:
            numpy.write(state.numpy)
    if found is None or found.torch != state.torch:
        _write_torch(torch.default_generator, state.torch)
    for index, (generator, data) in enumerate(zip(_cuda_generators(), state.cuda, strict=False)):
        if found is None or index >= len(found.cuda) or found.cuda[index] != data:
            _write_torch(generator, data)


@contextmanager
def preserved() -> Iterator[None]:
    """Run the body and put every global generator back where it was, also when the body raises."""
    before = read_globals()
    try:
        yield
    finally:
        write_globals(before, found=read_globals())


def capture() -> Value:
    """Return every global generator as a value of the core's algebra; none is advanced."""
    state = read_globals()
    return {
        "python": state.python,
        "numpy": state.numpy,
        "torch": state.torch,
        "cuda": list(state.cuda),
    }


def restore(value: Value) -> None:
    """Put back what `capture` returned; all or nothing.

    Raises:
        MismatchError: The value belongs to other generators (another number of CUDA devices, another
            release's state size). Nothing has been changed.
    """
    if not isinstance(value, dict) or value.keys() != {"python", "numpy", "torch", "cuda"}:
        raise MismatchError([("generator state", "python, numpy, torch, cuda", _names(value))])
    state = Globals(value["python"], value["numpy"], value["torch"], tuple(value["cuda"]))
    if state.numpy is not None and "numpy.random" not in sys.modules:
        import numpy.random  # noqa: F401  # What drew before the checkpoint will draw again.
    if state.cuda and not torch.cuda.is_initialized() and torch.cuda.is_available():
        torch.cuda.init()
    _check_globals(state)
    before = read_globals()
    try:
        write_globals(state)
    except BaseException:
        write_globals(before)
        raise


def _names(value: Value) -> str:
    return ", ".join(str(key) for key in value) if isinstance(value, dict) else type(value).__name__


def _check_globals(state: Globals) -> None:
    differences: list[tuple[str, object, object]] = []
    current = read_globals()
    if not isinstance(state.python, bytes) or len(state.python) not in (_PYTHON_BYTES, _PYTHON_BYTES + 8):
        differences.append(("rng/python", "a state of 2500 or 2508 bytes", _size(state.python)))
    if state.numpy is not None and not isinstance(state.numpy, bytes):
        differences.append(("rng/numpy", "bytes", _size(state.numpy)))
    elif state.numpy is not None and not _is_numpy_state(state.numpy):
        differences.append(("rng/numpy", "a state of 2500 or 2508 bytes", _size(state.numpy)))
    if not isinstance(state.torch, bytes) or len(state.torch) != len(current.torch):
        differences.append(("rng/torch", f"{_size(state.torch)}", f"{len(current.torch)} bytes"))
    if len(state.cuda) > len(current.cuda):
        differences.append(("cuda generators", len(state.cuda), len(current.cuda)))
    for index, (kept, live) in enumerate(zip(state.cuda, current.cuda, strict=False)):
        if len(kept) != len(live):
            differences.append((f"rng/cuda:{index}", f"{len(kept)} bytes", f"{len(live)} bytes"))
    if differences:
        raise MismatchError(differences)


def _is_numpy_state(data: bytes) -> bool:
    return len(data) in (_NUMPY_BYTES, _NUMPY_BYTES + 8) or data[:1] == b"\0"


def _size(data: object) -> str:
    return f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__


def reader() -> _core.GeneratorReader:
    """Return what reads the digests of the global generators; numpy's and CUDA's are among them once they exist."""
    global _reader
    if _reader is None:
        _reader = _make_reader()
    return _reader


def digests() -> list[tuple[str, bytes]]:
    """Return a digest (16 bytes) of each global generator, by name; a few microseconds, none is advanced."""
    return reader().digests()


_reader: _core.GeneratorReader | None = None


def _make_reader() -> _core.GeneratorReader:
    found = _core.GeneratorReader(_read_slowly)
    # What lies in memory as it would be read is digested there; a cached normal goes the long way.
    if _PYTHON_OFFSET is None:
        found.add_slow("rng/python", 0)
    else:
        found.add_memory(
            "rng/python",
            0,
            id(_PYTHON_GLOBAL) + _PYTHON_OFFSET,
            _PYTHON_BYTES,
            unset=(_PYTHON_GLOBAL, "gauss_next"),
        )
    found.add_state("rng/torch", 2, torch.default_generator.get_state)
    found.when(sys.modules, "numpy.random", lambda: _add_numpy(found))
    found.when(vars(torch.cuda), "_initialized", lambda: _add_cuda(found))
    return found


def _add_numpy(found: _core.GeneratorReader) -> None:
    numpy = _numpy()
    assert numpy is not None, "numpy.random is imported"
    place = numpy.place()
    if place is None:
        found.add_slow("rng/numpy", 1)
        return
    address, bits, flag = place
    found.add_memory(
        "rng/numpy", 1, address, _NUMPY_BYTES, same=(numpy.random.get_bit_generator, bits), zero=flag
    )


def _add_cuda(found: _core.GeneratorReader) -> None:
    for index, generator in enumerate(_cuda_generators()):
        found.add_state(f"rng/cuda:{index}", 3 + index, generator.get_state)


def _read_slowly(name: str) -> bytes:
    if name == "rng/python":
        return _read_python(_PYTHON_GLOBAL)
    numpy = _numpy()
    assert name == "rng/numpy" and numpy is not None, "the others are never read slowly"
    return numpy.read()


# Generator objects that someone owns.


def is_generator(obj: object) -> bool:
    """Tell whether an object is a generator whose state can be read and put back."""
    if isinstance(obj, random.Random):
        return not isinstance(obj, random.SystemRandom)
    if isinstance(obj, torch.Generator):
        return True
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(obj, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def read_generator(obj: Any) -> bytes:
    """Return bytes that determine what a generator object will draw; it is not advanced."""
    if isinstance(obj, random.Random):
        return _read_python(obj)
    if isinstance(obj, torch.Generator):
        return _torch_bytes(obj)
    return _core.encode(capture_generator(obj))


def capture_generator(obj: Any) -> Value:
    """Return a generator object's state as a value; it is not advanced.

    Raises:
        UnsupportedState: It is not a generator that `is_generator` knows.
    """
    if isinstance(obj, random.Random) and not isinstance(obj, random.SystemRandom):
        return {"kind": "random.Random", "state": _read_python(obj)}
    if isinstance(obj, torch.Generator):
        return {"kind": "torch.Generator", "device": str(obj.device), "state": _torch_bytes(obj)}
    if is_generator(obj) and not isinstance(obj, random.Random):
        numpy = sys.modules["numpy.random"]
        if isinstance(obj, numpy.RandomState):
            return {"kind": "numpy.RandomState", "state": _lower_bits(obj.get_state(legacy=False))}
        bits = obj.bit_generator if isinstance(obj, numpy.Generator) else obj
        return {"kind": "numpy.BitGenerator", "state": _lower_bits(bits.state)}
    raise UnsupportedState("generator", f"{type(obj).__module__}.{type(obj).__qualname__}")


def restore_generator(obj: Any, value: Value) -> None:
    """Put a generator object back to what `capture_generator` returned.

    Raises:
        MismatchError: The value belongs to another kind of generator; nothing has been changed.
    """
    live = capture_generator(obj)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind != live["kind"]:
        raise MismatchError([("kind of generator", kind, live["kind"])])
    if kind == "random.Random":
        _write_python(obj, value["state"])
    elif kind == "torch.Generator":
        if value["device"] != live["device"] or len(value["state"]) != len(live["state"]):
            raise MismatchError([("device of a torch.Generator", value["device"], live["device"])])
        _write_torch(obj, value["state"])
    else:
        expected, found = value["state"].get("bit_generator"), live["state"].get("bit_generator")
        if expected != found:
            raise MismatchError([("bit generator", expected, found)])
        state = _raise_bits(value["state"])
        if kind == "numpy.RandomState":
            obj.set_state(state)
        elif hasattr(obj, "bit_generator"):
            obj.bit_generator.state = state
        else:
            obj.state = state


def generator_digest(obj: Any) -> bytes:
    """Return a digest (16 bytes) of a generator object's state; it is not advanced."""
    return _core.digest_bytes(read_generator(obj))


# What loader workers need.


def pack() -> bytes:
    """Return python's, numpy's and torch's global generators as one byte string (about 10 KB)."""
    state = read_globals(cuda=False)
    numpy = state.numpy if state.numpy is not None else b""
    return (
        struct.pack("<III", len(state.python), len(numpy), len(state.torch))
        + state.python
        + numpy
        + state.torch
    )


def unpack(data: bytes) -> None:
    """Put back what `pack` returned."""
    python, numpy, torch_ = struct.unpack_from("<III", data)
    expected = 12 + python + numpy + torch_
    if len(data) != expected:
        raise MismatchError([("packed generators", f"{expected} bytes", f"{len(data)} bytes")])
    middle, last = 12 + python, 12 + python + numpy
    write_globals(Globals(data[12:middle], data[middle:last] or None, data[last:]))


def rekey(key: bytes, generators: Iterable[Any] = ()) -> None:
    """Seed python's, numpy's and torch's CPU generator, and the given objects, from a 32-byte key.

    A pure function of the key and of the objects' order: parts of the key that do not overlap seed each
    library, and a digest of the key and its place in the order seeds each object.
    """
    _PYTHON_GLOBAL.seed(int.from_bytes(key[:12], "little"))
    numpy = _numpy()
    if numpy is not None:
        numpy.seed(struct.unpack_from("<3I", key, 12))
    torch.default_generator.manual_seed(int.from_bytes(key[24:32], "little"))
    for index, generator in enumerate(generators):
        _rekey_generator(generator, _core.digest_bytes(key, struct.pack("<I", index)))


def _rekey_generator(obj: Any, seed: bytes) -> None:
    words = struct.unpack("<4I", seed)
    if isinstance(obj, random.Random):
        obj.seed(int.from_bytes(seed, "little"))
    elif isinstance(obj, torch.Generator):
        obj.manual_seed(int.from_bytes(seed[:8], "little"))
    elif hasattr(obj, "set_state"):
        obj.set_state(type(obj)(words).get_state(legacy=False))
    else:
        bits = getattr(obj, "bit_generator", obj)
        bits.state = type(bits)(words).state
