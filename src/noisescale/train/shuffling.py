"""The order of an epoch's examples, by seed and epoch alone."""

from __future__ import annotations

import torch


def order_of(examples: int, seed: int, epoch: int, *, shuffle: bool = True) -> torch.Tensor:
    """Return the order of an epoch's examples, shape (examples,), int64.

    Args:
        examples: how many there are.
        seed: of the shuffling.
        epoch: from 0.
        shuffle: False for the data set's own order.

    >>> order_of(4, seed=0, epoch=0, shuffle=False).tolist()
    [0, 1, 2, 3]
    """
    if not shuffle:
        return torch.arange(examples)
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(examples, generator=generator)


def _mixed(seed: int, epoch: int) -> int:
    """A seed of 32 bits from two numbers.

    Not their sum: epoch 1 of seed 0 would be epoch 0 of seed 1. Not more bits: torch's generator
    for CPUs drops the upper ones.
    Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    value = (seed * 0x9E3779B97F4A7C15 + epoch + 1) & (2**64 - 1)
    for _ in range(2):
        value = (value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 32
