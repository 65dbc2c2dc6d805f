"""The largest eigenvalue of the Hessian along a run, at steps that lie ever further apart."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noisescale.measure.batches import move, take
from noisescale.measure.curvature import largest_eigenvalue
from noisescale.measure.second_moments import KINDS, LEAST_STEPS, root, second_moment
from noisescale.records.curvature import Curvature, CurvaturePoint
from noisescale.workload import Workload

QUANTILE = 0.9
"""Of the looks, weighted by the steps that each stands for. Curvature spikes: a rate capped by its
median fails. (measured: a cap by the upper quantile never failed on the digits network)"""

SPACING = 0.15
"""Steps to the next look over the steps done: about 30 looks in 200 steps. (assumed)"""

EXAMPLES = 1000
"""Training examples behind each look. (assumed)"""

TOKENS = 8192
"""Tokens behind each look, where an example is a sequence. (measured for a GPT of 112,000
parameters, 10 to 22 products a look: 128 sequences of 64 tokens take 0.3 s a product and 0.5 GB,
1,000 take 3.2 s and 3.2 GB, and the eigenvalue is 5 % off)"""


class CurvatureAlong:
    """Looks at the curvature before some of a run's steps; changes nothing.

    Args:
        workload: its loss and training data are used; a fixed part of the data.
        model: the model in training.
        optimizer: Adam and its kin divide the Hessian as they divide gradients, once their
            second moments rest on enough updates.
        quantile: which quantile :meth:`summary` gives as ``upper``.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        quantile: float = QUANTILE,
    ) -> None:
        self._loss, self._model, self._optimizer = workload.loss, model, optimizer
        size = workload.train_size
        length = workload.recipe.sequence_length or 1
        self._examples = min(EXAMPLES, max(1, TOKENS // length), size)
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        rows = chosen[: self._examples]
        batch = take(workload.train, rows, workload.collate)
        self._batch = move(batch, next(model.parameters()).device)
        self._adam = isinstance(optimizer, KINDS)
        self._quantile = quantile
        self._next = LEAST_STEPS if self._adam else 0
        self.points: list[CurvaturePoint] = []

    def before_step(self, done: int) -> None:
        """Look if it is time.

        Args:
            done: steps done.
        """
        if done < self._next:
            return
        self._next = done + max(1, int(done * SPACING))
        found = largest_eigenvalue(
            self._model, self._loss, self._batch, scales=self._scales() if self._adam else None
        )
        if math.isfinite(found.value):
            point = CurvaturePoint(step=done, value=found.value, residual=found.residual)
            self.points.append(point)

    def summary(self, *, steps: int) -> Curvature | None:
        """Summarise the looks at the first ``steps`` steps; None when there is none."""
        points = [point for point in self.points if point.step < steps]
        if not points:
            return None
        return Curvature(
            upper=weighted_quantile(points, steps=steps, quantile=self._quantile),
            median=weighted_quantile(points, steps=steps, quantile=0.5),
            largest=max(point.value for point in points),
            quantile=self._quantile,
            preconditioner="adam" if self._adam else "none",
            examples=self._examples,
            points=tuple(points),
        )

    def _scales(self) -> list[Tensor]:
        scales = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                moment = second_moment(self._optimizer, group, self._optimizer.state[parameter])
                if moment is None:  # never had a gradient: Adam does not move it
                    scales.append(torch.zeros_like(parameter))
                    continue
                divisor = (moment.value.sqrt() + moment.eps) / root(moment.correction)
                scales.append(divisor.rsqrt().to(parameter))
        return scales


def weighted_quantile(points: Sequence[CurvaturePoint], *, steps: int, quantile: float) -> float:
    """Quantile over steps: each look stands for the steps up to the next one.

    Args:
        points: looks, ascending in their steps, all before ``steps``.
        steps: end of the run.
        quantile: in [0, 1].

    >>> looks = [CurvaturePoint(step=s, value=v, residual=0.0) for s, v in ((0, 9.0), (1, 2.0))]
    >>> weighted_quantile(looks, steps=10, quantile=0.5)
    2.0
    """
    edges = [point.step for point in points] + [steps]
    shares = [after - before for before, after in itertools.pairwise(edges)]
    ordered = sorted(zip((point.value for point in points), shares, strict=True))
    reached = list(itertools.accumulate(share for _, share in ordered))
    at = bisect.bisect_left(reached, quantile * reached[-1])
    return ordered[min(at, len(ordered) - 1)][0]
