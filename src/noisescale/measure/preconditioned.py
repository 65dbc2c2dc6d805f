"""The norm that an adaptive optimizer gives to gradients: squares over its second moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import check_choice, check_count
from noisescale.measure.drawn import Draw, draw, sizes
from noisescale.measure.gradients import Inventory
from noisescale.measure.metric import Euclidean, Metric
from noisescale.measure.restated import Restated
from noisescale.measure.rules.parts import Part, wide
from noisescale.measure.rules.registry import Call
from noisescale.measure.rules.scratch import buffers
from noisescale.measure.rules.weighted import coordinate_square_sum, weighted_square_sum
from noisescale.measure.second_moments import (
    Scalar,
    SecondMoment,
    check_kind,
    kind_name,
    root,
    second_moment,
    too_few,
)
from noisescale.measure.squares import squared_norm

AT_MOST = 128
"""Examples per layer and step whose weighted squares are taken, drawn by the size of their
gradients. A few of many cost little, but what a rare large gradient adds to both moments cancels
only if it is among them. (measured: benchmarks/adam_draws.py)"""

DEAR = 4
"""So many times fewer where an example has several positions: there a square is dear, and sizes
tell it within a few percent. (measured: benchmarks/adam_draws.py)"""


# A dot product of so many numbers keeps its precision, see noisescale.measure.squares. (measured)
_SHORT = 1 << 12


@dataclass(frozen=True, kw_only=True)
class AdamNorm:
    """How gradients are measured under an adaptive optimizer's norm.

    With D = sqrt(v_hat) + eps, which the optimizer divides by, |g|^2 = sum_j g_j^2 / D_j^power.

    With power 2 (the default) it is the plain squared norm of the preconditioned gradient
    g / D: tr(P Sigma P) / |P G|^2 with P = 1/D. It does not change when gradients and v are
    rescaled together, coordinate by coordinate, which leaves Adam's steps unchanged too; it is
    the noise scale under preconditioning of Pollux (Qiao et al. 2021, section 3) and of its code,
    adaptdl. With power 1 it is tr(P Sigma) / (G' P G): the plain noise scale in the coordinates
    w / sqrt(P), where a step of -lr P g is plain gradient descent. McCandlish et al. 2018, eq. 2.8,
    with that step gives tr(P H P Sigma) / (G' P H P G): the first is exact for a Hessian H that is
    a multiple of the identity, the second for H that is a multiple of 1/P, which Adam hopes for.
    A coordinate whose v is 0, which has never had a gradient, is left out of the norm while that
    lasts: 1/eps^2 would outweigh all others. Neither power knows of momentum, of weight decay, or
    of rates that differ between groups.

    Attributes:
        power: 2 or 1.
        batch_size: the batch size, in examples, whose v is meant; None for the v in use. The v of
            another size is made of per-example second moments, which source ``examples``
            averages over the measured steps with the optimizer's own memory.
        at_most: examples per layer and measured step whose squares are taken, a quarter of it
            where an example has several positions, drawn at random by the size of their gradients;
            None for all. The estimate stays unbiased and gets noisier.
        seed: of those draws.
    """

    power: Literal[1, 2] = 2
    batch_size: int | None = None
    at_most: int | None = AT_MOST
    seed: int = 0

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise InvalidInputError(f"power {self.power!r}", "1 or 2 is required", "give power=2")
        for name, value in (("batch_size", self.batch_size), ("at_most", self.at_most)):
            if value is not None:
                check_count(name, value, 32)

    @property
    def suffix(self) -> str:
        """What a record's name of the norm says besides the optimizer."""
        said = "" if self.power == 2 else f", power {self.power}"
        return said if self.batch_size is None else f"{said}, v at batch size {self.batch_size}"


Preconditioner = Literal["none", "adam"] | AdamNorm


def metric_of(
    preconditioner: Preconditioner,
    optimizer: torch.optim.Optimizer | None,
    inventory: Inventory,
    loss_reduction: str,
) -> Metric:
    """Make the norm that a meter is asked for.

    Args:
        preconditioner: ``none``, ``adam`` or an :class:`AdamNorm`.
        optimizer: whose second moments are used.
        inventory: the parameters.
        loss_reduction: ``mean`` or ``sum``.

    Raises:
        InvalidInputError: it is none of these, or the optimizer does not fit.
    """
    if preconditioner == "none":
        return Euclidean()
    if isinstance(preconditioner, str):
        check_choice("preconditioner", preconditioner, ("none", "adam"))
        preconditioner = AdamNorm()
    check_kind(optimizer)
    assert optimizer is not None
    if preconditioner.batch_size is not None and loss_reduction == "sum":
        raise InvalidInputError(
            f"AdamNorm(batch_size={preconditioner.batch_size}) with loss_reduction='sum'",
            "a mean loss is required: under a sum v grows with the batch itself",
            "leave batch_size out, or divide the loss by the number of examples",
        )
    return AdamMetric(optimizer, inventory, preconditioner)


def _times(value: Tensor, factor: Scalar) -> Tensor:
    return value if isinstance(factor, float) and factor == 1.0 else value * factor


class AdamMetric(Metric):
    """:class:`AdamNorm` for the parameters of one optimizer.

    The second moments are those that the optimizer holds when the step's gradients come, before
    its own update: they do not depend on the step's examples, so that sums of squares under
    them stay unbiased. It keeps one tensor of weights per parameter.

    Args:
        optimizer: Adam, AdamW, NAdam, RAdam or RMSprop.
        inventory: the parameters.
        norm: the norm.

    Raises:
        InvalidInputError: the optimizer is of another kind.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, inventory: Inventory, norm: AdamNorm | None = None
    ) -> None:
        check_kind(optimizer)
        norm = norm or AdamNorm()
        self.name = kind_name(optimizer) + norm.suffix
        self.norm = norm
        self._optimizer = optimizer
        self._slots = inventory.slots
        self._generator = torch.Generator().manual_seed(norm.seed)
        self._drawn = (0, 0)
        self._index = {id(slot.tensor): i for i, slot in enumerate(self._slots)}
        self._owners: dict[int, Mapping[str, Any]] = {}
        self._weights: dict[int, tuple[Tensor, Scalar]] = {}
        self._buffers: dict[int, Tensor] = {}
        self._trusted: set[int] = set()
        self._restated = None if norm.batch_size is None else Restated(norm.batch_size)

    def freeze(self) -> None:
        """Forget the last step's second moments; the present ones are read when needed."""
        self.refusal = ""
        self._weights.clear()
        self._owners.clear()
        if self._restated is not None:
            self._restated.begin()

    def square(self, index: int, gradient: Tensor) -> Tensor:
        """Return sum_j g_j^2 / D_j^power."""
        found = self._weight(index)
        if found is None:
            return squared_norm(gradient)
        weight, factor = found
        g = gradient.detach() if gradient.requires_grad else gradient
        g = wide(g.to_dense() if g.is_sparse else g)
        if g.dim() == 1 and len(g) <= _SHORT:
            return _times(torch.dot(g * g, weight), factor)
        with buffers(g, tuple(g.shape)) as (squares,):
            torch.mul(g, g, out=squares)
            return _times(squares.mul_(weight).sum(), factor)

    def square_sum(self, index: int, parts: Sequence[Part], shape: torch.Size) -> Tensor:
        """Return the sum over the examples of sum_j g_ij^2 / D_j^power."""
        if self._restated is not None:
            self._restated.add(index, coordinate_square_sum(parts, shape))
        found = self._weight(index)
        if found is None:
            return self._slots[index].tensor.new_zeros(())
        weight, factor = found
        return _times(weighted_square_sum(parts, shape, weight), factor)

    def sample(self, calls: Sequence[Call]) -> Draw | None:
        """Draw which examples of the calls to take."""
        most, size = self.norm.at_most, calls[0].size
        if most is None:
            return None
        if any(g is not None and g.dim() > 2 for call in calls for g in call.gradients):
            most = max(1, most // DEAR)
        if size <= most:
            return None
        self._drawn = (min(most, self._drawn[0] or most), size)
        bounds, *others = [sizes(call, self._weights_of(call)) for call in calls]
        for other in others:
            bounds = bounds + other
        return draw(bounds, most, float(torch.rand((), generator=self._generator)))

    def _weights_of(self, call: Call) -> dict[str, Tensor]:
        found = {}
        for key, parameter in call.layer._parameters.items():
            index = self._index.get(id(parameter))
            weight = None if index is None else self._weight(index)
            if weight is not None:
                found[key] = weight[0]
        return found

    def settle(self, *, effective: float, factor: float) -> None:
        """Learn per-example second moments from a step that was measured."""
        if self._restated is not None:
            self._restated.settle(effective, factor)

    def notes(self) -> list[str]:
        """Say what was drawn, what was floored, and what has no second moment."""
        most, size = self._drawn
        drawn = f"squares of {most} of {size} examples per layer, drawn at random" if most else ""
        floored = self._restated.note() if self._restated is not None else ""
        return [note for note in (drawn, floored, self._unmoved()) if note]

    def _unmoved(self, limit: int = 3) -> str:
        """Name the parameters with coordinates that count for nothing; their weight is 0."""
        zeros = {
            self._slots[i].name: int((weight == 0).sum())
            for i, weight in self._buffers.items()
            if self._slots[i].missing is None
        }
        named = [f"{name} {number}" for name, number in zeros.items() if number]
        if not named:
            return ""
        total = sum(weight.numel() for weight in self._buffers.values())
        more = f" and {len(named) - limit} parameters more" if len(named) > limit else ""
        return (
            f"{sum(zeros.values())} of {total} coordinates have v = 0 (no gradient yet) and"
            f" count for nothing: {', '.join(named[:limit])}{more}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws; second moments of examples are learnt anew."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the draws."""
        if "generator" in state:
            self._generator.set_state(state["generator"].cpu())

    def _weight(self, index: int) -> tuple[Tensor, Scalar] | None:
        """A parameter's weights up to a factor, and the factor; None if the step is refused."""
        found = self._weights.get(index)
        if found is not None:
            return found
        moment = self._moment(index)
        if not isinstance(moment, str) and self._restated is not None:
            moment = self._restated.at(index, moment)
        if isinstance(moment, str):
            self.refusal = self.refusal or moment
            return None
        buffer = self._buffers.get(index)
        if buffer is None or buffer.dtype != moment.value.dtype:
            buffer = torch.empty_like(moment.value, memory_format=torch.contiguous_format)
            self._buffers[index] = buffer
        torch.sqrt(moment.value, out=buffer)
        # What never had a gradient has no second moment: it counts for nothing, not 1/eps^2.
        torch.nn.functional.threshold(buffer, 0.0, math.inf, inplace=True)
        factor: Scalar = 1.0
        eps, correction = moment.eps, moment.correction
        if isinstance(eps, float) and isinstance(correction, float) and correction > 0:
            scale = correction**-0.5
            torch.add(buffer.new_tensor(eps * scale), buffer, alpha=scale, out=buffer)
        else:
            # What is on a device corrects sums, not tensors.
            buffer.add_(moment.eps)
            factor = moment.correction if self.norm.power == 2 else root(moment.correction)
        _ = buffer.pow_(-2) if self.norm.power == 2 else buffer.reciprocal_()
        self._weights[index] = buffer, factor
        return buffer, factor

    def _moment(self, index: int) -> SecondMoment | str:
        slot = self._slots[index]
        if not self._owners:
            self._owners = {
                id(p): group for group in self._optimizer.param_groups for p in group["params"]
            }
        group = self._owners.get(id(slot.tensor))
        if group is None:
            return (
                f"the optimizer does not hold {slot.name!r}, which has no norm then; pass the "
                "optimizer of all trained parameters, or leave the others out with parameters="
            )
        state = self._optimizer.state.get(slot.tensor, {})
        moment = second_moment(self._optimizer, group, state)
        if moment is None:
            return f"the first step of {slot.name!r} has no second moments yet"
        if index not in self._trusted:
            # Counts only grow: one that is on a device is read no more than a few times.
            reason = too_few(self._optimizer, moment)
            if reason:
                return reason
            self._trusted.add(index)
        return moment
