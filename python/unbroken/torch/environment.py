"""What the bits depend on besides the run's own state: settings that must not differ, versions that are recorded.

Touches: reads torch's global settings, library versions, the CPU's features and a few environment variables.
Changes nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

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
    """Return what software and hardware this life runs on: recorded, named when it changed, not refused."""
    from unbroken import _core

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
    return values


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
