"""LAMB: Adam whose step in each layer has the length of the layer's own norm."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from noisescale.errors import InvalidInputError
from noisescale.train.layerwise import (
    Exclude,
    LayerwiseOptimizer,
    Slice,
    biases_and_norms,
    check_setting,
    norms,
)


@final
class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments, as an ordinary ``torch.optim.Optimizer``.

    For each parameter tensor ``w`` with gradient ``g`` at its t-th step (t = 1 at first)::

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2    (0 at first)
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        ratio = |w| / |u|;  1 if |w| = 0 or |u| = 0
        w <- w - lr ratio u

    So every tensor moves by ``lr |w|``, decay included. Excluded parameters take torch's Adam
    step: ratio 1, no decay. The global gradient is not clipped, as some implementations do
    and the paper's algorithm does not: call ``clip_grad_norm_`` for that.

    Args:
        params: parameters, named parameters or groups; groups may set every key below.
        lr: learning rate, at least 0: the share of its norm by which a tensor moves.
        betas: decay rates of the two averages per step, each in [0, 1).
        eps: positive, added after the square root and after bias correction.
        weight_decay: inside the update that the ratio scales, at least 0.
        exclude: ``exclude(name, parameter)``, or True or False for all; see
            :func:`~noisescale.train.biases_and_norms`.

    Raises:
        InvalidInputError: a setting is out of its range, or a parameter is complex or flattened
            by FullyShardedDataParallel.

    Source: You et al. 2020 (arXiv:1904.00962), algorithm 2 with phi the identity.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> layer.weight.grad = torch.tensor([[0.0, 9.0]])
    >>> LAMB(layer.parameters(), lr=0.1, weight_decay=0.0).step()
    >>> layer.weight.tolist()  # moved by lr |w|, whatever |g|
    [[3.0, 3.5]]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),  # paper
        eps: float = 1e-6,  # paper
        weight_decay: float = 0.01,  # paper
        exclude: Exclude | bool = biases_and_norms,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, exclude)

    def _check(self, group: dict[str, Any]) -> None:
        check_setting("lr", group["lr"])
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise InvalidInputError(
                f"betas {betas!r}", "two numbers are required", "give one per average"
            )
        for beta in betas:
            check_setting("betas", beta, below=1)
        check_setting("eps", group["eps"], positive=True)
        check_setting("weight_decay", group["weight_decay"])

    def _begin_step(self, state: dict[str, Any], weight: torch.Tensor) -> int:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        return int(state["step"])

    def _update(self, part: Slice, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        first, second = part.state("exp_avg"), part.state("exp_avg_sq")
        torch._foreach_lerp_(first, part.gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, part.gradients, part.gradients, value=1 - beta2)
        steps = part.states[0]["step"]
        root = math.sqrt(1 - beta2**steps)
        # m / (sqrt(v) + eps root) is what Adam's step would be but for this factor: folding it
        # into scalars saves two passes.
        scale = root / (1 - beta1**steps)
        divisors = torch._foreach_sqrt(second)
        torch._foreach_add_(divisors, group["eps"] * root)
        if part.excluded:
            torch._foreach_addcdiv_(part.weights, first, divisors, value=-lr * scale)
            return
        updates = _updates(part.weights, first, divisors, group["weight_decay"] / scale)
        ratios = _ratios(part.weights, updates, scale)
        torch._foreach_addcmul_(part.weights, updates, ratios, value=-lr)


def _updates(
    weights: list[torch.Tensor],
    numerators: list[torch.Tensor],
    divisors: tuple[torch.Tensor, ...],
    decay: float,
) -> tuple[torch.Tensor, ...]:
    if not decay:
        return torch._foreach_div(numerators, divisors)
    updates = torch._foreach_mul(weights, decay)
    torch._foreach_addcdiv_(updates, numerators, divisors)
    return updates


def _ratios(
    weights: list[torch.Tensor], updates: tuple[torch.Tensor, ...], scale: float
) -> tuple[torch.Tensor, ...]:
    """Return what the updates, too small by ``scale``, are multiplied with."""
    own, theirs = norms(weights), norms(updates)
    return torch.where((own > 0) & (theirs > 0), own / theirs, scale).unbind()
