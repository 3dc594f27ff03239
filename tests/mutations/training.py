"""The training whose resume is broken on purpose: a little of everything that a checkpoint has to hold.

80 items in batches of 8, two workers that augment at random, 3 epochs of 10 steps. Batch norm, dropout, AdamW, a
schedule, a gradient scaler, averaged weights, gradients that are kept for a second step, a module with an attribute and
a buffer that no `state_dict` holds, a value in `run.state`; draws of python, numpy and torch in the body and from a
generator of its own; an evaluation with draws of its own after each epoch. It knows nothing of the faults.

Touches: the run directory.
"""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unbroken

STEPS_PER_EPOCH = 10
CHECKPOINT = 5


class Items(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 8 * STEPS_PER_EPOCH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.sin(torch.arange(6.0) * (index + 1)) + 0.1 * torch.randn(6) + random.random()
        return features * float(np.random.uniform(0.9, 1.1)), torch.tensor(index % 3)


class Gauge(nn.Module):
    """Scales by what it has seen so far, and keeps that where nobody looks."""

    peak: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("peak", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.peak.copy_(torch.maximum(0.9 * self.peak, x.detach().abs().max()))
        return x * (1 + 0.01 / (1 + self.peak)) + 0.001 * self.calls


def build_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), Gauge(), nn.Linear(12, 3)
    )


def evaluate(net: nn.Module) -> float:
    net.eval()
    with torch.no_grad():
        score = net(torch.randn(16, 6) * random.random() + float(np.random.random())).mean().item()
    net.train()
    return score


def main() -> None:
    torch.set_num_threads(1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    net = build_net()
    ema = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    noise = torch.Generator().manual_seed(8)
    # Long enough that its sum depends on how many threads share the work.
    ballast = torch.sin(torch.arange(400_000.0))
    loader = DataLoader(Items(), 8, shuffle=True, num_workers=2)
    run = unbroken.Run(
        "training",
        seed=3,
        checkpoint=CHECKPOINT,
        model=net,
        optimizer=opt,
        scheduler=sched,
        scaler=scaler,
        ema=ema,
        noise=noise,
    )
    for _ in run.epochs(3):
        for x, y in run.batches(loader):
            x = x + 0.01 * torch.randn(x.shape, generator=noise)
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.random())
            loss = (
                nn.functional.cross_entropy(net(x), y) + 0.1 * (ballast * next(net.parameters())[0, 0]).sum()
            )
            loss = loss * (1 + 0.001 * run.state.get("turns", 0))
            run.state["turns"] = run.state.get("turns", 0) + 1
            if run.step % 2 == 0:
                opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            sched.step()
            ema.update_parameters(net)
            run.log(loss=loss)
        with run.aside():
            evaluate(net)


if __name__ == "__main__":
    main()
