"""Hyper-parameters of many trials: one number where they agree, else one per trial."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from noisescale.records import Recipe
from noisescale.run.rates import rate_factor, warmup_length


class PerTrial:
    """One hyper-parameter of the trials of a stack.

    Attributes:
        values: one per trial, as Python has them.
        shared: the number, when all trials agree; else None.

    >>> PerTrial([0.9, 0.9]).shared, PerTrial([0.9, 0.5]).shared
    (0.9, None)
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = [float(value) for value in values]
        self.shared = self.values[0] if len(set(self.values)) == 1 else None
        self._tensor: Tensor | None = None

    def tensor(self, like: Tensor) -> Tensor:
        """Return the values as a tensor of shape (trials,), with ``like``'s type and place."""
        if self._tensor is None or self._tensor.dtype != like.dtype:
            self._tensor = torch.tensor(self.values, dtype=like.dtype, device=like.device)
        return self._tensor

    def any(self) -> bool:
        """Whether some trial's is not zero."""
        return any(self.values)


class Rates:
    """The learning rate of every trial at every step.

    Attributes:
        constant: whether no trial has warm-up or a schedule.

    Args:
        recipes: one per trial.
    """

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = recipes
        self._base = PerTrial([recipe.lr for recipe in recipes])
        self.constant = all(not warmup_length(r) and r.schedule is None for r in recipes)
        texts = {(r.warmup_steps, r.warmup_examples, r.batch_size, r.total_steps,
                  r.total_examples, repr(r.schedule)) for r in recipes}  # fmt: skip
        self._alike = len(texts) == 1

    def at(self, step: int) -> PerTrial:
        """Return the rates of the step after ``step`` steps."""
        if self.constant:
            return self._base
        factor = partial(rate_factor, step=step)
        if self._alike:
            alike = factor(self._recipes[0])
            return PerTrial([recipe.lr * alike for recipe in self._recipes])
        return PerTrial([recipe.lr * factor(recipe) for recipe in self._recipes])


def setting(recipes: Sequence[Recipe], name: str, default: float) -> PerTrial:
    """Return a recipe key of every trial; ``default`` where it is absent."""
    given = [getattr(recipe, name) for recipe in recipes]
    return PerTrial([default if value is None else value for value in given])
