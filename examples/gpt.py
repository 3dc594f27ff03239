"""A GPT from scratch on real text, with Unbroken: kill it at any instant, start the same command again.

The text is the Python language reference as the interpreter itself carries it, so that nothing is
downloaded. Blocks of text are drawn at random, with replacement, from the run's own generator: one more
piece of state that has to survive.

    python examples/gpt.py runs/gpt [steps per epoch]
"""

import random
import sys
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn

import unbroken

SEED = 1
EPOCHS = 4
STEPS_PER_EPOCH = int(sys.argv[2]) if len(sys.argv) > 2 else 300
BATCH_SIZE = 12
CONTEXT = 64
WIDTH = 80
HEADS = 4
LAYERS = 2
DROPOUT = 0.05
LEARNING_RATE = 4e-3


class Blocks(torch.utils.data.Dataset[torch.Tensor]):
    """Every window of CONTEXT + 1 characters of a text."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        number = {character: index for index, character in enumerate(self.alphabet)}
        self.characters = torch.tensor([number[character] for character in text])

    def __len__(self) -> int:
        return len(self.characters) - CONTEXT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.characters[index : index + CONTEXT + 1]


class Block(nn.Module):
    """Attention to what came before, then a small net for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_net = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(DROPOUT)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        split = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, HEADS, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=DROPOUT if self.training else 0.0
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.net(self.norm_net(x))


class Gpt(nn.Module):
    """Characters in, scores for the next character out. The table that reads is the table that writes."""

    def __init__(self, alphabet_size: int) -> None:
        super().__init__()
        self.character = nn.Embedding(alphabet_size, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, alphabet_size, bias=False)
        self.head.weight = self.character.weight
        nn.init.normal_(self.character.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return self.head(self.norm(self.blocks(self.character(x) + self.place(places))))


@torch.no_grad()
def sample(net: Gpt, alphabet: list[str], length: int) -> str:
    """Return text that the net makes up, one character after the other."""
    net.eval()
    text = torch.tensor([[alphabet.index("\n")]])
    for _ in range(length):
        scores = net(text[:, -CONTEXT:])[:, -1]
        text = torch.cat([text, torch.multinomial(scores.softmax(-1), 1)], 1)
    net.train()
    return "".join(alphabet[index] for index in text[0, 1:].tolist())


def main() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    blocks = Blocks("".join(topics.values()))
    sampler = torch.utils.data.RandomSampler(
        blocks, replacement=True, num_samples=STEPS_PER_EPOCH * BATCH_SIZE
    )
    loader = torch.utils.data.DataLoader(blocks, BATCH_SIZE, sampler=sampler)

    net = Gpt(len(blocks.alphabet))
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    total = EPOCHS * STEPS_PER_EPOCH
    warm_up = torch.optim.lr_scheduler.LinearLR(opt, 0.01, total_iters=total // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, total - total // 20, eta_min=LEARNING_RATE / 10)
    sched = torch.optim.lr_scheduler.SequentialLR(opt, [warm_up, cosine], [total // 20])

    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/gpt"
    run = unbroken.Run(directory, seed=SEED, model=net, optimizer=opt, scheduler=sched, checkpoint=20)
    for epoch in run.epochs(EPOCHS):
        for batch in run.batches(loader):
            scores = net(batch[:, :-1])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
            opt.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            sched.step()
            run.log(loss=loss, norm=norm)
        with run.aside():
            text = sample(net, blocks.alphabet, 160)
        print(f"--- epoch {epoch + 1} of {EPOCHS}\n{text}", flush=True)


if __name__ == "__main__":
    main()
