"""All measurements, one after the other: `make bench`, or `python bench`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in (
        "step_cost.py",
        "resume_time.py",
        "checkpoint.py",
        "continuous.py",
        "load.py",
        "compression.py",
    ):
        print(f"== {name}", flush=True)
        code = subprocess.run([sys.executable, str(HERE / name)], env=environment, check=False).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
