"""Records as text for a terminal: readable at 80 columns, in colour or piped into a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from noisescale.records import (
    Advice,
    BatchSplit,
    Limits,
    Measurement,
    NoiseScale,
    Outcome,
    RateCheck,
    Tradeoff,
    TrajectoryRow,
)
from noisescale.report import costs, critical_wording, wording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_WIDTH = 100  # columns; assumed: longer lines are hard to read
_ROWS = 22  # assumed: what a small terminal shows at once beside the rest
_PLAIN = str.maketrans({"×": "x", "–": "-", "·": "-", "µ": "u", "²": "^2", "Σ": "Sigma"})


def render_advice(advice: Advice, console: Console | None = None) -> None:
    """Print the answer first, then what it rests on.

    Args:
        advice: what ``advise`` returned.
        console: where to print; standard output by default.
    """
    parts: list[RenderableType] = [
        _styled(_subject(advice), "dim"),
        "",
        _styled(wording.headline(advice), "bold green" if advice.recommended else "bold yellow"),
    ]
    parts += ["", _limits(advice.limits, advice.unit, advice.noise_scale.level)]
    if advice.limits.critical_batch.detail:
        detail = wording.sentence(advice.limits.critical_batch.detail)
        parts.append(_line("Critical batch: ", detail))
    parts.append(_line("Noise scale: ", _along(advice)))
    parts += ["", *_rate(advice.rate_check, advice.unit), ""]
    if advice.calibration is not None:
        from noisescale.report.sweep_terminal import calibration_parts

        parts += calibration_parts(advice.calibration, advice.unit)
    parts += _costs(advice)
    parts += _reasons(advice)
    parts += _warnings(advice.warnings)
    parts.append(_styled(f"Measured in {wording.duration(advice.seconds)}.", "dim"))
    _show(console, parts)


def render_measurement(measurement: Measurement, console: Console | None = None) -> None:
    """Print a noise scale, along the run and per parameter group.

    Args:
        measurement: what ``measure`` returned.
        console: where to print; standard output by default.
    """
    noise = measurement.noise_scale
    norm = "" if noise.preconditioner == "none" else f" ({noise.preconditioner} norm)"
    parts: list[RenderableType] = [
        _styled(_conditions(measurement), "dim"),
        "",
        _styled(f"Noise scale{norm}: {wording.noise_scale(noise)}", _style_of(noise)),
    ]
    if noise.detail:
        parts.append(_styled(wording.sentence(noise.detail)))
    parts += [_line("Rests on ", wording.rests_on(noise)), *_warnings(measurement.warnings)]
    if noise.grad_sq is not None or noise.trace_cov is not None:
        parts.append(_line("|G|² ", _moments(noise)))
    if measurement.curvature is not None:
        parts.append(_line("Curvature ", wording.curvature(measurement.curvature)))
    if measurement.trajectory:
        parts += [
            "",
            _styled("Along the run", "bold"),
            _trajectory(measurement.trajectory, noise.unit),
        ]
    if measurement.groups:
        parts += [
            "",
            _styled("Per parameter group", "bold"),
            _groups(measurement.groups, noise.unit),
        ]
    parts.append(_styled(f"Measured in {wording.duration(measurement.seconds)}.", "dim"))
    _show(console, parts)


def render_split(split: BatchSplit, console: Console | None = None) -> None:
    """Print how a global batch is made.

    Args:
        split: what ``split`` returned.
        console: where to print; standard output by default.
    """
    sentence = wording.split_sentence(split, split.unit)
    table = _plain_table()
    for name, value, meaning in (
        ("global batch", split.global_batch_size, f"{split.unit} per optimizer step"),
        ("micro-batch", split.micro_batch_size, f"{split.unit} per pass on one device"),
        ("accumulation", split.accumulation, "passes per optimizer step on one device"),
        ("replicas", split.replicas, "devices that average their gradients"),
    ):
        table.add_row(name, _styled(f"{value:,}", "bold"), _styled(meaning, "dim"))
    _show(console, [_styled(sentence[0].upper() + sentence[1:], "bold"), "", table])


def render_tradeoff(tradeoff: Tradeoff, console: Console | None = None) -> None:
    """Print the steps law fitted to batch sizes and steps.

    Args:
        tradeoff: what ``tradeoff`` returned.
        console: where to print; standard output by default.
    """
    target = f" to {tradeoff.target}" if tradeoff.target else ""
    level = wording.percent(tradeoff.level)
    table = _grid("quantity", "estimate", f"{level} interval")
    for name, value, unit in (
        ("critical global batch Bcrit = Emin / Smin", tradeoff.critical_batch, tradeoff.unit),
        ("fewest steps Smin, at very large batch", tradeoff.steps_min, "steps"),
        ("fewest examples Emin, at very small batch", tradeoff.examples_min, tradeoff.unit),
        ("20 % more examples than the smallest size", tradeoff.overhead_batch, tradeoff.unit),
    ):
        bounds = wording.interval(value.low, value.high)
        table.add_row(name, wording.quantity(value.point, unit), bounds)
    good = tradeoff.outcome is Outcome.DETERMINED
    head = f"Steps law S = Smin (1 + Bcrit/B){target}: {wording.outcome(tradeoff.outcome)}"
    parts: list[RenderableType] = [_styled(head, "bold green" if good else "bold yellow")]
    if tradeoff.detail:
        parts.append(_styled(wording.sentence(tradeoff.detail)))
    _show(console, [*parts, "", table, "", *_fit(tradeoff)])


def _fit(tradeoff: Tradeoff) -> list[RenderableType]:
    fit = tradeoff.fit
    runs = f"{wording.count(fit.points, 'runs')} at {wording.count(fit.batch_sizes, 'batch sizes')}"
    if fit.censored:
        runs += f", {fit.censored:,} more that did not reach the target (lower bounds)"
    lines: list[RenderableType] = [_line("Data: ", runs)]
    if not math.isfinite(fit.rms_log_error):
        return lines  # too few rows: there is no fit to speak of
    error = f"rms log error {wording.number(fit.rms_log_error)}"
    if fit.replication_error is not None:
        error += f", between repeats {wording.number(fit.replication_error)}"
    if fit.lack_of_fit_p is not None:
        error += f", lack of fit p = {wording.number(fit.lack_of_fit_p)}"
    lines.append(_line("Fit:  ", error))
    # Without a point it is the detail that says on which side sizes are missing, if any.
    if not fit.brackets and tradeoff.critical_batch.point is not None:
        lines += _warnings(("all batch sizes lie on one side of the critical batch",))
    return lines


def _show(console: Console | None, parts: Sequence[RenderableType]) -> None:
    from rich.console import Console, Group

    target = console if console is not None else Console()
    options = {"soft_wrap": False, "width": min(target.width, _WIDTH), "highlight": False}
    if target.encoding.startswith("utf"):
        target.print(Group(*parts), **options)  # type: ignore[arg-type]
        return
    with target.capture() as captured:
        target.print(Group(*parts), **options)  # type: ignore[arg-type]
    text = captured.get().translate(_PLAIN)
    target.file.write(text.encode(target.encoding, "replace").decode(target.encoding))


def _styled(text: str, style: str = "") -> Text:
    """Make text of a string without reading markup in it: names come from users."""
    from rich.text import Text

    return Text(text, style=style)


def _line(name: str, value: str, style: str = "") -> Text:
    return _styled("").append(name, style="bold").append(value, style=style)


def _bullets(texts: Sequence[str], mark: str, style: str) -> list[RenderableType]:
    table = _plain_table()
    for text in texts:
        table.add_row(_styled(mark, style), _styled(text, style))
    return [table] if texts else []


def _warnings(texts: Sequence[str]) -> list[RenderableType]:
    return _bullets(texts, "Warning:", "yellow")


def _reasons(advice: Advice) -> list[RenderableType]:
    """The reasons; without a recommendation the first one is in the headline already."""
    shown = advice.reasons if advice.recommended else advice.reasons[1:]
    if not shown:
        return []
    title = "Why" if advice.recommended else "Besides"
    sentences = [wording.sentence(text) for text in shown]
    return [_styled(title, "bold"), *_bullets(sentences, "-", ""), ""]


def _plain_table() -> Table:
    from rich.table import Table

    return Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)


def _grid(*columns: str) -> Table:
    """Make a table whose first column is a name and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _subject(advice: Advice) -> str:
    target = f", target {advice.target}" if advice.target else ", no target"
    recipe = wording.recipe_line(advice.recipe)
    return (
        f"noisescale {advice.version} · {advice.workload}: {recipe}{target} · {advice.speed.device}"
    )


def _conditions(measurement: Measurement) -> str:
    noise = measurement.noise_scale
    where = "weights held still" if measurement.frozen else "along the training"
    rate = "" if measurement.lr is None else f", lr {wording.setting(measurement.lr)}"
    batch = wording.count(measurement.batch_size, noise.unit)
    return f"{measurement.workload}: global batch {batch}{rate}, {where}"


def _style_of(noise: NoiseScale) -> str:
    return "bold green" if noise.outcome is Outcome.DETERMINED else "bold yellow"


def _moments(noise: NoiseScale) -> str:
    return f"{wording.number(noise.grad_sq)}, tr(Σ) {wording.number(noise.trace_cov)}"


def _along(advice: Advice) -> str:
    text = f"{wording.noise_scale(advice.noise_scale)} pooled"
    if advice.first is None or advice.last is None:
        return text
    first, last = map(wording.noise_scale_short, (advice.first, advice.last))
    return f"{text}; along the first run {first} in its first quarter, {last} in its last"


def _limits(limits: Limits, unit: str, level: float) -> Table:
    """The three limits side by side."""
    from rich import box
    from rich.table import Table

    critical = limits.critical_batch
    table = Table(box=box.ROUNDED, expand=True, header_style="bold", padding=(0, 1))
    for name, share in (("Fits in memory", 5), ("Throughput knee", 5), ("Critical batch", 8)):
        table.add_column(name, ratio=share, overflow="fold")
    memory = wording.memory_lines(limits.memory, unit)
    note = wording.memory_note(limits.memory)
    table.add_row(
        _cell(wording.memory_point(limits.memory, unit), memory, note),
        _cell(
            wording.knee_point(limits.throughput_knee, unit),
            wording.knee_lines(limits.throughput_knee, unit),
        ),
        _cell(
            f"global batch {critical_wording.critical_point(critical)}"
            if critical.low is not None
            else critical_wording.critical_point(critical),
            critical_wording.critical_lines(critical, level),
        ),
    )
    return table


def _cell(point: str, lines: Sequence[tuple[str, str]], note: str = "") -> Text:
    text = _styled("").append(point, style="bold cyan")
    for name, value in lines:
        text.append(f"\n{name}: ", style="dim").append(value)
    return text.append(f"\n{note}") if note else text


def _rate(check: RateCheck, unit: str) -> list[RenderableType]:
    style = "green" if check.verdict == "near_best" else "yellow"
    lines: list[RenderableType] = [_line("Rate check: ", wording.rate_verdict(check), style)]
    for text in (check.detail, wording.rate_consequence(check, unit)):
        if text:
            lines.append(_styled(wording.sentence(text)))
    return lines


def _costs(advice: Advice) -> list[RenderableType]:
    if not advice.table:
        return []
    columns = costs.cost_columns(advice)
    goal = "to the target" if costs.judged(advice) else "per step"
    title = f"What each global batch costs {goal} (batch sizes in {advice.unit})"
    table = _grid(*columns)
    rows = costs.thinned(advice.table, advice.recommended, _ROWS)
    for row in rows:
        cells = [write(row) for write in columns.values()]
        cells[0] = costs.mark(row, advice) + cells[0]
        table.add_row(*cells, style=costs.row_style(row, advice))
    legend = costs.legend(advice)
    left = len(advice.table) - len(rows)
    if left:
        legend.append(f"{wording.count(left, 'rows')} left out here; --json and the page have all")
    return [_styled(title, "bold"), table, *(_styled(line, "dim") for line in legend), ""]


def _trajectory(rows: Sequence[TrajectoryRow], unit: str) -> Table:
    table = _grid("step", f"{unit} seen", "loss", f"noise scale ({unit})", "interval")
    stride = -(-len(rows) // _ROWS)
    for row in rows[::-stride][::-1]:
        table.add_row(
            f"{row.step:,}",
            f"{row.examples:,}",
            wording.number(row.loss),
            "?" if row.b_simple is None else wording.number(row.b_simple),
            wording.interval(row.low, row.high),
        )
    return table


def _groups(groups: dict[str, NoiseScale], unit: str) -> Table:
    table = _grid("parameter group", f"noise scale ({unit})", "interval")
    for name, noise in groups.items():
        point = "?" if noise.b_simple is None else wording.number(noise.b_simple)
        bounds = wording.interval(noise.low, noise.high)
        known = noise.low is not None or noise.high is not None
        table.add_row(_styled(name), point, bounds if known else wording.outcome(noise.outcome))
    return table
