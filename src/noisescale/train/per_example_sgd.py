"""SGD with momentum, stated per example."""

from __future__ import annotations

from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from noisescale.errors import InvalidInputError
from noisescale.train.layerwise import check_setting
from noisescale.train.per_example import PerExampleOptimizer, States, Tensors, kept_and_given


@final
class PerExampleSGD(PerExampleOptimizer):
    """SGD with momentum by rate per example and half-life in examples.

    A batch of B examples with mean gradient ``g``, while the size stays, is torch's step::

        m = 2^(-B / momentum_half_life);  lr = tau (1 - m) B;  weight_decay = weight_shrinkage / tau
        v <- m v + g + weight_decay w;  w <- w - lr v

    After a change of size, from B0 with m0 to B, v is first restated: v <- m0 (B0/B) v + g + ...
    Then one example's gradient moves the weights by tau in the end, whatever sizes follow: the
    momentum not yet spent, Q = B v summed over examples, gives up the share 1 - m at each step
    and keeps m. With v as it is, what is still to come would be multiplied by m B / (m0 B0). The
    rate stands outside, as in torch: what is to come follows a schedule's tau.

    Nesterov's form looks ahead by the present step's m and takes back what the last one looked
    ahead, which keeps the same sum.

    Args:
        params: parameters, named parameters or groups.
        tau: temperature, lr / ((1 - m) B): the displacement per example's gradient; positive.
        momentum_half_life: examples after which half of the momentum is spent; None for none.
        weight_shrinkage: share of the weights that decay takes per example, in [0, 1).
        nesterov: Nesterov's form of the momentum.
        batch_size: B of the first steps; :meth:`set_batch_size` may give it later.

    Raises:
        InvalidInputError: a setting is out of its range, or a parameter is complex.

    Source: derived; for one batch size :mod:`noisescale.theory.temperature` (Smith et al. 2018,
    arXiv:1711.00489, sec. 4). What momentum means when the size changes is not in the papers.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = PerExampleSGD([weight], tau=0.01, momentum_half_life=8, batch_size=8)
    >>> optimizer.as_torch()[0]["lr"], optimizer.as_torch()[0]["momentum"]
    (0.04, 0.5)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.step()
    >>> round(weight.item(), 6)  # half of 8 examples x 0.01
    -0.04
    """

    def __init__(
        self,
        params: ParamsT,
        tau: float,
        *,
        momentum_half_life: float | None = None,
        weight_shrinkage: float = 0.0,
        nesterov: bool = False,
        batch_size: float | None = None,
    ) -> None:
        defaults = {
            "tau": tau,
            "momentum_half_life": momentum_half_life,
            "weight_shrinkage": weight_shrinkage,
            "nesterov": nesterov,
            "batch_size": None,
        }
        super().__init__(params, defaults)
        if batch_size is not None:
            self.set_batch_size(batch_size)

    def _check(self, group: dict[str, Any]) -> None:
        if group["momentum_half_life"] is not None:
            check_setting("momentum_half_life", group["momentum_half_life"], positive=True)
        elif group["nesterov"]:
            raise InvalidInputError(
                "nesterov=True without momentum", "Nesterov needs it", "set momentum_half_life"
            )

    def _as_torch(self, group: dict[str, Any]) -> dict[str, Any]:
        momentum, given = kept_and_given(group["momentum_half_life"], group["batch_size"])
        return {
            "lr": group["lr"] * given * group["batch_size"],
            "momentum": momentum,
            "nesterov": group["nesterov"],
            "weight_decay": group["weight_decay"],
        }

    def _first_state(self, group: dict[str, Any], weight: torch.Tensor) -> dict[str, Any]:
        if group["momentum_half_life"] is None:
            return {}
        momentum, _ = kept_and_given(group["momentum_half_life"], group["batch_size"])
        buffer = torch.zeros_like(weight)
        return {"momentum_buffer": buffer, "momentum": momentum, "batch_size": group["batch_size"]}

    def _update(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, states: States
    ) -> None:
        now, size = self._as_torch(group), group["batch_size"]
        if now["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=now["weight_decay"]))
        if group["momentum_half_life"] is None:
            torch._foreach_add_(weights, gradients, alpha=-now["lr"])
            return
        momentum, before = now["momentum"], states[0]["momentum"]
        velocities = [state["momentum_buffer"] for state in states]
        torch._foreach_mul_(velocities, before * (states[0]["batch_size"] / size))
        torch._foreach_add_(velocities, gradients)
        if group["nesterov"]:
            # Q's share now, (1 - m^2) Q, less the (1 - m0)(Q - B g) that was looked ahead.
            whole = group["lr"] * size
            torch._foreach_add_(weights, velocities, alpha=-whole * (before - momentum**2))
            torch._foreach_add_(weights, gradients, alpha=-whole * (1 - before))
        else:
            torch._foreach_add_(weights, velocities, alpha=-now["lr"])
        for state in states:
            state["momentum"], state["batch_size"] = momentum, size
