"""What memory a process may still take: the machine's, or that of the tightest group that it is in."""

from pathlib import Path

import pytest

from unbroken import room


def machine(root: Path, *, available_kb: int | None, group: str = "", **limits: tuple[str, str, int]) -> Path:
    """Write a machine's files: groups by path with their limit, use and cache."""
    (root / "proc/self").mkdir(parents=True)
    if available_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {available_kb} kB\n")
    if group:
        (root / "proc/self/cgroup").write_text(f"0::/{group}\n")
    for path, (limit, used, cached) in limits.items():
        place = root / "sys/fs/cgroup" / path.replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(limit + "\n")
        (place / "memory.current").write_text(used + "\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return root


def test_without_limits_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    assert room.free_bytes(machine(tmp_path, available_kb=3)) == 3072


def test_a_groups_limit_counts_less_what_it_uses_and_files_it_could_forget(tmp_path: Path) -> None:
    root = machine(tmp_path, available_kb=1000, group="job", job=("5000", "4000", 300))
    assert room.free_bytes(root) == 1300


@pytest.mark.parametrize("limit", ["2000", "max"])
def test_a_group_above_may_be_tighter(tmp_path: Path, limit: str) -> None:
    root = machine(
        tmp_path,
        available_kb=1000,
        group="slurm/job",
        slurm=(limit, "500", 0),
        slurm__job=("9000", "100", 0),
    )
    assert room.free_bytes(root) == (1500 if limit == "2000" else 8900)


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(tmp_path, available_kb=1000, group="job", job=("100", "400", 0))
    assert room.free_bytes(root) == 0


def test_a_machine_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    assert room.free_bytes(tmp_path) is None


def test_this_machine_has_some() -> None:
    free = room.free_bytes()
    assert free is not None
    assert free > 1 << 20
