"""Converted recipes as text for a terminal."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from noisescale.records import (
    Alternative,
    Change,
    Conversion,
    DataConversion,
    GroupConversion,
    LiveConversion,
)
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_Row = tuple[str, str, str, str, str]
_GAPS = 8  # columns between the five of the table
_OPTIONS = ("--data-rule NAME", "--rule NAME")
_ARGUMENTS = ('data_rule="NAME"', 'rule="NAME"')
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


def render_live_conversion(conversion: LiveConversion, console: Console | None = None) -> None:
    """Print what changes in an optimizer and its scheduler, why, and what other rules say.

    Parameter groups that change alike are told of once.

    Args:
        conversion: what :func:`~noisescale.plan.live.convert_live` returned.
        console: where to print; standard output by default.
    """
    parts = _live_head(conversion)
    changes = []
    for title, rows, askable in _live_parts(conversion):
        changes += list(rows)
        parts += [terminal._styled(title, "bold"), *_tabled(list(_rows(rows, askable)), console)]
    if not conversion.unchanged:
        found = [group.conversion for group in conversion.groups]
        of = " of the first group" if len(found) > 1 else ""
        parts += [*_reasons(found, changes), *_others(found[0], _ARGUMENTS, of)]
    left = [wording.sentence(text) for text in conversion.not_converted]
    warnings = [wording.sentence(text) for text in conversion.warnings]
    parts += terminal._bullets(left, "Left as it is:", "yellow")
    terminal._show(console, parts + terminal._warnings(warnings))


def conversion_text(conversion: Conversion | LiveConversion) -> str:
    """Return what a terminal as wide as this one shows, without colours.

    Args:
        conversion: of a recipe, or of a live optimizer.
    """
    import io

    from rich.console import Console

    file = io.StringIO()
    if isinstance(conversion, LiveConversion):
        render_live_conversion(conversion, Console(file=file))
    else:
        render_conversion(conversion, Console(file=file))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip("\n")


def _live_head(conversion: LiveConversion) -> list[RenderableType]:
    what = conversion.optimizer
    if conversion.scheduler is not None:
        what += f" with {conversion.scheduler}, stepped once per {conversion.scheduler_per}"
    batch = wording.count(conversion.old_batch_size, conversion.unit)
    was = f"noisescale convert · {what}, global batch {batch}"
    answer = terminal._styled(wording.sentence(_live_answer(conversion)), "bold green")
    return [terminal._styled(was, "dim"), "", answer, ""]


def _live_answer(conversion: LiveConversion) -> str:
    """Give the sentence of the one rate, or one for the rates of all groups."""
    answers = dict.fromkeys(group.conversion.summary for group in conversion.groups)
    first, *others = answers
    if not others:
        return first
    factors = [g.conversion.recipe.lr / g.conversion.original.lr for g in conversion.groups]
    low, high = (f"{factor:.4g}" for factor in (min(factors), max(factors)))
    times = low if low == high else f"{low} to {high}"
    turn = first.partition(";")[0]
    return f"{turn}; the rates of {len(factors)} parameter groups are multiplied by {times}"


def _live_parts(
    conversion: LiveConversion,
) -> Iterator[tuple[str, tuple[Change, ...], set[str | None]]]:
    """Give each set of changes its title; groups that change alike share one."""
    alike: dict[str, list[GroupConversion]] = {}
    for group in conversion.groups:
        alike.setdefault(_kind_of_change(group), []).append(group)
    for groups in alike.values():
        first = groups[0]
        if first.changes:
            names = ", ".join(group.name or str(group.index) for group in groups)
            title = f"Parameter group{'s' if len(groups) > 1 else ''} {names}"
            yield title, _together(groups), _askable(first.conversion)
    if conversion.scheduler_changes:
        yield "Scheduler", conversion.scheduler_changes, set()


def _kind_of_change(group: GroupConversion) -> str:
    """Tell groups apart by what they do: rates differ often, and go by one factor."""
    return repr(
        [
            (row.name, row.rule, f"{row.new / row.old:.9g}")
            if row.old and isinstance(row.old, int | float)
            else (row.name, row.rule, row.old, row.new)
            for row in group.changes
        ]
    )


def _together(groups: Sequence[GroupConversion]) -> tuple[Change, ...]:
    """Make one row of what the groups have in common, from the least value to the largest."""
    rows = zip(*(group.changes for group in groups), strict=True)
    return tuple(
        dataclasses.replace(
            row[0],
            old=_span([change.old for change in row]),
            new=_span([change.new for change in row]),
        )
        for row in rows
    )


def _span(values: Sequence[Any]) -> Any:
    same = all(one == values[0] for one in values)
    return values[0] if same else f"{value(min(values))} to {value(max(values))}"


def _cautions(conversion: Conversion) -> list[RenderableType]:
    sentences = [wording.sentence(text) for text in conversion.warnings]
    notes = [wording.sentence(text) for text in conversion.notes]
    return terminal._warnings(sentences) + terminal._bullets(notes, "Note:", "dim")


def _head(conversion: Conversion) -> list[RenderableType]:
    was = f"noisescale convert · {wording.recipe_line(conversion.original)}"
    answer = wording.sentence(conversion.summary)
    return [terminal._styled(was, "dim"), "", terminal._styled(answer, "bold green"), ""]


def _changes(conversion: Conversion, console: Console | None) -> list[RenderableType]:
    return _tabled(list(_rows(conversion.changes, _askable(conversion))), console)


def _tabled(rows: Sequence[_Row], console: Console | None) -> list[RenderableType]:
    from rich.console import Console

    if not rows:
        return []
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

    Shared so that the table has the fewest lines, then so that papers are whole: rich shrinks both
    alike, below the least width of the one, and then cuts the other.
    """
    *fixed, least_rule, least_source = _least_widths(rows)
    room -= sum(fixed)
    widest = max(len(row[4]) for row in rows)
    shares = [(room - source, source) for source in range(least_source, room - least_rule + 1)]
    rule, source = min(shares, key=lambda share: (_lines(rows, *share), -min(share[1], widest)))
    return min(max(len(row[3]) for row in rows), rule), min(widest, source)


def _lines(rows: Sequence[_Row], rule: int, source: int) -> int:
    """Return how many lines a table has at widths of its two last columns."""
    return sum(
        max(len(textwrap.wrap(row[3], rule)), len(textwrap.wrap(row[4], source))) for row in rows
    )


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


def _askable(conversion: Conversion) -> set[str | None]:
    """Return the names of rules that can be asked for; the others are words, and fold as such."""
    return {conversion.rule, None if conversion.data is None else conversion.data.rule}


def _rows(changes: Iterable[Change], askable: set[str | None]) -> Iterator[_Row]:
    """Give each change its name, values, rule and paper; of a table only what differs in it."""
    for row in changes:
        rule = row.rule
        if not askable & set(rule.split(", ")):
            rule = rule.replace("-", " ")
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
    return _reasons([conversion], conversion.changes)


def _reasons(conversions: Sequence[Conversion], changes: Iterable[Change]) -> list[RenderableType]:
    """Tell of each rule that set a rate, then of each change; what is said alike is said once."""
    table = terminal._plain_table()
    rules = [rule for one in conversions for rule in (one, one.data) if rule is not None]
    told = (line for rule in rules if rule.rule is not None for line in _of_rule(rule))
    for name, text in dict.fromkeys(told):
        table.add_row("-", terminal._line(name, text))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in changes:
        if row.why and row.status != "given":
            reasons.setdefault((row.why, _with_status(row)), []).append(label(row))
    for (why, source), names in reasons.items():
        reason = terminal._line(f"{', '.join(dict.fromkeys(names))}: ", f"{why}. ")
        table.add_row("-", reason.append(f"({source})", style="dim"))
    return [terminal._styled("Why", "bold"), table, ""]


def _with_status(row: Change) -> str:
    return row.source if row.source == "arithmetic" else f"{row.status}: {row.source}"


def _of_rule(rule: Conversion | DataConversion) -> Iterator[tuple[str, str]]:
    yield f"{rule.rule}, ", f"{rule.why}."
    yield "It keeps: ", f"{rule.preserves}."
    yield "It assumes: ", f"{rule.assumption}."
    yield f"It holds ({rule.status}): ", f"{rule.validity}."


def _kept(kept: Sequence[Change]) -> list[RenderableType]:
    if not kept:
        return []
    table = terminal._plain_table()
    for row in kept:
        table.add_row("-", terminal._line(f"{label(row)} {value(row.old)}: ", f"{row.why}."))
    return [terminal._styled("Stays as it is", "bold"), table, ""]


def _others(
    conversion: Conversion, options: tuple[str, str] = _OPTIONS, of: str = ""
) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for rule, option in zip((conversion.data, conversion), options, strict=True):
        if rule is None or not rule.alternatives:
            continue
        table = terminal._plain_table()
        for one in rule.alternatives:
            table.add_row(*_other(one, one.rule == rule.recommended, options is _ARGUMENTS))
        heading = f"What other rules say{of}"
        if rule is not conversion:
            heading = "For the data, the other rule"
        lines += [terminal._styled(f"{heading} ({option})", "bold"), table, ""]
    return lines


def _other(one: Alternative, recommended: bool, in_python: bool) -> tuple[Text, Text]:
    name = terminal._styled(one.rule, "bold")
    if recommended:
        name.append("\nrecommended", style="green")
    said = ", ".join(f"{key} {value(new)}" for key, new in one.values.items())
    if one.needs:
        given = (
            f"{need}=X" if in_python else f"--{need.replace('_', '-')} X" for need in one.needs
        )
        options = " and ".join(given)
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
