"""A training of an embedding table with sparse gradients: each step changes one row in a hundred. Plain or in a run.

Touches: the run directory, and the trace file: a line for each step with its loss, and at the end one with a digest of
the table and of its moments.
"""

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unbroken

ROWS, WIDTH, STEPS = 8192, 256, 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).square().mean()


def digest_of(net: Net, optimizer: torch.optim.Optimizer) -> str:
    state = optimizer.state[net.table.weight]
    tensors = [net.table.weight.detach(), state["exp_avg"], state["exp_avg_sq"], net.head.weight.detach()]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True)
    add("--trace", type=Path, required=True)
    add("--plain", action="store_true", help="the same loop without Unbroken")
    add("--kill", type=int, default=0, help="SIGKILL after this step")
    add("--compress", default=None, help="how what is not saved by chunks is compressed")
    add("--on-full", default="stop", help="what to do when the disk is full")
    add("--pause-ms", type=float, default=0, help="time that a step takes besides the work")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(1)
    net = Net()
    sparse = torch.optim.SparseAdam([net.table.weight], lr=0.01)
    dense = torch.optim.SGD(net.head.parameters(), lr=0.01)
    ids = torch.randint(ROWS, (STEPS * 2, ROWS // 200), generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(ids), batch_size=2, shuffle=True)
    trace = options.trace.open("a", buffering=1)

    def step(number: int, batch: list[torch.Tensor]) -> None:
        time.sleep(options.pause_ms / 1000)
        loss = net(batch[0])
        loss.backward()
        sparse.step()
        dense.step()
        sparse.zero_grad()
        dense.zero_grad()
        trace.write(json.dumps({"step": number, "loss": loss.item().hex()}) + "\n")
        if number == options.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    if options.plain:
        for number, batch in enumerate(loader, start=1):
            step(number, batch)
    else:
        with unbroken.Run(
            options.run,
            net=net,
            sparse=sparse,
            dense=dense,
            loader=loader,
            checkpoint=2,
            keep=100,
            compress=options.compress,
            on_full=options.on_full,
        ) as run:
            for _ in run.epochs(1):
                for batch in run.batches(loader):
                    step(run.step + 1, batch)
    trace.write(json.dumps({"final": STEPS, "state": digest_of(net, sparse)}) + "\n")


if __name__ == "__main__":
    main(parse())
