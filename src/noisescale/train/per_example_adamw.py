"""AdamW, stated per example."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from noisescale.errors import InvalidInputError
from noisescale.train.layerwise import check_setting
from noisescale.train.per_example import PerExampleOptimizer, States, Tensors, kept_and_given


@final
class PerExampleAdamW(PerExampleOptimizer):
    """AdamW by rate per example, half-lives in examples and eps per example.

    A batch of B examples with mean gradient ``g``, while the size stays, is torch's step with::

        beta_i = 2^(-B / half_lives[i]);  lr = tau sqrt(B);  eps = eps_per_example / sqrt(B)
        weight_decay = weight_shrinkage sqrt(B) / tau

    The averages forget by the size of the present batch, and their bias corrections divide by
    1 - (the product of the betas so far) = 1 - 2^(-examples so far / half-life). After a change
    of size from B0 to B the second moments are first multiplied by B0/B: they are the variance
    of a mean over the batch as long as noise dominates them, which is where the square root in
    the rate holds too. Where the gradient itself dominates, both are wrong.

    Args:
        params: parameters, named parameters or groups.
        tau: lr / sqrt(B), the rate per example's standard deviation; positive.
        half_lives: examples after which each average has forgotten half; positive, the first
            may be None for no momentum.
        eps_per_example: eps beside one example's standard deviation, eps sqrt(B); positive.
        weight_shrinkage: share of the weights that decay takes per example, in [0, 1).
        batch_size: B of the first steps; :meth:`set_batch_size` may give it later.

    Raises:
        InvalidInputError: a setting is out of its range, or a parameter is complex.

    Source: Malladi et al. 2022 (arXiv:2205.10287), sec. 5, for lr and eps; Marek et al. 2025
    (arXiv:2507.07101) for the half-lives; changes of size: derived.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = PerExampleAdamW([weight], tau=0.001, half_lives=(16, 64), batch_size=16)
    >>> settings = optimizer.as_torch()[0]
    >>> settings["lr"], [round(beta, 6) for beta in settings["betas"]]
    (0.004, [0.5, 0.840896])
    """

    def __init__(
        self,
        params: ParamsT,
        tau: float,
        *,
        half_lives: tuple[float | None, float],
        eps_per_example: float = 1e-7,  # assumed: torch's 1e-8 at 100 examples
        weight_shrinkage: float = 0.0,
        batch_size: float | None = None,
    ) -> None:
        defaults = {
            "tau": tau,
            "half_lives": half_lives,
            "eps_per_example": eps_per_example,
            "weight_shrinkage": weight_shrinkage,
            "batch_size": None,
        }
        super().__init__(params, defaults)
        if batch_size is not None:
            self.set_batch_size(batch_size)

    def _check(self, group: dict[str, Any]) -> None:
        half_lives = group["half_lives"]
        if not isinstance(half_lives, tuple | list) or len(half_lives) != 2:
            raise InvalidInputError(
                f"half_lives {half_lives!r}", "two numbers are required", "give one per average"
            )
        first, second = half_lives
        if first is not None:
            check_setting("half_lives[0]", first, positive=True)
        check_setting("half_lives[1]", second, positive=True)
        check_setting("eps_per_example", group["eps_per_example"], positive=True)

    def _as_torch(self, group: dict[str, Any]) -> dict[str, Any]:
        size = group["batch_size"]
        first, second = group["half_lives"]
        root = math.sqrt(size)
        return {
            "lr": group["lr"] * root,
            "betas": (kept_and_given(first, size)[0], kept_and_given(second, size)[0]),
            "eps": group["eps_per_example"] / root,
            "weight_decay": group["weight_decay"] * root,
        }

    def _first_state(self, group: dict[str, Any], weight: torch.Tensor) -> dict[str, Any]:
        return {
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            "examples": 0,
            "batch_size": group["batch_size"],
        }

    def _update(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, states: States
    ) -> None:
        now, size = self._as_torch(group), group["batch_size"]
        seen, before = states[0]["examples"] + size, states[0]["batch_size"]
        (_, new1), (kept2, new2) = (kept_and_given(each, size) for each in group["half_lives"])
        (_, sum1), (_, sum2) = (kept_and_given(each, seen) for each in group["half_lives"])
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        if now["weight_decay"]:
            torch._foreach_mul_(weights, 1 - now["lr"] * now["weight_decay"])
        torch._foreach_lerp_(averages, gradients, new1)
        torch._foreach_mul_(squares, kept2 * (before / size))
        torch._foreach_addcmul_(squares, gradients, gradients, value=new2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, math.sqrt(sum2))
        torch._foreach_add_(divisors, now["eps"])
        torch._foreach_addcdiv_(weights, averages, divisors, value=-now["lr"] / sum1)
        for state in states:
            state["examples"], state["batch_size"] = seen, size
