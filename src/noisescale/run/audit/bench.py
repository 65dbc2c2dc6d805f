"""Gradients of one batch at weights that do not move, whole and in parts, and their rounding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import move
from noisescale.measure.inventory import Inventory
from noisescale.measure.microbatches import gradients_of
from noisescale.measure.untouched import untouched
from noisescale.run.audit.conditions import Condition, applied, seed_everything
from noisescale.run.audit.differences import Gradient, Sizes, combined, finite, gap, sizes
from noisescale.run.audit.examples import Examples
from noisescale.run.users_code import blame_user
from noisescale.workload import Workload

ORDERS = 3
"""Other orders of the examples that show rounding. (assumed)"""

ROUNDING = 10.0
"""A difference within so many times what re-ordering shows is rounding. (assumed: accumulation
adds in yet another order, with other kernels)"""

ULPS, HALF_ULPS = 100.0, 2.0
"""And so is one within so many spacings of floating-point numbers, at the size of the parts'
gradients: a few orders may all round alike. Results of 16 bits are sums of wider numbers, rounded
once in every pass, which makes 0.3 spacings. (assumed; the 0.3 is measured)"""

_HALF_EPS = 1e-5

SEEDS_LEFT = 16
"""Passes that are averaged where random numbers cannot be switched off. (assumed)"""

ANEW = 100_003
"""What is added to a seed for other random numbers. (assumed: past the seeds averaged over)"""

STANDARD_ERRORS = 4.0
"""Averages that lie within so many standard errors are equal. (assumed)"""


@dataclass(frozen=True)
class Found:
    """What a pass gave.

    Attributes:
        gradient: by parameter.
        loss: the weighted sum of the parts' losses.
    """

    gradient: Gradient
    loss: float


class Bench:
    """Differentiates one batch, in parts and under conditions, and leaves no trace.

    Args:
        workload: its model, loss and collation are used.
        model: in training mode, at the weights to audit.
        examples: the batch.
        parts: a split of it; how large its gradients are says how much is rounded.
        seed: of the random numbers of a pass.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        examples: Examples,
        parts: Sequence[Tensor],
        seed: int,
    ) -> None:
        self.workload, self.model, self.examples = workload, model, examples
        self._parts = list(parts)
        self.inventory = Inventory(model)
        self.seeds: tuple[int, ...] = (seed,)
        """More than one where random numbers cannot be switched off."""
        self._device = next(model.parameters()).device
        self._whole: dict[Condition, Found] = {}
        self._tolerance: dict[Condition, Sizes] = {}
        self._order_matters = False

    @property
    def order_matters(self) -> bool:
        """Whether another order of the examples changes more than rounding does."""
        return self._order_matters

    @cached_property
    def eps(self) -> float:
        """The coarsest relative spacing of numbers in a pass, under autocast too."""
        kinds = {slot.tensor.dtype for slot in self.inventory.slots}

        def note(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() or tensor.is_complex():
                kinds.add(tensor.dtype)
            return tensor

        named = f"workload {self.workload.name!r}: a forward pass"
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with blame_user(named), self.held(Condition(), self.seeds[0]), hooks:
            self._loss(self.everything())
        return max(torch.finfo(kind).eps for kind in kinds)

    @property
    def unit(self) -> float:
        """Relative difference that spacing alone explains."""
        return self.eps * (ULPS if self.eps < _HALF_EPS else HALF_ULPS)

    def batch(self, positions: Tensor, *, cut: bool = False) -> Any:
        """Return some of the examples, on the model's device, collated anew unless ``cut``."""
        make = self.examples.rows if cut else self.examples.batch
        with blame_user(f"workload {self.workload.name!r}: collating {len(positions)} examples"):
            return move(make(positions), self._device)

    def everything(self) -> Tensor:
        """Return the positions of the whole batch."""
        return torch.arange(self.examples.count)

    @contextmanager
    def held(self, condition: Condition, seed: int) -> Iterator[None]:
        """Hold the model in a condition, its random numbers seeded, and undo all of it after."""

        def see_whole_batch() -> None:
            self.workload.loss(self.model, self.batch(self.everything()))

        with untouched(self.model), torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(applied(self.model, condition, see_whole_batch))
            seed_everything(self.model, seed)
            yield

    def run(
        self,
        parts: Sequence[Tensor],
        weights: Sequence[float],
        condition: Condition,
        seed: int,
    ) -> Found:
        """Accumulate the gradients of ``weight * loss`` over parts, as a training loop does."""
        total: dict[int, Tensor] = {}
        loss_sum = 0.0
        named = f"workload {self.workload.name!r}: a pass on {_sizes(parts)} examples"
        with blame_user(named), self.held(condition, seed):
            for part, weight in zip(parts, weights, strict=True):
                with _buffers_kept(self.model, condition.restored):
                    loss = self._loss(part, cut=condition.cut)
                    loss_sum += weight * float(loss.detach())
                    for index, value in gradients_of(loss * weight, self.inventory):
                        total[index] = total[index] + value if index in total else value
        return Found(total, loss_sum)

    def whole(self, condition: Condition) -> Found:
        """Return the gradient of the batch in one pass."""
        if condition not in self._whole:
            self._whole[condition] = self.split([self.everything()], [1.0], condition)
        return self._whole[condition]

    def split(
        self, parts: Sequence[Tensor], weights: Sequence[float], condition: Condition
    ) -> Found:
        """Return the accumulated gradient, averaged over seeds where it has to be."""
        found = [self.run(parts, weights, condition, seed) for seed in self.seeds]
        share = 1 / len(found)
        return Found(
            combined((share, one.gradient) for one in found),
            statistics.fmean(one.loss for one in found),
        )

    def drawn_anew(
        self, parts: Sequence[Tensor], weights: Sequence[float], condition: Condition
    ) -> Found:
        """Accumulate with random numbers that the one pass did not draw.

        Equal seeds may give every example the mask that it has in one pass, which no training does.
        """
        return self.run(parts, weights, condition, self.seeds[0] + ANEW)

    def rounding(self, condition: Condition) -> Sizes:
        """Return the largest difference that re-ordering and repeating make.

        Examples are re-ordered in one pass, and parts when they are accumulated.
        """
        whole = self.run([self.everything()], [1.0], condition, self.seeds[0])
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(self.examples.count, generator=generator) for _ in range(ORDERS)]
        gaps = [
            self.gap(self.run([order], [1.0], condition, self.seeds[0]).gradient, whole.gradient)
            for order in (self.everything(), *orders)
        ]
        repeated, spacing = gaps[0], self._spacing(condition)
        # Far beyond rounding: the loss takes the examples in their order.
        if max(one.total for one in gaps[1:]) > ROUNDING * (spacing.total + repeated.total):
            self._order_matters = True
            gaps = [repeated]
        added = gap(*self._added_both_ways(condition), self.inventory)
        if math.isfinite(added.total):
            gaps.append(added)
        return Sizes({name: max(one.groups[name] for one in gaps) for name in repeated.groups})

    def tolerance(self, condition: Condition) -> Sizes:
        """Return the differences that say nothing, per group."""
        if condition not in self._tolerance:
            several = len(self.seeds) > 1
            self._tolerance[condition] = (
                self._standard_errors(condition) if several else self._rounding_allowed(condition)
            )
        return self._tolerance[condition]

    def same(self, one: Gradient, other: Gradient, condition: Condition) -> bool:
        """Whether two gradients differ by no more than says nothing, in every group."""
        return within(self.gap(one, other), self.tolerance(condition))

    def gap(self, one: Gradient, other: Gradient) -> Sizes:
        """Return the norms of a difference."""
        return gap(one, other, self.inventory)

    def _added_both_ways(self, condition: Condition) -> tuple[Gradient, Gradient]:
        """Accumulate in two orders, from equal buffers: what rounding alone changes."""
        still = replace(condition, restored=True)
        weights = [1 / len(self._parts)] * len(self._parts)
        ways = (self._parts, self._parts[::-1])
        first, second = (self.run(way, weights, still, self.seeds[0]).gradient for way in ways)
        return first, second

    def _loss(self, part: Tensor, *, cut: bool = False) -> Tensor:
        loss: Any = self.workload.loss(self.model, self.batch(part, cut=cut))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = (
                f"a tensor of shape {tuple(loss.shape)}"
                + ("" if loss.requires_grad else " without a gradient")
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            raise InvalidInputError(
                f"workload {self.workload.name!r}: loss(model, batch) returned {what}",
                "a scalar tensor that depends on the model's parameters is required",
                "return the mean loss over the batch, with its graph",
            )
        return loss.reshape(())

    def _spacing(self, condition: Condition) -> Sizes:
        """Spacings of floating-point numbers at the size of the parts' gradients."""
        whole = self.whole(condition).gradient
        each = [sizes(whole, self.inventory)]
        for part in self._parts:
            gradient = self.run([part], [1.0], condition, self.seeds[0]).gradient
            if finite(gradient):
                each.append(sizes(gradient, self.inventory))
        total = max(one.total for one in each)
        # A group whose gradient cancels to nothing is still computed from numbers of full size.
        return Sizes(
            {
                name: self.unit * max(one.groups[name] for one in each) + self.eps * total
                for name in each[0].groups
            }
        )

    def _rounding_allowed(self, condition: Condition) -> Sizes:
        rounding, spacing = self.rounding(condition), self._spacing(condition)
        return Sizes(
            {
                name: max(ROUNDING * value, spacing.groups[name])
                for name, value in rounding.groups.items()
            }
        )

    def _standard_errors(self, condition: Condition) -> Sizes:
        """Of the difference of two averages over the seeds."""
        mean = self.whole(condition).gradient
        squares = dict.fromkeys(sizes(mean, self.inventory).groups, 0.0)
        for seed in self.seeds:
            one = self.run([self.everything()], [1.0], condition, seed)
            for name, value in self.gap(one.gradient, mean).groups.items():
                squares[name] += value**2
        count = len(self.seeds)
        factor = STANDARD_ERRORS * (2 / (count * (count - 1))) ** 0.5
        return Sizes({name: factor * value**0.5 for name, value in squares.items()})


def within(found: Sizes, tolerance: Sizes) -> bool:
    """Whether sizes stay within others in every group; NaN does not."""
    return all(value <= tolerance.groups[name] for name, value in found.groups.items())


def shares(parts: Sequence[Tensor]) -> list[float]:
    """Return each part's share of the examples."""
    count = sum(len(part) for part in parts)
    return [len(part) / count for part in parts]


def _sizes(parts: Sequence[Tensor]) -> str:
    lengths = list(dict.fromkeys(len(part) for part in parts))
    return " and ".join(f"{length}" for length in lengths)


@contextmanager
def _buffers_kept(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Put buffers back, by copies swapped in, as ``untouched`` does."""
    if not wanted:
        yield
        return
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    for module, buffers in kept:
        for name, value in buffers.items():
            module._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
