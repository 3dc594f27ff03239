"""The command-line program from Python: the Rust program, plus the two commands that know torch.

Touches: the standard streams, and what a Ctrl-C does. Imports torch only for ``unbroken export RUN FILE.pt`` and, where
it is installed, for ``unbroken doctor``.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from unbroken import _core
from unbroken.errors import InvalidArgument, UnbrokenError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: Arguments without the program's name; by default those of this process.
    """
    if arguments is None:
        # The work happens in Rust, where Python's own handler would only be looked at afterwards.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        arguments = sys.argv[1:]
    given = list(arguments)
    if given[:1] == ["export"] and any(argument.endswith((".pt", ".pth")) for argument in given[1:]):
        return _export_pt(given[1:])
    if given[:1] == ["doctor"] and not {"-h", "--help"}.intersection(given):
        given[1:1] = ["--facts", json.dumps(_facts(), default=str)]
    return _core.main(given)


def _facts() -> dict[str, object]:
    """Return what this Python's torch, as it starts, makes the bits depend on; nothing of it where there is none."""
    seed: dict[str, object] = {"env.PYTHONHASHSEED": "random"} if sys.flags.hash_randomization else {}
    try:
        from unbroken.torch import environment
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        return seed
    return {**environment.settings(), **environment.versions(), **seed}


def _export_pt(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("unbroken export", description="Write a checkpoint to a .pt file.")
    parser.add_argument("checkpoint", help="RUN or RUN@STEP")
    parser.add_argument("file", type=Path, help="file to write, ending in .pt")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    given = parser.parse_args(arguments)
    try:
        if given.file.exists() and not given.force:
            raise InvalidArgument(f"`{given.file}` is there already", hint="replace it with --force")
        checkpoint = _core.read_checkpoint(_locate(given.checkpoint))
        try:
            from unbroken.torch.export import write_pt
        except ModuleNotFoundError as missing:
            if missing.name != "torch":
                raise
            raise InvalidArgument(
                "writing a .pt file needs torch", hint="install torch, or export to .safetensors"
            ) from None
        write_pt(checkpoint, given.file)
    except UnbrokenError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2
    print(f"{given.file}: checkpoint {checkpoint.info.name}")
    return 0


def _locate(text: str) -> Path:
    """Return the path that RUN or RUN@STEP stands for: a run directory, or a manifest in it."""
    run, at, step = text.rpartition("@")
    if Path(text).exists() or not at or not step.isdecimal():
        return Path(text)
    # Names sort by step and phase (docs/format.md): the last is the step's latest boundary.
    found = sorted(Path(run, "checkpoints").glob(f"{int(step):09d}-[0-9]-*"))
    if not found:
        raise InvalidArgument(
            f"{run} has no checkpoint of step {int(step)}", hint="`unbroken list` shows them"
        )
    return found[-1]


if __name__ == "__main__":
    raise SystemExit(main())
