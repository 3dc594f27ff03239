"""How much memory this process may still take before the kernel kills somebody.

Touches: reads `/proc` and the control group's limits. Sources: the kernel's documents on `/proc/meminfo` and cgroup v2.
"""

from __future__ import annotations

from pathlib import Path


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return the least of what the machine and each of this process' control groups have left, or None if unknown.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    left = [_machine(root / "proc/meminfo"), *_groups(root)]
    return min((number for number in left if number is not None), default=None)


def _machine(meminfo: Path) -> int | None:
    for line in _text(meminfo).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _groups(root: Path) -> list[int | None]:
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            group = mounted / line.removeprefix("0::").strip().lstrip("/")
            # A limit of any group above counts, too.
            return [_group(place) for place in (group, *group.parents) if place.is_relative_to(mounted)]
    return []


def _group(group: Path) -> int | None:
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    # What was read from files and not looked at lately is given back before anybody is killed.
    cached = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            cached = int(value)
    return max(int(limit) - int(used) + cached, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
