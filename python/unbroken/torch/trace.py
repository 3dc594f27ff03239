"""What one step computed, operator by operator, so that two executions of it can be laid side by side.

Touches: torch's dispatch mode stack from `Tracer.begin` to `Tracer.end`; one file, written as the step goes. Reads
the operators' tensors, draws nothing and changes none of them. One JSON object a line: `begin`, an `operator` for each
call, `end` (the comparison is in crates/unbroken-cli/src/trace.rs).

What is digested does not depend on where memory lies: dtype, shape, strides, bytes in logical order. Views are left
out, for they compute nothing; memory that `torch.empty` gives has no content until something writes to it. The inside
of compiled regions and of operators is not seen: what they give comes out of nowhere, and is named as theirs.
"""

from __future__ import annotations

import functools
import json
import linecache
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from unbroken import _core
from unbroken._core import Tensor as Leaf

from . import rng, snapshot

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_CALL: CodeType = torch.nn.Module._call_impl.__code__
_ENGINE = f"{_TORCH}autograd{os.sep}graph.py"
# Outputs that are scratch memory for the operator's own backward: bytes in it may never be written.
_SCRATCH_OUTPUTS = {"aten::mkldnn_rnn_layer": {3}, "aten::_cudnn_rnn": {3, 4}, "aten::miopen_rnn": {3}}
_EMPTY = ("aten::empty", "aten::new_empty", "aten::_empty", "aten::resize_", "aten::_resize")
_UNINITIALISED = "uninitialised memory"
_SCRATCH = "scratch memory"
_PLAIN = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
# Left-over names of storages are swept this often, in operators.
_SWEEP = 4096


class _Site(NamedTuple):
    """Where in the user's program: `file:line`, the function, the line's text, and the module path."""

    line: str
    function: str
    text: str
    module: str

    def lowered(self) -> dict[str, str]:
        return dict(self._asdict())


class _Known(NamedTuple):
    """Where a storage's content comes from. The weak reference keeps the id from passing to another."""

    alive: StorageWeakRef
    words: str


class Tracer(TorchDispatchMode):
    """Writes down every operator of one step.

    Args:
        path: File to write; replaced if it is there.
        objects: What is tracked, by name.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions are to run as they would run without a recorder."""
        return True

    def __init__(self, path: Path, objects: Mapping[str, object]) -> None:
        super().__init__()
        self._file = path.open("w", encoding="utf-8")
        self._objects = objects
        self._pid = os.getpid()
        self._count = 0
        self._known: dict[int, _Known] = {}
        self._forward: dict[int, dict[str, str]] = {}
        self._modules = dict(_module_names(objects))
        self._on = False

    def begin(self, step: int, batch: Any) -> None:
        """Note what the step begins with, and listen from here on."""
        for path, tensor in _tensors_in(batch, "batch"):
            self._know(tensor, f"`{path}`")
        for words, tensor in _named_tensors(self._objects):
            self._know(tensor, words)
        batches = [[path, _digest(tensor)] for path, tensor in _tensors_in(batch, "batch")]
        self._write({"kind": "begin", "step": step, "leaves": [*batches, *self._state()]})
        self._on = True
        self.__enter__()

    def end(self) -> None:
        """Listen no more, and note what the step left behind. Idempotent."""
        if not self._on:
            return
        self._on = False
        self.__exit__(None, None, None)
        self._write({"kind": "end", "count": self._count, "leaves": self._state()})
        self._file.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator as it is, and write down what went in and what came out."""
        kwargs = kwargs or {}
        # A loader's worker that was forked meanwhile has the mode, and is no part of the step.
        if os.getpid() != self._pid or _computes_nothing(func):
            return func(*args, **kwargs)
        shape = _shape_of(func)
        number, self._count = self._count, self._count + 1
        entry: dict[str, Any] = {"kind": "operator", "name": str(func), **self._place()}
        entry["in"] = [
            self._input(path, value, is_written=name in shape.written)
            for name, path, value in shape.arguments(args, kwargs)
            if name not in shape.out
        ]
        if shape.draws:
            entry["in"].append(self._generator(kwargs.get("generator"), args, kwargs))
        result = func(*args, **kwargs)
        outputs = [*_tensors_in(result, "result", plain=True)]
        given = {id(value) for _, value in outputs}
        outputs += [
            (path, value)
            for name, path, value in shape.arguments(args, kwargs)
            if name in shape.written and isinstance(value, torch.Tensor) and id(value) not in given
        ]
        entry["out"] = [
            self._output(number, index, path, value, shape) for index, (path, value) in enumerate(outputs)
        ]
        self._write(entry)
        if self._count % _SWEEP == 0:
            self._known = {key: known for key, known in self._known.items() if not known.alive.expired()}
        return result

    def _state(self) -> list[list[str]]:
        captured = snapshot.capture(self._objects)
        regions = captured.regions()
        digests = [_core.digest_memory([region]).hex() for region in regions]
        leaves = [[name, digest.hex()] for name, digest in rng.digests()]
        tree = _core.decode(_core.encode(captured.tree))
        leaves += [[path, _leaf_text(value, digests)] for path, value in _leaves(tree, "objects")]
        return leaves

    def _place(self) -> dict[str, Any]:
        node = torch._C._current_autograd_node()
        site, in_backward = _site(sys._getframe(2), self._modules)
        if node is None or not in_backward:
            # The node for the backward was made just before its operator is called.
            made = torch.autograd._get_sequence_nr() - 1  # pyright: ignore[reportPrivateImportUsage]
            self._forward.setdefault(made, site.lowered())
            return {"site": site.lowered()}
        forward = self._forward.get(node._sequence_nr())
        variable = getattr(node, "variable", None)
        words = node.name() if variable is None else f"{node.name()} of {self._origin(variable)}"
        return {"site": site.lowered(), "backward": words, "forward": forward}

    def _know(self, tensor: torch.Tensor, words: str) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._known[storage._cdata] = _Known(StorageWeakRef(storage), words)

    def _origin(self, tensor: torch.Tensor) -> str:
        storage = _storage(tensor)
        if storage is None:
            return ""
        known = self._known.get(storage._cdata)
        if known is not None and not known.alive.expired():
            return known.words
        node = tensor.grad_fn
        if node is not None:
            name = node.name()
            return "a compiled region" if name.startswith("CompiledFunction") else f"the function of `{name}`"
        for words, parameter in _parameters(self._objects):
            gradient = parameter.grad
            if gradient is not None and _storage_id(gradient) == storage._cdata:
                return f"gradient of {words}"
        return ""

    def _input(self, path: str, value: Any, *, is_written: bool) -> list[Any]:
        if isinstance(value, torch.Tensor):
            origin = self._origin(value)
            # Left-over bytes that the operator writes over are no input.
            is_unread = origin == _SCRATCH or (is_written and origin == _UNINITIALISED)
            return [path, _head(value) if is_unread else _digest(value), origin, _alignment(value)]
        if isinstance(value, torch.Generator):
            return [path, rng.generator_digest(value).hex(), "a generator"]
        return [path, _plain(value), "a value of the program"]

    def _output(self, number: int, index: int, path: str, value: Any, shape: _Shape) -> list[Any]:
        if not isinstance(value, torch.Tensor):
            return [path, _plain(value)]
        if shape.gives_empty:
            self._know(value, _UNINITIALISED)
            return [path, _head(value)]
        if index in _SCRATCH_OUTPUTS.get(shape.name, ()):
            self._know(value, _SCRATCH)
            return [path, _head(value)]
        self._know(value, f"#{number}.{index}")
        return [path, _digest(value)]

    def _generator(self, given: Any, args: Any, kwargs: Any) -> list[Any]:
        if given is not None:
            return ["generator", rng.generator_digest(given).hex(), "a generator of the program's own"]
        for _, tensor in _tensors_in((args, kwargs), ""):
            if tensor.is_cuda:
                generator = torch.cuda.default_generators[tensor.device.index or 0]
                return ["generator", rng.generator_digest(generator).hex(), "torch's generator of the device"]
        return ["generator", rng.generator_digest(torch.default_generator).hex(), "torch's global generator"]

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")


# Operators.


class _Shape:
    """What an operator's schema says, looked up once.

    Args:
        func: An `OpOverload`, or a higher-order operator, which has no schema.
    """

    def __init__(self, func: Any) -> None:
        schema = getattr(func, "_schema", None)
        arguments = [] if schema is None else list(schema.arguments)
        self.name = str(func) if schema is None else schema.name
        self.names = [a.name for a in arguments]
        self.written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        self.out = {a.name for a in arguments if a.name in self.written and a.is_out}
        self.gives_empty = self.name.startswith(_EMPTY)
        self.draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())

    def arguments(self, args: Any, kwargs: Any) -> Iterator[tuple[str, str, Any]]:
        """Yield (name, path, value) of each argument, lists taken apart."""
        names = [*self.names[: len(args)], *(str(i) for i in range(len(self.names), len(args)))]
        for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
            if name != "generator":
                for path, item in _tensors_in(value, name, plain=True):
                    yield name, path, item


@functools.lru_cache(maxsize=4096)
def _shape_of(func: Any) -> _Shape:
    return _Shape(func)


@functools.lru_cache(maxsize=4096)
def _computes_nothing(func: Any) -> bool:
    # `lift_fresh` is a view by its schema, and where a tensor made of Python's values appears.
    is_view = getattr(func, "is_view", False) and func is not torch.ops.aten.lift_fresh.default
    return is_view or getattr(func, "namespace", "") == "profiler"


# Digests.


def _head(tensor: torch.Tensor) -> str:
    strides: tuple[int, ...] = ()
    if tensor.layout is torch.strided:
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        strides = tuple(0 if size == 1 else stride for stride, size in sizes)
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} strides {list(strides)}"


def _digest(tensor: torch.Tensor) -> str:
    """Return look and content as text; equal texts mean equal tensors, wherever they lie."""
    head = _head(tensor)
    if tensor.device.type == "meta" or _storage(tensor) is None:
        return head
    return f"{head} {_content(tensor.detach()).hex()}"


def _content(tensor: torch.Tensor) -> bytes:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    tensor = tensor.contiguous().cpu()
    return _core.digest_memory([(tensor.data_ptr(), tensor.nbytes)])


def _alignment(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % 64 if tensor.is_cpu and tensor.layout is torch.strided else 0


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value!r} ({value.hex()})"
    # Other objects may show an address, which is another in each process.
    return repr(value) if isinstance(value, (*_PLAIN, complex)) else type(value).__qualname__


def _leaf_text(value: Any, digests: list[str]) -> str:
    if isinstance(value, Leaf):
        shape = f"{value.dtype}{list(value.shape)} strides {list(value.strides)} offset {value.offset}"
        return f"{shape} {digests[value.storage]}"
    return _core.digest_value(value).hex()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a captured tree by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    elif isinstance(value, _core.Object):
        for key, item in value.fields.items():
            yield from _leaves(item, f"{path}/{key}")
    else:
        yield path, value


# Tensors and their names.


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    if tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except RuntimeError:  # Subclasses that wrap others have none.
        return None


def _storage_id(tensor: torch.Tensor) -> int | None:
    storage = _storage(tensor)
    return None if storage is None else storage._cdata


def _tensors_in(value: Any, path: str, *, plain: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (path, tensor) of each tensor in nested containers; of everything else too, if `plain`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}[{key!r}]", plain=plain)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{index}]", plain=plain)
    elif isinstance(value, torch.Tensor) or (plain and value is not None):
        yield path, value


def _module_names(objects: Mapping[str, object]) -> Iterator[tuple[int, str]]:
    seen: set[int] = set()
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module):
            for path, module in item.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield id(module), f"{name}.{path}" if path else name


def _parameters(objects: Mapping[str, object]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module):
            for path, parameter in item.named_parameters():
                yield f"parameter `{name}.{path}`", parameter


def _named_tensors(objects: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    names: dict[int, str] = {}
    for words, parameter in _parameters(objects):
        names.setdefault(id(parameter), words)
        yield words, parameter
        if parameter.grad is not None:
            yield f"gradient of {words}", parameter.grad
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module):
            for path, buffer in item.named_buffers():
                yield f"buffer `{name}.{path}`", buffer
        elif isinstance(item, torch.optim.Optimizer):
            for parameter, state in item.state.items():
                whose = names.get(id(parameter), "a parameter")
                for path, tensor in _tensors_in(state, ""):
                    yield f"`{name}` state {path} of {whose}", tensor
        else:
            for path, tensor in _tensors_in(item, name):
                yield f"`{path}`", tensor


# The user's program.


def _site(frame: FrameType | None, modules: Mapping[int, str]) -> tuple[_Site, bool]:
    """Return the innermost line of the user's, and whether torch's backward called this."""
    line = function = text = ""
    path: str | None = None
    in_backward = False
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if code is _CALL and path is None and not in_backward:
            module = frame.f_locals.get("self")
            path = modules.get(id(module), type(module).__qualname__)
        elif file == _ENGINE and code.co_name == "_engine_run_backward":
            in_backward = in_backward or path is None
        elif not line and not file.startswith((_TORCH, _OURS, "<")):
            line, function = f"{file}:{frame.f_lineno}", code.co_qualname
            text = linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back
    return _Site(line, function, text, path or ""), in_backward


__all__ = ["Tracer"]
