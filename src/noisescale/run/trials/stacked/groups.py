"""Which trials of a stack see the same batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Groups:
    """Trials that share their order of the data, which lie next to each other.

    Attributes:
        orders: the seed of each group's order.
        count: number of groups.
        owner: the group of each trial, shape (trials,).
        rows: the trials of each group.
        even: whether all groups are equally large.

    Args:
        order_seeds: one per trial, equal ones next to each other.

    >>> groups = Groups([5, 5, 7])
    >>> groups.orders, groups.rows, groups.even
    ([5, 7], [slice(0, 2, None), slice(2, 3, None)], False)
    """

    def __init__(self, order_seeds: Sequence[int]) -> None:
        self.orders = list(dict.fromkeys(order_seeds))
        self.count = len(self.orders)
        number = {seed: group for group, seed in enumerate(self.orders)}
        owner = [number[seed] for seed in order_seeds]
        if owner != sorted(owner):
            raise ValueError("trials of one order must lie next to each other")
        self.owner: Tensor = torch.tensor(owner, dtype=torch.long)
        sizes = [owner.count(group) for group in range(self.count)]
        ends = [sum(sizes[: group + 1]) for group in range(self.count)]
        self.rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.even = len(set(sizes)) == 1
