"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from noisescale.measure.rules.parts import Outer, Part, row_norms, wide
from noisescale.measure.rules.registry import all_examples, example_rule, trained
from noisescale.measure.squares import squared_norm


def _norms(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor] | None:
    """For one position |g_i|^2 is shared between weight and bias.

    Source: Goodfellow 2015 (arXiv:1510.01799).
    """
    if x.dim() != 2:
        return None
    lengths = row_norms(wide(g))
    norms: dict[str, Tensor] = {}
    if trained(layer, "weight"):
        norms["weight"] = squared_norm(lengths * row_norms(wide(x)))
    if trained(layer, "bias"):
        norms["bias"] = squared_norm(lengths)
    return norms


@example_rule(nn.Linear, norms=_norms, step=all_examples)
def linear(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """Linear: dW_i = sum_t g_it x_it^T, db_i = sum_t g_it, over all dimensions but the first."""
    x, g = wide(x), wide(g)
    x, g = (t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2) for t in (x, g))
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        found["weight"] = Outer(g, x)
    if trained(layer, "bias"):
        found["bias"] = g.sum(1) if g.shape[1] > 1 else g.flatten(1)
    return found
