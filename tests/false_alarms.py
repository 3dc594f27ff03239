"""Does the journal ever cry wolf? Kills a clean training again and again, and counts the alarms: there must be none.

    python tests/false_alarms.py            200 kills, 10 in each run
    python tests/false_alarms.py 1000 7     another number, another seed

Each life is killed by SIGKILL: at a step, a moment after one, during a save, in the work after an epoch, or from
outside at any instant. Each run ends as it would have ended. An alarm is a life that says that something differs, or a
run whose journal or final state is not the uninterrupted run's.

Touches: a temporary directory; processes that it starts itself.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unbroken import _core, forks

KILLS_A_RUN = 10
STEPS, STEPS_AN_EPOCH, CHECKPOINT = 120, 20, 6

SCRIPT = f"""
import random
import numpy as np
import torch
import unbroken

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return {4 * STEPS_AN_EPOCH}
    def __getitem__(self, index):
        return torch.sin(torch.arange(6.0) * index) + 0.1 * torch.randn(6) + random.random() * float(np.random.random())

random.seed(1)
np.random.seed(1)
torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
)
opt = torch.optim.AdamW(net.parameters())
sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, {STEPS})
loader = torch.utils.data.DataLoader(Items(), 4, shuffle=True, num_workers=1)
run = unbroken.Run("run", seed=1, checkpoint={CHECKPOINT}, model=net, optimizer=opt, scheduler=sched)
for _ in run.epochs({STEPS // STEPS_AN_EPOCH}):
    for x in run.batches(loader):
        loss = net(x * random.random()).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        run.log(loss=loss)
    with run.aside():
        net.eval()
        net(torch.randn(4, 6))
"""


@dataclass
class Count:
    """What happened."""

    kills: int = 0
    too_late: int = 0
    executed_again: int = 0
    alarms: list[str] = field(default_factory=list)


def points(step: int, chance: random.Random) -> tuple[str, float]:
    """Return where a life that goes on from a step is to die: a point of ours, or after so many seconds."""
    at = min(step + chance.randint(1, 12), STEPS - 1)
    sort = chance.randrange(5)
    if sort == 0:
        return f"step:{at}", 0.0
    if sort == 1:
        return f"step:{at}:{chance.uniform(0.01, 20):.3f}", 0.0
    if sort == 2:
        save = -(-at // CHECKPOINT) * CHECKPOINT
        return f"saving:{save}:{chance.uniform(0.01, 4):.3f}", 0.0
    if sort == 3:
        return f"work:{at // STEPS_AN_EPOCH}:{chance.uniform(0.01, 2):.3f}", 0.0
    return "", chance.uniform(0.05, 0.8)


def live(
    command: Sequence[str], directory: Path, *, crash_at: str = "", after_s: float = 0.0
) -> tuple[int, str]:
    """Go through one life; return its exit code and what it said."""
    script = directory.parent / "train.py"
    life = subprocess.Popen(
        [*command, str(script)],
        cwd=directory,
        env={**os.environ, "UNBROKEN_CRASH_AT": crash_at},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if after_s:
        time.sleep(after_s)
        life.kill()
    said, _ = life.communicate()
    return life.returncode, said


def steps_done(run: Path) -> int:
    return (
        max((entry["step"] for entry in _core.read_journal(run)), default=0)
        if (run / "run.toml").exists()
        else 0
    )


def one_run(
    command: Sequence[str], directory: Path, reference: Path, kills: int, chance: random.Random
) -> Count:
    """Kill one run so often, let it end, and compare it with the uninterrupted one."""
    directory.mkdir()
    run, count = directory / "run", Count()
    said = []
    for _ in range(kills):
        crash_at, after_s = points(steps_done(run), chance)
        code, words = live(command, directory, crash_at=crash_at, after_s=after_s)
        said.append(words)
        count.kills += code == -9
        count.too_late += code == 0
        if code not in (0, -9):
            count.alarms.append(f"{directory.name}: exit code {code}: {words}")
    code, words = live(command, directory)
    said.append(words)
    if code != 0:
        count.alarms.append(f"{directory.name}: exit code {code} at the end: {words}")
    count.executed_again = sum(len(entry["lives"]) > 1 for entry in _core.read_journal(run))
    count.alarms += [
        f"{directory.name}: {words}" for words in said if "differs" in words or "Warning" in words
    ]
    if _core.main(["explain", str(reference), str(run)]) != 0:
        count.alarms.append(f"{directory.name} is not the uninterrupted run")
    return count


def count_alarms(kills: int, seed: int) -> Count:
    """Kill runs until there were so many kills, and return what happened."""
    chance, total = random.Random(seed), Count()
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith(("UNBROKEN_", "SLURM_"))
    }
    with tempfile.TemporaryDirectory() as name, forks.serving(environment) as command:
        place = Path(name)
        (place / "train.py").write_text(SCRIPT)
        (place / "reference").mkdir()
        code, words = live(command, place / "reference")
        assert code == 0, words
        number = 0
        while total.kills < kills and not total.alarms:
            number += 1
            left = min(KILLS_A_RUN, kills - total.kills)
            count = one_run(command, place / f"run-{number}", place / "reference" / "run", left, chance)
            total.kills += count.kills
            total.too_late += count.too_late
            total.executed_again += count.executed_again
            total.alarms += count.alarms
    return total


def main() -> int:
    kills, seed = (*map(int, sys.argv[1:]), *(200, 1)[len(sys.argv) - 1 :])[:2]
    started = time.monotonic()
    total = count_alarms(kills, seed)
    for alarm in total.alarms:
        print(alarm)
    print(
        f"{total.kills} kills, {total.executed_again} boundaries executed again and compared, "
        f"{len(total.alarms)} alarms ({time.monotonic() - started:.0f} s, seed {seed})"
    )
    return 1 if total.alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
