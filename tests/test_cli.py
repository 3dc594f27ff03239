"""The command-line program on small runs: what it prints, where, and with which exit code."""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unbroken import _core
from unbroken.__main__ import main


def commit(run: _core.Run, step: int, numbers: list[float], *, phase: int = 0, **changes: Any) -> str:
    """Commit a small state: a 2 x 3 weight, its transpose as a tied view, a momentum, plain values."""
    weight = ctypes.create_string_buffer(struct.pack("<6f", *numbers), 24)
    momentum = ctypes.create_string_buffer(struct.pack("<4e", 1, 2, 3, step), 8)
    tensor = {"dtype": "float32", "offset": 0, "storage": 0}
    tree = {
        "model": {
            "weight": _core.Tensor(shape=(2, 3), strides=(3, 1), **tensor),
            "tied": _core.Tensor(shape=(3, 2), strides=(1, 3), **tensor),
        },
        "optimizer": {
            0: {"exp_avg": _core.Tensor(dtype="float16", shape=(4,), strides=(1,), offset=0, storage=1)}
        },
        "state": {"best": 0.5, "name": "a", **changes},
    }
    info = run.commit(
        step=step,
        phase=phase,
        tree=tree,
        storages=[(ctypes.addressof(weight), 24), (ctypes.addressof(momentum), 8)],
        identity={"data/length": 200},
        environment={"torch": "2.15.0"},
        metrics={"loss": 1.0 / (step + 1)},
    )
    return info.name


def make_run(
    path: Path, *, steps: int = 6, loss_at: dict[int, float] | None = None, **changes: Any
) -> list[str]:
    """Make a run with checkpoints at step 0 and every second one after; return their names."""
    run = _core.Run.open(path, seed=7, settings={})
    run.begin()
    names = [commit(run, 0, [0, 1, 2, 3, 4, 5])]
    run.event("signal", 0, {"name": "SIGTERM"})
    for step in range(1, steps + 1):
        loss = (loss_at or {}).get(step, 1 / step)
        components = [("batch", bytes([step] * 16)), ("loss", loss)]
        assert run.record(step, 0, 0, step, components) is None
        if step % 2 == 0:
            names.append(commit(run, step, [step, 1, 2, 3, 4, 5], **changes))
    run.close()
    return names


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    make_run(tmp_path / "a")
    return tmp_path / "a"


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Call the program in this process; return exit code, stdout and stderr."""
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def damage(file: Path) -> None:
    """Flip one bit of a file's last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


def test_list_prints_a_row_for_each_checkpoint(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "list", run_path)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["step", "boundary", "created", "size", "added", "name", "notes"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "4", "6"]
    assert "loss=0.2" in lines[3]
    assert "32 B" in lines[1]
    assert err == ""


def test_list_in_json_has_what_the_manifests_say(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "list", "--json", run_path)
    answer = json.loads(out)
    assert code == 0
    assert answer["seed"] == 7
    assert [row["step"] for row in answer["checkpoints"]] == [0, 2, 4, 6]
    assert answer["checkpoints"][2]["metrics"] == {"loss": 0.2}
    assert answer["checkpoints"][0]["identity"] == {"data/length": 200}
    assert answer["rejected"] == []


def test_a_path_that_is_no_run_cannot_be_answered(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["show"], ["log"], ["verify"], ["prune", "--last", "1"]):
        code, out, err = call(capfd, *command, tmp_path / "nothing")
        assert (code, out) == (2, ""), command
        assert err.startswith("error: "), command
        assert "nothing" in err
    assert not (tmp_path / "nothing").exists()


def test_show_prints_leaves_with_type_shape_size_and_digest(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capfd, "show", run_path)
    assert code == 0
    assert re.search(r"^step +6 \(step\)$", out, re.MULTILINE)
    assert re.search(r"^  model/weight +float32 \[2, 3\] +24 B +[0-9a-f]{16}$", out, re.MULTILINE)
    assert re.search(r"^  model/tied +float32 \[3, 2\] +24 B +[0-9a-f]{16}$", out, re.MULTILINE)
    assert re.search(r"^  optimizer/0/exp_avg +float16 \[4\] +8 B", out, re.MULTILINE)
    assert re.search(r'^  state/name +"a"$', out, re.MULTILINE)
    assert re.search(r'^  torch +"2.15.0"$', out, re.MULTILINE)
    code, out, _ = call(capfd, "show", "--json", f"{run_path}@2")
    answer = json.loads(out)
    assert (code, answer["step"]) == (0, 2)
    assert {leaf["path"] for leaf in answer["leaves"]} >= {"model/weight", "state/best"}


def test_show_of_a_step_without_checkpoint_names_the_nearest(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "show", f"{run_path}@3")
    assert (code, out) == (2, "")
    assert "has no checkpoint of step 3" in err
    assert "hint: the nearest are those of steps 2 and 4" in err


def test_log_prints_a_line_for_each_boundary(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "log", run_path)
    lines = out.splitlines()
    assert code == 0
    assert re.fullmatch(
        r"step 0  \* saved \(life 1\) 000000000-0-\w+: 32 B, 288 B new, durable after .* [mu]?s", lines[0]
    )
    assert lines[1] == 'step 0  * signal (life 1) name="SIGTERM"'
    assert [line for line in lines if "*" not in line][3] == "step 4  epoch 0 position 4  loss=0.25"
    assert len(lines) == 6 + 4 + 1
    _, out, _ = call(capfd, "log", run_path, "--steps", "2..3", "--components")
    assert [line.split()[1] for line in out.splitlines()] == ["2", "2", "3"]
    assert f"batch={'02' * 16}" in out
    _, out, _ = call(capfd, "log", run_path, "--steps", "5..", "--json")
    *boundaries, saved = [json.loads(line) for line in out.splitlines()]
    assert [boundary["step"] for boundary in boundaries] == [5, 6]
    assert saved["event"] == "saved"
    assert saved["fields"]["durable_us"] >= saved["fields"]["commit_us"] > 0
    assert boundaries[0]["components"]["loss"] == {"float": 0.2, "bits": "3fc999999999999a"}


def test_diff_of_equal_runs_says_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    code, out, _ = call(capfd, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert out == "same through step 6; checkpoints of step 6 are the same in all 5 leaves\n"


def test_diff_names_the_first_step_and_component(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", loss_at={4: 0.26, 5: 9.0})
    code, out, _ = call(capfd, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert out.startswith('same through step 3; part at step 4: "loss" is 0.25')
    code, out, _ = call(capfd, "diff", "--json", tmp_path / "a", tmp_path / "b")
    answer = json.loads(out)
    assert (code, answer["same"]) == (1, False)
    assert (answer["part_at"]["step"], answer["part_at"]["component"]) == (4, "loss")


def test_diff_of_a_run_that_ends_early_is_no(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", steps=4)
    code, out, _ = call(capfd, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert "same through step 4; part at step 5" in out


def test_diff_goes_on_to_checkpoints_where_journals_are_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", name="b")
    code, out, _ = call(capfd, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert out.startswith("state/name: ")
    assert len(out.splitlines()) == 1


def test_diff_of_two_checkpoints_counts_elements(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "diff", f"{run_path}@2", f"{run_path}@4")
    assert code == 1
    (weight,) = [line for line in out.splitlines() if line.startswith("model/weight")]
    # From 2.0 to 4.0 there are 2^23 floats.
    assert "1 of 6 elements, at most 8388608 ulps" in weight
    code, out, _ = call(capfd, "diff", "--json", f"{run_path}@2", f"{run_path}@4")
    paths = [row["path"] for row in json.loads(out)["differences"]]
    assert paths == ["model/weight", "model/tied", "optimizer/0/exp_avg"]
    assert call(capfd, "diff", f"{run_path}@4", f"{run_path}@4")[0] == 0
    assert call(capfd, "diff", run_path, f"{run_path}@4")[0] == 2


def test_diff_of_checkpoints_that_are_gone_goes_by_the_digests_in_the_journal(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, whole, _ = call(capfd, "diff", f"{run_path}@2", f"{run_path}@4")
    assert call(capfd, "prune", run_path, "--last", "1")[0] == 0
    code, out, err = call(capfd, "diff", f"{run_path}@2", f"{run_path}@4")
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        line.split(":")[0] for line in whole.splitlines()
    ]
    assert "model/weight: its bytes should hash to " in out
    assert (
        "note: the checkpoint of step 2 is not whole or no longer there; the journal has its digests" in err
    )
    code, out, _ = call(capfd, "diff", f"{run_path}@4", f"{run_path}@4")
    assert (code, out) == (0, "checkpoints of step 4 are the same in all 5 leaves\n")
    code, _, err = call(capfd, "diff", f"{run_path}@3", f"{run_path}@4")
    assert code == 2
    assert "has no checkpoint of step 3" in err


def own_pack(run_path: Path) -> Path:
    """Return the pack that the newest manifest names and no older one does."""
    *older, newest = [manifest.read_bytes() for manifest in sorted((run_path / "checkpoints").iterdir())]
    packs = [pack for pack in (run_path / "objects").iterdir() if pack.name.encode() in newest]
    (own,) = [pack for pack in packs if not any(pack.name.encode() in manifest for manifest in older)]
    return own


def test_verify_finds_a_flipped_bit_in_a_tensor_and_quick_says_that_it_read_none(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "verify", run_path)
    assert code == 0
    assert out.count("whole    ") == 4
    assert "summary: 4 checkpoints whole; journal whole" in err
    damage(own_pack(run_path))
    code, out, err = call(capfd, "verify", run_path)
    assert code == 1
    assert re.search(r"^damaged  000000006-0-[0-9a-f]+: .*is damaged", out, re.MULTILINE)
    assert "summary: 3 checkpoints whole, 1 damaged; journal whole" in err
    code, _, err = call(capfd, "verify", "--quick", run_path)
    assert code == 0
    assert "no tensor was read" in err
    assert call(capfd, "verify", f"{run_path}@4")[0] == 0
    code, out, _ = call(capfd, "verify", "--json", f"{run_path}@6")
    assert code == 1
    assert [row["name"][:9] for row in json.loads(out)["damaged"]] == ["000000006"]


def test_verify_misses_the_checkpoints_of_a_run_that_has_none_left(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for manifest in (run_path / "checkpoints").iterdir():
        manifest.unlink()
    code, out, _ = call(capfd, "verify", run_path)
    assert code == 1
    assert "no checkpoint of this run is there" in out


def test_repair_misses_the_checkpoints_of_a_run_that_has_none_left_and_takes_a_copys(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = run_path.with_name("copy")
    shutil.copytree(run_path, copy)
    for manifest in (run_path / "checkpoints").iterdir():
        manifest.unlink()
    code, out, err = call(capfd, "repair", run_path)
    assert code == 1
    assert out.startswith("missing  checkpoints: no checkpoint of this run is there")
    assert "the run is not whole" in err
    assert "--from COPY" in err
    code, out, err = call(capfd, "repair", run_path, "--from", copy, "--json")
    answer = json.loads(out)
    assert (code, answer["whole"], answer["missing"]) == (0, True, None)
    assert [name[:9] for name in answer["checkpoints"]] == ["000000006"]
    assert call(capfd, "verify", run_path)[0] == 0


def test_verify_and_repair_agree_on_a_segment_that_is_cut_short(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = run_path.with_name("copy")
    shutil.copytree(run_path, copy)
    (segment,) = (run_path / "journal").iterdir()
    for length in (segment.stat().st_size // 2, 0):
        os.truncate(segment, length)
        for command in ("verify", "repair"):
            code, out, _ = call(capfd, command, run_path)
            assert code == 1, command
            assert "damaged  journal: the record that checkpoint 000000006-0-" in out
        code, out, _ = call(capfd, "repair", run_path, "--from", copy)
        assert (code, out) == (0, f"restore  journal/{segment.name}: from {copy}\n")
        assert call(capfd, "verify", run_path)[0] == 0


def test_verify_says_no_of_a_run_whose_description_is_damaged_or_gone(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_path / "run.toml"
    whole = config.read_bytes()
    for content in (whole.replace(b"seed", b"sead"), whole[:40], b"\xff", None):
        config.unlink(missing_ok=True)
        if content is not None:
            config.write_bytes(content)
        code, out, err = call(capfd, "verify", run_path)
        assert (code, out.startswith("damaged  run.toml: ")) == (1, True)
        assert "hint: `unbroken repair --from COPY`" in err
        assert "continues from" not in err
        code, out, _ = call(capfd, "verify", "--json", run_path)
        assert (code, [row["name"] for row in json.loads(out)["damaged"]]) == (1, ["run.toml"])
    config.write_bytes(whole[:40])
    code, _, err = call(capfd, "repair", run_path)
    assert code == 2
    assert "`unbroken repair --from COPY`" in err


def test_verify_of_a_run_without_a_whole_checkpoint_does_not_say_that_training_goes_on(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for manifest in (run_path / "checkpoints").iterdir():
        damage(manifest)
    code, _, err = call(capfd, "verify", run_path)
    assert code == 1
    assert "continues from" not in err
    assert "hint: `unbroken repair --from COPY`" in err


def test_verify_finds_a_damaged_manifest_and_a_damaged_journal(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(sorted((run_path / "checkpoints").iterdir())[1])
    (segment,) = (run_path / "journal").iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    code, out, err = call(capfd, "verify", run_path)
    assert code == 1
    assert "damaged  000000002-0-" in out
    assert "damaged  journal: " in out
    assert "3 checkpoints whole, 1 damaged; journal damaged" in err
    code, out, err = call(capfd, "list", run_path)
    assert code == 0
    assert len(out.splitlines()) == 4
    assert err.startswith("damaged: 000000002-0-")


def test_export_writes_tied_and_transposed_tensors_as_plain_ones(
    run_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    file = tmp_path / "out.safetensors"
    code, out, _ = call(capfd, "export", run_path, file)
    assert code == 0
    assert out.startswith(f"{file}: 3 tensors, ")
    tensors = safetensors.load_file(file)
    assert sorted(tensors) == ["model/tied", "model/weight", "optimizer/0/exp_avg"]
    assert tensors["model/weight"].tolist() == [[6, 1, 2], [3, 4, 5]]
    assert tensors["model/tied"].tolist() == [[6, 3], [1, 4], [2, 5]]
    assert tensors["optimizer/0/exp_avg"].tolist() == [1, 2, 3, 6]
    code, _, err = call(capfd, "export", run_path, file)
    assert code == 2
    assert "is there already" in err
    assert call(capfd, "export", f"{run_path}@2", file, "--force", "--prefix", "model/")[0] == 0
    tensors = safetensors.load_file(file)
    assert sorted(tensors) == ["tied", "weight"]
    assert tensors["weight"][0, 0] == 2
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_export_of_named_tensors_reads_nothing_else(
    run_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    # Damage in what was not asked for is not seen: its bytes are not read.
    manifest = max((run_path / "checkpoints").iterdir())
    checkpoint = _core.read_checkpoint(manifest)
    moment = checkpoint.tree["optimizer"][0]["exp_avg"]
    damage_bytes(run_path, checkpoint.read(moment.storage))
    file = tmp_path / "out.safetensors"
    assert call(capfd, "export", run_path, file, "--only", "model/w*t", "--only", "model/tied")[0] == 0
    assert sorted(safetensors.load_file(file)) == ["model/tied", "model/weight"]
    code, _, err = call(capfd, "export", run_path, file, "--force", "--only", "optimizer/0/exp_avg")
    assert (code, "optimizer/0/exp_avg" in err) == (2, True)
    code, _, err = call(capfd, "export", run_path, file, "--force", "--only", "model/w*t", "--only", "none*")
    assert (code, "is called `none*`" in err) == (2, True)


def damage_bytes(run_path: Path, found: bytes) -> None:
    """Flip a bit where these bytes stand in a pack."""
    for pack in (run_path / "objects").iterdir():
        data = pack.read_bytes()
        if found in data:
            at = data.index(found)
            pack.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_export_refuses_what_it_cannot_write(
    run_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capfd, "export", run_path, tmp_path / "out.txt")
    assert (code, "cannot tell" in err) == (2, True)
    code, _, err = call(capfd, "export", run_path, tmp_path / "o.safetensors", "--prefix", "none/")
    assert (code, "starts with `none/`" in err) == (2, True)
    code, _, err = call(capfd, "export", run_path, tmp_path / "no" / "o.safetensors")
    assert (code, "cannot open the directory" in err) == (2, True)
    assert _core.main(["export", str(run_path), str(tmp_path / "out.pt")]) == 2
    assert "no torch" in capfd.readouterr().err
    assert list(tmp_path.glob("*o*.safetensors")) == []


def test_prune_shows_first_and_deletes_then(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = sorted(path.name for path in (run_path / "checkpoints").iterdir())
    code, out, err = call(capfd, "prune", run_path, "--last", "1", "--dry-run")
    assert (code, out.split()) == (0, names[:3])
    assert "3 checkpoints would be deleted, 1 checkpoint kept" in err
    assert sorted(path.name for path in (run_path / "checkpoints").iterdir()) == names
    code, out, _ = call(capfd, "prune", run_path, "--last", "1", "--best", "loss:max:1", "--json")
    kept = [names[0], names[3]]
    assert json.loads(out) == {"dry_run": False, "deleted": names[1:3], "kept": kept, "warnings": []}
    assert sorted(path.name for path in (run_path / "checkpoints").iterdir()) == [names[0], names[3]]
    assert call(capfd, "verify", run_path)[0] == 0
    assert call(capfd, "prune", run_path)[0] == 2


def test_prune_refuses_a_metric_that_no_checkpoint_has_and_names_those_there_are(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--dry-run"]):
        code, out, err = call(capfd, "prune", run_path, "--last", "1", "--best", "los:min:1", *flags)
        assert (code, out) == (2, "")
        assert "error: no checkpoint has a logged number called `los`" in err
        assert "hint: they have `loss`; nothing was deleted" in err
        assert len(list((run_path / "checkpoints").iterdir())) == 4


def test_prune_says_which_file_keeps_it_from_deleting_tensors(
    run_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_path / "checkpoints" / ".DS_Store").write_bytes(b"desktop")
    packs = len(list((run_path / "objects").iterdir()))
    code, _, err = call(capfd, "prune", run_path, "--last", "3")
    assert (code, "warning" in err) == (0, False)
    assert len(list((run_path / "objects").iterdir())) == packs - 1
    (run_path / "checkpoints" / "notes.txt").write_text("mine")
    code, out, err = call(capfd, "prune", run_path, "--last", "1", "--json")
    assert code == 0
    assert "`checkpoints/notes.txt` is no checkpoint" in err
    assert "move it elsewhere" in json.loads(out)["warnings"][-1]
    assert len(list((run_path / "objects").iterdir())) == packs - 1


def test_prune_does_not_touch_a_run_that_is_held(run_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    holder = _core.Run.open(run_path, seed=None, settings={})
    try:
        code, out, err = call(capfd, "prune", run_path, "--last", "1")
        assert (code, out) == (2, "")
        assert "held by" in err
        assert len(list((run_path / "checkpoints").iterdir())) == 4
    finally:
        holder.close()


def test_help_fits_a_screen_and_usage_errors_exit_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "-h")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 30
    commands = [
        "list",
        "show",
        "log",
        "diff",
        "verify",
        "export",
        "prune",
        "prove",
        "explain",
        "report",
        "replay",
    ]
    for command in [*commands, "trace", "watch", "certify", "check", "fork", "repair", "doctor", "import"]:
        code, out, err = call(capfd, command, "-h")
        assert (code, err) == (0, "")
        assert 3 < len(out.splitlines()) <= 30
        assert max(map(len, out.splitlines())) <= 100
    for arguments in (
        ["nonsense"],
        ["list"],
        ["log", "x", "--steps", "5..3"],
        ["prune", "x", "--best", "loss"],
    ):
        code, out, err = call(capfd, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")


def test_no_answer_has_colour_and_a_closed_pipe_is_no_error(run_path: Path) -> None:
    environment = {**os.environ, "CLICOLOR_FORCE": "1", "TERM": "xterm-256color"}
    program = [sys.executable, "-m", "unbroken"]
    done = subprocess.run([*program, "show", str(run_path)], capture_output=True, env=environment, check=True)
    assert b"\x1b" not in done.stdout + done.stderr
    read, write = os.pipe()
    os.close(read)
    try:
        closed = subprocess.run([*program, "show", str(run_path)], stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (closed.returncode, closed.stderr) == (0, b"")
