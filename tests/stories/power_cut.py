"""Power cuts on real file systems: `python tests/stories/power_cut.py ext4 xfs btrfs --cuts 20`, as root.

Each life saves beside a training that goes on, or waits for each save, by turns.

The file system under test lies in an image on another one, which is shut down without its log (FS_IOC_SHUTDOWN) at a
random moment of a save or a deletion: what was not flushed by then is gone, as after a power cut, and nothing arrives
later. Then both are mounted again, and the run is opened: every checkpoint that was acknowledged must be there, whole.

Touches: a directory that it makes below --place; loop devices and mounts there, which it takes away again.
"""

import argparse
import fcntl
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import HERE, environment

# _IOR('X', 125, __u32), and the flag that says: without flushing the log.
FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2

OUTER_BYTES = 1200 << 20
INNER_BYTES = 600 << 20


def do(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def unmount(place: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", place], capture_output=True, check=False).returncode == 0:
            return
        if not os.path.ismount(place):
            return
        time.sleep(0.1)
    raise SystemExit(f"{place} cannot be unmounted")


class Disk:
    """A file system in an image on a file system in an image."""

    def __init__(self, place: Path, kind: str) -> None:
        self.outer, self.inner = place / "outer", place / "inner"
        self.image = place / "outer.img"
        self.kind = kind
        for directory in (self.outer, self.inner):
            directory.mkdir()
        with self.image.open("wb") as file:
            file.truncate(OUTER_BYTES)
        do("mkfs.ext4", "-q", "-F", self.image)
        do("mount", "-o", "loop", self.image, self.outer)
        with (self.outer / "inner.img").open("wb") as file:
            file.truncate(INNER_BYTES)
        do(f"mkfs.{kind}", "-q", self.outer / "inner.img")
        do("mount", "-o", "loop", self.outer / "inner.img", self.inner)
        os.sync()

    def cut(self) -> None:
        """Nothing that is not on the disk by now gets there."""
        directory = os.open(self.outer, os.O_RDONLY)
        fcntl.ioctl(directory, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(directory)

    def start_again(self) -> None:
        self.close()
        do("mount", "-o", "loop", self.image, self.outer)
        do("mount", "-o", "loop", self.outer / "inner.img", self.inner)

    def close(self) -> None:
        unmount(self.inner)
        unmount(self.outer)


def live(run: Path, said: Path, state_bytes: int, steps: int, mode: str) -> subprocess.Popen[bytes]:
    with said.open("w") as out:
        return subprocess.Popen(
            [sys.executable, str(HERE / "saver.py"), str(run), str(state_bytes), str(steps), mode],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
        )


def last(said: Path, what: str) -> int:
    found = re.findall(rf"^{what} (\d+)$", said.read_text(), re.MULTILINE)
    return int(found[-1]) if found else -1


def cut_off(kind: str, cuts: int, state_bytes: int, seed: int, at: Path) -> None:
    """Cut the power so often, and say how many of the cuts fell into a save."""
    print(f"{kind}, seed {seed}", flush=True)
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=at) as name:
        place = Path(name)
        disk = Disk(place, kind)
        try:
            acknowledged, in_save = -1, 0
            for number in range(cuts):
                said = place / f"{number}.out"
                mode = ("sync", "background")[number % 2]
                life = live(disk.inner / "run", said, state_bytes, 1000, mode)
                while last(said, "saving") < 0:
                    if life.poll() is not None:
                        raise SystemExit(f"seed {seed}, life {number}: {said.read_text()}")
                    time.sleep(0.002)
                resumed = last(said, "resumed")
                if resumed < acknowledged:
                    raise SystemExit(
                        f"step {acknowledged} was acknowledged, and life {number} found {resumed}"
                    )
                time.sleep(moments.uniform(0, 0.3))
                disk.cut()
                # What was acknowledged before the cut was on the disk then.
                life.send_signal(signal.SIGKILL)
                life.wait()
                acknowledged = max(resumed, last(said, "saved"))
                in_save += last(said, "saving") != last(said, "saved")
                disk.start_again()
            said = place / "last.out"
            code = live(disk.inner / "run", said, state_bytes, 2, "sync").wait()
            if code != 0 or last(said, "resumed") < acknowledged:
                raise SystemExit(f"after the last cut: {said.read_text()}")
            print(f"{cuts} of {cuts} cuts lost nothing acknowledged; {in_save} fell into a save", flush=True)
        finally:
            disk.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [kind for kind in ("ext4", "xfs", "btrfs") if shutil.which(f"mkfs.{kind}")]
    parser.add_argument("kinds", nargs="*", default=known, help="file systems; all that can be made here")
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--state-mb", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    for kind in options.kinds:
        cut_off(kind, options.cuts, int(options.state_mb * 1e6), options.seed, options.place)


if __name__ == "__main__":
    main()
