"""What every command does with its record, and around its work."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from noisescale.cli.diverted import output_diverted
from noisescale.cli.progress import Progress, showing

if TYPE_CHECKING:
    from noisescale.records import Record


def show(record: Record, render: str, *, as_json: bool, module: str = "terminal") -> None:
    """Print a record as JSON, or by a function of ``noisescale.report``.

    Args:
        record: what a command returned.
        render: name of the function.
        as_json: print one JSON object instead.
        module: of ``noisescale.report`` that has the function.
    """
    if as_json:
        click.echo(record.to_json(indent=2))
        return
    getattr(importlib.import_module(f"noisescale.report.{module}"), render)(record)


@contextlib.contextmanager
def working(*, as_json: bool, quiet: bool) -> Iterator[Progress]:
    """Show progress; keep what the user's code prints out of the JSON on standard output."""
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(showing(sys.stderr, quiet=quiet))
        if as_json:
            stack.enter_context(output_diverted())
        yield progress
