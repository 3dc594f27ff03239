"""Gradient accumulation with mixed precision: a kill between two micro-batches keeps the gradients so far.

Four micro-batches make one update. Forward runs under bfloat16 autocast, and a GradScaler looks after the
scale: its scale and growth counter are state, the partial gradients are state, and the run keeps both. A
step of the run is one micro-batch; an update happens each fourth.

    python examples/accumulate_amp.py runs/accumulate
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import unbroken

SEED = 1
EPOCHS = 12
BATCH_SIZE = 16
ACCUMULATE = 4
LEARNING_RATE = 3e-3


def main() -> None:
    torch.manual_seed(SEED)
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)

    net = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )
    opt = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS * len(loader) // ACCUMULATE)
    scaler = torch.amp.GradScaler("cpu", growth_interval=50)

    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/accumulate"
    run = unbroken.Run(
        directory, seed=SEED, model=net, optimizer=opt, scheduler=sched, scaler=scaler, checkpoint=25
    )
    run.state.setdefault("micro_batches", 0)
    loss = torch.zeros(())
    for epoch in run.epochs(EPOCHS):
        for x, y in run.batches(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(x), y) / ACCUMULATE
            scaler.scale(loss).backward()
            run.state["micro_batches"] += 1
            if run.state["micro_batches"] % ACCUMULATE == 0:
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                sched.step()
            run.log(loss=loss, scale=scaler.get_scale())
        print(f"epoch {epoch + 1:2d} of {EPOCHS}: loss {loss.item() * ACCUMULATE:.4f}", flush=True)


if __name__ == "__main__":
    main()
