"""Where a trial passes its targets, from what its evaluations say; pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping

from noisescale.records import Target
from noisescale.records.trial import Crossing, TrialOutcome, TrialPlan

DIVERGED_RISE = 4.0
"""A trial has diverged when its smoothed evaluation loss lies this many times the initial loss's
size above the initial loss. (assumed: as in the short runs of ``advise``)"""

SMOOTHING = 0.2
"""Weight of the newest evaluation in the smoothed loss. (assumed)"""

SUSTAINED_GRACE = 1.5
"""A trial that passed every target goes on at most so many times as far in order to learn where
it passes for good. (assumed: a rate that flickers longer is stopped, its crossing unknown)"""


class Passage:
    """One target's bookkeeping.

    Args:
        target: what is to be passed.
        hold: evaluations in a row that must pass for a sustained crossing.

    >>> passage = Passage(Target.parse("validation_error<0.1"), hold=2)
    >>> for step, error in [(0, 0.9), (10, 0.2), (20, 0.05), (30, 0.04)]:
    ...     passage.note(step, error)
    >>> round(passage.first, 3), round(passage.sustained, 3), passage.closest
    (16.667, 16.667, 0.04)
    """

    def __init__(self, target: Target, *, hold: int) -> None:
        self.target = target
        self.name = target.name
        self.first: float | None = None
        self.sustained: float | None = None
        self.closest: float | None = None
        self._hold = max(1, hold)
        self._in_a_row = 0
        self._run_began = 0.0
        self._last: tuple[int, float] | None = None

    def note(self, step: int, value: float) -> None:
        """Enter an evaluation; steps must ascend."""
        if math.isfinite(value):
            self.closest = value if self.closest is None else self._better(value, self.closest)
        if self.target.reached(value):
            if self._in_a_row == 0:
                self._run_began = self._crossed(step, value)
            self._in_a_row += 1
            if self.first is None:
                self.first = self._run_began
            if self.sustained is None and self._in_a_row >= self._hold:
                self.sustained = self._run_began
        else:
            self._in_a_row = 0
        self._last = (step, value)

    def crossing(self, text: str) -> Crossing:
        """Return the record, under the target's spelling in the plan."""
        return Crossing(
            target=text, first=self.first, sustained=self.sustained, closest=self.closest
        )

    def _better(self, one: float, other: float) -> float:
        return min(one, other) if self.target.comparison == "<" else max(one, other)

    def _crossed(self, step: int, value: float) -> float:
        """Return where the line between the last evaluation and this one passes the target."""
        if self._last is None or not math.isfinite(self._last[1]) or self._last[1] == value:
            return float(step)
        before, earlier = self._last
        return before + (step - before) * (earlier - self.target.value) / (earlier - value)


class Passages:
    """All of a trial's evaluations, and whether it has ended.

    It is evaluated at step 0, then whenever ``next_step`` is reached: after
    max(1, floor(steps x evaluate_share)) further steps, and at the last step of the budget.

    Attributes:
        next_step: steps done at which the trial is to be evaluated next.
        steps: steps done at the last evaluation; -1 before the first.
        stopped_by: why it ended; empty while it goes on.
        evaluated_at: steps of the evaluations, where curves are kept.
        values: by quantity, what they said.

    Args:
        plan: the trial.
        keep_curves: remember every value.
    """

    def __init__(self, plan: TrialPlan, *, keep_curves: bool = False) -> None:
        self.next_step = 0
        self.steps = -1
        self.stopped_by = ""
        self._plan = plan
        self._passages = [Passage(Target.parse(text), hold=plan.hold) for text in plan.targets]
        self._keep = keep_curves
        self.evaluated_at: list[int] = []
        self.values: dict[str, list[float | None]] = {}
        self._start = math.inf
        self._smoothed = math.inf

    def afresh(self) -> Passages:
        """Return the same trial's bookkeeping before its first evaluation."""
        return Passages(self._plan, keep_curves=self._keep)

    @property
    def goes_on(self) -> bool:
        """Whether the trial is to be trained further."""
        return not self.stopped_by

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """One per target of the plan, in its order."""
        pairs = zip(self._passages, self._plan.targets, strict=True)
        return tuple(passage.crossing(text) for passage, text in pairs)

    @property
    def outcome(self) -> TrialOutcome:
        """``reached`` when every target has a first passage, even if it diverged later."""
        if self._passages and all(passage.first is not None for passage in self._passages):
            return TrialOutcome.REACHED
        if self.stopped_by == "divergence":
            return TrialOutcome.DIVERGED
        return TrialOutcome.NOT_REACHED

    def note(self, step: int, values: Mapping[str, float], loss: float) -> None:
        """Enter one evaluation and decide whether the trial goes on.

        Args:
            step: optimizer steps done.
            values: by quantity (``validation_error``), NaN where not finite.
            loss: mean loss over the evaluation data, for divergence.
        """
        self.steps = step
        for passage in self._passages:
            passage.note(step, values[passage.name])
        if self._keep:
            self.evaluated_at.append(step)
            for name, value in values.items():
                kept = value if math.isfinite(value) else None
                self.values.setdefault(name, []).append(kept)
        self.stopped_by = self._ended(step, values, loss)
        share = max(1, math.floor(step * self._plan.evaluate_share))
        self.next_step = min(step + share, self._plan.max_steps)

    def _ended(self, step: int, values: Mapping[str, float], loss: float) -> str:
        if self._all_known(step):
            return "targets"
        if self._diverged(loss) or not all(map(math.isfinite, values.values())):
            return "divergence"
        return "budget" if step >= self._plan.max_steps else ""

    def _all_known(self, step: int) -> bool:
        """Whether every target was passed, for good or long enough ago."""
        firsts = []
        for passage in self._passages:
            if passage.first is None:
                return False
            firsts.append(passage.first)
        if not firsts:
            return False
        for_good = all(passage.sustained is not None for passage in self._passages)
        return for_good or step > max(SUSTAINED_GRACE * max(firsts), 10 * self._plan.hold)

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if math.isinf(self._smoothed):
            self._start = self._smoothed = loss
            return False
        self._smoothed += SMOOTHING * (loss - self._smoothed)
        return self._smoothed > self._start + DIVERGED_RISE * abs(self._start)


def quantities(plan: TrialPlan) -> tuple[str, ...]:
    """Return the names of what a plan's targets are about, each once, in their order."""
    return tuple(dict.fromkeys(Target.parse(text).name for text in plan.targets))
