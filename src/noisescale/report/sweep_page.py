"""A sweep as one self-contained HTML page: it loads nothing, and holds its record as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisescale.records import SweepResult
from noisescale.report import sweep_wording, wording
from noisescale.report.page import (
    at_both_widths,
    check_ready,
    fill_in,
    json_block,
    template,
    write_whole,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_sweep_page(sweep: SweepResult, path: str | Path) -> Path:
    """Write the page; a file that is there is replaced only once the new one is complete.

    Raises:
        InvalidInputError: the path cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check_ready(path)
    return write_whole(path, render_sweep_page(sweep))


def render_sweep_page(sweep: SweepResult) -> str:
    """Return the page as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    filters: dict[str, Callable[..., str]] = {
        name: getattr(wording, name)
        for name in ("number", "setting", "count", "interval", "duration", "sentence")
    }
    filters |= {"tuning_outcome": sweep_wording.tuning_outcome, "ends": sweep_wording.ends}
    return fill_in("sweep.html.j2", filters=filters, context=_context(sweep))


def _context(sweep: SweepResult) -> dict[str, Any]:
    from noisescale.report import sweep_figures

    draw: dict[str, Callable[[float], Figure]] = {
        "steps": lambda width: sweep_figures.steps_figure(sweep, width=width),
        "rate": lambda width: sweep_figures.rate_figure(sweep, width=width),
        "collapse": lambda width: sweep_figures.collapse_figure(sweep, width=width),
    }
    law = sweep.tradeoff
    return {
        "sweep": sweep,
        "unit": sweep.unit,
        "found": law is not None and law.critical_batch.point is not None,
        "headline": sweep_wording.headline(sweep),
        "subject": sweep_wording.subject(sweep),
        "effort": sweep_wording.effort(sweep),
        "regimes": sweep_wording.regime_lines(sweep),
        "pieces": sweep_figures.has_pieces(sweep),
        "figures": at_both_widths(draw),
        "json": json_block(sweep),
        "css": template("style.css"),
    }
