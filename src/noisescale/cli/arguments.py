"""Numbers on the command line, refused in one line that names option, value and requirement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from noisescale.errors import InvalidInputError

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.ParamType[Any]):
    """A number within bounds; the complaint names option, value and requirement."""

    def __init__(
        self,
        kind: type[int] | type[float],
        at_least: float,
        *,
        above: bool = False,
        below: float = math.inf,
        example: float | None = None,
    ) -> None:
        self.kind, self.at_least, self.above, self.below = kind, at_least, above, below
        self.example = example
        self.name = "whole number" if kind is int else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the number.

        Raises:
            InvalidInputError: it is none, or not within the bounds.
        """
        del ctx
        try:
            number = self.kind(value)
        except ValueError:
            raise self._refusal(value, param) from None
        enough = number > self.at_least if self.above else number >= self.at_least
        # NaN is below nothing, infinity below no bound.
        if not enough or not number < self.below:
            raise self._refusal(value, param)
        return number

    def _refusal(self, value: Any, param: click.Parameter | None) -> InvalidInputError:
        option = max(param.opts, key=len) if param is not None else "value"
        bound = "above" if self.above else "of at least"
        limit = "" if math.isinf(self.below) else f" and below {self.below:g}"
        example = self.at_least + 1 if self.above else max(self.at_least, 1)
        example = example if self.example is None else self.example
        return InvalidInputError(
            f"{option} {value}",
            f"a {self.name} {bound} {self.at_least:g}{limit} is required",
            f"give for example {option} {example:g}",
        )


class Counts(click.ParamType[Any]):
    """Whole numbers with commas between, positive unless told otherwise."""

    name = "N,N,..."

    def __init__(self, at_least: int = 1) -> None:
        self.at_least = at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the numbers, sorted, each once.

        Raises:
            InvalidInputError: one is no whole number of at least that.
        """
        del ctx
        if isinstance(value, tuple):
            return value
        try:
            counts = {int(part) for part in value.split(",")}
        except ValueError:
            counts = {self.at_least - 1}
        if min(counts) < self.at_least:
            option = max(param.opts, key=len) if param is not None else "value"
            raise InvalidInputError(
                f"{option} {value}",
                f"whole numbers of at least {self.at_least} with commas between are required",
                f"give for example {option} 1,2,4,8",
            )
        return tuple(sorted(counts))


COUNT = Number(int, 1)
SEED = Number(int, 0, below=2**63)
SECONDS = Number(float, 0, above=True)
SHARE = Number(float, 0, below=1, example=0.1)


def workload_options(command: Command) -> Command:
    """Add what every command on a workload takes."""
    for decorate in (
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed."),
        click.option(
            "--data", metavar="DIR", help="Data folder of mnist, cifar10, ... [NOISESCALE_DATA]"
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a key of the recipe, for example momentum=0.9. Repeatable.",
        ),
        click.argument("workload"),
    ):
        command = decorate(command)
    return command
