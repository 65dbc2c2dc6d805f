"""What the optimizers stated per example share: the batch size may be another at every step.

One gives the rate per example and half-lives in examples, and says how large the next batch is;
what torch's optimizer would need at that size follows. While the size stays, the steps are those
of ``torch.optim.SGD`` and ``torch.optim.AdamW`` with the converted settings.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import ParamsT, StateDict

from noisescale.errors import InvalidInputError
from noisescale.train.arguments import require_groups
from noisescale.train.layerwise import check_setting

Tensors = list[torch.Tensor]
States = list[dict[str, Any]]


class PerExampleOptimizer(torch.optim.Optimizer, abc.ABC):
    """What the per-example optimizers share: the batch size and the settings' translation.

    In a group, ``lr`` is tau: schedulers multiply the rate per example, whatever the batch size,
    and learning-rate logs show tau; :meth:`as_torch` tells torch's values. ``weight_decay`` is
    the shrinkage over the first tau, so that it follows the rate as in torch.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; every setting of the constructor may differ in it but the batch size.

        Raises:
            InvalidInputError: a setting is out of its range, or a parameter is complex.
        """
        if "lr" in param_group or "weight_decay" in param_group:
            raise InvalidInputError(
                "a group with lr or weight_decay",
                "settings per example are required",
                "give tau and weight_shrinkage",
            )
        super().add_param_group({**param_group, "batch_size": self.defaults["batch_size"]})
        group = self.param_groups[-1]
        try:
            self._check(group)
            check_setting("tau", group["tau"], positive=True)
            check_setting("weight_shrinkage", group["weight_shrinkage"], below=1)
            _refuse_complex(group)
        except Exception:
            del self.param_groups[-1]
            raise
        group["lr"] = group.pop("tau")
        group["weight_decay"] = group.pop("weight_shrinkage") / group["lr"]

    def set_batch_size(self, batch_size: float) -> None:
        """Say how many examples (or tokens) the gradients of the steps to come are means over.

        Args:
            batch_size: B, the global batch size, in the unit of the half-lives; positive.

        Raises:
            InvalidInputError: it is not positive, or so large that weight decay would take all
                of the weights in one step.
        """
        if isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool):
            batch_size = int(batch_size)  # numpy's own would not load with weights_only
        check_setting("batch_size", batch_size, positive=True)
        for group in self.param_groups:
            _refuse_whole_decay(group, batch_size)
        self.defaults["batch_size"] = batch_size
        for group in self.param_groups:
            group["batch_size"] = batch_size

    def as_torch(self) -> list[dict[str, Any]]:
        """Return each group's settings as torch's optimizer has them at the present batch size.

        Raises:
            InvalidInputError: no batch size was set.
        """
        return [self._as_torch(group) for group in self.param_groups if _batch_size(group)]

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load settings, batch size and state, as in torch.

        Raises:
            InvalidInputError: the state dict is another optimizer's.
        """
        # Not all that a group holds now: users and schedulers keep keys of their own there.
        needed = {*self.defaults, "lr", "weight_decay"} - {"tau", "weight_shrinkage"}
        require_groups(state_dict, type(self).__name__, needed)
        super().load_state_dict(state_dict)
        self.defaults["batch_size"] = self.param_groups[0]["batch_size"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once by the mean gradient of a batch of the size that was set.

        Nothing is copied to the host, so no device is waited for.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            InvalidInputError: no batch size was set, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _refuse_whole_decay(group, _batch_size(group))
        for group in self.param_groups:
            for weights, gradients, states in self._alike(group):
                self._update(group, weights, gradients, states)
        return loss

    @abc.abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise InvalidInputError if a group's own settings are out of range."""

    @abc.abstractmethod
    def _as_torch(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return torch's settings at the group's batch size."""

    @abc.abstractmethod
    def _first_state(self, group: dict[str, Any], weight: torch.Tensor) -> dict[str, Any]:
        """Return a parameter's state before its first step: tensors, and numbers of its past."""

    @abc.abstractmethod
    def _update(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, states: States
    ) -> None:
        """Move weights and states of one device, dtype and past, in place."""

    def _alike(self, group: dict[str, Any]) -> Iterator[tuple[Tensors, Tensors, States]]:
        alike: dict[tuple[Any, ...], tuple[Tensors, Tensors, States]] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                raise InvalidInputError(
                    f"sparse gradient of a parameter of shape {tuple(weight.shape)}",
                    "dense gradients are required",
                    "make its embedding with sparse=False, or give it torch.optim.SparseAdam",
                )
            state = self.state[weight]
            if not state:
                state.update(self._first_state(group, weight))
            past = tuple(value for value in state.values() if not isinstance(value, torch.Tensor))
            key = (weight.device, weight.dtype, past)
            chosen = alike.setdefault(key, ([], [], []))
            chosen[0].append(weight)
            chosen[1].append(weight.grad)
            chosen[2].append(state)
        yield from alike.values()


def kept_and_given(half_life: float | None, examples: float) -> tuple[float, float]:
    """Return 2^(-examples / half_life) and, without its rounding near 1, one less that."""
    if half_life is None:
        return 0.0, 1.0
    exponent = -math.log(2) * examples / half_life
    return 2.0 ** (-examples / half_life), -math.expm1(exponent)


def _batch_size(group: dict[str, Any]) -> float:
    if group["batch_size"] is None:
        raise InvalidInputError(
            "a step without a batch size",
            "the examples of its batch are required",
            "call set_batch_size before the first step",
        )
    return float(group["batch_size"])


def _refuse_whole_decay(group: dict[str, Any], batch_size: float) -> None:
    taken = group["lr"] * group["weight_decay"] * batch_size
    if not taken < 1:
        raise InvalidInputError(
            f"batch_size {batch_size:g} with a weight shrinkage of {taken / batch_size:g}",
            f"less than all of the weights may be taken per step, not {taken:g} of them",
            "lower weight_shrinkage or the batch size",
        )


def _refuse_complex(group: dict[str, Any]) -> None:
    if any(weight.is_complex() for weight in group["params"]):
        raise InvalidInputError(
            "a complex parameter", "real parameters are required", "train view_as_real of it"
        )
