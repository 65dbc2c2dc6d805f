"""Trials' evaluations and a goal to rows: when did each trial pass it?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import TrialCurve, TrialOutcome, TrialRow

_PATTERN = re.compile(r"^\s*(.+?)\s*([<>])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$")


@dataclass(frozen=True)
class Goal:
    """A quantity as a file names it, and the value to pass, strictly."""

    name: str
    comparison: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME<VALUE`` or ``NAME>VALUE``, the name as the file has it.

        Raises:
            InvalidInputError: the text is not a goal.

        >>> Goal.parse("val/classification_error < 0.01").value
        0.01
        """
        match = _PATTERN.match(text)
        if match is None:
            raise InvalidInputError(
                f"goal {text!r}",
                "NAME<VALUE or NAME>VALUE is required",
                'write for example "val/classification_error<0.01"',
            )
        return cls(match[1], match[2], float(match[3]))

    def passed(self, value: float) -> bool:
        """Whether a value passes the goal (NaN never does)."""
        return value < self.value if self.comparison == "<" else value > self.value

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of the finite values; None without any."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        return min(finite) if self.comparison == "<" else max(finite)


def rows_at_goal(
    curves: Sequence[TrialCurve],
    goal: str,
    *,
    max_steps: int | None = None,
    max_examples: float | None = None,
    interpolate: bool = False,
) -> list[TrialRow]:
    """Say of each trial when it first passed a goal.

    Args:
        curves: trials with their evaluations.
        goal: ``NAME<VALUE`` or ``NAME>VALUE``, the name as the curves have it.
        max_steps: evaluations after so many steps are not looked at.
        max_examples: nor those after so many examples (steps times batch size).
        interpolate: whether the passage is placed between two evaluations; published figures
            take the evaluation itself.

    Returns:
        A row for each trial. A trial that diverged counts as diverged even where it had passed
        the goal before, as the published analysis has it.

    Raises:
        InvalidInputError: the goal cannot be read, or no trial has its quantity.

    Source: Shallue et al. 2019, ``measurement_utils.compute_steps_to_result`` (first evaluation
    strictly beyond the threshold) and its step and example budgets.
    """
    wanted = Goal.parse(goal)
    known = sorted({name for curve in curves for name in curve.metrics})
    if wanted.name not in known:
        raise InvalidInputError(
            f"goal {goal!r}", f"no trial has {wanted.name!r}", nearest(wanted.name, known)
        )
    return [
        _row(curve, wanted, _budget(curve.batch_size, max_steps, max_examples), interpolate)
        for curve in curves
    ]


def _budget(batch_size: int, max_steps: int | None, max_examples: float | None) -> float:
    limits = [math.inf if max_steps is None else max_steps]
    limits.append(math.inf if max_examples is None else max_examples / batch_size)
    return min(limits)


def _row(curve: TrialCurve, goal: Goal, budget: float, interpolate: bool) -> TrialRow:
    series = curve.metrics.get(goal.name, ())
    pairs = [
        (float(step), math.nan if value is None else value)
        for step, value in zip(curve.evaluated_at, series, strict=False)
        if step <= budget
    ]
    at = None if curve.outcome is TrialOutcome.DIVERGED else _first(pairs, goal, interpolate)
    outcome = curve.outcome
    if at is not None:
        outcome = TrialOutcome.REACHED
    elif outcome is TrialOutcome.REACHED:
        outcome = TrialOutcome.NOT_REACHED
    return TrialRow(
        batch_size=curve.batch_size,
        values=curve.values,
        seed=curve.seed,
        outcome=outcome,
        steps=min(float(curve.steps), budget) if at is None else at,
        closest=goal.best(value for _, value in pairs),
    )


def _first(pairs: Sequence[tuple[float, float]], goal: Goal, interpolate: bool) -> float | None:
    before: tuple[float, float] | None = None
    for step, value in pairs:
        if goal.passed(value):
            if not interpolate or before is None or not math.isfinite(before[1]):
                return step
            share = (before[1] - goal.value) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None
