"""Models that use a parameter more than once."""

from __future__ import annotations

import torch
from torch import nn


class TiedHead(nn.Module):
    """The language model whose head is its table."""

    def __init__(self, vocabulary, width, padding=None, twice=False):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.table.weight
        self.twice = twice

    def forward(self, ids):
        h = torch.tanh(self.body(self.table(ids)))
        return self.head(h + self.table(ids.flip(1)) if self.twice else h)


class Repeated(nn.Module):
    """Layers of any kind, each called several times."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class Mixed(nn.Module):
    """One matrix as a linear layer, as a 1x1 convolution's twin, and as a table."""

    def __init__(self, kinds):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.kinds = kinds
        self.linear = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6, bias=False)
        self.table = nn.Embedding(6, 6)
        for module in (self.linear, self.again, self.table):
            module.weight = self.first.weight

    def forward(self, x, ids):
        h = torch.tanh(self.first(x))
        for kind in self.kinds:
            h = torch.tanh(self.table(ids) + h if kind == "table" else getattr(self, kind)(h))
        return h
