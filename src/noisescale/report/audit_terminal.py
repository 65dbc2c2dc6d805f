"""An audit as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noisescale.records import Audit, AuditCause, AuditClipping, AuditGroup
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_VERDICTS = {
    "same": ("The same.", "bold green"),
    "same_in_expectation": ("The same on average.", "bold green"),
    "different": ("Different.", "bold red"),
    "undetermined": ("Undetermined.", "bold yellow"),
}
_KINDS = {
    "token_mean": "Mean over something else than examples",
    "sum": "Loss that depends on the batch size",
    "partial_window": "Last micro-batch of another size",
    "collate": "Batches that are padded by what is in them",
    "batch_norm": "BatchNorm",
    "mixing": "Examples that are mixed",
    "state": "Buffers that change in every pass",
    "dropout": "Dropout",
    "random": "Random numbers",
    "replicas": "Replicas that do not share gradients",
    "unexplained": "Not explained",
}
_MOST_GROUPS = 16  # assumed: what a small terminal shows at once beside the rest
_MOST_NAMES = 4


def render_audit(audit: Audit, console: Console | None = None) -> None:
    """Print the verdict, its causes and what to do, then the differences.

    Args:
        audit: what ``audit`` returned.
        console: where to print; standard output by default.
    """
    styled = terminal._styled
    head, style = _VERDICTS[audit.verdict]
    parts: list[RenderableType] = [
        styled(_subject(audit), "dim"),
        "",
        styled(f"{head} {wording.sentence(audit.detail)}", style),
        "",
    ]
    for cause in audit.causes:
        parts += [*_cause(cause, audit), ""]
    parts += [styled("Relative difference from the gradient of one pass", "bold")]
    parts += [_differences(audit), *_legend(audit), ""]
    if audit.clipping is not None:
        parts += [*_clipping(audit.clipping, audit.unit), ""]
    parts += terminal._warnings(
        [text if text.endswith("?") else f"{text}." for text in audit.warnings]
    )
    parts.append(styled(f"Measured in {wording.duration(audit.seconds)}.", "dim"))
    terminal._show(console, parts)


def _subject(audit: Audit) -> str:
    text = (
        f"noisescale {audit.version} · {audit.workload}: a batch of"
        f" {wording.count(audit.batch_size, audit.unit)} in one pass, as"
        f" {wording.count(audit.micro_batches, 'micro-batches')} of {audit.micro_batch_size}"
    )
    if audit.last_micro_batch != audit.micro_batch_size:
        text += f" (the last of {audit.last_micro_batch})"
    if audit.replicas.processes > 1:
        text += f", and over {audit.replicas.processes} replicas"
        if audit.replicas.through == "DistributedDataParallel":
            text += " by DistributedDataParallel"
    return text


def _cause(cause: AuditCause, audit: Audit) -> list[RenderableType]:
    sides = " and ".join(cause.affects)
    if cause.difference is None:
        size = ""
    elif cause.ratio is not None:
        times = wording.number(cause.ratio)
        size = f": {_percent(cause.difference)}, a gradient {times} times as large"
    else:
        alone = " alone" if len(audit.causes) > 1 else ""
        size = f": {_percent(cause.difference)}{alone}"
    lines: list[RenderableType] = [
        terminal._line(f"{_KINDS[cause.kind]}{size}", f" ({sides})", "dim")
    ]
    shown = list(cause.where[:_MOST_NAMES])
    more = len(cause.where) - len(shown)
    where = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    rows = [("Where", where), ("Found", cause.evidence), ("Do", cause.remedy)]
    table = terminal._plain_table()
    for name, text in rows:
        if text:
            words = text if name == "Where" else wording.sentence(text)
            table.add_row(terminal._styled(f"  {name}", "dim"), terminal._styled(words))
    return [*lines, table]


def _differences(audit: Audit) -> Table:
    partial = audit.last_micro_batch != audit.micro_batch_size
    columns = ["parameters", "accumulated"]
    columns += ["weighted"] if partial else []
    columns += ["replicas"] if audit.total.replicas is not None else []
    columns += ["redrawn"] if audit.total.rng else []
    known = audit.total.floating_point is not None
    columns += ["rounding"] if known else []
    table = terminal._grid(*columns)
    for row in (audit.total, *_shown(audit)):
        cells = [row.name or "all"]
        cells += [_percent(row.accumulated)]
        cells += [_percent(row.weighted)] if partial else []
        cells += [_percent(row.replicas)] if audit.total.replicas is not None else []
        cells += [_percent(row.rng)] if audit.total.rng else []
        cells += [_percent(row.floating_point)] if known else []
        table.add_row(
            *(terminal._styled(cell) for cell in cells), style="" if row.same else "yellow"
        )
    return table


def _shown(audit: Audit) -> list[AuditGroup]:
    """The groups in their order; of many, those that differ most."""
    if len(audit.groups) == 1:
        return []
    if len(audit.groups) <= _MOST_GROUPS:
        return list(audit.groups)
    largest = sorted(audit.groups, key=lambda row: -(row.accumulated or 0.0))[:_MOST_GROUPS]
    return [row for row in audit.groups if row in largest]


def _legend(audit: Audit) -> list[RenderableType]:
    total, lines = audit.total, []
    if audit.last_micro_batch != audit.micro_batch_size:
        lines.append("weighted: micro-batches by their examples")
    if total.rng:
        lines.append("redrawn: one pass with other random numbers")
    lines.append(
        "random numbers cannot be switched off: differences of means over draws up to"
        f" {_percent(total.tolerance)} are taken for chance"
        if total.floating_point is None
        else "rounding: the same examples in another order, without random numbers; differences up"
        f" to {_percent(total.tolerance)} are taken for it"
    )
    hidden = len(audit.groups) - len(_shown(audit))
    if hidden and len(audit.groups) > 1:
        lines.append(f"{wording.count(hidden, 'modules')} that differ less are in --json")
    if audit.another_batch is not None:
        lines.append(
            f"for scale, another batch of {audit.batch_size}: {_percent(audit.another_batch)}"
        )
    if audit.last_window:
        lines.append(
            f"an epoch leaves {wording.count(audit.last_window, audit.unit)} for its last batch:"
            f" drop them, or divide by what there is, not by {audit.micro_batches} micro-batches"
        )
    return [terminal._styled(line, "dim") for line in lines]


def _clipping(clipping: AuditClipping, unit: str) -> list[RenderableType]:
    del unit
    norms = clipping.micro_norms
    mean = sum(norms) / len(norms)
    table = terminal._grid(f"clipping at {wording.setting(clipping.clip_norm)}", "difference")
    for name, value in (
        ("once, after accumulation", clipping.after),
        ("every micro-batch", clipping.each),
        ("the sum, before dividing", clipping.before_dividing),
    ):
        table.add_row(name, _percent(value))
    text = (
        f"norm {wording.number(clipping.norm)} in one pass, {wording.number(mean)} on average in a"
        f" micro-batch, {clipping.clipped_micro_batches} of {len(norms)} above the bound"
    )
    return [table, terminal._styled(text, "dim")]


def _percent(value: float | None) -> str:
    """Write a relative difference.

    >>> _percent(0.75), _percent(0.0123), _percent(2.1e-7), _percent(0.0), _percent(None)
    ('75.0 %', '1.23 %', '2e-7', '0', '-')
    """
    if value is None:
        return "-"
    if value >= 1e-4:
        return f"{wording.number(100 * value)} %"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
