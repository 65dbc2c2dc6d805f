"""A sweep drawn: steps to target, the best rate, and settings laid over each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from noisescale.records import Regimes, SettingSteps, SweepCurve, SweepResult, TunedSteps
from noisescale.report.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
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

_CURVE = 81  # points of a drawn line
_ENDS = ("#0072b2", "#d55e00")  # colours of the smallest and the largest batch size


def steps_figure(sweep: SweepResult, *, width: float = WIDE) -> Figure:
    """Draw steps to target against batch size, the steps law and the three regimes.

    Args:
        sweep: what ``sweep`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing(width, 4.2) as (figure, axes):
        axes.set_xlabel(f"global batch size ({sweep.unit})")
        axes.set_ylabel(f"steps to {sweep.targets[0]}")
        known = [row for row in sweep.batch_sizes if row.steps is not None]
        if not known:
            say_nothing(axes, "no batch size reached the target")
            return figure
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _regimes(axes, sweep.regimes, known)
        _tuned(axes, known)
        _law(axes, sweep, known)
        _bounds(axes, sweep.batch_sizes)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        legend(axes, columns=2 if width < 6 else 4)
    return figure


def rate_figure(sweep: SweepResult, *, width: float = WIDE) -> Figure:
    """Draw the best rate against batch size, and the law fitted to it.

    Args:
        sweep: what ``sweep`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing(width, 3.4) as (figure, axes):
        axes.set_xlabel(f"global batch size ({sweep.unit})")
        axes.set_ylabel("best learning rate")
        known = [(row, float(row.best["lr"])) for row in sweep.batch_sizes if "lr" in row.best]
        if not known:
            say_nothing(axes, "no batch size reached the target")
            return figure
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = [row.batch_size for row, _ in known]
        axes.plot(sizes, [lr for _, lr in known], "o", color=BLUE, ms=5.5, label="best tried")
        between = [(row.batch_size, row.optimum["lr"]) for row, _ in known if "lr" in row.optimum]
        if between:
            style: dict[str, Any] = {"mfc": PAPER, "color": BLUE, "ms": 6, "zorder": 3}
            axes.plot(*zip(*between, strict=True), "D", label="between the tried", **style)
        _rate_law(axes, sweep.curves[0], sizes)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        legend(axes, columns=2 if width < 6 else 4)
    return figure


def collapse_figure(sweep: SweepResult, *, width: float = WIDE) -> Figure:
    """Draw steps of every setting against its rate, and below against its temperature.

    Each batch size's steps stand over its own fewest. Where the temperature is what counts,
    the curves of different batch sizes lie over each other in the lower axes.

    Args:
        sweep: what ``sweep`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing(width, 5.6) as (figure, upper):
        groups = _groups(sweep)
        if not groups:
            say_nothing(upper, "no setting reached the target")
            return figure
        figure.delaxes(upper)
        upper, lower = figure.subplots(2, 1)
        for axes, name, place in (
            (upper, "learning rate", "lr"),
            (lower, _temperature_name(sweep), "temperature"),
        ):
            _overlaid(axes, groups, place)
            axes.set_xlabel(name)
            axes.set_ylabel("steps over fewest")
        handles = upper.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=4 if width < 6 else 8)
    return figure


def _tuned(axes: Axes, known: Sequence[TunedSteps]) -> None:
    for row in known:
        if row.low is not None and row.high is not None:
            ends = (row.low, row.high)
            axes.plot((row.batch_size, row.batch_size), ends, color=BLUE, lw=1.4, zorder=3)
    for on_edge, label in ((False, "tuned"), (True, "best on an edge")):
        places = [
            (row.batch_size, row.steps) for row in known if (row.outcome == "edge") is on_edge
        ]
        if places:
            face = PAPER if on_edge else BLUE
            style: dict[str, Any] = {"color": BLUE, "mfc": face, "ms": 5.5, "zorder": 4}
            axes.plot(*zip(*places, strict=True), "o", label=label, **style)


def _law(axes: Axes, sweep: SweepResult, known: Sequence[TunedSteps]) -> None:
    law = sweep.tradeoff
    if law is None or law.steps_min.point is None or law.examples_min.point is None:
        return
    steps, examples = law.steps_min.point, law.examples_min.point
    sizes = _span(known[0].batch_size, known[-1].batch_size)
    axes.plot(
        sizes, [steps + examples / b for b in sizes], color=VERMILION, lw=1.6, label="steps law"
    )
    critical = law.critical_batch
    if critical.low and critical.high:
        axes.axvspan(critical.low, critical.high, color=GREEN, alpha=0.15, lw=0)
    if critical.point is not None:
        mark_size(axes, critical.point, "critical batch", GREEN, 0.95)


def has_pieces(sweep: SweepResult) -> bool:
    """Whether the three regimes are known well enough to be drawn."""
    return _pieces(sweep.regimes) is not None


def _pieces(regimes: Regimes | None) -> tuple[float, float, float, float] | None:
    """Return the two ends, the examples and the plateau; None where one is not known."""
    if regimes is None:
        return None
    first, last = regimes.perfect_end.point, regimes.useful_end.point
    examples, plateau = regimes.examples.point, regimes.plateau.point
    if not (first and last and examples and plateau):
        return None
    return first, last, examples, plateau


def _regimes(axes: Axes, regimes: Regimes | None, known: Sequence[TunedSteps]) -> None:
    """Three straight pieces, behind everything else."""
    pieces = _pieces(regimes)
    if pieces is None:
        return
    first, last, examples, plateau = pieces
    low, high = known[0].batch_size, known[-1].batch_size
    corners = [(low, examples / low), (first, examples / first), (last, plateau), (high, plateau)]
    drawn = [corner for corner in sorted(corners) if low <= corner[0] <= high]
    axes.plot(
        *zip(*drawn, strict=True), color=ORANGE, lw=4, alpha=0.5, label="three regimes", zorder=1
    )


def _bounds(axes: Axes, rows: Sequence[TunedSteps]) -> None:
    late = [(row.batch_size, row.low) for row in rows if row.steps is None and row.low]
    if late:
        axes.plot(
            *zip(*late, strict=True), "^", color=BLUE, mfc="none", label="not reached: at least"
        )


def _rate_law(axes: Axes, curve: SweepCurve, sizes: Sequence[int]) -> None:
    law = curve.rate_law
    if law is None:
        return
    power, knee, most = law.exponent.point, law.saturation.point, law.rate_max.point
    if power is None or knee is None or most is None:
        return
    places = _span(min(sizes), max(sizes))
    axes.plot(
        places,
        [most / (1 + knee / size) ** power for size in places],
        color=VERMILION,
        lw=1.6,
        label="rate law",
    )
    if min(sizes) < knee < max(sizes):
        mark_size(axes, knee, "saturation", MUTED, 0.06)


def _span(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (i / (_CURVE - 1)) for i in range(_CURVE)]


def _groups(sweep: SweepResult) -> dict[int, list[SettingSteps]]:
    """Settings that reached the first target, by batch size; a lone one draws no curve."""
    groups: dict[int, list[SettingSteps]] = {}
    for row in sweep.settings:
        if row.target == sweep.targets[0] and row.steps is not None:
            groups.setdefault(row.batch_size, []).append(row)
    return dict(sorted(groups.items()))


def _overlaid(axes: Axes, groups: dict[int, list[SettingSteps]], place: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    count = max(len(groups) - 1, 1)
    for i, (size, rows) in enumerate(groups.items()):
        least = min(row.steps or math.inf for row in rows)
        points = sorted((getattr(row, place), (row.steps or math.nan) / least) for row in rows)
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=_mixed(i / count),
            ms=3.5,
            lw=1.2,
            label=f"{size:,}",
        )
    axes.set_ylim(0.9, min(axes.get_ylim()[1], 8.0))
    plain_numbers(axes.xaxis)
    axes.axhline(1.0, color=INK, lw=0.6)
    plain_numbers(axes.yaxis)


def _mixed(share: float) -> str:
    """A colour between the two ends, the same in light and dark pages."""
    pairs = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in _ENDS]
    mixed = [round((1 - share) * a + share * b) for a, b in zip(*pairs, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _temperature_name(sweep: SweepResult) -> str:
    if sweep.optimizer in ("adam", "adamw", "lion"):
        return "rate per example: lr / sqrt(B)"
    if sweep.optimizer in ("lars", "rmsprop"):
        return "rate per example: lr / ((1 - m) sqrt(B))"
    if sweep.optimizer == "lamb":
        return "rate per example: lr sqrt((1 + beta1)/(1 - beta1)) / sqrt(B)"
    return "temperature: lr / ((1 - m) B)"
