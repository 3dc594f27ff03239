"""A training of an embedding table with sparse gradients: each step changes one row in a hundred. Plain or in a run.

    tables.py WITNESS [RUN [KILL_AT [COMPRESS]]]

Writes the loss of each step and, at the end, a digest of the table and of its moments to WITNESS.

Touches: the run directory, and the witness file.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unbroken

ROWS, WIDTH, STEPS = 8192, 256, 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).square().mean()


def digest_of(net: Net, optimizer: torch.optim.Optimizer) -> str:
    state = optimizer.state[net.table.weight]
    tensors = [net.table.weight.detach(), state["exp_avg"], state["exp_avg_sq"], net.head.weight.detach()]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def main(witness: Path, place: str | None = None, kill_at: int | None = None, compress: Any = None) -> None:
    torch.manual_seed(1)
    net = Net()
    sparse = torch.optim.SparseAdam([net.table.weight], lr=0.01)
    dense = torch.optim.SGD(net.head.parameters(), lr=0.01)
    ids = torch.randint(ROWS, (STEPS * 2, ROWS // 200), generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(ids), batch_size=2, shuffle=True)

    def step(batch: list[torch.Tensor]) -> float:
        loss = net(batch[0])
        loss.backward()
        sparse.step()
        dense.step()
        sparse.zero_grad()
        dense.zero_grad()
        return loss.item()

    with witness.open("a") as said:
        if place is None:
            for at, batch in enumerate(loader, start=1):
                said.write(f"{at} {step(batch).hex()}\n")
        else:
            with unbroken.Run(
                place,
                net=net,
                sparse=sparse,
                dense=dense,
                loader=loader,
                checkpoint=2,
                keep=100,
                compress=compress,
                quiet=True,
            ) as run:
                for _ in run.epochs(1):
                    for batch in run.batches(loader):
                        loss = step(batch)
                        said.write(f"{run.step + 1} {loss.hex()}\n")
                        said.flush()
                        if run.step + 1 == kill_at:
                            os.kill(os.getpid(), signal.SIGKILL)
        said.write(f"end {digest_of(net, sparse)}\n")


if __name__ == "__main__":
    place, kill_at, compress = [*sys.argv[2:], None, None, None][:3]
    main(Path(sys.argv[1]), place, int(kill_at) if kill_at else None, compress)
