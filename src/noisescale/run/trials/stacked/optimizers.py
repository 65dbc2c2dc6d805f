"""Stacked optimizers that take gradients as tensors: SGD in general, Adam, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from noisescale.records import Recipe
from noisescale.run.trials.stacked.hyper import PerTrial, setting
from noisescale.run.trials.stacked.layerwise import StackedLAMB, StackedLARS
from noisescale.run.trials.stacked.shelf import Shelf
from noisescale.run.trials.stacked.updates import FusedDescent, GradientUpdate, Update, piece

ADAM_BETAS = (0.9, 0.999)
"""torch's."""

ADAM_EPS = 1e-8
"""torch's."""


class Descent(GradientUpdate):
    """SGD with momentum, dampening, Nesterov's step and coupled decay, as torch has them."""

    past_buffers: Shelf

    def _read(self, recipes: Sequence[Recipe]) -> None:
        super()._read(recipes)
        self._decay = setting(recipes, "weight_decay", 0.0)
        self._momentum = setting(recipes, "momentum", 0.0)
        self._dampening = setting(recipes, "dampening", 0.0)
        self._nesterov = bool(recipes[0].nesterov)
        self._moving = self._momentum.any()
        if self._moving:
            self.past_buffers = self.weights.zeros()

    def _move(self) -> None:
        _add_decay(self, self._decay)
        if self._moving:
            for j, (momentum, dampening) in self._pieces(self._momentum, self._dampening):
                self._gather(j, momentum, dampening)
        _descend(self)

    def _gather(self, j: int | None, momentum: float | Tensor, dampening: float | Tensor) -> None:
        gradient, buffer = piece(self._gradients, j), piece(self.past_buffers, j)
        if self._steps == 1:  # torch's first buffer is the gradient, without dampening
            buffer.copy_(gradient)
        else:
            buffer.mul_(momentum)
            buffer.add_(gradient if not self._dampening.any() else gradient * (1 - dampening))
        if self._nesterov:
            gradient.add_(buffer * momentum)
        else:
            gradient.copy_(buffer)


class Adam(GradientUpdate):
    """Adam; with ``decoupled`` AdamW. Bias corrections and the place of eps are torch's."""

    past_means: Shelf
    past_squares: Shelf
    decoupled = False

    def _read(self, recipes: Sequence[Recipe]) -> None:
        super()._read(recipes)
        betas = [recipe.betas or ADAM_BETAS for recipe in recipes]
        self._beta1 = PerTrial([first for first, _ in betas])
        self._beta2 = PerTrial([second for _, second in betas])
        self._eps = setting(recipes, "eps", ADAM_EPS)
        # torch's AdamW decays by default, its Adam does not
        self._decay = setting(recipes, "weight_decay", 0.01 if self.decoupled else 0.0)
        self.past_means, self.past_squares = self.weights.zeros(), self.weights.zeros()

    def _move(self) -> None:
        if self.decoupled:
            _shrink(self, self._decay)
        else:
            _add_decay(self, self._decay)
        t = self._steps
        # p -= lr/c1 m / (sqrt(v)/sqrt(c2) + eps) = lr sqrt(c2)/c1 m / (sqrt(v) + eps sqrt(c2))
        roots = [math.sqrt(1 - beta**t) for beta in self._beta2.values]
        eps = PerTrial([e * root for e, root in zip(self._eps.values, roots, strict=True)])
        for j, (beta1, beta2, small) in self._pieces(self._beta1, self._beta2, eps):
            mean, square = piece(self.past_means, j), piece(self.past_squares, j)
            gradient = piece(self._gradients, j)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2)
            if isinstance(beta2, Tensor):
                square.add_(gradient.square_().mul_(1 - beta2))
            else:
                square.addcmul_(gradient, gradient, value=1 - beta2)
            torch.sqrt(square, out=gradient)
            torch.div(mean, gradient.add_(small), out=gradient)
        corrections = zip(roots, self._beta1.values, strict=True)
        _descend(self, [root / (1 - beta**t) for root, beta in corrections])


class AdamW(Adam):
    """AdamW: the decay acts on the weights, by the rate."""

    decoupled = True


def _add_decay(update: GradientUpdate, decay: PerTrial) -> None:
    if not decay.any():
        return
    for j, (amount,) in update._pieces(decay):
        gradient, weights = piece(update._gradients, j), piece(update.weights, j)
        if isinstance(amount, Tensor):
            gradient.addcmul_(weights, amount)
        else:
            gradient.add_(weights, alpha=amount)


def _shrink(update: GradientUpdate, decay: PerTrial) -> None:
    if not decay.any():
        return
    pairs = zip(update._now.values, decay.values, strict=True)
    for j, (kept,) in update._pieces(PerTrial([1 - lr * amount for lr, amount in pairs])):
        piece(update.weights, j).mul_(kept)


def _descend(update: GradientUpdate, factors: Sequence[float] | None = None) -> None:
    """Subtract the gradients times the rates, and times ``factors``, from the weights."""
    rates = update._now.values
    if factors is not None:
        rates = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    for j, (rate,) in update._pieces(PerTrial(rates)):
        weights, gradient = piece(update.weights, j), piece(update._gradients, j)
        if isinstance(rate, Tensor):
            weights.addcmul_(gradient, rate, value=-1)
        else:
            weights.add_(gradient, alpha=-rate)


UPDATES: dict[str, type[Update]] = {
    "sgd": Descent,
    "adam": Adam,
    "adamw": AdamW,
    "lars": StackedLARS,
    "lamb": StackedLAMB,
}


def update_kind(recipe: Recipe) -> tuple[object, ...]:
    """Return what must be equal for two trials to be moved by one update."""
    return (recipe.optimizer, bool(recipe.nesterov), bool(recipe.momentum))


def make_update(weights: Shelf, recipes: Sequence[Recipe], *, fused: bool = True) -> Update:
    """Return the update of trials of one :func:`update_kind`.

    Args:
        weights: moved in place.
        recipes: one per trial.
        fused: let products go straight into the weights where the optimizer permits.
    """
    if fused and FusedDescent.fits(recipes):
        return FusedDescent(weights, recipes)
    return UPDATES[recipes[0].optimizer](weights, recipes)
