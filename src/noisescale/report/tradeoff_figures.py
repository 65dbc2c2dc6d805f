"""Time against compute: what each global batch costs, and the law fitted to runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from noisescale.records import Advice, AdviceRow, Tradeoff
from noisescale.report import wording
from noisescale.report.drawing import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    WIDE,
    drawing,
    legend,
    mark_size,
    plain_numbers,
    say_nothing,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 10.0  # assumed: times the best; what lies beyond is in the table, not in the figure


def tradeoff_figure(advice: Advice, *, width: float = WIDE) -> Figure:
    """Draw time to target against compute, one point per global batch size.

    Args:
        advice: what ``advise`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing(width, 4.2) as (figure, axes):
        axes.set_xlabel("compute to target: examples over the fewest possible (×)")
        axes.set_ylabel("time to target over the best (×)")
        rows = drawn_rows(advice)
        if not rows:
            say_nothing(axes, "no critical batch is known, so neither time nor compute is")
            return figure
        axes.set_xscale("log")
        axes.set_yscale("log")
        _draw_rows(axes, rows, advice.recommended)
        limit = f"accepted waste {wording.setting(float(advice.max_waste))}×"
        axes.axvline(advice.max_waste, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            limit,
            (advice.max_waste, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            color=VERMILION,
            fontsize=8.5,
        )
        _label_rows(axes, rows, advice.recommended, width=width)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        legend(axes, columns=1 if width < 6 else 3)
    return figure


def tradeoff_fit_figure(
    tradeoff: Tradeoff,
    *,
    batch_size: Sequence[float],
    steps: Sequence[float],
    censored: Sequence[bool] | None = None,
    width: float = WIDE,
) -> Figure:
    """Draw steps to target against batch size with the fitted law and its two limits.

    Args:
        tradeoff: the fit.
        batch_size: shape (rows,), in the fit's unit.
        steps: shape (rows,), steps to target.
        censored: shape (rows,), whether the target was not reached (steps are a lower bound).
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    reached = [not flag for flag in censored] if censored is not None else [True] * len(steps)
    with drawing(width, 3.9) as (figure, axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"global batch size ({tradeoff.unit})")
        axes.set_ylabel("steps to target")
        for flag, marker, label in ((True, "o", "run"), (False, "^", "not reached: at least")):
            points = [
                (b, s) for b, s, r in zip(batch_size, steps, reached, strict=True) if r is flag
            ]
            if points:
                face = BLUE if flag else "none"
                axes.plot(
                    *zip(*points, strict=True), marker, color=BLUE, mfc=face, ms=5, label=label
                )
        _draw_law(axes, tradeoff, min(batch_size), max(batch_size))
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        legend(axes, columns=2 if width < 6 else 4)
    return figure


def drawn_rows(advice: Advice) -> tuple[AdviceRow, ...]:
    """Return the rows that the trade-off figure draws: far ones would squeeze the others."""
    known = tuple(row for row in advice.table if row.relative_time is not None)
    near = tuple(row for row in known if max(_place(row)) <= _FAR or row == advice.recommended)
    return near if len(near) >= 3 else known


def _place(row: AdviceRow) -> tuple[float, float]:
    """Compute and time of a row that has both."""
    return (row.examples_ratio or math.nan, row.relative_time or math.nan)


def _draw_rows(axes: Axes, rows: Sequence[AdviceRow], chosen: AdviceRow | None) -> None:
    place = [_place(row) for row in rows]
    axes.plot(*zip(*place, strict=True), color=GRID, linewidth=1.5, zorder=1)
    for row in rows:
        colour = BLUE if row.allowed else MUTED
        _draw_bars(axes, row, GREEN if row == chosen else colour)
    for flag, label in ((True, "within the accepted waste at worst"), (False, "may waste more")):
        points = [p for p, row in zip(place, rows, strict=True) if row.allowed is flag]
        if points:
            face = BLUE if flag else PAPER
            edge = BLUE if flag else MUTED
            axes.plot(*zip(*points, strict=True), "o", mfc=face, mec=edge, ms=5.5, label=label)
    if chosen in rows:
        x, y = place[rows.index(chosen)]
        axes.plot(x, y, "o", color=GREEN, ms=11, mec=PAPER, zorder=6, label="recommended")


def _draw_bars(axes: Axes, row: AdviceRow, colour: str) -> None:
    """The wider band of compute and of time, each as a thin bar."""
    x, y = _place(row)
    left, right = row.examples_ratio_low, row.examples_ratio_high
    low, high = row.relative_time_low, row.relative_time_high
    if right is not None:
        axes.plot((left or 1.0, right), (y, y), color=colour, linewidth=1, alpha=0.55, zorder=2)
    if low is not None and high is not None:
        axes.plot((x, x), (low, high), color=colour, linewidth=1, alpha=0.55, zorder=2)


def _label_rows(
    axes: Axes, rows: Sequence[AdviceRow], chosen: AdviceRow | None, *, width: float
) -> None:
    """Write batch sizes beside the points, the recommended first, the rest where there is room."""
    placed: list[tuple[float, float]] = []
    space_x, space_y = 0.38 / width, 0.055
    inverse = axes.transAxes.inverted()
    for row in sorted(rows, key=lambda row: (row != chosen, row.global_batch_size)):
        x, y = _place(row)
        spot_x, spot_y = inverse.transform(axes.transData.transform((x, y)))
        if any(abs(spot_x - px) < space_x and abs(spot_y - py) < space_y for px, py in placed):
            continue
        placed.append((spot_x, spot_y))
        axes.annotate(
            f"{row.global_batch_size:,}",
            (x, y),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=11 if row == chosen else 8,
            fontweight="bold" if row == chosen else "normal",
            color=GREEN if row == chosen else INK if row.allowed else MUTED,
            zorder=7,
        )


def _draw_law(axes: Axes, tradeoff: Tradeoff, smallest: float, largest: float) -> None:
    """The fitted curve, and the fewest steps and fewest examples that it runs into."""
    steps, examples = tradeoff.steps_min.point, tradeoff.examples_min.point
    if steps is None or examples is None:
        return
    sizes = [smallest / 2 * (4 * largest / smallest) ** (i / 80) for i in range(81)]
    axes.plot(sizes, [steps + examples / b for b in sizes], color=VERMILION, lw=1.6, label="fit")
    low, high = axes.get_ylim()
    axes.axhline(steps, color=MUTED, lw=1, ls=":", label="fewest steps")
    axes.plot(
        sizes, [examples / b for b in sizes], color=MUTED, lw=1, ls="--", label="fewest examples"
    )
    axes.set_ylim(min(low, 0.8 * steps), high)
    critical = tradeoff.critical_batch
    if critical.low is not None and critical.high is not None:
        axes.axvspan(critical.low, critical.high, color=GREEN, alpha=0.15, lw=0)
    if critical.point is not None:
        mark_size(axes, critical.point, "critical batch", GREEN, 0.92)
