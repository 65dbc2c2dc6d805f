"""Whether a workload is in another process what it is in this one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from noisescale.run.dry_run import fresh_model
from noisescale.run.trials.stacked.feed import Feed
from noisescale.workload import Workload

SAME = 1e-4
"""Relative difference that rounding explains. (assumed)"""

_EXAMPLES = 2


def likeness(workload: Workload) -> list[float]:
    """Return numbers that tell a workload from one made under other settings or other data.

    Sums over the initial weights and buffers of one seed, and over a few examples' loss; infinite
    where there is no loss. What is drawn otherwise than from torch's seeded state differs at
    each call.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(workload)
        tensors = [*model.parameters(), *model.buffers()]
        numbers = [float(t.detach().double().sum()) + t.element_size() for t in tensors]
        try:
            feed = Feed(workload, next(model.parameters()).device)
            last = torch.arange(workload.train_size - _EXAMPLES, workload.train_size)
            with torch.no_grad():
                numbers.append(float(workload.loss(model, feed.batch(last))))
        except Exception:  # noqa: BLE001  for the trials to tell
            numbers.append(math.inf)
    return numbers


def alike(ones: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two such lists agree.

    >>> alike([1.0, float("inf")], [1.00001, float("inf")]), alike([1.0], [1.1]), alike([], [1.0])
    (True, False, False)
    """
    return len(ones) == len(others) and all(
        a == b or abs(a - b) <= SAME * max(abs(a), abs(b), 1e-3) or (a != a and b != b)
        for a, b in zip(ones, others, strict=True)
    )
