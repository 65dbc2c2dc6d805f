"""Converted recipes as text for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from noisescale.records import Alternative, Change, Conversion
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_Row = tuple[str, str, str, str, str]
_GAPS = 8  # columns between the five of the table
_PAPER = re.compile(r"(?:[A-Z][\w-]+, )*[A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)? \d{4}")


def render_conversion(conversion: Conversion, console: Console | None = None) -> None:
    """Print the answer, each change with rule and source, then reasons and other answers.

    Args:
        conversion: what ``convert`` returned.
        console: where to print; standard output by default.
    """
    parts = [*_head(conversion), *_changes(conversion, console)]
    if not conversion.unchanged:
        parts += [*_why(conversion), *_kept(conversion.kept), *_others(conversion)]
    terminal._show(console, parts + _cautions(conversion))


def render_conversion_briefly(conversion: Conversion, console: Console | None = None) -> None:
    """Print the answer, the changes and the warnings only.

    Args:
        conversion: what ``convert`` returned.
        console: where to print; standard output by default.
    """
    parts = [*_head(conversion), *_changes(conversion, console)]
    terminal._show(console, parts + _cautions(conversion))


def _cautions(conversion: Conversion) -> list[RenderableType]:
    sentences = [wording.sentence(text) for text in conversion.warnings]
    notes = [wording.sentence(text) for text in conversion.notes]
    return terminal._warnings(sentences) + terminal._bullets(notes, "Note:", "dim")


def _head(conversion: Conversion) -> list[RenderableType]:
    was = f"noisescale convert · {wording.recipe_line(conversion.original)}"
    answer = wording.sentence(conversion.summary)
    return [terminal._styled(was, "dim"), "", terminal._styled(answer, "bold green"), ""]


def _changes(conversion: Conversion, console: Console | None) -> list[RenderableType]:
    from rich.console import Console

    if not conversion.changes:
        return []
    rows = list(_rows(conversion))
    room = min((console or Console()).width, terminal._WIDTH) - _GAPS
    if sum(_least_widths(rows)) > room:
        return [*_stacked(rows), ""]
    return [_table(rows, room), ""]


def _least_widths(rows: Sequence[_Row]) -> list[int]:
    """Return the columns that each part of a table needs: names and numbers whole, else words."""
    names, old, new, *folded = zip(*rows, strict=True)
    words = [max(len(word) for text in texts for word in text.split()) for texts in folded]
    return [*(max(map(len, texts)) for texts in (names, old, new)), *words]


def _folded_widths(rows: Sequence[_Row], room: int) -> tuple[int, int]:
    """Return the columns of rule and source, which share what names and numbers leave.

    rich shrinks both alike, below the least width of the one, and then cuts the other.
    """
    *fixed, least_rule, least_source = _least_widths(rows)
    room -= sum(fixed)
    wanted = max(len(row[4]) for row in rows)
    source = max(least_source, min(wanted, room - least_rule))
    return min(max(len(row[3]) for row in rows), room - source), source


def _table(rows: Sequence[_Row], room: int) -> Table:
    table = terminal._grid("what", "old", "new", "rule", "source")
    # Names and numbers are what is read and copied: the rest is folded where there is no room.
    for column in table.columns[:3]:
        column.no_wrap = True
    for column, width in zip(table.columns[3:], _folded_widths(rows, room), strict=True):
        column.justify, column.width = "left", width
    for name, old, new, rule, source in rows:
        table.add_row(
            terminal._styled(name),
            old,
            terminal._styled(new, "bold cyan"),
            rule,
            terminal._styled(source, "dim"),
        )
    return table


def _stacked(rows: Sequence[_Row]) -> list[RenderableType]:
    """One change below the other, where a table has no room."""
    lines: list[RenderableType] = []
    for name, old, new, rule, source in rows:
        lines.append(terminal._line(f"{name} ", f"{old} -> ").append(new, style="bold cyan"))
        lines.append(terminal._styled(f"  {rule}: {source}", "dim"))
    return lines


def _rows(conversion: Conversion) -> Iterator[_Row]:
    """Give each change its name, values, rule and paper; of a table only what differs in it."""
    for row in conversion.changes:
        # Only the rate's rule can be asked for by name; the others are words, and fold as such.
        rule = row.rule if row.rule == conversion.rule else row.rule.replace("-", " ")
        for name, old, new in _values(row):
            yield name, value(old), value(new), rule, _paper(row.source)


def _values(row: Change) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(row.old, dict) and isinstance(row.new, dict)):
        yield label(row), row.old, row.new
        return
    for key in (*row.new, *(key for key in row.old if key not in row.new)):
        old, new = row.old.get(key), row.new.get(key)
        if old != new:
            yield f"{label(row)}.{key}", old, new


def _why(conversion: Conversion) -> list[RenderableType]:
    table = terminal._plain_table()
    rows = [c for c in conversion.changes if c.why and c.name != "batch_size"]
    for name, text in (
        (f"{conversion.rule}, ", f"{conversion.why}."),
        ("It keeps: ", f"{conversion.preserves}."),
        ("It assumes: ", f"{conversion.assumption}."),
        (f"It holds ({conversion.status}): ", f"{conversion.validity}."),
    ):
        table.add_row("-", terminal._line(name, text))
    for row in rows:
        reason = terminal._line(f"{label(row)}: ", f"{row.why}. ")
        source = row.source if row.source == "arithmetic" else f"{row.status}: {row.source}"
        table.add_row("-", reason.append(f"({source})", style="dim"))
    return [terminal._styled("Why", "bold"), table, ""]


def _kept(kept: Sequence[Change]) -> list[RenderableType]:
    if not kept:
        return []
    table = terminal._plain_table()
    for row in kept:
        table.add_row("-", terminal._line(f"{label(row)} {value(row.old)}: ", f"{row.why}."))
    return [terminal._styled("Stays as it is", "bold"), table, ""]


def _others(conversion: Conversion) -> list[RenderableType]:
    if not conversion.alternatives:
        return []
    table = terminal._plain_table()
    for one in conversion.alternatives:
        table.add_row(*_other(one, one.rule == conversion.recommended))
    return [terminal._styled("What other rules say (--rule NAME)", "bold"), table, ""]


def _other(one: Alternative, recommended: bool) -> tuple[Text, Text]:
    name = terminal._styled(one.rule, "bold")
    if recommended:
        name.append("\nrecommended", style="green")
    said = ", ".join(f"{key} {value(new)}" for key, new in one.values.items())
    if one.needs:
        options = " and ".join(f"--{need.replace('_', '-')} X" for need in one.needs)
        said = f"give {options} (noisescale measure tells it)"
    # Where it was seen to hold or fail helps to choose; what it assumes is in the JSON.
    text = terminal._styled(said or "no answer here", "cyan")
    reason = f"holds: {one.validity}" if said else one.when
    text.append(f"\n{wording.sentence(reason)} ")
    return name, text.append(f"({one.status}: {_paper(one.source)})", style="dim")


def _paper(source: str) -> str:
    """Return the first paper that a source names; the whole stands with the reasons.

    >>> _paper("derived from Smith and Le 2018 (arXiv:1710.06451), sec. 4; You et al. 2020")
    'Smith and Le 2018'
    """
    found = _PAPER.search(source)
    return source if found is None else found[0]


def label(change: Change) -> str:
    """Return what the user calls a key: by the file's own name where the file has one."""
    # A batch size in parts has several keys, and the number here is their product.
    return change.name if change.key is None or change.name == "batch_size" else change.key


def value(of: Any) -> str:
    """Write a value of a recipe: six digits, whole numbers in full, ``unset`` for what is absent.

    >>> value(0.4), value(9000), value((0.9, 0.99)), value(None), value(1 - 1.5e-7)
    ('0.4', '9,000', '(0.9, 0.99)', 'unset', '0.99999985')
    """
    if of is None:
        return "unset"
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
