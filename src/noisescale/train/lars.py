"""LARS: SGD with momentum whose step in each layer follows the layer's own norm."""

from __future__ import annotations

from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from noisescale.errors import InvalidInputError
from noisescale.train.layerwise import (
    Exclude,
    LayerwiseOptimizer,
    Slice,
    add_scaled,
    biases_and_norms,
    check_setting,
    norms,
)


@final
class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling, as an ordinary ``torch.optim.Optimizer``.

    For each parameter tensor ``w`` with gradient ``g``::

        ratio = trust_coefficient |w| / (|g| + weight_decay |w|);  1 if |w| = 0 or |g| = 0
        d = ratio (g + weight_decay w)
        v <- momentum v + d                     (v = 0 at first)
        w <- w - lr v                           (nesterov: w - lr (d + momentum v))

    The rate stands outside the momentum, as in torch's SGD; the paper's stands inside. The two
    differ only in the steps after the rate changes. Excluded parameters take torch's SGD step:
    ratio 1, no decay.

    Args:
        params: parameters, named parameters or groups; groups may set every key below.
        lr: learning rate, at least 0. With the usual trust coefficient it is 10 to 100 times
            SGD's, and excluded parameters feel it in full.
        momentum: heavy-ball momentum per step, in [0, 1).
        nesterov: Nesterov's form of it.
        weight_decay: coupled decay, at least 0; it is scaled by the ratio too.
        trust_coefficient: the paper's eta, positive.
        exclude: ``exclude(name, parameter)``, or True or False for all; see
            :func:`~noisescale.train.biases_and_norms`.

    Raises:
        InvalidInputError: a setting is out of its range, or a parameter is complex or flattened
            by FullyShardedDataParallel.

    Source: You, Gitman, Ginsburg 2017 (arXiv:1708.03888), algorithm 1; the ratio of 1 at a norm
    of 0 is apex's and timm's.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> layer.weight.grad = torch.tensor([[0.0, 9.0]])
    >>> LARS(layer.parameters(), lr=1.0, trust_coefficient=0.1).step()
    >>> layer.weight.tolist()  # moved by lr x 0.1 x |w|, whatever |g|
    [[3.0, 3.5]]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,  # paper
        exclude: Exclude | bool = biases_and_norms,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults, exclude)

    def _check(self, group: dict[str, Any]) -> None:
        check_setting("lr", group["lr"])
        check_setting("momentum", group["momentum"], below=1)
        check_setting("weight_decay", group["weight_decay"])
        check_setting("trust_coefficient", group["trust_coefficient"], positive=True)
        if group["nesterov"] and not group["momentum"]:
            raise InvalidInputError(
                "nesterov=True with momentum 0", "Nesterov needs momentum", "set momentum"
            )

    def _begin_step(self, state: dict[str, Any], weight: torch.Tensor) -> int:
        del state, weight
        return 0  # how many steps came before changes nothing

    def _update(self, part: Slice, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        decay = 0.0 if part.excluded else group["weight_decay"]
        ratios = None if part.excluded else _ratios(part, group)
        if not momentum:
            _add_direction(part.weights, part, ratios, decay, -lr)
            return
        velocities = _velocities(part)
        torch._foreach_mul_(velocities, momentum)
        _add_direction(velocities, part, ratios, decay, 1.0)
        if group["nesterov"]:
            _add_direction(part.weights, part, ratios, decay, -lr)
            lr *= momentum
        torch._foreach_add_(part.weights, velocities, alpha=-lr)


def _velocities(part: Slice) -> list[torch.Tensor]:
    for state, weight in zip(part.states, part.weights, strict=True):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
    return part.state("momentum_buffer")


def _ratios(part: Slice, group: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    weights, gradients = norms(part.weights), norms(part.gradients)
    wanted = group["trust_coefficient"] * weights / (gradients + group["weight_decay"] * weights)
    both = (weights > 0) & (gradients > 0)
    return torch.where(both, wanted, 1.0).unbind()


def _add_direction(
    targets: list[torch.Tensor],
    part: Slice,
    ratios: tuple[torch.Tensor, ...] | None,
    decay: float,
    factor: float,
) -> None:
    """Add ``factor * ratio * (g + decay w)``; decay first, since targets may be the weights."""
    if decay:
        add_scaled(targets, part.weights, ratios, factor * decay)
    add_scaled(targets, part.gradients, ratios, factor)
