"""O9: the newest checkpoint is not whole. The newest that is goes on exactly, and each rejected one is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import KILLED, Story, assert_exact

Begin = Callable[..., Story]


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def own_packs(run: Path, at: int) -> list[Path]:
    """Return the packs of one checkpoint that no older one refers to."""
    paths = checkpoints(run)

    def packs(path: Path) -> set[str]:
        names = {pack.name for pack in (run / "objects").iterdir()}
        data = path.read_bytes()
        return {name for name in names if name.encode() in data}

    older = set[str]().union(*(packs(path) for path in paths[:at]))
    return [run / "objects" / name for name in sorted(packs(paths[at]) - older)]


def truncate_a_data_file(run: Path) -> int:
    pack = own_packs(run, 4)[0]
    pack.write_bytes(pack.read_bytes()[:-100])
    return 1


def empty_all_files_of_two(run: Path) -> int:
    packs = [pack for at in (3, 4) for pack in own_packs(run, at)]
    for path in [*packs, *checkpoints(run)[3:]]:
        path.write_bytes(b"")
    return 2


def delete_the_manifest(run: Path) -> int:
    checkpoints(run)[4].unlink()
    return 0


def delete_a_data_file(run: Path) -> int:
    own_packs(run, 4)[0].unlink()
    return 1


def add_an_empty_directory_with_a_higher_number(run: Path) -> int:
    newest = checkpoints(run)[4].name
    (run / "checkpoints" / newest.replace(newest[:9], "000000900")).mkdir()
    return 1


def copy_a_file_of_an_older_one(run: Path) -> int:
    shutil.copyfile(own_packs(run, 3)[0], own_packs(run, 4)[0])
    return 1


@pytest.mark.parametrize(
    "harm",
    [
        truncate_a_data_file,
        empty_all_files_of_two,
        delete_the_manifest,
        delete_a_data_file,
        add_an_empty_directory_with_a_higher_number,
        copy_a_file_of_an_older_one,
    ],
)
def test_a_newest_checkpoint_that_is_not_whole_is_named_and_an_older_one_goes_on_exactly(
    story: Begin, reference: Begin, harm: Callable[[Path], int]
) -> None:
    told = story("--checkpoint", "10", "--keep", "5", "--save", "sync")
    told.live("--kill", "45:after", code=KILLED)
    before = checkpoints(told.run)
    assert [int(path.name[:9]) for path in before] == [0, 10, 20, 30, 40]
    rejected = harm(told.run)
    life = told.live()
    said = life.stderr.read_text()
    assert said.count("is not whole and was passed over: ") == rejected, said
    assert all(path.name in said for path in before[5 - rejected :]) or "000000900" in said, said
    assert_exact(told, reference())


def test_with_no_whole_checkpoint_left_the_training_is_refused_and_nothing_begun(story: Begin) -> None:
    told = story("--checkpoint", "10", "--keep", "5", "--save", "sync")
    told.live("--kill", "45:after", code=KILLED)
    for pack in (told.run / "objects").iterdir():
        pack.write_bytes(pack.read_bytes()[:-1])
    life = told.live(code=1)
    assert "NoWholeCheckpoint" in life.words
    assert checkpoints(told.run)[-1].name in life.words and "5 were rejected" in life.words, life.words
    assert max(told.steps_written()) == 45
