"""Records as matplotlib figures: no global state, no pyplot.

Each function returns a ``matplotlib.figure.Figure``; notebooks show it, the page writes it as
inline SVG with :func:`noisescale.report.drawing.to_svg`. matplotlib is imported inside the
functions and needs the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from noisescale.records import (
    Advice,
    Measurement,
    MemoryLimit,
    NoiseScale,
    SpeedCurve,
    SpeedPoint,
    ThroughputKnee,
    TrajectoryRow,
)
from noisescale.report.drawing import (
    BLUE,
    BLUE_BAND,
    GREEN,
    ORANGE,
    PAPER,
    VERMILION,
    WIDE,
    drawing,
    legend,
    level,
    mark_size,
    plain_numbers,
    say_nothing,
)
from noisescale.report.tradeoff_figures import drawn_rows, tradeoff_figure, tradeoff_fit_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "drawn_rows",
    "noise_scale_figure",
    "speed_figure",
    "tradeoff_figure",
    "tradeoff_fit_figure",
]


def noise_scale_figure(source: Advice | Measurement, *, width: float = WIDE) -> Figure:
    """Draw the noise scale along the run against examples seen, with its interval.

    A window whose interval has no upper end is drawn as an area open to the top, without a line.

    Args:
        source: what ``advise`` or ``measure`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    noise = source.noise_scale
    with drawing(width, 3.5) as (figure, axes):
        axes.set_yscale("log")
        axes.set_xlabel(f"{noise.unit} seen in training")
        axes.set_ylabel(f"noise scale ({noise.unit})")
        rows = [row for row in source.trajectory if row.low is not None]
        if not rows:
            say_nothing(axes, "no window of the run has an interval")
            return figure
        top = _ceiling([*rows, noise])
        _draw_windows(axes, source.trajectory, top)
        end = source.trajectory[-1].examples
        _draw_marks(axes, source, end, top)
        batch = source.recipe.batch_size if isinstance(source, Advice) else source.batch_size
        level(axes, batch, f"global batch of the run: {batch:,}")
        axes.set_xlim(0, end * 1.1)
        axes.set_ylim(top=top)
        plain_numbers(axes.yaxis)
        plain_numbers(axes.xaxis)
        legend(axes, columns=2 if width < 6 else 4)
    return figure


def speed_figure(
    curve: SpeedCurve,
    *,
    knee: ThroughputKnee | None = None,
    memory: MemoryLimit | None = None,
    width: float = WIDE,
) -> Figure:
    """Draw throughput against micro-batch size, and what the step's time goes to.

    Args:
        curve: the scan.
        knee: marked where given.
        memory: its largest size that fits is marked where given.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing(width, 4.4, rows=2) as (figure, (above, below)):
        below.set_xlabel(f"micro-batch size ({curve.unit} per pass)")
        above.set_ylabel(f"{curve.unit} per second")
        below.set_ylabel("share")
        if not curve.points:
            say_nothing(above, "no micro-batch size ran")
            return figure
        for axes in (above, below):
            axes.set_xscale("log", base=2)
        above.set_yscale("log")
        _draw_throughput(above, curve.points)
        _draw_shares(below, curve.points)
        if knee is not None:
            mark_size(above, knee.micro_batch_size, "knee", GREEN, 0.1)
        if memory is not None and memory.micro_batch_size is not None:
            fits_all = memory.micro_batch_size >= memory.largest_tested
            label = "largest tried" if fits_all else "largest that fits"
            mark_size(above, memory.micro_batch_size, label, VERMILION, 0.28)
        _draw_failures(above, curve)
        plain_numbers(above.yaxis)
        plain_numbers(below.xaxis)
    return figure


def _ceiling(records: Sequence[TrajectoryRow | NoiseScale]) -> float:
    """Where areas that are open upward end: well above every finite end."""
    ends = [end for record in records for end in (record.low, record.high) if end is not None]
    return 2.0 * max(ends)


def _draw_windows(axes: Axes, rows: Sequence[TrajectoryRow], top: float) -> None:
    start = 0
    named: set[str] = set()
    for row in rows:
        span = (start, row.examples)
        start = row.examples
        if row.low is None:
            continue
        closed = row.high is not None
        label = "interval of a window" if closed else "no upper end"
        axes.fill_between(
            span,
            row.low,
            row.high if row.high is not None else top,
            facecolor=BLUE_BAND if closed else "none",
            edgecolor=PAPER if closed else BLUE_BAND,
            hatch=None if closed else "////",
            linewidth=0.8 if closed else 0,
            label=None if label in named else label,
        )
        named.add(label)
        if row.b_simple is not None:
            axes.plot(
                span,
                (row.b_simple, row.b_simple),
                color=BLUE,
                linewidth=2,
                solid_capstyle="butt",
                label=None if "window" in named else "window",
            )
            named.add("window")


def _draw_marks(axes: Axes, source: Advice | Measurement, end: int, top: float) -> None:
    """The first quarter, the last quarter, and all steps pooled, right of the run."""
    if isinstance(source, Advice):
        for name, noise, start in (
            ("first quarter", source.first, 0.0),
            ("last quarter", source.last, 0.75 * end),
        ):
            if noise is not None:
                _draw_mark(axes, name, noise, (start, start + 0.25 * end), ORANGE, top)
    pooled = (1.04 * end, 1.08 * end)
    _draw_mark(axes, "pooled", source.noise_scale, pooled, VERMILION, top)


def _draw_mark(
    axes: Axes, name: str, noise: NoiseScale, span: tuple[float, float], colour: str, top: float
) -> None:
    """One bar for the interval and one level for the value; an arrow where no end is known."""
    if noise.low is None:
        return
    middle = sum(span) / 2
    high = noise.high if noise.high is not None else top
    axes.plot((middle, middle), (noise.low, high), color=colour, linewidth=1.8, zorder=4)
    if noise.b_simple is None:
        label = f"{name}: at least"
        axes.plot(middle, noise.low, "^", color=colour, ms=7, mec=PAPER, zorder=5, label=label)
    else:
        level = (noise.b_simple, noise.b_simple)
        axes.plot(span, level, color=colour, linewidth=2.4, zorder=5, label=name)


def _draw_throughput(axes: Axes, points: Sequence[SpeedPoint]) -> None:
    sizes = [point.micro_batch_size for point in points]
    speed = [point.examples_per_second for point in points]
    below = [s - p.micro_batch_size / p.seconds_high for s, p in zip(speed, points, strict=True)]
    above = [p.micro_batch_size / p.seconds_low - s for s, p in zip(speed, points, strict=True)]
    bars = [[max(0.0, value) for value in side] for side in (below, above)]
    axes.errorbar(
        sizes, speed, yerr=bars, color=BLUE, ecolor=BLUE, fmt="o-", ms=4.5, lw=1.6, elinewidth=1.2
    )
    axes.set_title("Throughput (median, bars: quartiles)")


def _draw_shares(axes: Axes, points: Sequence[SpeedPoint]) -> None:
    sizes = [point.micro_batch_size for point in points]
    share = [100 * point.data_seconds / point.seconds_per_step for point in points]
    axes.fill_between(sizes, 0, share, color=ORANGE, linewidth=0, label="waiting for data")
    axes.fill_between(sizes, share, 100, color=BLUE_BAND, linewidth=0, label="compute")
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2, borderaxespad=0)
    axes.set_title("Step time")


def _draw_failures(axes: Axes, curve: SpeedCurve) -> None:
    sizes = [failure.micro_batch_size for failure in curve.failures]
    if sizes:
        place = axes.get_xaxis_transform()
        axes.plot(sizes, [0.04] * len(sizes), "x", color=VERMILION, ms=7, mew=2, transform=place)
        axes.annotate(
            "does not fit",
            (min(sizes), 0.04),
            xycoords=place,
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=VERMILION,
            fontsize=8.5,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
