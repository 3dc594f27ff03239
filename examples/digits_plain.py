"""Handwritten digits with plain PyTorch: a training before Unbroken. Kill it, and it starts from zero.

A small convolutional net, augmentation with randomness in two worker processes, dropout, batch norm, AdamW
and a OneCycle schedule. `digits.py` is the same program with Unbroken: compare them with `diff`.

    python examples/digits_plain.py
"""

import random

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

SEED = 1
EPOCHS = 24
BATCH_SIZE = 32
WORKERS = 2
LEARNING_RATE = 4e-3
TEST_IMAGES = 297


class Digits(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The 8 by 8 images that scikit-learn ships, shifted, scaled and with noise at random."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images.astype(np.float32) / 16
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        image = np.roll(image, (random.randint(-1, 1), random.randint(-1, 1)), axis=(0, 1))
        image = image * np.random.uniform(0.8, 1.2)
        noisy = torch.from_numpy(image.astype(np.float32)) + 0.1 * torch.randn(8, 8)
        return noisy[None], torch.tensor(self.labels[index])


def build_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.1),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    net.eval()
    with torch.no_grad():
        hits = (net(images).argmax(1) == labels).float().mean().item()
    net.train()
    return hits


def main() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = images.reshape(-1, 8, 8)
    train = Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:])
    test_images = torch.from_numpy(images[:TEST_IMAGES].astype(np.float32) / 16)[:, None]
    test_labels = torch.from_numpy(labels[:TEST_IMAGES])

    loader = torch.utils.data.DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=WORKERS, drop_last=True)
    net = build_net()
    opt = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, LEARNING_RATE, total_steps=EPOCHS * len(loader))

    for epoch in range(EPOCHS):
        for x, y in loader:
            loss = nn.functional.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
        print(
            f"epoch {epoch + 1:2d} of {EPOCHS}: {accuracy(net, test_images, test_labels):.1%} right",
            flush=True,
        )


if __name__ == "__main__":
    main()
