"""Stacked optimizers: what takes the gradients of many trials and moves their weights.

A network hands over each gradient once per step, either as a product of two batches of matrices,
which some optimizers add straight onto what they keep, or as a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from noisescale.records import Recipe
from noisescale.run.trials.stacked.hyper import PerTrial, Rates, setting
from noisescale.run.trials.stacked.shelf import Shelf, columns


class Update(ABC):
    """Moves the weights of all trials of a stack, one step at a time.

    Attributes:
        scale: what every gradient is to be multiplied by before it is handed over, shape
            (trials,); None for 1.

    Args:
        weights: changed in place.
        recipes: one per trial.
    """

    def __init__(self, weights: Shelf, recipes: Sequence[Recipe]) -> None:
        self.weights = weights
        self.scale: Tensor | None = None
        self._recipes = list(recipes)
        self._rates = Rates(recipes)
        self._read(self._recipes)

    def begin(self, step: int) -> None:
        """Prepare the step after ``step`` steps."""
        self._now = self._rates.at(step)

    @abstractmethod
    def product(self, j: int, rows: slice, left: Tensor, right: Tensor) -> None:
        """Take the gradient of parameter ``j`` of some trials as ``left @ right``.

        Args:
            j: place of the parameter.
            rows: which trials.
            left: shape (groups, outputs, examples).
            right: shape (groups, examples, inputs); the trials' parameters, seen as (groups,
                outputs, inputs), must be what they are in memory.
        """

    @abstractmethod
    def columns(self, j: int, rows: slice, products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the gradient of matrix ``j`` of some trials as a sum of products.

        Args:
            j: place of the parameter.
            rows: which trials.
            products: each ``left`` of shape (trials x outputs, examples) and ``right`` of shape
                (examples, first columns); the gradient is zero in the columns after these.
        """

    @abstractmethod
    def value(self, j: int, gradient: Tensor) -> None:
        """Take the gradient of parameter ``j`` of all trials, shape (trials, ...)."""

    @abstractmethod
    def finish(self) -> None:
        """End the step: every gradient has been handed over."""

    def rows(self, rows: Tensor) -> Update:
        """Return the same optimizer for some of the trials."""
        new = type(self)(self.weights.rows(rows), [self._recipes[i] for i in rows.tolist()])
        for name, shelf in self._memory().items():
            setattr(new, name, shelf.rows(rows))
        return new

    def joined(self, other: Update) -> Update:
        """Return one optimizer for the trials of both, which are equally far."""
        weights = self.weights.joined(other.weights)
        new = type(self)(weights, self._recipes + other._recipes)
        theirs = other._memory()
        for name, shelf in self._memory().items():
            setattr(new, name, shelf.joined(theirs[name]))
        return new

    @abstractmethod
    def _read(self, recipes: Sequence[Recipe]) -> None:
        """Take the settings from the recipes and make the memory of past steps."""

    def _memory(self) -> dict[str, Shelf]:
        """Attributes that remember past steps."""
        shelves = {name: kept for name, kept in vars(self).items() if isinstance(kept, Shelf)}
        return {name: kept for name, kept in shelves.items() if name.startswith("past_")}


class FusedDescent(Update):
    """Plain SGD and momentum whose products go straight into the weights or the velocities.

    w <- (1 - lr wd) w - lr g;  with momentum u <- m u + lr (g + wd w), w <- w - u: torch's
    steps, with velocities that carry the rate, which must then be constant.
    """

    past_velocities: Shelf

    @staticmethod
    def fits(recipes: Sequence[Recipe]) -> bool:
        """Whether the recipes are such."""
        plain = all(r.optimizer == "sgd" and not r.nesterov and not r.dampening for r in recipes)
        moving = any(r.momentum for r in recipes)
        return plain and (not moving or Rates(recipes).constant)

    def begin(self, step: int) -> None:
        """Prepare the step: gradients are wanted with the rate in them."""
        super().begin(step)
        self.scale = self._now.tensor(self.weights.flat)

    def product(self, j: int, rows: slice, left: Tensor, right: Tensor) -> None:
        """See :meth:`Update.product`."""
        shape = (len(left), left.shape[1], right.shape[2])
        target, kept = self._target(j, rows)
        target = target.view(shape)
        if len(left) == 1:
            target[0].addmm_(left[0], right[0], beta=kept, alpha=self._alpha)
        else:
            target.baddbmm_(left, right, beta=kept, alpha=self._alpha)

    def columns(self, j: int, rows: slice, products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See :meth:`Update.columns`."""
        target, kept = self._target(j, rows)
        if kept != 1.0:
            target.mul_(kept)
        add_products(target, products, alpha=self._alpha)

    def value(self, j: int, gradient: Tensor) -> None:
        """See :meth:`Update.value`."""
        target, kept = self._target(j, slice(None))
        if kept != 1.0:
            target.mul_(kept)
        target.add_(gradient, alpha=self._alpha)

    def finish(self) -> None:
        """See :meth:`Update.finish`."""
        if self._moving:
            self.weights.flat.sub_(self.past_velocities.flat)

    def _read(self, recipes: Sequence[Recipe]) -> None:
        self._momentum = setting(recipes, "momentum", 0.0)
        self._decay = setting(recipes, "weight_decay", 0.0)
        self._moving = self._momentum.any()
        self._alpha = 1.0 if self._moving else -1.0
        if self._moving:
            self.past_velocities = self.weights.zeros()

    def _target(self, j: int, rows: slice) -> tuple[Tensor, float]:
        """Return what the gradient is added to, and what that is to be multiplied by before."""
        weights = self.weights.parts[j][rows]
        if not self._moving:
            return self._shrunk(weights, rows), 1.0
        velocities, shared = self.past_velocities.parts[j][rows], self._momentum.shared
        if shared is not None and not self._decay.any():
            return velocities, shared
        momentum = self._momentum.tensor(weights)[rows]
        velocities.mul_(columns(momentum, velocities))
        if self._decay.any():
            velocities.addcmul_(columns(self._pull(weights)[rows], weights), weights)
        return velocities, 1.0

    def _shrunk(self, weights: Tensor, rows: slice) -> Tensor:
        if self._decay.any():
            kept = 1 - self._pull(weights)[rows]
            weights.mul_(columns(kept, weights))
        return weights

    def _pull(self, weights: Tensor) -> Tensor:
        """Return lr wd of every trial, shape (trials,)."""
        assert self.scale is not None
        return self.scale * self._decay.tensor(weights)


class GradientUpdate(Update):
    """An optimizer that wants its gradients as tensors."""

    def product(self, j: int, rows: slice, left: Tensor, right: Tensor) -> None:
        """See :meth:`Update.product`."""
        shape = (len(left), left.shape[1], right.shape[2])
        torch.bmm(left, right, out=self._gradients.parts[j][rows].view(shape))

    def columns(self, j: int, rows: slice, products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See :meth:`Update.columns`."""
        gradient = self._gradients.parts[j][rows]
        add_products(gradient.zero_(), products, alpha=1.0)

    def value(self, j: int, gradient: Tensor) -> None:
        """See :meth:`Update.value`."""
        self._gradients.parts[j].copy_(gradient)

    def finish(self) -> None:
        """See :meth:`Update.finish`."""
        self._steps += 1
        self._move()

    def rows(self, rows: Tensor) -> Update:
        """See :meth:`Update.rows`."""
        new = super().rows(rows)
        assert isinstance(new, GradientUpdate)
        new._steps = self._steps
        return new

    def joined(self, other: Update) -> Update:
        """See :meth:`Update.joined`."""
        new = super().joined(other)
        assert isinstance(new, GradientUpdate)
        new._steps = self._steps
        return new

    @abstractmethod
    def _move(self) -> None:
        """Move the weights by ``_gradients``, which may be overwritten."""

    def _read(self, recipes: Sequence[Recipe]) -> None:  # noqa: ARG002
        self._steps = 0
        self._gradients = self.weights.zeros()

    def _pieces(self, *settings: PerTrial) -> list[tuple[int | None, list[float | Tensor]]]:
        """Return what to go through: everything at once where all trials agree, else by part.

        Each piece is its place (None for everything) and the settings in the form that
        multiplies it.
        """
        if all(each.shared is not None for each in settings):
            return [(None, [each.shared for each in settings if each.shared is not None])]
        like = self.weights.flat
        return [
            (j, [columns(each.tensor(like), part) for each in settings])
            for j, part in enumerate(self.weights.parts)
        ]


def piece(shelf: Shelf, j: int | None) -> Tensor:
    """Return part ``j`` of a shelf, or all of it."""
    return shelf.flat if j is None else shelf.parts[j]


def add_products(
    target: Tensor, products: Sequence[tuple[Tensor, Tensor]], *, alpha: float
) -> None:
    """Add products to the first columns of matrices that lie below each other."""
    flat = target.view(-1, target.shape[-1])
    for left, right in products:
        flat[:, : right.shape[1]].addmm_(left, right, alpha=alpha)
