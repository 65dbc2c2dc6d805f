"""How a trial's end becomes a record, whoever trained it."""

from __future__ import annotations

import torch

from noisescale.records.trial import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.trials.passages import Passages

_STOPPED_OTHERWISE = {
    "memory": TrialOutcome.INFEASIBLE_MEMORY,
    "crash": TrialOutcome.CRASHED,
    "interruption": TrialOutcome.INTERRUPTED,
}


def trial_result(
    plan: TrialPlan,
    passages: Passages,
    *,
    seconds: float,
    engine: str,
    steps: int | None = None,
    stopped_by: str = "",
    detail: str = "",
) -> TrialResult:
    """Return the record of a trial that has ended.

    Args:
        plan: its configuration.
        passages: its evaluations.
        seconds: wall time, or its share of a stack's.
        engine: ``stacked`` or ``alone``.
        steps: optimizer steps done; those at the last evaluation when None.
        stopped_by: what ended it when its evaluations did not.
        detail: one line on a crash.
    """
    why = stopped_by or passages.stopped_by
    return TrialResult(
        plan=plan,
        outcome=_STOPPED_OTHERWISE.get(why, passages.outcome),
        steps=max(0, passages.steps) if steps is None else steps,
        crossings=passages.crossings,
        stopped_by=why,
        seconds=seconds,
        engine=engine,
        detail=detail,
        evaluated_at=tuple(passages.evaluated_at),
        values={name: tuple(values) for name, values in passages.values.items()},
    )


def failure(problem: BaseException) -> tuple[str, str]:
    """Return ``memory`` or ``crash`` and one line on what happened."""
    words = " ".join(str(problem).split()) or "no message"
    short = isinstance(problem, MemoryError | torch.OutOfMemoryError)
    short = short or (isinstance(problem, RuntimeError) and "allocate memory" in words)
    return "memory" if short else "crash", f"{type(problem).__name__}: {words}"
