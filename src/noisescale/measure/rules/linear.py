"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from noisescale.measure.rules.parts import Outer, Part, wide
from noisescale.measure.rules.registry import all_examples, example_rule, trained


@example_rule(nn.Linear, step=all_examples)
def linear(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """Linear: dW_i = sum_t g_it x_it^T, db_i = sum_t g_it, over all dimensions but the first."""
    x, g = wide(x), wide(g)
    x, g = (t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2) for t in (x, g))
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        found["weight"] = Outer(g, x)
    if trained(layer, "bias"):
        found["bias"] = g.sum(1)
    return found
