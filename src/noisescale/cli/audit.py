"""The command ``audit``."""

from __future__ import annotations

from typing import Any

import click

from noisescale.cli.arguments import COUNT, workload_options
from noisescale.cli.output import show, working


@click.command(short_help="Say whether accumulation or replicas change the training.")
@workload_options
@click.option("--micro", type=COUNT, help="Examples per micro-batch; 8, or half of a small batch.")
@click.option(
    "--replicas", type=COUNT, help="Processes that share the batch; 2 where possible, 1 runs none."
)
@click.option("--batch-size", type=COUNT, help="Global batch size; the recipe's if absent.")
def audit(
    workload: str, overrides: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Say whether accumulation or the number of replicas changes the training, and why.

    The gradient of one batch in one pass is compared with that of its micro-batches and of its
    shares in processes of their own; what makes a difference is found by switching it off.
    """
    with working(as_json=as_json, quiet=quiet) as progress:
        from noisescale.run.audit import audit as run

        found = run(workload, overrides=list(overrides), on_progress=progress, **options)
    show(found, "render_audit", as_json=as_json, module="audit_terminal")
