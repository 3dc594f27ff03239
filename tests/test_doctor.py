"""`unbroken doctor` from Python: this Python's torch is looked at, and nothing stays behind."""

import json
from pathlib import Path

import pytest
import torch

from unbroken.__main__ import main


def test_doctor_judges_the_torch_of_this_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    answers = []
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag)
        try:
            assert main(["doctor", str(tmp_path), "--json"]) in (0, 1)
        finally:
            torch.use_deterministic_algorithms(before)
        answers.append(json.loads(capfd.readouterr().out))
    named = [{advice["name"] for advice in answer["advice"]} for answer in answers]
    assert named[0] - named[1] == {"torch.use_deterministic_algorithms"}
    assert answers[0]["settings"]["threads.intra_op"] == str(torch.get_num_threads())
    assert list(tmp_path.iterdir()) == []
