"""What the bits depend on besides the run's own state: settings that must not differ, and what is tried if it does.

Touches: reads torch's global settings, library versions, the CPU's features, a few environment variables and the
source files of the user's program. Changes nothing.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.distributed

from unbroken import _core

_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG")


def settings() -> dict[str, Any]:
    """Return the settings that change results and that a script can make equal again: they are compared on resume."""
    values: dict[str, Any] = {
        "threads.intra_op": torch.get_num_threads(),
        "torch.default_dtype": str(torch.get_default_dtype()),
        "torch.default_device": str(torch.get_default_device()),
        "torch.float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.mkldnn": torch.backends.mkldnn.enabled,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    for name in _ISA_VARIABLES:
        values[f"env.{name}"] = os.environ.get(name)
    if torch.cuda.is_available():
        values["cuda.devices"] = torch.cuda.device_count()
        values["cudnn.deterministic"] = torch.backends.cudnn.deterministic
        values["cudnn.benchmark"] = torch.backends.cudnn.benchmark
        values["cuda.matmul.allow_tf32"] = torch.backends.cuda.matmul.allow_tf32
        values["cudnn.allow_tf32"] = torch.backends.cudnn.allow_tf32
    return values


def versions() -> dict[str, Any]:
    """Return what software, hardware and code this life runs on: recorded, and on trial when it changed."""
    values: dict[str, Any] = {
        "unbroken": _core.build_info().get("version", "unknown"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": _cpu_name(),
        "cpu.capability": torch.backends.cpu.get_cpu_capability(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        values["numpy"] = numpy.__version__
    if torch.cuda.is_available():
        values["cuda"] = torch.version.cuda
        values["cuda.device"] = torch.cuda.get_device_name()
    values.update((f"code.{name}", digest) for name, digest in code())
    return values


def ranks() -> int:
    """Return the size of torch.distributed's process group, 1 where there is none."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def code() -> Iterator[tuple[str, str]]:
    """Yield (file, digest) of the program's own source files that are imported by now: neither libraries nor ours.

    The digest is of what the source compiles to, so that comments and layout do not count.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        return
    home = Path(main).resolve().parent
    seen: set[Path] = set()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or name.partition(".")[0] == "unbroken":
            continue
        # Nearly all of some two thousand modules go here; resolving a path asks the file system for each of its parts.
        if file.startswith(_LIBRARIES):
            continue
        path = Path(file).resolve()
        if path not in seen and not path.is_relative_to(_OURS) and not path.as_posix().startswith(_LIBRARIES):
            seen.add(path)
            digest = _code_digest(path)
            if digest is not None:
                yield Path(os.path.relpath(path, home)).as_posix(), digest


def _code_digest(path: Path) -> str | None:
    try:
        compiled = compile(path.read_bytes(), path.name, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        return None  # Gone or changed since it was imported: nothing can be said of what runs.
    return _core.digest_bytes(*_code_parts(compiled)).hex()


def _code_parts(code: CodeType) -> Iterator[bytes]:
    """Yield what a code object does, without the lines that it stands on."""
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        else:
            yield _constant(constant)


def _constant(value: Any) -> bytes:
    # The order of a frozen set's texts is another in each process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def _library_prefixes() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    given = {Path(path) for name in names if (path := sysconfig.get_path(name))}
    return tuple(sorted(f"{path.as_posix()}/" for path in given | {path.resolve() for path in given}))


_LIBRARIES = _library_prefixes()
_OURS = Path(__file__).resolve().parents[1]


def changed(recorded: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, recorded, current) of what differs, sorted by name."""
    names = sorted(recorded.keys() | current.keys())
    return [(n, recorded.get(n), current.get(n)) for n in names if recorded.get(n) != current.get(n)]


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
