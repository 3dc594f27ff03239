"""`unbroken trace`: one step executed twice, and what its record says of each operator.

Each trace is two real processes that import torch, so that one history serves all of them; what a record holds is
looked at in this process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbroken.torch.trace import Tracer

SCRIPT = """
import os, random, torch
from torch import nn
import unbroken

library = torch.library.Library("tests", "DEF")
library.define("jitter(Tensor x) -> Tensor")
library.impl("jitter", lambda x: x * (1.001 if os.environ.get("WAVER") == "operator" else 1.0), "CPU")

class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        return grad * float(os.environ.get("WAVER") != "backward")

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        x = torch.relu(self.linear(x))
        return x + torch.ops.tests.jitter(x.detach())

random.seed(1)
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(4, 8), Block(), nn.Dropout(0.2), nn.Linear(8, 2))
opt = torch.optim.AdamW(net.parameters())
# Long enough that its sum depends on how many threads share the work.
ballast = torch.sin(torch.arange(400_000.0))
data = torch.utils.data.TensorDataset(torch.sin(torch.arange(96.0)).reshape(24, 4))
loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
run = unbroken.Run("anywhere/run", seed=1, model=net, optimizer=opt, checkpoint=2, keep=10, journal="full")
for _ in run.epochs(1):
    for (x,) in run.batches(loader):
        y = Bent.apply(net(x * random.random()))
        loss = y.square().mean() + 0.1 * (ballast * net[0].weight[0, 0]).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(loss=loss)
"""

Trace = Callable[..., Any]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Trace step 4 of a history of 6 steps; return the answer."""
    directory = tmp_path_factory.mktemp("trace")
    (directory / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}

    def execute(*command: str | Path, code: int) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    execute("train.py", code=0)

    def ask(*options: str, code: int) -> Any:
        run = directory / "anywhere" / "run"
        before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
        program = ["--", sys.executable, "train.py"]
        answer = execute("-m", "unbroken", "trace", run, "--json", *options, *program, code=code)
        assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
        return json.loads(answer)

    return ask


def test_a_deterministic_step_is_the_same_and_the_recorder_changes_no_number(trace: Trace) -> None:
    answer = trace("--step", "4", code=0)
    assert (answer["same"], answer["step"], answer["from"]) == (True, 4, 2)
    assert answer["operators"] > 40
    # The history digests every byte of the state and knows of no recorder.
    assert answer["as_recorded"] is True
    assert answer["directory"] is None


def test_an_operator_that_is_not_deterministic_is_named_with_module_and_line(trace: Trace) -> None:
    answer = trace("--step", "4", "--set", "WAVER=operator", code=1)
    assert (answer["kind"], answer["operator"]["name"]) == ("operator", "tests.jitter.default")
    site = answer["operator"]["site"]
    assert site["module"] == "model.1"
    assert site["text"] == "return x + torch.ops.tests.jitter(x.detach())"
    assert (Path(answer["directory"]) / "4" / "second" / "operators.jsonl").exists()


def test_other_threads_are_traced_to_the_operator_that_shares_its_work(trace: Trace) -> None:
    answer = trace("--step", "3", "--set", "OMP_NUM_THREADS=2", code=1)
    assert (answer["kind"], answer["operator"]["name"]) == ("operator", "aten.sum.default")
    assert "ballast" in answer["operator"]["site"]["text"]


def test_a_value_of_python_in_a_backward_is_named_as_what_brings_the_difference_in(trace: Trace) -> None:
    # The step before it differs already, so that one is the one to look at.
    answer = trace("--step", "4", "--set", "WAVER=backward", code=1)
    assert (answer["kind"], answer["input"], answer["step"]) == ("input", "other", 3)
    assert answer["origin"] == "a value of the program"
    operator = answer["operator"]
    assert operator["backward"] == "BentBackward"
    assert operator["site"]["function"] == "Bent.backward"
    assert operator["forward"]["text"] == "return x.clone()"


def test_a_step_that_is_not_in_the_history_leaves_the_question_open(trace: Trace) -> None:
    for options in (("--step", "99"), ("--step", "0"), ()):
        with pytest.raises(json.JSONDecodeError):
            trace(*options, code=2)


# What a record holds.


def record(path: Path, step: Callable[[], object], **objects: Any) -> list[dict[str, Any]]:
    tracer = Tracer(path, objects)
    tracer.begin(1, {"x": torch.ones(2)})
    try:
        step()
    finally:
        tracer.end()
    return [json.loads(line) for line in path.read_text().splitlines()]


def operators(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["begin", "end"]
    return lines[1:-1]


def test_views_are_left_out_and_uninitialised_memory_has_no_content(tmp_path: Path) -> None:
    def step() -> None:
        x = torch.empty(3, 4)
        x.t()[0].fill_(1.0)
        x.uniform_()

    empty, fill, uniform = operators(record(tmp_path / "record", step))
    assert empty["out"] == [["result", "float32[3, 4] strides [4, 1]"]]
    assert fill["in"][0] == ["self", "float32[3] strides [4]", "uninitialised memory", 0]
    assert uniform["in"][-1][0] == "generator"


def test_an_input_knows_where_it_comes_from(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=True)
    net(torch.ones(2)).sum().backward()
    opt.step()

    def step() -> None:
        _ = torch.from_numpy(torch.ones(2).numpy()) * 2
        opt.step()

    found = operators(record(tmp_path / "record", step, model=net, opt=opt))
    origins = {part[2] for entry in found for part in entry["in"]}
    assert {
        "",
        "a value of the program",
        "parameter `model.weight`",
        "gradient of parameter `model.bias`",
        "`opt` state ['momentum_buffer'] of parameter `model.weight`",
    } <= origins
    fused = next(entry for entry in found if entry["name"] == "aten._foreach_add_.List")
    assert [part[0] for part in fused["out"]] == ["self[0]", "self[1]"]


def test_equal_tensors_are_equal_wherever_and_however_they_lie(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    shifted = torch.cat([torch.zeros(1), base.flatten()])[1:].view(4, 6)
    turned = base.t().contiguous().t()

    def step() -> None:
        for x in (base, shifted, turned, torch.complex(base, base).conj()):
            _ = x + 0

    found = [
        entry["in"][0] for entry in operators(record(tmp_path / "record", step)) if "add" in entry["name"]
    ]
    assert found[0][1] == found[1][1]
    assert (found[0][3], found[1][3]) == (0, 4)
    # Another layout is another input: it may well change the numbers.
    assert found[0][1].split()[-1] == found[2][1].split()[-1]
    assert found[0][1] != found[2][1]


def test_a_forked_child_writes_nothing_into_the_record(tmp_path: Path) -> None:
    def step() -> None:
        pid = os.fork()
        if pid == 0:
            _ = torch.ones(3) + 1
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    assert operators(record(tmp_path / "record", step)) == []


def test_the_recorder_leaves_every_generator_and_the_mode_stack_as_they_were(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    before = torch.get_rng_state()
    record(tmp_path / "record", lambda: None, model=net)
    assert torch.equal(before, torch.get_rng_state())
    assert torch._C._len_torch_dispatch_stack() == 0
