"""Whether the budget of `Policy(continuous=...)` is held: what continuous saves cost a training, beside what they give.

    OMP_NUM_THREADS=1 python bench/continuous.py [--budgets PART ...] [--minutes N] [--stretch SECONDS]
                                                 [--millions N] [--batch N] [--directory DIR] [--json FILE]

One process, one training under `unbroken.Run`: an MLP with AdamW on one thread. Stretches in which no save may begin
alternate with stretches in which saves follow one another within a budget; the budgets take turns, in a random order.
Each stretch with saves is compared with the two without that are its neighbours: machines that others use too are now
fast, now half as fast, for seconds; where the two neighbours differ by more than a tenth, the stretch between them is
left out, whatever it was. All that saving costs is on its side: a stretch with saves goes on until the last
one that began in it is durable and compared with steps after it, and what the boundary does (the capture, the copy) is
part of a step.

Each budget has a measure of its own, the run's (`unbroken.policy.Cost`), whose clock and steps are those of its own
stretches: the run decides as it would if there were nothing but them. Beside them, saves without a budget, where each
begins when the last is durable. The first saves of the process are shown by themselves and belong to no budget.

    longer     how much longer steps are in stretches with saves: of all of them together, and in brackets the interval
               that holds 95 % of what stretches drawn from these again would give
    measured   what the run itself measured, in percent of the time
    a minute   saves begun in a minute
    lost       steps that a kill would lose, on average over all moments

Expect: each budget's interval begins below the budget; `measured` ends near the budget, or below it where saves are
cheap enough to follow one another anyway. On a machine with other work the interval is some percent wide.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unbroken
from unbroken import Policy
from unbroken.policy import Cost

WIDTH = 1024
WARM_UP_STEPS = 10
FIRST_SAVES = 4
DRAWS = 2000
CALM = 0.1
TURNS_LEAST = 8
"""Of a stretch, however long they take."""


class Rows(Dataset[torch.Tensor]):
    """Some batches, over and over."""

    def __init__(self, rows: int) -> None:
        self.batches = torch.randn(8, rows, WIDTH)

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.batches[index % len(self.batches)]


class Gate(Cost):
    """A run's measure of what saving costs, whose time stands still between the stretches of its budget."""

    def __init__(self, budget: float) -> None:
        super().__init__(budget, now=time.monotonic(), draw=random.Random(0))
        self.is_open = False
        self._left: float | None = time.monotonic()
        self._away_s = 0.0

    def enter(self) -> None:
        assert self._left is not None, "a stretch begins after another ended"
        self._away_s += time.monotonic() - self._left
        self._left = None
        self.is_open = True

    def leave(self) -> None:
        self._left = time.monotonic()

    @property
    def allows(self) -> bool:
        return self.is_open and super().allows

    @property
    def compares(self) -> bool:
        """A save is over, and the steps that it is compared with are not."""
        return self._during.count > 0

    def stood(self, seconds: float, *, now: float) -> None:
        super().stood(seconds, now=now - self._away_s)

    def step(self, seconds: float, *, saving: bool, now: float) -> None:
        if self._left is None:
            super().step(seconds, saving=saving, now=now - self._away_s)


class Unheld(Gate):
    """As soon as the last one is durable: what a run would do that weighs nothing."""

    @property
    def allows(self) -> bool:
        return self.is_open


class Training:
    """An MLP in training under a run that saves when the gate of the moment lets it.

    Args:
        place: Where the run goes.
        millions: Of parameters.
        rows: Of a batch.
    """

    def __init__(self, place: Path, millions: float, rows: int) -> None:
        torch.manual_seed(0)
        layers = [
            part for _ in range(max(1, round(millions))) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())
        ]
        self.net = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.run = unbroken.Run(
            place,
            seed=1,
            checkpoint=Policy(epoch_ends=False, continuous=1.0),
            quiet=True,
            net=self.net,
            optimizer=self.optimizer,
        )
        self.saves = self.run._saves
        self.let_through(Gate(1.0))
        self.batches = iter(self.run.batches(DataLoader(Rows(rows), batch_size=None), until_step=10**7))
        self.batch = next(self.batches)

    def let_through(self, gate: Gate) -> None:
        self.saves._cost = gate

    @property
    def saving(self) -> Any:
        """What is under way, as an object of its own for each save."""
        return self.saves._under_way

    def turn(self) -> float:
        """Return the seconds of one step, its boundary and the next batch."""
        begun = time.perf_counter()
        self.net(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.batch = next(self.batches)
        return time.perf_counter() - begun


@dataclass(frozen=True)
class Stretch:
    """Steps with saves, and what steps without took before and after: seconds each, on average."""

    step_s: float
    steps: int
    before_s: float
    after_s: float

    @property
    def around_s(self) -> float:
        return (self.before_s + self.after_s) / 2

    @property
    def is_calm(self) -> bool:
        return abs(self.before_s - self.after_s) <= CALM * self.around_s


@dataclass
class Side:
    """What is known of one budget.

    Args:
        budget: The part of the time that saving may take; None for saves without one.
        gate: Its measure.
        stretches: In their order.
        saves: Begun.
        turns: Steps so far.
        durable: The step, counted by `turns`, of the newest checkpoint that is durable.
        lost: Sum over all steps of those since that one.
    """

    budget: float | None
    gate: Gate
    stretches: list[Stretch] = field(default_factory=list)
    saves: int = 0
    turns: int = 0
    durable: int = 0
    lost: int = 0
    begun: tuple[Any, int] = (None, 0)

    @classmethod
    def of(cls, budget: float | None) -> "Side":
        return cls(budget, Unheld(1.0) if budget is None else Gate(budget))

    def stretch(self, training: Training, seconds: float) -> tuple[float, int]:
        """Train with saves until the time is over and all are durable; return the seconds and the steps."""
        training.let_through(self.gate)
        self.gate.enter()
        taken, turns = 0.0, 0
        while self.gate.is_open or training.saving is not None or self.gate.compares:
            taken += training.turn()
            turns += 1
            self._look(training)
            if taken >= seconds and turns >= TURNS_LEAST:
                self.gate.is_open = False
        self.gate.leave()
        return taken, turns

    def _look(self, training: Training) -> None:
        self.turns += 1
        what, at = self.begun
        if training.saving is not what:
            if what is not None:
                self.durable = at
            self.begun = training.saving, self.turns
            self.saves += training.saving is not None
        self.lost += self.turns - self.durable

    def seconds(self) -> float:
        return sum(stretch.step_s * stretch.steps for stretch in self.stretches)

    def figures(self) -> dict[str, Any]:
        calm = [stretch for stretch in self.stretches if stretch.is_calm]
        return {
            "budget": self.budget,
            "longer": longer(calm),
            "longer_95": interval(calm),
            "measured": self.gate.spent / self.seconds(),
            "saves": self.saves,
            "saves_a_minute": 60 * self.saves / self.seconds(),
            "steps_lost": self.lost / self.turns,
            "calm": len(calm),
            "step_ms": 1000 * statistics.median(stretch.around_s for stretch in self.stretches),
            "seconds": self.seconds(),
            "stretches": [vars(stretch) for stretch in self.stretches],
        }


def longer(stretches: Sequence[Stretch]) -> float:
    """Return how much longer all their steps were than as many around them."""
    around = sum(stretch.around_s * stretch.steps for stretch in stretches)
    return sum(stretch.step_s * stretch.steps for stretch in stretches) / around - 1 if around else math.nan


def interval(stretches: Sequence[Stretch]) -> tuple[float, float]:
    if not stretches:
        return math.nan, math.nan
    draw = random.Random(0)
    found = sorted(longer(draw.choices(stretches, k=len(stretches))) for _ in range(DRAWS))
    return found[DRAWS * 25 // 1000], found[DRAWS * 975 // 1000]


def without(training: Training, seconds: float) -> float:
    """Train without saves; return the seconds a step."""
    taken, turns = 0.0, 0
    while taken < seconds or turns < TURNS_LEAST:
        taken += training.turn()
        turns += 1
    return taken / turns


def first_saves(training: Training) -> list[float]:
    """Return what the first saves of the process cost, in seconds: what its steps took beyond those before it."""
    costs = []
    for _ in range(FIRST_SAVES):
        usual = statistics.median(training.turn() for _ in range(WARM_UP_STEPS))
        gate = Unheld(1.0)
        training.let_through(gate)
        gate.enter()
        taken, turns = training.turn(), 1
        gate.is_open = False
        while training.saving is not None:
            taken += training.turn()
            turns += 1
        costs.append(taken - turns * usual)
    return costs


def measure(
    training: Training, budgets: Sequence[float | None], minutes: float, stretch_s: float
) -> list[Side]:
    order = random.Random(1)
    sides = [Side.of(budget) for budget in budgets]
    ends = time.monotonic() + 60 * minutes
    before = without(training, stretch_s / 2)
    while time.monotonic() < ends:
        for side in order.sample(sides, len(sides)):
            taken, turns = side.stretch(training, stretch_s)
            after = without(training, stretch_s / 2)
            side.stretches.append(Stretch(taken / turns, turns, before, after))
            before = after
    return sides


def show(figures: dict[str, Any]) -> None:
    budget = "none" if figures["budget"] is None else f"{100 * figures['budget']:.1f} %"
    low, high = (100 * end for end in figures["longer_95"])
    calm = f"{figures['calm']} of {len(figures['stretches'])} stretches"
    print(
        f"{budget:>8}{100 * figures['longer']:9.2f} % ({low:6.2f} to {high:5.2f})"
        f"{100 * figures['measured']:10.2f} %{figures['saves']:7}{figures['saves_a_minute']:10.1f}"
        f"{figures['steps_lost']:7.1f}   {calm}, {figures['seconds']:.0f} s, {figures['step_ms']:.0f} ms a step",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.01, 0.05])
    parser.add_argument("--minutes", type=float, default=7.0, help="all together")
    parser.add_argument("--stretch", type=float, default=1.2, help="seconds with saves; half as long without")
    parser.add_argument("--millions", type=float, default=5.0, help="of parameters, 12 bytes of state each")
    parser.add_argument("--batch", type=int, default=64, help="rows: longer steps")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print("command: " + " ".join([Path(sys.executable).name, *sys.argv]))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        training = Training(Path(name) / "run", arguments.millions, arguments.batch)
        costs = first_saves(training)
        print("the first saves cost " + ", ".join(f"{cost:.3f}" for cost in costs) + " s")
        print(f"{'budget':>8}{'longer':>11}{'measured':>30}{'saves':>9}{'a minute':>10}{'lost':>7}")
        sides = measure(training, [*arguments.budgets, None], arguments.minutes, arguments.stretch)
        training.run.close()
    results = [side.figures() for side in sides]
    for figures in results:
        show(figures)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "first_saves_s": costs, "results": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
