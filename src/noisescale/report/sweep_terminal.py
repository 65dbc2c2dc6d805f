"""A sweep as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from noisescale.records import (
    Calibration,
    Interval,
    PredictedCurve,
    SweepCurve,
    SweepResult,
    TunedSteps,
)
from noisescale.report import sweep_wording, terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def render_sweep(sweep: SweepResult, console: Console | None = None) -> None:
    """Print steps to target by batch size, the law, the regimes, and the other goals.

    Args:
        sweep: what ``sweep`` returned.
        console: where to print; standard output by default.
    """
    styled = terminal._styled
    parts: list[RenderableType] = [
        styled(sweep_wording.subject(sweep), "dim"),
        "",
        styled(sweep_wording.headline(sweep), _style(sweep)),
        "",
    ]
    if sweep.batch_sizes:
        parts += [_rows(sweep.batch_sizes, sweep.unit), ""]
    parts += [terminal._line(name, text) for name, text in sweep_wording.regime_lines(sweep)]
    parts += ["", styled("Goals, by first passage and by crossing for good", "bold")]
    parts += [_curves(sweep.curves, sweep.unit)]
    parts += terminal._warnings([wording.sentence(text) for text in sweep.warnings])
    parts.append(styled(sweep_wording.effort(sweep), "dim"))
    terminal._show(console, parts)


def calibration_parts(calibration: Calibration, unit: str) -> list[RenderableType]:
    """Lay out the tuned batch sizes of an advice, and what they predict.

    Args:
        calibration: what was tuned.
        unit: what batch sizes count.
    """
    heading = f"Tuned to {calibration.target} at {len(calibration.tuned)} batch sizes"
    parts: list[RenderableType] = [terminal._styled(heading, "bold")]
    if calibration.tuned:
        parts.append(_rows(calibration.tuned, unit))
    if calibration.predicted is not None:
        parts.append(terminal._styled("Steps predicted from them", "bold"))
        parts.append(_predicted(calibration.predicted, unit))
    parts.append(terminal._line("Tuning: ", wording.sentence(calibration.detail)))
    return [*parts, ""]


def _predicted(curve: PredictedCurve, unit: str) -> Table:
    table = terminal._grid(f"batch ({unit})", "steps", f"{100 * curve.level:.0f} % band")
    for row in curve.curve:
        size = f"{row.batch_size:,.0f}" + (" (tuned)" if row.measured else "")
        table.add_row(size, wording.number(row.steps), wording.interval(row.low, row.high))
    return table


def _style(sweep: SweepResult) -> str:
    law = sweep.tradeoff
    good = law is not None and law.critical_batch.point is not None
    return "bold green" if good else "bold yellow"


def _rows(rows: Sequence[TunedSteps], unit: str) -> Table:
    table = terminal._grid(
        f"batch ({unit})", "steps", "95 % interval", unit, "best lr", "runs", "outcome"
    )
    for row in rows:
        table.add_row(
            f"{row.batch_size:,}",
            wording.number(row.steps) if row.steps is not None else "-",
            wording.interval(row.low, row.high) if row.steps is not None else _bound(row),
            wording.number(row.steps * row.batch_size) if row.steps is not None else "-",
            wording.setting(row.best["lr"]) if "lr" in row.best else "-",
            f"{row.trials:,}",
            sweep_wording.tuning_outcome(row),
        )
    return table


def _bound(row: TunedSteps) -> str:
    return "-" if row.low is None else f"above {wording.number(row.low)}"


def _curves(curves: Sequence[SweepCurve], unit: str) -> Table:
    table = terminal._grid(
        "goal", "crossing", f"critical batch ({unit})", "interval", "fewest steps", f"fewest {unit}"
    )
    for curve in curves:
        law = curve.tradeoff
        none = Interval(point=None, low=None, high=None)
        critical = law.critical_batch if law else none
        table.add_row(
            terminal._styled(curve.target),
            "first" if curve.crossing == "first" else "for good",
            wording.number(critical.point) if critical.point is not None else "?",
            wording.interval(critical.low, critical.high) if law else "-",
            *(
                wording.number(value.point) if value.point is not None else "?"
                for value in ((law.steps_min, law.examples_min) if law else (none, none))
            ),
        )
    return table
