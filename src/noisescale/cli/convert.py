"""The command ``convert``."""

from __future__ import annotations

from typing import Any

import click

from noisescale.cli.arguments import COUNT, Number
from noisescale.cli.output import show

_POSITIVE = Number(float, 0, above=True)


@click.command(short_help="Restate a recipe at another batch size, each change with its rule.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--batch-size",
    type=COUNT,
    help="New global batch size; what the file makes on --new-replicas if absent.",
)
@click.option(
    "--new-dataset-size", type=COUNT, help="Training examples of the new run, where they change."
)
@click.option("--noise-scale", type=_POSITIVE, help="Noise scale at the old batch size.")
@click.option("--curvature", type=_POSITIVE, help="Largest curvature along the run.")
@click.option("--rule", metavar="NAME", help="Rule for the rate; the recommended one if absent.")
@click.option(
    "--data-rule",
    metavar="keep-rate|long-run",
    help="How the rate follows --new-dataset-size; keep-rate if absent.",
)
@click.option("--write", "target", metavar="NEW", help="Write a copy with the new values.")
@click.option(
    "--unit",
    metavar="examples|sequences|tokens",
    help="What --batch-size counts; the recipe's unit if absent.",
)
@click.option("--replicas", type=COUNT, help="Devices of the old run, where the file is silent.")
@click.option("--new-replicas", type=COUNT, help="Devices of the new run.")
@click.option(
    "--dataset-size", type=COUNT, help="Training examples of the old run, where it is silent."
)
@click.option(
    "--old-batch-size", type=COUNT, help="Global batch size of the old run, where it is silent."
)
@click.option(
    "--kind",
    metavar="NAME",
    help="Whose keys: noisescale, transformers, deepspeed, lightning or timm; else told by them.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe first, for example momentum=0.9. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Only what changes, and warnings.")
def convert(
    recipe: str, overrides: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Restate the recipe in the file RECIPE at another global batch size.

    Or for data of another size (--new-dataset-size), or both.

    RECIPE is TOML, YAML or JSON: our own flat keys, or a configuration of Transformers,
    DeepSpeed, Lightning or timm.
    """
    from noisescale.run.convert_file import convert_file

    done = convert_file(recipe, overrides=overrides, **options)
    render = "render_conversion_briefly" if quiet else "render_conversion"
    show(done, render, as_json=as_json, module="conversion_terminal")
    if options["target"] is not None and not as_json:
        click.echo(f"Written: {options['target']}")
