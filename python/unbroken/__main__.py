"""The command-line program from Python: the Rust program, plus the one export that needs torch.

Touches: the standard streams. Imports torch only for ``unbroken export RUN FILE.pt``.
"""

import sys
from collections.abc import Sequence

from unbroken import _core


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: Arguments without the program's name; by default those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _core.main(given)


if __name__ == "__main__":
    raise SystemExit(main())
