"""Resuming by hand, as a widely read article of 2022 taught it: one file, at epoch ends, with generators.

Exact for this program, if it is killed between two epochs. What it leaves out: a kill inside an epoch costs
the epoch, a kill inside `torch.save` costs the file, and schedules, scalers and generators of one's own
have to be remembered by hand. `article_unbroken.py` is the same training with Unbroken.

    python examples/article.py runs/article.pt
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

EPOCHS = 10
BATCH_SIZE = 32
LEARNING_RATE = 1e-2


def build_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/article.pt")
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True)

    torch.manual_seed(0)
    np.random.seed(0)
    net = build_net()
    opt = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        start = saved["epoch"] + 1
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["optimizer"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["torch"])

    loss = torch.zeros(())
    for epoch in range(start, EPOCHS):
        torch.manual_seed(1 + epoch)
        for x, y in loader:
            x = x + torch.from_numpy(np.random.normal(0, 0.05, x.shape)).float()
            loss = nn.functional.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        print(f"epoch {epoch + 1:2d} of {EPOCHS}: last loss {loss.item():.4f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "epoch": epoch,
            "net": net.state_dict(),
            "optimizer": opt.state_dict(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        torch.save(saved, path)


if __name__ == "__main__":
    main()
