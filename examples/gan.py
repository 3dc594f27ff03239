"""Two nets, two optimizers, one run: a small GAN that learns to draw the digits scikit-learn ships.

Everything that takes part is named once, also the generator that the noise comes from.

    python examples/gan.py runs/gan
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import unbroken

SEED = 1
EPOCHS = 40
BATCH_SIZE = 64
NOISE = 16
LEARNING_RATE = 1e-3
SHADES = " .:-=+*#%@"


def show(images: torch.Tensor) -> str:
    """Return images (count, 64), values -1 to 1, side by side as text."""
    shade = ((images.clamp(-1, 1) + 1) / 2 * (len(SHADES) - 1)).round().long().view(-1, 8, 8)
    rows = (["".join(SHADES[s] * 2 for s in image[row].tolist()) for image in shade] for row in range(8))
    return "\n".join("   ".join(row) for row in rows)


def main() -> None:
    torch.manual_seed(SEED)
    images, _ = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.as_tensor(images).float() / 8 - 1)
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)

    painter = nn.Sequential(
        nn.Linear(NOISE, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.Tanh(),
    )
    critic = nn.Sequential(
        nn.Linear(64, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )
    painter_opt = torch.optim.Adam(painter.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999))
    critic_opt = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999))
    noise = torch.Generator().manual_seed(SEED)
    fixed = torch.randn(5, NOISE, generator=noise)

    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/gan"
    run = unbroken.Run(
        directory,
        seed=SEED,
        painter=painter,
        critic=critic,
        painter_opt=painter_opt,
        critic_opt=critic_opt,
        noise=noise,
        checkpoint=50,
    )
    judge = nn.functional.binary_cross_entropy_with_logits
    for epoch in run.epochs(EPOCHS):
        for (real,) in run.batches(loader):
            fake = painter(torch.randn(len(real), NOISE, generator=noise))
            real_score, fake_score = critic(real), critic(fake.detach())
            critic_loss = judge(real_score, torch.full_like(real_score, 0.9))
            critic_loss = critic_loss + judge(fake_score, torch.zeros_like(fake_score))
            critic_opt.zero_grad()
            critic_loss.backward()
            critic_opt.step()

            score = critic(fake)
            painter_loss = judge(score, torch.ones_like(score))
            painter_opt.zero_grad()
            painter_loss.backward()
            painter_opt.step()
            run.log(critic=critic_loss, painter=painter_loss)
        if (epoch + 1) % 10 == 0:
            painter.eval()
            with torch.no_grad():
                print(f"epoch {epoch + 1} of {EPOCHS}\n{show(painter(fixed))}", flush=True)
            painter.train()


if __name__ == "__main__":
    main()
