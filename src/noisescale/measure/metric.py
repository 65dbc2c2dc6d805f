"""How the size of a gradient is measured: the norm under which everything is squared."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from noisescale.measure.rules.parts import Part, square_sum
from noisescale.measure.squares import squared_norm


class Metric(abc.ABC):
    """A squared norm |g|^2, parameter by parameter, frozen while a step is measured."""

    name: ClassVar[str]
    """As records call it."""
    plain: ClassVar[bool] = False
    """Whether it is the sum of squares, for which rules may know a faster way."""

    @abc.abstractmethod
    def freeze(self) -> None:
        """Fix the norm for the step that begins; called once per measured step."""

    @abc.abstractmethod
    def square(self, index: int, gradient: Tensor) -> Tensor:
        """Return |gradient|^2 of a parameter, by its index in the inventory, shape ()."""

    @abc.abstractmethod
    def square_sum(self, index: int, parts: Sequence[Part], shape: torch.Size) -> Tensor:
        """Return the sum of |g_i|^2 over examples, shape ().

        Args:
            index: the parameter's, in the inventory.
            parts: the uses of the parameter by the same examples; g_i is their sum.
            shape: the parameter's.
        """


class Euclidean(Metric):
    """Plain squares."""

    name = "none"
    plain = True

    def freeze(self) -> None:
        """Nothing changes from step to step."""

    def square(self, index: int, gradient: Tensor) -> Tensor:
        """Return sum g^2."""
        del index
        return squared_norm(gradient)

    def square_sum(self, index: int, parts: Sequence[Part], shape: torch.Size) -> Tensor:
        """Return the sum over examples of sum g_i^2."""
        del index
        return square_sum(parts, shape)
