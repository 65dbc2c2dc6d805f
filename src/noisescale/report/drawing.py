"""What the figures share: size, colours, style, and how one becomes inline SVG.

matplotlib is imported inside the functions and needs the extra ``report``.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

from noisescale.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 7.6
"""Inches: a figure beside text on a desktop."""
NARROW = 4.3
"""Inches: a figure on a phone, the same letters on less paper."""

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
INK, MUTED, GRID, PAPER = "#1c2430", "#5b6675", "#dde2e8", "#fefefe"
BLUE_BAND = "#c9dfec"

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "noisescale",
}


def require_matplotlib() -> None:
    """Refuse early where no figure can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise MissingExtraError("the report", package="matplotlib", extra="report") from None


def to_svg(figure: Figure, *, prefix: str) -> str:
    """Write a figure as one inline ``<svg>`` element: text as text, nothing to fetch.

    Args:
        figure: what one of the functions here returned.
        prefix: put before every id, so that several figures can share a page.
    """
    matplotlib = importlib.import_module("matplotlib")
    buffer = StringIO()
    with matplotlib.rc_context(_STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text, count=3)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', prefix, text)
    return re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)


@contextmanager
def drawing(width: float, height: float, *, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """Open a styled figure of ``rows`` axes above each other; sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        ratios = {"height_ratios": [3, 1]} if rows == 2 else {}
        yield figure, figure.subplots(rows, 1, sharex=rows > 1, gridspec_kw=ratios)


def say_nothing(axes: Axes, why: str) -> None:
    """Say in the empty axes why nothing is drawn."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.minorticks_off()


def plain_numbers(axis: Any) -> None:
    """Write 20, 1,000 instead of powers; on short log axes label 2 and 5 as well."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log" and axis.get_transform().base == 10:
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def legend(axes: Axes, *, columns: int) -> None:
    """Put the legend above the axes, where it hides no data."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)


def level(axes: Axes, height: float, text: str) -> None:
    """Draw a dotted horizontal line named in the legend."""
    axes.axhline(height, color=MUTED, linewidth=1, linestyle=":", label=text)


def mark_size(axes: Axes, size: float, name: str, colour: str, height: float) -> None:
    """Draw a dashed vertical line with its name and value on its left."""
    axes.axvline(size, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{name}: {size:,.3g}" if isinstance(size, float) else f"{name}: {size:,}",
        (size, height),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        color=colour,
        fontsize=8.5,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )
