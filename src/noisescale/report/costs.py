"""The table of what each global batch costs, as text: which columns, which rows, which marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from noisescale.records import Advice, AdviceRow
from noisescale.report import wording

_MARKED = "> "
_REFUSED = "- "


def judged(advice: Advice) -> bool:
    """Whether the waste of the rows is known at all."""
    return any(row.examples_ratio_high is not None for row in advice.table)


def legend(advice: Advice) -> list[str]:
    """Explain the marks that the table uses."""
    lines = [f"{_MARKED}recommended"] if advice.recommended else []
    if judged(advice) and not all(row.allowed for row in advice.table):
        lines.append(f"{_REFUSED}{wording.not_allowed(advice.max_waste)}")
    return lines


def mark(row: AdviceRow, advice: Advice) -> str:
    """Return what stands before a row, so that it is marked without colours too."""
    if row == advice.recommended:
        return _MARKED
    return _REFUSED if judged(advice) and not row.allowed else "  "


def row_style(row: AdviceRow, advice: Advice) -> str:
    """Return the rich style of a row."""
    if row == advice.recommended:
        return "bold green"
    return "" if row.allowed or not judged(advice) else "dim"


def cost_columns(advice: Advice) -> dict[str, Callable[[AdviceRow], str]]:
    """Header -> how to write the cell; columns that would hold nothing are left out."""
    columns: dict[str, Callable[[AdviceRow], str]] = {
        "  global\n  batch": lambda row: f"{row.global_batch_size:,}",
        "micro ×\naccumulation ×\nreplicas": wording.split_cell,
    }
    if any(row.steps_ratio is not None for row in advice.table):
        columns["steps\nover\nfewest"] = lambda row: _ratio_or_dash(row.steps_ratio)
        columns["examples\nover fewest\n(worst case)"] = _examples_cell
    elif judged(advice):
        columns["examples\nover fewest\n(worst case)"] = _examples_cell
    columns["time\nper\nstep"] = lambda row: wording.duration(row.seconds_per_step)
    if any(row.relative_time is not None for row in advice.table):
        columns["time to target\nover best\n(band)"] = _time_cell
    elif judged(advice):
        columns["time to target\nover best (at the\nlower end)"] = _lower_time_cell
    else:
        columns[f"{advice.unit}\nper second"] = lambda row: wording.number(
            row.global_batch_size / row.seconds_per_step
        )
    return columns


def _examples_cell(row: AdviceRow) -> str:
    worst = f"({_ratio_or_dash(row.examples_ratio_high)})"
    return worst if row.examples_ratio is None else f"{wording.ratio(row.examples_ratio)} {worst}"


def _time_cell(row: AdviceRow) -> str:
    band = wording.ratio_interval(row.relative_time_low, row.relative_time_high)
    time = _ratio_or_dash(row.relative_time)
    return f"{time} ({band})" if band else time


def _lower_time_cell(row: AdviceRow) -> str:
    return _ratio_or_dash(row.relative_time_low)


def _ratio_or_dash(value: float | None) -> str:
    return "?" if value is None else wording.ratio(value)


def thinned(rows: Sequence[AdviceRow], keep: AdviceRow | None, limit: int) -> tuple[AdviceRow, ...]:
    """Choose about ``limit`` rows: both ends, the one to keep with its neighbours, the rest spread.

    Args:
        rows: the table.
        keep: the row that must stay.
        limit: how many rows to return besides the kept one and its neighbours, at least 2.
    """
    if len(rows) <= limit:
        return tuple(rows)
    last = len(rows) - 1
    chosen = {round(index * last / (limit - 1)) for index in range(limit)}
    if keep in rows:
        middle = rows.index(keep)
        chosen |= {middle - 1, middle, middle + 1}
    return tuple(row for index, row in enumerate(rows) if index in chosen)
