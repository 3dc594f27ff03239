"""A file system, or a limit, that gets full for real and has room again: whatever this machine allows.

Touches: as root a mount of its own below a temporary directory; else a mount in a user namespace of its own; else the
limit of one process on the length of its files.
"""

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SIZE_BYTES = 4 << 20
# For the table's story, which writes 70 MB.
LARGE_BYTES = 96 << 20
# Between the journal of a whole run and one pack of a run with WIDE.
LIMIT_BYTES = 600_000
WIDE = ("--hidden", "4000")


@dataclass
class SmallDisk:
    """A place that can be filled.

    Args:
        how: What it is, for people.
        directory: Where to put a run.
        limits: Whether it is a process that is limited, and not a file system.
        flags: What a story needs so that its packs are what does not fit.
    """

    how: str
    directory: Path
    limits: bool = False
    flags: tuple[str, ...] = ()
    _ballast: list[Path] = field(default_factory=list)

    def fill(self, pid: int) -> None:
        """Leave no room: not one more byte can be had."""
        if self.limits:
            _limit(pid, LIMIT_BYTES)
            return
        ballast = self.directory / f"ballast{len(self._ballast)}"
        self._ballast.append(ballast)
        file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            for length in (1 << 16, 1 << 9, 1):
                with contextlib.suppress(OSError):
                    while os.write(file, bytes(length)):
                        pass
        os.close(file)
        free = os.statvfs(self.directory)
        assert free.f_bavail * free.f_frsize < 4096, f"{self.how} is not full: {free}"

    def empty(self, pid: int) -> None:
        """Give the room back."""
        if self.limits:
            _limit(pid, resource.RLIM_INFINITY)
        for ballast in self._ballast:
            ballast.unlink()
        self._ballast.clear()


def _limit(pid: int, length: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (length, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int = SIZE_BYTES) -> Iterator[SmallDisk]:
    """Make the best small disk that is allowed here, and take it away again."""
    for make in (_mounted("ext4"), _mounted("tmpfs"), _namespace):
        with contextlib.ExitStack() as stack:
            disk = make(directory, size_bytes, stack)
            if disk is not None:
                yield disk
                return
    yield limited(directory)


def limited(directory: Path) -> SmallDisk:
    """Return what gets full for one process only, in the middle of a file: the limit on its files' length."""
    return SmallDisk("a limit on the length of files", directory, limits=True, flags=WIDE)


Make = Callable[[Path, int, contextlib.ExitStack], SmallDisk | None]


def _quietly(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _mounted(kind: str) -> Make:
    def make(directory: Path, size_bytes: int, stack: contextlib.ExitStack) -> SmallDisk | None:
        place = directory / "disk"
        place.mkdir(exist_ok=True)
        if kind == "tmpfs":
            mounted = _quietly("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", place)
        else:
            image = directory / "image"
            with image.open("wb") as file:
                file.truncate(size_bytes)
            # Without blocks kept for root, so that full means full for it too.
            mounted = _quietly(f"mkfs.{kind}", "-q", "-m", "0", "-F", image) and _quietly(
                "mount", "-o", "loop", image, place
            )
        if not mounted:
            return None
        stack.callback(_quietly, "umount", "-l", place)
        return SmallDisk(f"{kind} of {size_bytes} bytes", place)

    return make


def _namespace(directory: Path, size_bytes: int, stack: contextlib.ExitStack) -> SmallDisk | None:
    place = directory / "disk"
    place.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size_bytes} none "$0" && echo mounted && exec sleep 600'
    try:
        holder = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script, str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    stack.enter_context(holder.stdout)
    if holder.stdout.readline() != b"mounted\n":
        return None
    seen = Path(f"/proc/{holder.pid}/root{place.resolve()}")
    try:
        (seen / "probe").touch()
        (seen / "probe").unlink()
    except OSError:
        return None
    return SmallDisk(f"tmpfs of {size_bytes} bytes in a namespace", seen)
