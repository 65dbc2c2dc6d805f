"""What a sweep's figures are called, on a terminal and on the page."""

from __future__ import annotations

from noisescale.records import Interval, Outcome, SweepResult, TunedSteps, TuningOutcome
from noisescale.report import wording


def subject(sweep: SweepResult) -> str:
    """Say what was swept."""
    goals = ", ".join(sweep.targets)
    return f"noisescale {sweep.version} · {sweep.workload}: {sweep.optimizer}, to {goals}"


def headline(sweep: SweepResult) -> str:
    """Say the critical batch, or why there is none."""
    law = sweep.tradeoff
    if law is None:
        return "No steps law: tuned steps at two or more batch sizes are required"
    critical = law.critical_batch
    if law.outcome is Outcome.TOO_FEW_STEPS:
        # Here it is batch sizes or repeats that are too few.
        return f"Critical batch not known: {law.detail or wording.outcome(law.outcome)}"
    if critical.point is None:
        return f"Critical batch {ends(critical, law.unit)}: {wording.outcome(law.outcome)}"
    return f"Critical batch {ends(critical, law.unit)} for {sweep.targets[0]}"


def ends(value: Interval, unit: str) -> str:
    """Write a value with its interval."""
    if value.point is None:
        # An open lower end is 0 in the record.
        return wording.interval(value.low or None, value.high, unit).strip()
    return f"{wording.quantity(value.point, unit)} ({wording.interval(value.low, value.high)})"


def regime_lines(sweep: SweepResult) -> list[tuple[str, str]]:
    """Name and value of what the three regimes and the rate law say."""
    lines: list[tuple[str, str]] = []
    regimes = sweep.regimes
    if regimes is not None:
        named = (
            ("Perfect scaling up to: ", regimes.perfect_end, sweep.unit),
            ("Useful scaling up to: ", regimes.useful_end, sweep.unit),
            ("Plateau: ", regimes.plateau, "steps"),
        )
        lines += [(name, ends(value, unit)) for name, value, unit in named if _known(value)]
        slope = regimes.small_slope
        if slope.point is not None:
            span = f"{wording.number(slope.low)} to {wording.number(slope.high)}"
            text = f"{wording.number(slope.point)} ({span}; -1 is perfect)"
            lines.append(("Slope at small batch: ", text))
        if regimes.detail:
            lines.append(("Regimes: ", wording.sentence(regimes.detail)))
    rate = sweep.curves[0].rate_law if sweep.curves else None
    if rate is not None and rate.exponent.point is not None and _known(rate.exponent, ends=True):
        low, high = rate.exponent.low, rate.exponent.high
        text = f"batch to the power {wording.number(rate.exponent.point)}"
        text += f" ({wording.interval(low, high)}) at small batch"
        if rate.saturation.point is not None:
            text += f", saturating at {ends(rate.saturation, sweep.unit)}"
        lines.append(("Best rate: ", text))
    return lines


def _known(value: Interval, *, ends: bool = False) -> bool:
    """Whether a value says anything; with ``ends``, whether its interval does."""
    bounded = value.low is not None or value.high is not None
    return bounded or (value.point is not None and not ends)


_OUTCOMES = {
    TuningOutcome.REACHED: "reached",
    TuningOutcome.EDGE: "best on an edge",
    TuningOutcome.NOT_REACHED: "not reached",
    TuningOutcome.DIVERGED: "all diverged",
    TuningOutcome.NOTHING_RAN: "nothing ran",
}


def tuning_outcome(row: TunedSteps) -> str:
    """Say how the tuning at a batch size ended, and how close it came where it failed."""
    words = _OUTCOMES[row.outcome]
    if row.outcome is TuningOutcome.NOT_REACHED and row.closest is not None:
        return f"{words} ({wording.number(row.closest)})"
    return words


def effort(sweep: SweepResult) -> str:
    """Say how many trials there are, how they ended and how long they took."""
    ends_ = ", ".join(
        f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(sweep.outcomes.items())
    )
    took = f" in {wording.duration(sweep.seconds)}" if sweep.seconds else ""
    where = f"; kept in {sweep.store}" if sweep.store else ""
    return f"{wording.count(sweep.trials, 'trials')}{took}: {ends_ or 'none'}{where}."
