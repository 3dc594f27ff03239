"""The training of `article.py` with Unbroken: nothing to save or load, a kill anywhere loses nothing.

python examples/article_unbroken.py runs/article
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import unbroken

EPOCHS = 10
BATCH_SIZE = 32
LEARNING_RATE = 1e-2


def build_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "runs/article"
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True)

    torch.manual_seed(0)
    np.random.seed(0)
    net = build_net()
    opt = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    run = unbroken.Run(path, seed=0, model=net, optimizer=opt, checkpoint=20)

    loss = torch.zeros(())
    for epoch in run.epochs(EPOCHS):
        for x, y in run.batches(loader):
            x = x + torch.from_numpy(np.random.normal(0, 0.05, x.shape)).float()
            loss = nn.functional.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss)
        print(f"epoch {epoch + 1:2d} of {EPOCHS}: last loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
