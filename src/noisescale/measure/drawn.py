"""A few of a step's examples, drawn so that large gradients are hardly ever missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noisescale.measure.rules.parts import wide
from noisescale.measure.rules.registry import Call
from noisescale.measure.rules.scratch import buffers

# Share of the chances that all examples have alike: a size that tells too little of an example
# then weighs at most ten times as much as in a uniform draw. (assumed)
_UNIFORM = 0.1
# Rounds in which chances above 1 are cut and the others grow; what is left above 1 then stands
# for an example drawn twice, and biases nothing. (assumed)
_ROUNDS = 3
_TINY = 1e-300
"""Keeps sizes that are all 0 from a division by 0."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Examples that stand for all of a step's.

    Attributes:
        examples: their numbers, shape (some,).
        scale: what their gradients are multiplied by, 1 / sqrt(chance), shape (some,): sums of
            their squares are then unbiased for the sums over all examples.
    """

    examples: Tensor
    scale: Tensor

    def take(self, call: Call) -> Call:
        """Return the call of the drawn examples alone, their gradients multiplied."""
        few = call.take(self.examples)
        gradients = [
            None if g is None else g * self._along(g, dim)
            for g, dim in zip(few.gradients, call.outputs, strict=True)
        ]
        return replace(few, gradients=gradients)

    def _along(self, gradient: Tensor, dim: int) -> Tensor:
        shape = [1] * gradient.dim()
        shape[dim] = -1
        return self.scale.to(gradient.device, gradient.dtype).view(shape)


def sizes(call: Call, weights: Mapping[str, Tensor]) -> Tensor:
    """Bound, or nearly bound, the squared gradients of the examples of one call.

    Without weights |g_i|^2 |x_i|^2: by Cauchy and Schwarz no parameter that multiplies x, at
    however many positions, has a larger one. Linear layers and convolutions take their weights
    into account as if they were an outer product: sum_o r_o g_io^2 sum_k c_k x_ik^2 with the
    means r and c of the rows and columns.

    Args:
        call: complete.
        weights: what the squares of the layer's own ``weight`` and ``bias`` are weighed with,
            in their shapes; others may be left out.

    Returns:
        Shape (examples,), float64.
    """
    weight, axis = weights.get("weight"), _channels(call)
    if weight is None or axis is None:
        return _squares(call.gradients, call.outputs) * (1 + _squares(call.tensors, call.dims))
    table = weight.flatten(2).mean(2) if weight.dim() > 2 else weight
    # Sums as products: one pass over the weights each, and no copy.
    rows = table @ table.new_ones(table.shape[1]) / table.shape[1]
    columns = table.new_ones(table.shape[0]) @ table / (rows.sum())
    x, g = call.tensors[0], call.gradient
    found = _weighed(g, axis, rows) * _weighed(x, axis, columns)
    return found if "bias" not in weights else found + _weighed(g, axis, weights["bias"])


def _channels(call: Call) -> int | None:
    """The dimension of a layer's input and output that its weight joins; None for other layers."""
    layer = call.layer
    if isinstance(layer, nn.Linear):
        return -1
    plain = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1
    return 1 if plain else None


def _weighed(tensor: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Sum over everything but the examples of weight times square, by example."""
    # One pass, and no tensor of the input's size: norms along the positions.
    if tensor.dim() > 2:
        along = tensor.flatten(2) if axis == 1 else tensor.flatten(1, -2).mT
        tensor = torch.linalg.vector_norm(along, dim=2)
    tensor = wide(tensor)
    with buffers(tensor, tuple(tensor.shape)) as (squares,):
        torch.mul(tensor, tensor, out=squares)
        return (squares @ weights.to(squares.dtype)).double()


def _squares(tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> Tensor:
    """Squared norms by example, over all tensors that have one; 0 where none has."""
    found = [
        torch.linalg.vector_norm(t.movedim(d, 0).flatten(1).float(), dim=1).double().square()
        for t, d in zip(tensors, dims, strict=True)
        if t is not None and d is not None and t.is_floating_point()
    ]
    return torch.stack(found).sum(0) if found else torch.zeros((), dtype=torch.float64)


def draw(sizes: Tensor, most: int, start: float) -> Draw:
    """Draw by chances in proportion to sizes, systematically.

    Args:
        sizes: shape (examples,), at least 0; those that are not finite count as 0.
        most: how many to draw, less than there are.
        start: where the systematic draw starts, uniform in [0, 1).

    Returns:
        ``most`` examples; the chance of each to be among them is min(1, c size), mixed with a
        tenth of a uniform draw.

    Source: Horvitz and Thompson 1952 for the estimate; Madow 1949 for the systematic draw.
    """
    sizes = sizes.double()
    # The same calls in both; NumPy's are several times cheaper for arrays this small.
    on_host = sizes.device.type == "cpu"
    of: Any = np if on_host else torch
    marks: Any = torch.arange(most, device=sizes.device, dtype=torch.float64) + start
    values: Any = sizes
    if on_host:
        marks, values = marks.numpy(), sizes.numpy()
    values = of.nan_to_num(values, nan=0.0, posinf=0.0)
    share = values * ((1 - _UNIFORM) / (values.sum() + _TINY)) + _UNIFORM / len(values)
    chances = share * (most / share.sum())
    for _ in range(_ROUNDS):
        sure = chances >= 1
        rest = of.where(sure, 0.0, share)
        chances = of.where(sure, 1.0, rest * ((most - sure.sum()) / rest.sum()))
    ends = chances.cumsum(0)
    # The last end is ``most`` up to rounding.
    examples = of.searchsorted(ends, marks * (ends[-1] / most)).clip(0, len(values) - 1)
    scale = chances[examples] ** -0.5
    return Draw(torch.as_tensor(examples), torch.as_tensor(scale))
