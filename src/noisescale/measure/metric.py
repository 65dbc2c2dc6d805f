"""How the size of a gradient is measured: the norm under which everything is squared."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from noisescale.measure.drawn import Draw
from noisescale.measure.rules.parts import Part, square_sum
from noisescale.measure.rules.registry import Call
from noisescale.measure.squares import squared_norm


class Metric(abc.ABC):
    """A squared norm |g|^2, parameter by parameter, frozen while a step is measured."""

    name: str
    """As records call it."""
    refusal: str = ""
    """Why the step that runs has no norm; empty while it has one."""
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
            parts: the uses of the parameter by the same examples; g_i is their sum. Where
                :meth:`sample` drew some, of those alone, scaled: the sum stands for all.
            shape: the parameter's.
        """

    def sample(self, calls: Sequence[Call]) -> Draw | None:
        """Draw the examples whose squares the next sums are made of; None for all.

        Args:
            calls: the calls of layers that the sums are made of, complete.
        """
        del calls
        return None

    def settle(self, *, effective: float, factor: float) -> None:
        """Take note that the step was measured.

        Args:
            effective: its examples, see :class:`~noisescale.measure.gradients.StepNorms`.
            factor: what turns its sums of squares into means over examples.
        """
        del effective, factor

    def notes(self) -> list[str]:
        """Say what a reader of the record must know of the norm."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what must outlive the process, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        del state


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
