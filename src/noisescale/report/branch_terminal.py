"""Critical batch sizes by branches, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noisescale.records import BranchPoint, BranchResult
from noisescale.report import terminal, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def render_branch(branch: BranchResult, console: Console | None = None) -> None:
    """Print the critical batch at each point, and what it rests on.

    Args:
        branch: what ``branch`` returned.
        console: where to print; standard output by default.
    """
    styled = terminal._styled
    rule = branch.rule.replace("_", " ")
    subject = (
        f"noisescale {branch.version} · {branch.workload}: {branch.optimizer}, batch"
        f" {wording.count(branch.batch_size, branch.unit)}, lr {wording.setting(branch.lr)};"
        f" branches of {wording.count(branch.examples, branch.unit)}, rates by the {rule} rule,"
        f" {branch.quantity} may lose {wording.setting(branch.tolerance)}"
    )
    parts: list[RenderableType] = [styled(subject, "dim")]
    for point in branch.points:
        parts += ["", styled(_headline(point, branch), _style(point))]
        if point.detail:
            parts.append(styled(wording.sentence(point.detail)))
        parts.append(_rows(point, branch.unit))
    parts.append(styled(f"Measured in {wording.duration(branch.seconds)}.", "dim"))
    terminal._show(console, parts)


def _headline(point: BranchPoint, branch: BranchResult) -> str:
    critical = point.critical_batch
    where = "from the checkpoint" if point.step is None else f"at step {point.step:,}"
    band = wording.interval(critical.low, critical.high, branch.unit)
    if critical.point is None:
        return f"Critical batch {where}: {band}"
    return f"Critical batch {where}: {wording.number(critical.point)} ({band})"


def _style(point: BranchPoint) -> str:
    return "bold green" if point.critical_batch.high is not None else "bold yellow"


def _rows(point: BranchPoint, unit: str) -> Table:
    table = terminal._grid(
        f"batch ({unit})", "factor", "lr", "steps", "loss", "excess", "interval", "verdict"
    )
    for row in point.rows:
        known = row.low is not None and row.factor > 1
        table.add_row(
            f"{row.batch_size:,}",
            f"{row.factor:,}",
            wording.number(row.lr),
            f"{row.steps:,}",
            "-" if row.loss is None else wording.number(row.loss),
            "-" if row.excess is None or row.factor == 1 else wording.number(row.excess),
            wording.interval(row.low, row.high) if known else "-",
            "start" if row.factor == 1 else row.verdict,
        )
    return table
