"""Any model whatever, stacked by ``torch.func``: one vectorised gradient of all trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from noisescale.run.trials.stacked.anatomy import Loss
from noisescale.run.trials.stacked.groups import Groups
from noisescale.run.trials.stacked.shelf import columns
from noisescale.run.trials.stacked.updates import Update


class _Called(nn.Module):
    """Lets a model be called by ``functional_call`` through the function that uses it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any, batch: Any) -> Any:
        """Return ``function(model, batch)``."""
        return function(self.model, batch)


class GeneralNetwork:
    """Many models of one class that see the same batch.

    Args:
        model: one of them, all of whose parameters are trained; used for its structure.
        loss: ``loss(model, batch)``.
        rebuild: puts a batch together from its tensors.
    """

    name = "vmap"
    joins_orders = False

    def __init__(self, model: nn.Module, loss: Loss, rebuild: Any) -> None:
        self._called = _Called(model)
        self._names = [f"model.{name}" for name, _ in model.named_parameters()]
        self._loss, self._rebuild = loss, rebuild
        self._slopes = vmap(grad(self._value), in_dims=(0, None), randomness="error")

    def step(self, update: Update, leaves: Sequence[Tensor], groups: Groups) -> None:  # noqa: ARG002
        """Hand the gradients of all trials, one group, to their update."""
        self._called.train()
        batch = self._rebuild([leaf[0] for leaf in leaves])
        gradients = self._slopes(tuple(update.weights.parts), batch)
        for j, gradient in enumerate(gradients):
            if update.scale is not None:
                gradient = gradient * columns(update.scale, gradient)
            update.value(j, gradient)

    def apply(self, function: Any, weights: Sequence[Tensor], batch: Any) -> Any:
        """Return ``function(model, batch)`` of every trial in evaluation mode, stacked.

        Args:
            function: returns tensors of equal shape for every trial.
            weights: per parameter, shape (trials, ...).
            batch: shared by all trials.
        """
        self._called.eval()

        def one(parts: tuple[Tensor, ...]) -> Any:
            return functional_call(self._called, self._named(parts), (function, batch))

        return vmap(one, randomness="error")(tuple(weights))

    def _value(self, parts: tuple[Tensor, ...], batch: Any) -> Tensor:
        value: Tensor = functional_call(self._called, self._named(parts), (self._loss, batch))
        return value.reshape(())

    def _named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, parts, strict=True))


def is_stackable(model: nn.Module) -> bool:
    """Whether a model has only parameters, all trained and none shared: nothing else to stack."""
    every = list(model.parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    alike = all(p.requires_grad and p.dtype == every[0].dtype for p in every)
    return alike and len(named) == len(every) and not any(True for _ in model.buffers())
