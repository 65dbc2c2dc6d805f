"""The command ``schedule``."""

from __future__ import annotations

from typing import Any

import click

from noisescale.cli.arguments import COUNT, Number
from noisescale.cli.output import show

_UNITS = "examples|sequences|tokens"


@click.command(short_help="Plan batch sizes along a training: grow, warm up, or by a list.")
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option("--grow", is_flag=True, help="Grow the batch instead of decaying the rate.")
@click.option("--text", metavar='"0:768 250B:1536"', help="Sizes from given positions on.")
@click.option("--unit", metavar=_UNITS, help="What the numbers of --text count.")
@click.option("--threshold-unit", metavar=_UNITS, help="What its thresholds count, if another.")
@click.option("--size-unit", metavar=_UNITS, help="What its sizes count, if another.")
@click.option("--sequence-length", type=COUNT, help="Tokens per sequence.")
@click.option(
    "--warmup-batch",
    metavar="SIZE:LENGTH[:INCREMENT]",
    help="Begin with SIZE and double it (or add INCREMENT) until the recipe's size at LENGTH.",
)
@click.option(
    "--max-batch-size", type=COUNT, help="Limit of growth; a tenth of the data if absent."
)
@click.option(
    "--critical-batch", type=Number(float, 0, above=True), help="Limit of growth besides."
)
@click.option(
    "--curvature", type=Number(float, 0, above=True), help="Of the loss; caps the rate of SGD."
)
@click.option("--dataset-size", type=COUNT, help="Training examples, if RECIPE does not say.")
@click.option("--micro", "micro_batch_size", type=COUNT, help="Batch per pass and device.")
@click.option("--replicas", type=COUNT, help="Devices; sizes divide by micro x replicas.")
@click.option("--multiple-of", type=COUNT, help="What sizes must divide by besides.")
@click.option("--powers", is_flag=True, help="Grow by powers of two only.")
@click.option(
    "--growth-factor",
    type=Number(float, 1, above=True, example=2),
    default=2.0,
    show_default=True,
    help="Between neighbouring sizes where the rate falls continuously.",
)
@click.option(
    "--coupling",
    metavar="auto|linear|square_root|none",
    default="auto",
    show_default=True,
    help="How the rate follows the batch size; auto: the square root for Adam, else linear.",
)
@click.option(
    "--total",
    metavar="N",
    help="Length of the training, for example 300B, in the unit of thresholds.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, or make one without RECIPE. Repeatable.",
)
@click.option("--out", metavar="FILE.png|svg", help="Also draw the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def schedule(recipe: str | None, out: str | None, as_json: bool, **options: Any) -> None:
    """Plan batch sizes and rates along the training that RECIPE describes.

    RECIPE is TOML, YAML or JSON: our own flat keys, or a configuration of Transformers,
    DeepSpeed, Lightning or timm. Without a wish its own schedule is shown.
    """
    if out is not None:
        from noisescale.report.schedule_figures import check_drawable

        check_drawable(out)
    from noisescale.run.schedule_file import schedule_file

    plan = schedule_file(recipe, **options)
    if out is not None:
        from noisescale.report.schedule_figures import write_schedule_figure

        write_schedule_figure(plan, out)
    show(plan, "render_schedule", as_json=as_json, module="schedule_terminal")
    if out is not None and not as_json:
        click.echo(f"Figure: {out}")
