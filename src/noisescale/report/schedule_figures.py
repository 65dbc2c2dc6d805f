"""A planned schedule drawn: batch size and rate along the training, beside the recipe's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisescale.errors import InvalidInputError
from noisescale.records import SchedulePlan
from noisescale.report import drawing
from noisescale.report.drawing import BLUE, MUTED, WIDE, plain_numbers
from noisescale.report.schedule_terminal import LONG, position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400  # of a drawn line
_ENDINGS = (".png", ".svg")


def schedule_figure(plan: SchedulePlan, *, width: float = WIDE) -> Figure:
    """Draw batch size, rate and updates done against position.

    Args:
        plan: what ``schedule`` returned.
        width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing.drawing(width, 6.0) as (figure, whole):
        figure.delaxes(whole)
        upper, middle, lower = figure.subplots(3, 1, sharex=True)
        _sizes(upper, plan)
        _rates(middle, plan)
        _updates(lower, plan)
        lower.set_xlabel(f"{plan.schedule.unit} seen in training")
        handles = upper.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=2)
    return figure


def check_drawable(path: str | Path) -> None:
    """Refuse early what no figure can be written to.

    Raises:
        InvalidInputError: the ending is neither .png nor .svg, or the folder does not exist.
        MissingExtraError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _ENDINGS:
        raise InvalidInputError(
            f"--out {path}", "a name that ends in .png or .svg is required", "rename it"
        )
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise InvalidInputError(
            f"--out {path}", "a file in a folder that exists is required", "name another path"
        )
    drawing.require_matplotlib()


def write_schedule_figure(plan: SchedulePlan, path: str | Path) -> Path:
    """Draw a plan into a PNG or SVG file, as its name ends.

    Raises:
        InvalidInputError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check_drawable(path)
    figure = schedule_figure(plan)
    matplotlib = importlib.import_module("matplotlib")
    nothing: dict[str, Any] = {"metadata": {"Date": None}} if _is_svg(path) else {}
    try:
        with matplotlib.rc_context(drawing._STYLE):
            figure.savefig(path, dpi=160, **nothing)
    except OSError as error:
        raise InvalidInputError(
            f"--out {path}", f"cannot be written ({error.strerror})", "name another path"
        ) from None
    return Path(path)


def _is_svg(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".svg"


def _sizes(axes: Axes, plan: SchedulePlan) -> None:
    edges = [row.start for row in plan.rows] + [plan.rows[-1].stop]
    sizes = [row.batch_size for row in plan.rows]
    axes.set_yscale("log", base=2)
    axes.axhline(plan.recipe.batch_size, label="recipe", **_OLD)
    axes.stairs(sizes, edges, baseline=None, color=BLUE, linewidth=1.8, label="plan")
    axes.set_ylabel(f"global batch\n({plan.schedule.unit})")
    low, high = min(*sizes, plan.recipe.batch_size), max(*sizes, plan.recipe.batch_size)
    axes.set_ylim(low / 1.5, high * 1.5)
    plain_numbers(axes.yaxis)


def _rates(axes: Axes, plan: SchedulePlan) -> None:
    schedule = plan.schedule
    assert schedule.rate is not None
    places = _places(plan)
    axes.plot(places, [schedule.rate.at(place) for place in places], label="recipe", **_OLD)
    planned = [schedule.lr_at(place) or 0.0 for place in places]
    axes.plot(places, planned, color=BLUE, linewidth=1.8, label="plan")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _updates(axes: Axes, plan: SchedulePlan) -> None:
    done, places = [0], [0]
    for row in plan.rows:
        places.append(row.stop)
        done.append(done[-1] + row.updates)
    total = plan.schedule.total or plan.rows[-1].stop
    axes.plot([0, total], [0, plan.original_updates], **_OLD)
    axes.plot(places, done, color=BLUE, linewidth=1.8)
    axes.set_ylabel("updates")
    axes.set_ylim(bottom=0)
    plain_numbers(axes.yaxis)
    plain_numbers(axes.xaxis)
    if total >= LONG:
        axes.xaxis.set_major_formatter(lambda value, _: position(round(value)))


def _places(plan: SchedulePlan) -> list[int]:
    """Evenly spaced positions, and both sides of every change."""
    total = plan.schedule.total or plan.rows[-1].stop
    places = {total * index // _POINTS for index in range(_POINTS + 1)}
    changes = [piece.start for piece in plan.schedule.pieces]
    if plan.schedule.rate is not None:
        changes += [segment.start for segment in plan.schedule.rate.segments]
    for start in changes:
        places |= {max(0, start - 1), start}
    return sorted(place for place in places if place <= total)


_OLD: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
