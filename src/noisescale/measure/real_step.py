"""One real training step: forward, backward, clipping, the optimizer and the weight average.

What is timed, what is watched for memory and what short runs train with is this one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_TAKES = {
    "sgd": ("momentum", "dampening", "nesterov", "weight_decay"),
    "adam": ("betas", "eps", "weight_decay"),
    "adamw": ("betas", "eps", "weight_decay"),
}
_OPTIMIZER_KEYS = sorted(
    {key for keys in _TAKES.values() for key in keys} | {"trust_coefficient", "alpha"}
)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names, over the parameters that are trained.

    Keys that the recipe leaves out take torch's defaults.

    Args:
        model: the model; parameters with ``requires_grad=False`` are left out.
        recipe: its ``optimizer``, ``lr`` and the optimizer's own keys are used.

    Returns:
        A ``torch.optim`` optimizer with one parameter group.

    Raises:
        InvalidInputError: the optimizer is none of torch's (``lars`` and ``lamb`` are made by
            those who train), the model has no trainable parameter, the recipe sets a key
            that the optimizer does not have, or torch refuses the combination.

    >>> make_optimizer(nn.Linear(2, 1), Recipe(lr=0.1, batch_size=8)).defaults["momentum"]
    0
    """
    if recipe.optimizer not in _OPTIMIZERS:
        raise InvalidInputError(
            f"optimizer {recipe.optimizer!r}",
            f"runs and probes step with {', '.join(_OPTIMIZERS)}, runs with lars and lamb too",
            "change the recipe's optimizer for this command",
        )
    settings = optimizer_settings(recipe, takes=_TAKES[recipe.optimizer])
    parameters = trainable_parameters(model)
    try:
        return _OPTIMIZERS[recipe.optimizer](parameters, lr=recipe.lr, **settings)
    except ValueError as error:
        raise InvalidInputError(
            f"recipe for {recipe.optimizer}", str(error), "change the recipe"
        ) from None


def optimizer_settings(recipe: Recipe, *, takes: Sequence[str]) -> dict[str, Any]:
    """Return the optimizer's own keys that a recipe sets, without ``lr``.

    Args:
        recipe: where the keys come from.
        takes: the keys that its optimizer has.

    Raises:
        InvalidInputError: the recipe sets a key that the optimizer does not have.

    >>> optimizer_settings(Recipe(lr=0.1, batch_size=8, momentum=0.9), takes=("momentum",))
    {'momentum': 0.9}
    """
    given = {key: getattr(recipe, key) for key in _OPTIMIZER_KEYS}
    settings = {key: value for key, value in given.items() if value is not None}
    for key in settings:
        if key not in takes:
            raise InvalidInputError(
                f"recipe key {key}={settings[key]!r}",
                f"{recipe.optimizer} takes {', '.join(takes)}",
                f"leave {key} out or change the optimizer",
            )
    return settings


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained.

    Raises:
        InvalidInputError: there is none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InvalidInputError(
            f"model {type(model).__name__}",
            "a model with trainable parameters is required",
            "leave requires_grad on for what is to be trained",
        )
    return parameters


class RealStep:
    """The training step of a recipe, whole or in its two halves.

    ``step(batch)`` is ``step.backward(batch)`` followed by ``step.update()``. A loop that
    accumulates calls ``backward`` once per micro-batch and ``update`` once.

    Attributes:
        model: the model that is trained.
        optimizer: what :func:`make_optimizer` made, or the one passed.
        average: the weight average, one tensor per trainable parameter; empty without
            ``ema_decay``.

    Args:
        model: as above.
        loss: ``loss(model, batch)`` returns the batch's mean loss, a scalar tensor.
        recipe: ``clip_norm`` and ``ema_decay`` are used beside the optimizer's keys.
        optimizer: use this one instead of making it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any],
        recipe: Recipe,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer if optimizer is not None else make_optimizer(model, recipe)
        self._loss = loss
        self._clip_norm = recipe.clip_norm
        self._parameters = trainable_parameters(model)
        self._stale = True
        self.average: list[torch.Tensor] = []
        if recipe.ema_decay is not None:
            self.average = [parameter.detach().clone() for parameter in self._parameters]
            self._update_average = get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train on one batch and return its loss before the step, detached."""
        loss = self.backward(batch)
        self.update()
        return loss

    def backward(self, batch: Any, weight: float = 1.0) -> torch.Tensor:
        """Add the gradient of ``weight`` times the batch's mean loss.

        Args:
            batch: what the loss takes.
            weight: this micro-batch's share of the examples of the step, in (0, 1].

        Returns:
            The batch's mean loss, detached, without ``weight``.

        Raises:
            InvalidInputError: the loss is not a scalar tensor with a gradient.
        """
        loss = self._loss(self.model, batch)
        _require_scalar_loss(loss)
        if self._stale:
            # Only now, after the forward pass: gradients then lie in memory beside the
            # activations, as they do from the second micro-batch of an accumulated step on.
            self.optimizer.zero_grad(set_to_none=True)
            self._stale = False
        (loss if weight == 1.0 else loss * weight).backward()
        return loss.detach()  # type: ignore[no-any-return]

    def update(self) -> None:
        """Clip the gathered gradient, step the optimizer, move the weight average."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.optimizer.step()
        if self.average:
            with torch.no_grad():
                self._update_average(self.average, [p.detach() for p in self._parameters], 1)
        self._stale = True


def _require_scalar_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor):
        raise InvalidInputError(
            f"loss of type {type(loss).__name__}",
            "the loss must return a scalar tensor",
            "return the mean loss over the batch's examples",
        )
    if loss.numel() != 1:
        raise InvalidInputError(
            f"loss of shape {tuple(loss.shape)}",
            "the loss must be a scalar",
            "return the mean over the batch's examples",
        )
    if not loss.requires_grad:
        raise InvalidInputError(
            "loss without a gradient",
            "the loss must depend on the model's trainable parameters",
            "compute it from the model's output without detach() or no_grad()",
        )
