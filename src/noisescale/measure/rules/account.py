"""Whether the calls of its modules account for all that a parameter receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from noisescale.measure.rules.registry import Call
from noisescale.measure.rules.uses import Use, own_gradients
from noisescale.measure.squares import squared_norm

# Largest relative difference between the gradient that the calls account for and the one that
# the parameter received that rounding explains, in full and in half precision. (assumed; TF32
# rounds at 1e-3)
_SAME_GRADIENT = 5e-3
_SAME_GRADIENT_HALF = 5e-2
_HALF = (torch.float16, torch.bfloat16)

# Rounding errors of a long sum, in units of eps |terms|. (assumed)
_ROUNDINGS = 8.0


class Account:
    """Compares the two until they agreed once, parameter by parameter.

    Attributes:
        unchecked: indices of the parameters that were not compared yet.
    """

    def __init__(self, shapes: Mapping[int, torch.Size]) -> None:
        self.unchecked = set(shapes)
        self._shapes = shapes
        self._half: set[int] = set()
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._errors: dict[int, Tensor] = {}

    def add(self, uses: Mapping[int, Sequence[Use]], call: Call) -> None:
        """Count what a call accounts for, until the parameter's own gradient comes."""
        uses = {i: u for i, u in uses.items() if i in self.unchecked}
        if not uses:
            return
        floor = _rounding_sq(call)
        if any(t is not None and t.dtype in _HALF for t in (*call.tensors, *call.gradients)):
            self._half.update(uses)
        for index, own in own_gradients(uses, self._shapes).items():
            before = self._own.get(index)
            self._own[index] = (
                (own, floor) if before is None else (before[0] + own, before[1] + floor)
            )

    def hook(self, index: int) -> Callable[[Tensor], None]:
        """Return the hook on a parameter's gradient that compares it."""

        def compare(gradient: Tensor) -> None:
            found = self._own.pop(index, None)
            if found is None or index not in self.unchecked:
                return
            own, floor = found
            received = gradient.detach()
            if received.is_sparse:
                received = received.to_dense()
            three = torch.stack([squared_norm(received - own), squared_norm(own), floor])
            before = self._errors.get(index)
            self._errors[index] = three if before is None else torch.maximum(before, three)

        return compare

    def settle(self) -> list[int]:
        """Return the parameters that received something else; the rest is checked for good."""
        wrong: list[int] = []
        for index, three in self._errors.items():
            error, size, floor = three.tolist()
            if not math.isfinite(error + size + floor):
                continue
            self.unchecked.discard(index)
            bound = _SAME_GRADIENT_HALF if index in self._half else _SAME_GRADIENT
            if error > bound**2 * size + floor:
                wrong.append(index)
        self._errors.clear()
        return wrong

    def clear(self) -> None:
        """Forget what was counted and not compared."""
        self._own.clear()
        self._errors.clear()


def _rounding_sq(call: Call) -> Tensor:
    """Squared rounding error of a sum over positions of gradient times input, at most.

    Where the terms cancel (a key's bias under attention) nothing else is left of the sum.
    """
    gradients = [g for g in call.gradients if g is not None]
    size = torch.stack([squared_norm(g) for g in gradients]).sum()
    inputs = [squared_norm(t).to(size.dtype) for t in call.tensors if t.is_floating_point()]
    rows = float(sum(g.numel() // max(1, g.shape[-1]) for g in gradients))
    scale = torch.stack([*inputs, size.new_tensor(rows)]).amax()
    eps = max(torch.finfo(g.dtype).eps for g in gradients)
    return size * scale * (_ROUNDINGS * eps) ** 2
