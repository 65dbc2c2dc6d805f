"""The command ``branch``."""

from __future__ import annotations

from typing import Any

import click

from noisescale.cli.arguments import COUNT, Counts, Number, workload_options
from noisescale.cli.output import show, working


@click.command(short_help="Measure a critical batch from a point of a training.")
@workload_options
@click.option("--checkpoint", metavar="FILE", help="Weights to start from, loaded weights-only.")
@click.option(
    "--at",
    type=Counts(0),
    default="0",
    show_default=True,
    help="Steps of the training after which branches start, without a checkpoint.",
)
@click.option("--factors", type=Counts(), help="Multiples of the batch size; 1,2,4,... if absent.")
@click.option("--examples", type=COUNT, help="Examples of each branch; one pass if absent.")
@click.option("--seeds", type=Number(int, 2), default=4, show_default=True, help="Data orders.")
@click.option(
    "--tolerance",
    type=Number(float, 0, above=True, example=0.01),
    default=0.01,
    show_default=True,
    help="Loss that may be lost.",
)
@click.option(
    "--rule",
    metavar="auto|linear|square_root",
    default="auto",
    show_default=True,
    help="How the rate is converted; auto: linear, for Adam the square root.",
)
@click.option(
    "--quantity",
    metavar="train_loss|validation_loss",
    default="train_loss",
    show_default=True,
    help="Which loss is compared.",
)
def branch(
    workload: str, overrides: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Run short branches at k times the batch, and find the largest k that loses nothing.

    A batch counts only if all smaller ones keep the loss too.
    """
    with working(as_json=as_json, quiet=quiet) as progress:
        from noisescale.run.branch.driver import branch as run

        found = run(workload, overrides=list(overrides), on_progress=progress, **options)
    show(found, "render_branch", as_json=as_json, module="branch_terminal")
