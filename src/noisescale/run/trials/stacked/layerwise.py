"""Stacked LARS and LAMB: a trust ratio per trial and parameter tensor.

What they compute is defined by :class:`noisescale.train.LARS` and :class:`noisescale.train.LAMB`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from noisescale.records import Recipe
from noisescale.run.trials.stacked.hyper import PerTrial, setting
from noisescale.run.trials.stacked.shelf import Shelf, columns
from noisescale.run.trials.stacked.updates import GradientUpdate

LARS_MOMENTUM = 0.9
LARS_TRUST = 0.001
LAMB_BETAS = (0.9, 0.999)
LAMB_EPS = 1e-6
LAMB_DECAY = 0.01
"""Defaults of the optimizers in ``train``. (paper)"""


def excluded(part: Tensor) -> bool:
    """Whether a parameter, stacked to (trials, ...), takes neither decay nor ratio."""
    return part.dim() <= 2


class StackedLARS(GradientUpdate):
    """LARS, its ratios per trial."""

    past_velocities: Shelf

    def _read(self, recipes: Sequence[Recipe]) -> None:
        super()._read(recipes)
        self._momentum = setting(recipes, "momentum", LARS_MOMENTUM)
        self._decay = setting(recipes, "weight_decay", 0.0)
        self._trust = setting(recipes, "trust_coefficient", LARS_TRUST)
        self._nesterov = bool(recipes[0].nesterov)
        if self._momentum.any():
            self.past_velocities = self.weights.zeros()

    def _move(self) -> None:
        like = self.weights.flat
        rates = self._now.tensor(like)
        momentum = self._momentum.tensor(like)
        for j, weights in enumerate(self.weights.parts):
            move = self._direction(weights, self._gradients.parts[j])
            if self._momentum.any():
                share, velocities = columns(momentum, weights), self.past_velocities.parts[j]
                velocities.mul_(share).add_(move)
                move = move.addcmul_(velocities, share) if self._nesterov else velocities
            weights.addcmul_(move, columns(rates, weights), value=-1)

    def _direction(self, weights: Tensor, gradient: Tensor) -> Tensor:
        if excluded(weights):
            return gradient
        decay = self._decay.tensor(weights)
        own, theirs = norms(weights), norms(gradient)
        wanted = self._trust.tensor(weights) * own / (theirs + decay * own)
        ratios = torch.where((own > 0) & (theirs > 0), wanted, 1.0)
        if self._decay.any():
            gradient.addcmul_(weights, columns(decay, weights))
        return gradient.mul_(columns(ratios, gradient))


class StackedLAMB(GradientUpdate):
    """LAMB, its ratios per trial."""

    past_means: Shelf
    past_squares: Shelf

    def _read(self, recipes: Sequence[Recipe]) -> None:
        super()._read(recipes)
        betas = [recipe.betas or LAMB_BETAS for recipe in recipes]
        self._beta1 = PerTrial([first for first, _ in betas])
        self._beta2 = PerTrial([second for _, second in betas])
        self._eps = setting(recipes, "eps", LAMB_EPS)
        self._decay = setting(recipes, "weight_decay", LAMB_DECAY)
        self.past_means, self.past_squares = self.weights.zeros(), self.weights.zeros()

    def _move(self) -> None:
        like, t = self.weights.flat, self._steps
        rates = self._now.tensor(like)
        kept1, kept2 = self._beta1.tensor(like), self._beta2.tensor(like)
        roots = [math.sqrt(1 - beta**t) for beta in self._beta2.values]
        small = PerTrial([e * r for e, r in zip(self._eps.values, roots, strict=True)])
        pairs = zip(roots, self._beta1.values, strict=True)
        scale = PerTrial([root / (1 - beta**t) for root, beta in pairs]).tensor(like)
        for j, weights in enumerate(self.weights.parts):
            gradient = self._gradients.parts[j]
            mean, square = self.past_means.parts[j], self.past_squares.parts[j]
            mean.lerp_(gradient, 1 - columns(kept1, mean))
            square.mul_(columns(kept2, square))
            square.add_(gradient.square_().mul_(1 - columns(kept2, square)))
            torch.sqrt(square, out=gradient)
            gradient.add_(columns(small.tensor(like), gradient))
            torch.div(mean, gradient, out=gradient).mul_(columns(scale, gradient))
            ratios = self._ratios(weights, gradient)
            weights.addcmul_(gradient, columns(rates * ratios, weights), value=-1)

    def _ratios(self, weights: Tensor, move: Tensor) -> Tensor:
        """Add the decay to the move and return the trust ratios."""
        if excluded(weights):
            return torch.ones_like(weights[:, 0] if weights.dim() > 1 else weights)
        if self._decay.any():
            move.addcmul_(weights, columns(self._decay.tensor(weights), weights))
        own, theirs = norms(weights), norms(move)
        return torch.where((own > 0) & (theirs > 0), own / theirs, 1.0)


def norms(part: Tensor) -> Tensor:
    """Return the Euclidean norm of each trial's tensor, shape (trials,)."""
    lengths: Tensor = torch.linalg.vector_norm(part.flatten(1), dim=1)
    return lengths
