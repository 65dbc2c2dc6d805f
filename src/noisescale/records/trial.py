"""One training of a sweep: what it is to do, and what it did."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
from dataclasses import dataclass, field

from noisescale.records.recipe import Recipe
from noisescale.records.serial import Record


class TrialOutcome(enum.StrEnum):
    """How a trial ended; none of them is thrown away."""

    REACHED = "reached"
    """Every target was passed."""
    NOT_REACHED = "not_reached"
    """The budget was used up, or a race stopped it: its steps are a lower bound (censored)."""
    DIVERGED = "diverged"
    """The loss became far larger than at the start, or not finite."""
    INFEASIBLE_MEMORY = "infeasible_memory"
    """One step did not fit in memory."""
    CRASHED = "crashed"
    """The user's code raised, or its process died."""
    INTERRUPTED = "interrupted"
    """It was stopped from outside before it could end; it is run again."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan(Record):
    """The whole configuration of one training; its hash is the trial's name.

    Attributes:
        workload: the workload's name and fingerprint.
        recipe: optimizer, rate and all other hyper-parameters, batch size included.
        seed: of the initial weights and of what the model draws.
        order_seed: of the order of the data; trials that share it see the same batches.
        targets: goals, each as :class:`~noisescale.Target` spells it.
        max_steps: budget in optimizer steps.
        evaluate_share: steps between evaluations over the steps done (at least one step), so
            that first passage is resolved alike at every batch size.
        hold: evaluations in a row that must pass a target for a sustained crossing.
    """

    workload: str
    recipe: Recipe
    seed: int
    order_seed: int
    targets: tuple[str, ...]
    max_steps: int
    evaluate_share: float = 0.04
    hold: int = 3

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything above that is set: 16 hexadecimal digits."""
        # What is absent is left out: a key that recipes gain later renames no trial.
        values = self.to_dict()
        values["recipe"] = {k: v for k, v in values["recipe"].items() if v is not None}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Crossing(Record):
    """Where a trial passed one target.

    Attributes:
        target: as :class:`~noisescale.Target` spells it.
        first: steps at the first passage, interpolated between evaluations; None if never.
        sustained: steps at the first passage from which ``hold`` evaluations in a row passed;
            None if never, or if the trial ended too early to tell.
        closest: best value of the quantity at any evaluation; None if none was finite.
    """

    target: str
    first: float | None
    sustained: float | None
    closest: float | None


@dataclass(frozen=True, kw_only=True)
class TrialResult(Record):
    """What one training did.

    Attributes:
        plan: its configuration.
        outcome: how it ended.
        steps: optimizer steps done.
        crossings: one per target of the plan, in its order.
        stopped_by: ``targets``, ``budget``, ``race``, ``divergence``, ``memory``, ``crash`` or
            ``interruption``.
        seconds: wall time that it took; its share of a stack's time when trained in a stack.
        engine: ``stacked`` or ``alone``.
        detail: one line on a crash; empty otherwise.
        evaluated_at: steps done at each evaluation; empty where curves are not kept.
        values: by quantity, its value at each evaluation, None where not finite.
    """

    plan: TrialPlan
    outcome: TrialOutcome
    steps: int
    crossings: tuple[Crossing, ...]
    stopped_by: str
    seconds: float
    engine: str = "alone"
    detail: str = ""
    evaluated_at: tuple[int, ...] = ()
    values: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
