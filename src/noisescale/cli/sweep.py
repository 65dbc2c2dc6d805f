"""The commands on sweeps: ``sweep`` and ``report``."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from noisescale.cli.arguments import COUNT, SECONDS, workload_options
from noisescale.cli.diverted import output_diverted
from noisescale.cli.output import show
from noisescale.cli.sweep_progress import showing_sweep


@click.command(short_help="Tune at every batch size: steps to target, three regimes.")
@workload_options
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME<VALUE",
    help="Goal; repeatable. The workload's own if absent.",
)
@click.option(
    "--batch-sizes",
    metavar="FROM:TO|N,N,...|full",
    help="Doubled from the first to the second, or listed; about the recipe's if absent.",
)
@click.option("--trials", type=COUNT, help="Settings per batch size at first.  [5, or 24 random]")
@click.option(
    "--seeds", type=COUNT, default=4, show_default=True, help="Runs of those that matter."
)
@click.option(
    "--search",
    metavar="grid|quasi-random",
    default="grid",
    show_default=True,
    help="Rates on a grid, or points in the box of --over.",
)
@click.option("--full", is_flag=True, help="Every setting runs every seed.")
@click.option(
    "--over",
    multiple=True,
    metavar="NAME[=LOW:HIGH]",
    help="What a random search varies: lr, momentum, beta1, beta2, weight_decay, total_examples.",
)
@click.option("--race/--no-race", default=True, help="Stop trials that cannot win.  [race]")
@click.option("--max-steps", type=COUNT, help="Budget of a trial in steps.")
@click.option("--max-examples", type=COUNT, help="Budget of a trial in examples.")
@click.option("--store", metavar="DIR", help="Keep every trial there; again: go on from there.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "stacked", "alone"]),
    default="auto",
    show_default=True,
    help="How trials are trained here.",
)
@click.option(
    "--executor",
    metavar="local|ray|slurm",
    help="Train each trial in a process of its own instead.",
)
@click.option("--slots", type=COUNT, help="Trials at a time of an executor.")
@click.option("--seconds", type=SECONDS, help="About the most time to take.")
@click.option("--rerun-crashed", is_flag=True, help="Run trials of the store that crashed again.")
@click.option("--report", metavar="FILE.html", help="Also write one self-contained page.")
def sweep(
    workload: str,
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    report: str | None,
    **options: Any,
) -> None:
    """Tune at every batch size, and say how many steps each needs to the target.

    With --store the same command again goes on where it was; counts are totals.
    """
    _check_page(report)  # before minutes of training
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(showing_sweep(sys.stderr, quiet=quiet))
        if as_json:
            stack.enter_context(output_diverted())
        from noisescale.run.sweep.driver import sweep as run

        try:
            found = run(workload, overrides=list(overrides), on_progress=progress, **options)
        except KeyboardInterrupt:
            stack.close()
            if options["store"] is not None:
                kept = f"what was finished is kept in {options['store']}"
                click.echo(f"noisescale: {kept}: the same command again goes on", err=True)
            raise
    _finish(found, page=report, as_json=as_json)


@click.command(short_help="Show what a sweep's store holds, as a table or a page.")
@click.argument("store", metavar="STORE")
@click.option("--target", help="Which goal to begin with.")
@click.option("--out", metavar="FILE.html", help="Also write one self-contained page.")
@click.option("--csv", metavar="FILE.csv", help="Also write a row per trial and target.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(store: str, target: str | None, out: str | None, csv: str | None, as_json: bool) -> None:
    """Show what a sweep's store holds: steps to target, steps law, three regimes."""
    _check_page(out)
    from noisescale.run.sweep.summary import summarise_store

    if csv is not None:
        from noisescale.run.store import TrialStore

        TrialStore.open(store).to_csv(csv)
    _finish(summarise_store(store, target=target), page=out, as_json=as_json)


def _check_page(path: str | None) -> None:
    if path is not None:
        from noisescale.report.page import check_ready

        check_ready(path)


def _finish(found: Any, *, page: str | None, as_json: bool) -> None:
    if page is not None:
        from noisescale.report.sweep_page import write_sweep_page

        write_sweep_page(found, page)
    show(found, "render_sweep", as_json=as_json, module="sweep_terminal")
    if page is not None and not as_json:
        click.echo(f"Report: {page}")
