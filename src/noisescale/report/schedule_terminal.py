"""Planned schedules as text for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from noisescale.records import SchedulePlan, ScheduleRow
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"
_STRIP = 60  # columns of a strip; assumed: fits 80 columns with its name
_WIDE = 92  # columns; assumed: all columns of the table need about that
LONG = 10**8
"""Positions from here on are written shorter. (assumed: tables stay within 80 columns)"""


def render_schedule(plan: SchedulePlan, console: Console | None = None) -> None:
    """Print what the plan saves, its rows, and what it rests on.

    Args:
        plan: what ``schedule`` returned.
        console: where to print; standard output by default.
    """
    from rich.console import Console

    target = console if console is not None else Console()
    length = position(plan.schedule.total or plan.rows[-1].stop)
    was = f"noisescale schedule · {wording.recipe_line(plan.recipe)}, {length} {plan.schedule.unit}"
    parts: list[RenderableType] = [
        terminal._styled(was, "dim"),
        "",
        terminal._styled(headline(plan), "bold green"),
        "",
        terminal._styled(f"Positions and batch sizes in {plan.schedule.unit}", "bold"),
        _table(plan, narrow=target.width < _WIDE),
        *_left_out(plan.rows),
        "",
        *(_strips(plan) if target.encoding.startswith("utf") else []),
        terminal._line("Sizes: ", plan.text),
        terminal._line("Rule: ", f"{wording.sentence(plan.rule)} Source: {plan.source}."),
    ]
    if plan.limit is not None:
        limit = wording.count(plan.limit, plan.schedule.unit)
        parts.append(terminal._line("Limit: ", f"{limit} ({plan.limit_source})"))
    terminal._show(target, [*parts, *terminal._warnings(plan.warnings)])


def headline(plan: SchedulePlan) -> str:
    """Say what the plan costs in steps, beside the recipe."""
    now, before = plan.updates, plan.original_updates
    if now == before:
        return f"{wording.count(now, 'updates')}, as many as the recipe's"
    share = wording.percent(abs(plan.updates_saved))
    if now < before:
        verdict = f"{share} saved"
    else:
        verdict = f"{share} more" if now < 2 * before else f"{wording.ratio(now / before)} as many"
    return f"{wording.count(now, 'updates')} instead of {before:,}: {verdict}"


def position(value: int) -> str:
    """Write a position: in full, or with four digits and a suffix where it is long.

    >>> position(25_600), position(250_000_000_000), position(1_234_567_890)
    ('25,600', '250B', '1.235B')
    """
    if value < LONG:
        return f"{value:,}"
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= 0.99995 * scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:,}"


def _table(plan: SchedulePlan, *, narrow: bool) -> Table:
    """Write the rows; a narrow table leaves out where each ends: there the next begins."""
    columns: dict[str, Callable[[ScheduleRow], str]] = {
        "from": lambda row: position(row.start),
        "to": lambda row: position(row.stop),
        "batch": lambda row: f"{row.batch_size:,}",
        "passes": lambda row: f"{row.accumulation:,}",
        "rate": lambda row: _along(row.lr_first, row.lr_last),
        "temperature": lambda row: _along(row.temperature_first, row.temperature_last),
        "updates": lambda row: f"{row.updates:,}",
    }
    if narrow:
        del columns["to"]
    if plan.rows[0].accumulation is None:
        del columns["passes"]
    table = terminal._grid(*columns)
    for row in _shown(plan.rows):
        table.add_row(*(write(row) for write in columns.values()))
    return table


def _shown(rows: Sequence[ScheduleRow]) -> Sequence[ScheduleRow]:
    """Thin out evenly; the first and the last are kept."""
    most = min(len(rows), terminal._ROWS)
    places = {index * (len(rows) - 1) // max(1, most - 1) for index in range(most)}
    return [rows[place] for place in sorted(places)]


def _left_out(rows: Sequence[ScheduleRow]) -> list[RenderableType]:
    left = len(rows) - len(_shown(rows))
    text = f"{wording.count(left, 'rows')} left out here; --json has all"
    return [terminal._styled(text, "dim")] if left else []


def _along(first: float, last: float) -> str:
    if math.isclose(first, last, rel_tol=5e-4):
        return wording.number(first)
    return f"{wording.number(first)} -> {wording.number(last)}"


def _strips(plan: SchedulePlan) -> list[RenderableType]:
    """Batch size and rate along the training, on logarithmic scales."""
    total = plan.schedule.total or plan.rows[-1].stop
    places = [total * column // _STRIP for column in range(_STRIP)]
    sizes = [float(plan.schedule.batch_size_at(place)) for place in places]
    rates = [plan.schedule.lr_at(place) or 0.0 for place in places]
    return [
        terminal._line("batch ", strip(sizes), "cyan"),
        terminal._line("rate  ", strip(rates), "cyan"),
        "",
    ]


def strip(values: Sequence[float]) -> str:
    """Draw values as bars of eight heights, by their logarithm over at least a factor of 10.

    >>> strip([1, 10, 100, 1000])
    '▁▃▆█'
    """
    top = max(values)
    low = max(min((value for value in values if value > 0), default=1.0), top * 1e-4)
    span = max(math.log(top / low), math.log(10.0)) if top > 0 else 1.0
    heights = [1 - math.log(top / max(value, low)) / span if value > 0 else 0 for value in values]
    return "".join(_BARS[round(max(0.0, height) * (len(_BARS) - 1))] for height in heights)
