"""What counts as the program's own code, and what of it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from unbroken.torch import environment

SOURCE = """
import helper
def scale(x):
    return x * 2 if x in {"a", "b", "c"} else helper.twice(x)
"""


def digest(path: Path, source: str) -> str | None:
    path.write_text(source)
    return environment._code_digest(path)


def test_comments_and_layout_do_not_count_and_everything_else_does(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    before = digest(path, SOURCE)
    assert before is not None
    assert digest(path, SOURCE.replace("def scale", "# a word\n\n\ndef  scale")) == before
    for old, new in (
        ("* 2", "* 3"),
        ("* 2", "** 2"),
        ("twice", "thrice"),
        ('"b"', '"d"'),
        ("(x)", "(x, y=1)"),
    ):
        assert digest(path, SOURCE.replace(old, new)) != before, new
    assert digest(path, "def broken(") is None


def test_the_digest_is_the_same_in_each_process_and_names_only_the_programs_own_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "train.py").write_text(
        SOURCE
        + "from unbroken.torch import environment\nimport json\nprint(json.dumps(dict(environment.code())))\n"
    )
    (tmp_path / "helper.py").write_text("import inner.part\ndef twice(x):\n    return x + x\n")
    (tmp_path / "inner" / "part.py").write_text("")
    outputs = {
        subprocess.check_output(
            [sys.executable, tmp_path / "train.py"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
        )
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert list(json.loads(outputs.pop())) == ["train.py", "helper.py", "inner/part.py"]
