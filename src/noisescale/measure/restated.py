"""An optimizer's second moments as they would be at another batch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from noisescale.measure.second_moments import SecondMoment
from noisescale.theory.preconditioning import restating_share


@dataclass(eq=False)
class _Memory:
    """A running average of one parameter's per-example second moments."""

    total: Tensor
    weight: float
    steps: float


class Restated:
    """Second moments at a batch size that is not the one in use.

    v at the batch size in use and the second moments s of single examples tell a coordinate's
    variance; s is averaged over the measured steps with the optimizer's memory beta2. For a
    larger batch v' may come out below v B / B', which is what is left if all of v is noise: it
    is then put there, and the share of such coordinates is reported. Gradients that are
    clipped before the optimizer sees them, or weight decay inside them, make v and s
    differ in more than noise: neither is corrected for.

    Args:
        batch_size: B', examples.
    """

    def __init__(self, batch_size: int) -> None:
        self._new = batch_size
        self._old = 0.0
        self._memory: dict[int, _Memory] = {}
        self._pending: dict[int, Tensor] = {}
        self._read: dict[int, SecondMoment] = {}
        self._floored: Tensor | int = 0
        self._coordinates = 0

    def begin(self) -> None:
        """Start a step; what was not settled is dropped."""
        self._pending.clear()
        self._read.clear()

    def add(self, index: int, squares: Tensor) -> None:
        """Take sums over examples of squared gradients, the parameter's shape."""
        before = self._pending.get(index)
        self._pending[index] = squares if before is None else before + squares

    def settle(self, effective: float, factor: float) -> None:
        """Average what the step brought: ``factor`` times the sums are means over examples."""
        finite = [sums.sum().isfinite() for sums in self._pending.values()]
        if not all(bool(one) for one in finite):
            return
        self._old = effective
        for index, sums in self._pending.items():
            moment = self._read.get(index)
            if moment is None:
                continue
            steps, before = float(moment.steps), self._memory.get(index)
            fresh = sums * factor
            if before is None:
                self._memory[index] = _Memory(fresh, 1.0, steps)
                continue
            kept = moment.memory ** max(1.0, steps - before.steps)
            before.total.mul_(kept).add_(fresh)
            before.weight = kept * before.weight + 1
            before.steps = steps

    def at(self, index: int, moment: SecondMoment) -> SecondMoment | str:
        """Restate a second moment, or say why it cannot be."""
        if not moment.average:
            return (
                "v of this optimizer is no plain average of squared gradients (amsgrad, RMSprop): "
                "it cannot be restated at another batch size"
            )
        self._read[index] = moment
        memory = self._memory.get(index)
        if memory is None:
            return (
                f"v at batch size {self._new} rests on per-example second moments of earlier "
                "measured steps by source='examples', and there are none yet"
            )
        value = moment.value / moment.correction
        share = restating_share(batch_size=self._old, new_batch_size=self._new)
        restated = torch.lerp(value, memory.total / memory.weight, share)
        floor = value * (self._old / self._new)
        if self._new > self._old:
            self._floored = (restated < floor).sum() + self._floored
            self._coordinates += restated.numel()
            restated = torch.maximum(restated, floor)
        eps = moment.eps / moment.correction**0.5
        return moment._replace(value=restated, correction=1.0, eps=eps)

    def note(self) -> str:
        """Say how many coordinates had to be floored."""
        if not self._coordinates:
            return ""
        share = float(self._floored) / self._coordinates
        return f"{share:.0%} of the restated second moments lie at their floor v B / B'"
