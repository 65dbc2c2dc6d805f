"""Converted recipes as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from noisescale.records import Alternative, Change, Conversion
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_NARROW = 72  # columns; assumed: below it five columns of a table leave a few letters each


def render_conversion(conversion: Conversion, console: Console | None = None) -> None:
    """Print the answer, each change with rule and source, then reasons and other answers.

    Args:
        conversion: what ``convert`` returned.
        console: where to print; standard output by default.
    """
    terminal._show(console, _whole(conversion, console))


def render_conversion_briefly(conversion: Conversion, console: Console | None = None) -> None:
    """Print the answer, the changes and the warnings only.

    Args:
        conversion: what ``convert`` returned.
        console: where to print; standard output by default.
    """
    parts = [*_head(conversion), *_changes(conversion, _width(console))]
    terminal._show(console, parts + terminal._warnings(conversion.warnings))


def _whole(conversion: Conversion, console: Console | None) -> list[RenderableType]:
    parts = [*_head(conversion), *_changes(conversion, _width(console))]
    if conversion.unchanged:
        return parts + terminal._warnings(conversion.warnings)
    parts += [*_why(conversion), *_kept(conversion.kept), *_others(conversion)]
    return parts + terminal._warnings(conversion.warnings)


def _width(console: Console | None) -> int:
    from rich.console import Console

    return (console or Console()).width


def _head(conversion: Conversion) -> list[RenderableType]:
    was = f"noisescale convert · {wording.recipe_line(conversion.original)}"
    answer = wording.sentence(conversion.summary)
    return [terminal._styled(was, "dim"), "", terminal._styled(answer, "bold green"), ""]


def _changes(conversion: Conversion, width: int) -> list[RenderableType]:
    if not conversion.changes:
        return []
    if width < _NARROW:
        return [*_stacked(conversion.changes), ""]
    return [_table(conversion.changes), ""]


def _table(changes: Sequence[Change]) -> Table:
    table = terminal._grid("what", "old", "new", "rule", "source")
    for column in table.columns[3:]:
        column.justify = "left"
    # Numbers and names are what is read and copied: only the sources may be folded.
    for column in table.columns[:4]:
        column.no_wrap = True
    for change in changes:
        table.add_row(
            change.name,
            value(change.old),
            terminal._styled(value(change.new), "bold cyan"),
            change.rule,
            terminal._styled(change.source, "dim"),
        )
    return table


def _stacked(changes: Sequence[Change]) -> list[RenderableType]:
    """One change below the other, where a table has no room."""
    lines: list[RenderableType] = []
    for change in changes:
        line = terminal._line(f"{change.name} ", f"{value(change.old)} → ")
        lines.append(line.append(value(change.new), style="bold cyan"))
        lines.append(terminal._styled(f"  {change.rule}: {change.source}", "dim"))
    return lines


def _why(conversion: Conversion) -> list[RenderableType]:
    sentences = [
        conversion.why,
        f"it keeps {conversion.preserves}; it assumes that {conversion.assumption}",
        f"it holds for {conversion.validity} ({conversion.status})",
        *(f"{c.name}: {c.why}" for c in conversion.changes if c.why and c.name != "batch_size"),
    ]
    return _section("Why", sentences)


def _kept(kept: Sequence[Change]) -> list[RenderableType]:
    return _section("Stays as it is", [f"{c.name} {value(c.old)}: {c.why}" for c in kept])


def _others(conversion: Conversion) -> list[RenderableType]:
    known = [one for one in conversion.alternatives if not one.needs]
    wanting = [one for one in conversion.alternatives if one.needs]
    title = "What other rules say (--rule NAME)"
    lines = [_other(one, conversion) for one in known]
    lines += [_wanting(one) for one in wanting]
    return _section(title, lines)


def _other(one: Alternative, conversion: Conversion) -> str:
    mark = " (recommended)" if one.rule == conversion.recommended else ""
    said = ", ".join(f"{name} {value(new)}" for name, new in one.values.items())
    return f"{one.rule}{mark}: {said or 'nothing'}; {one.when} ({one.source}; {one.status})"


def _wanting(one: Alternative) -> str:
    options = " and ".join(f"--{name.replace('_', '-')}" for name in one.needs)
    return f"{one.rule}: give {options} to see it ({one.source}; {one.status})"


def _section(title: str, sentences: Sequence[str]) -> list[RenderableType]:
    if not sentences:
        return []
    return [terminal._styled(title, "bold"), *terminal._bullets(sentences, "-", ""), ""]


def value(of: Any) -> str:
    """Write a value of a recipe: six digits, whole numbers in full, ``-`` for what is absent.

    >>> value(0.4), value(9000), value((0.9, 0.99)), value(None), value(1 - 1.5e-7)
    ('0.4', '9,000', '(0.9, 0.99)', '-', '0.99999985')
    """
    if of is None:
        return "-"
    if isinstance(of, bool):
        return str(of).lower()
    if isinstance(of, int):
        return f"{of:,}"
    if isinstance(of, float):
        return f"{of:.{_digits(of)}g}"
    if isinstance(of, tuple | list):
        return f"({', '.join(map(value, of))})"
    if isinstance(of, dict):
        return ", ".join(f"{key} {value(item)}" for key, item in of.items())
    return str(of)


def _digits(number: float) -> int:
    """Six; more for decays close to 1, whose distance from it is what matters."""
    return max(6, 3 - math.floor(math.log10(1 - number))) if 0.9 < number < 1 else 6
