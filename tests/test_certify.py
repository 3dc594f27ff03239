"""A certificate convicts whoever removes, swaps or edits a step or a checkpoint. No torch takes part."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two lives: 20 steps, the last two of them executed again."""
    path = tmp_path / "run"
    train(path, range(1, 19), 8)
    train(path, range(17, 21), 8)
    return path


def program(*arguments: str | Path, code: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "unbroken", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def check(file: Path, run: Path, *, code: int) -> list[str]:
    answer: dict[str, Any] = json.loads(program("check", "--json", file, run, code=code))
    assert answer["as_certified"] is (code == 0)
    return answer["wrong"]


@pytest.fixture
def file(run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.certificate"
    assert "2 lives and 3 checkpoints" in program("certify", run, path, code=0)
    return path


def test_an_untouched_run_is_as_certified(run: Path, file: Path) -> None:
    assert check(file, run, code=0) == []
    assert "25 records and 3 checkpoints are as certified" in program("check", file, run, code=0)


def test_a_run_that_went_on_is_still_as_certified(run: Path, file: Path) -> None:
    train(run, range(17, 31), 8)
    assert check(file, run, code=0) == []
    assert "gone on for" in program("check", file, run, code=0)


def test_an_edited_step_is_found(run: Path, file: Path) -> None:
    segment = min((run / "journal").iterdir())
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    (wrong,) = check(file, run, code=1)
    assert "the journal of life 1" in wrong


def test_a_removed_tail_of_steps_is_found(run: Path, file: Path) -> None:
    segment = max((run / "journal").iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[: len(data) - 150])
    (wrong,) = check(file, run, code=1)
    assert "records are missing" in wrong


def test_a_removed_life_is_found(run: Path, file: Path) -> None:
    max((run / "journal").iterdir()).unlink()
    assert check(file, run, code=1) == ["the journal of life 2 is missing"]


def test_a_history_written_anew_is_found_although_its_chain_holds(
    run: Path, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    train(other, range(1, 19), 8)
    train(other, range(17, 21), 8)
    assert "was certified" in check(file, other, code=1)[0]
    # The same run, its second life trained once more: whole records, another past.
    segment = max((run / "journal").iterdir())
    segment.unlink()
    train(run, range(17, 21), 8)
    wrong = check(file, run, code=1)
    assert any("the journal of life 2 is another one" in text for text in wrong)


def test_a_removed_checkpoint_is_found(run: Path, file: Path) -> None:
    victim = sorted((run / "checkpoints").iterdir())[1]
    victim.unlink()
    assert check(file, run, code=1) == [f"checkpoint {victim.name} is missing"]


def test_swapped_checkpoints_are_found(run: Path, file: Path) -> None:
    first, second = sorted((run / "checkpoints").iterdir())[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    wrong = check(file, run, code=1)
    assert [first.name in wrong[0], second.name in wrong[1]] == [True, True]


def test_an_edited_tensor_is_found_unless_only_a_quick_look_was_asked_for(run: Path, file: Path) -> None:
    pack = max((run / "objects").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    assert "is not whole" in check(file, run, code=1)[0]
    program("check", "--quick", file, run, code=0)


def test_an_edited_certificate_is_refused(run: Path, file: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace("2.15.0", "2.16.0"))
    assert "is damaged" in program("check", file, run, code=2)
    file.write_text("{}")
    assert "not one of unbroken" in program("check", file, run, code=2)


def test_a_certificate_says_what_the_run_itself_noticed(run: Path, tmp_path: Path) -> None:
    train(run, range(17, 31), 8, off_at=18)
    file = tmp_path / "diverged.certificate"
    words = "not exact: life 3 executed step 18 again and got another log/loss"
    assert words in program("certify", run, file, code=0)
    assert words in program("check", file, run, code=0)
    answer = json.loads(program("check", "--json", file, run, code=0))
    assert answer["divergences"] == [words.removeprefix("not exact: ")]


def test_a_certificate_of_version_1_is_read(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "torch-net"
    file = fixture / "version-1.certificate"
    assert check(file, fixture / "run", code=0) == []
    edited = tmp_path / "edited.certificate"
    edited.write_text(file.read_text().replace('"records"', '"others"').replace("AVX2", "AVX512"))
    assert "is damaged" in program("check", edited, fixture / "run", code=2)


def test_a_damaged_run_is_not_certified(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "damaged")
    manifest = max((tmp_path / "damaged" / "checkpoints").iterdir())
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert "is damaged" in program("certify", tmp_path / "damaged", code=2)


def test_a_certificate_is_never_written_over(run: Path, file: Path) -> None:
    before = file.read_bytes()
    assert "cannot write" in program("certify", run, file, code=2)
    assert file.read_bytes() == before
