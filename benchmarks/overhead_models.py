"""The six problems of `overhead.py`, and the slow truth they are checked against.

Fixed before the first full run: layers, widths, batch sizes, seeds. torch's default
initialisation, synthetic data, float32, train mode; no dropout and no BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0
CLASSES = 10
VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 96, 128, 128, 4, 4

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """Linear 784-512-512-10 with ReLU."""
    return nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, CLASSES),
    )


def cnn() -> nn.Module:
    """Three 3x3 convolutions at 28x28 (1-32-64-64), global average pool, Linear."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class _Block(nn.Module):
    """Pre-LayerNorm transformer block with a fused qkv product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        q, k, v = (
            part.view(size, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Four blocks of width 128, 4 heads, token and position embeddings, head without bias.

    The positions are repeated for every sequence: a lookup of ``arange`` alone has no batch
    dimension, and one peer cannot read an expanded view.
    """

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (sequences, length, vocabulary)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.tokens(tokens) + self.positions(places.contiguous())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)


class _Residual(nn.Module):
    """Basic block: two 3x3 convolutions with GroupNorm; a 1x1 convolution where shapes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, after, 3, stride), nn.GroupNorm(8, after)
        self.conv2, self.norm2 = _conv(after, after, 3), nn.GroupNorm(8, after)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else _conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """Stem 3-16 at 32x32, three stages of 2 blocks (16/32/64), GroupNorm with 8 groups."""
    blocks = [
        _Residual(before, after, stride)
        for before, after, stride in (
            (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1),
        )
    ]  # fmt: skip
    return nn.Sequential(
        _conv(3, 16, 3),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


@dataclass(frozen=True)
class Problem:
    """A model, a batch and a loss.

    Attributes:
        name: its column.
        build: makes the model.
        batch_size: examples (of ``gpt``: sequences).
        shape: of one example; empty for token sequences.
        device: where it runs.
    """

    name: str
    build: Callable[[], nn.Module]
    batch_size: int
    shape: tuple[int, ...]
    device: str = "cpu"

    def model(self) -> nn.Module:
        """Return a fresh model, the same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.build().to(self.device)

    def batch(self) -> Batch:
        """Return the batch, the same every time."""
        rng = torch.Generator().manual_seed(SEED + 1)
        if self.shape:
            x = torch.randn(self.batch_size, *self.shape, generator=rng)
            y = torch.randint(CLASSES, (self.batch_size,), generator=rng)
        else:
            text = torch.randint(VOCABULARY, (self.batch_size, CONTEXT + 1), generator=rng)
            x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        return x.to(self.device), y.to(self.device)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the examples, or over all tokens of all examples."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("mlp-128", mlp, 128, (784,)),
        Problem("mlp-1024", mlp, 1024, (784,)),
        Problem("cnn", cnn, 128, (1, 28, 28)),
        Problem("gpt", Gpt, 16, ()),
        Problem("gpt-tied", lambda: Gpt(tied=True), 16, ()),
        Problem("resnet", resnet, 64, (3, 32, 32)),
    )
}


def true_sum_sq(problem: Problem) -> float:
    """Sum over examples of |g_i|^2, g_i the gradient of example i's own loss.

    One example at a time in float64, on the CPU.
    """
    model = copy.deepcopy(problem.model()).cpu().double()
    x, y = (part.cpu() for part in problem.batch())
    x = x.double() if x.is_floating_point() else x
    total = 0.0
    for i in range(problem.batch_size):
        model.zero_grad()
        loss_of(model(x[i : i + 1]), y[i : i + 1]).backward()
        total += sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    return total
