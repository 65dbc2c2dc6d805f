"""The command line: parse, make one public call, print.

Only click and the standard library are imported here; torch, scipy and rich are imported by
the commands that need them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from noisescale import __version__
from noisescale.cli.arguments import COUNT, SECONDS, SHARE, Counts, Number, workload_options
from noisescale.cli.audit import audit
from noisescale.cli.branch import branch
from noisescale.cli.convert import convert
from noisescale.cli.output import show, working
from noisescale.cli.schedule import schedule
from noisescale.cli.sweep import report, sweep
from noisescale.errors import InvalidInputError, NoisescaleError, nearest

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what follows the program's name; those of the process by default.

    Returns:
        0 done, 2 bad input with one line on standard error, 130 interrupted.
    """
    try:
        # Not cli.main(): it writes lines of its own on an interruption.
        given = sys.argv[1:] if arguments is None else list(arguments)
        with cli.make_context("noisescale", given) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as problem:
        return _complain(_as_one_line(problem))
    except NoisescaleError as problem:
        return _complain(str(problem))
    except (KeyboardInterrupt, click.Abort):
        print("noisescale: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has left
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return DONE
    return DONE


def _complain(line: str) -> int:
    print(f"noisescale: error: {' '.join(line.split())}", file=sys.stderr)
    return BAD_INPUT


def _as_one_line(problem: click.ClickException) -> str:
    """Word click's own complaints as VALUE: REQUIREMENT; REMEDY."""
    context = getattr(problem, "ctx", None)
    where = context.command_path if context is not None else "noisescale"
    see = f"see {where} --help"
    if isinstance(problem, click.NoSuchOption):
        close = problem.possibilities
        remedy = f"did you mean {' or '.join(sorted(close))}?" if close else see
        return f"{problem.option_name}: there is no such option; {remedy}"
    if isinstance(problem, click.MissingParameter):
        name = "argument" if problem.param is None else problem.param.human_readable_name
        if isinstance(problem.param, click.Option):
            name = max(problem.param.opts, key=len)
        return f"{name}: it is required and missing; {see}"
    words = problem.format_message().rstrip(".")
    return f"{where}: {words[:1].lower()}{words[1:]}; {see}"


class _Commands(click.Group):
    """Commands in their order of use; a wrong name gets the nearest ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise InvalidInputError(
                f"command {args[0]!r}", "there is no such command", nearest(args[0], self.commands)
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands, invoke_without_command=True, context_settings={"max_content_width": 100}
)
@click.version_option(__version__, prog_name="noisescale", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """What batch size to use, what it costs, and what must change with it.

    WORKLOAD is a built-in name (digits, digits-cnn, chars, quadratic; with --data: mnist,
    mnist-cnn, cifar10, shakespeare), module:attribute or path/to/file.py:attribute.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Say what batch size to use, what it costs, and why.")
@workload_options
@click.option("--seconds", type=SECONDS, help="About the most time to take.")
@click.option(
    "--devices", type=Counts(), default="1", show_default=True, help="Numbers of devices."
)
@click.option(
    "--max-waste",
    type=Number(float, 1, above=True),
    default=1.5,
    show_default=True,
    help="Most examples, over the fewest that reach the target, that you accept.",
)
@click.option("--report", metavar="FILE.html", help="Also write one self-contained page.")
@click.option(
    "--margin", type=SHARE, default=0.1, show_default=True, help="Share of memory to keep free."
)
@click.option("--target", metavar="NAME<VALUE", help="Goal, for example validation_error<0.05.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Also tune at two or three batch sizes, and rest the critical batch on them.",
)
@click.option("--calibrate-seconds", type=SECONDS, help="About the most time for that.")
@click.option("--store", metavar="DIR", help="Folder that keeps the tuning's trials.")
def advise(
    workload: str,
    overrides: tuple[str, ...],
    data: str | None,
    seed: int,
    as_json: bool,
    quiet: bool,
    report: str | None,
    margin: float,
    **options: Any,
) -> None:
    """Say what batch size to use: what fits, what pays, what it costs, and why."""
    from noisescale.report.page import check_ready, write_page

    for name in ("calibrate_seconds", "store"):
        if options[name] is not None and not options["calibrate"]:
            option = f"--{name.replace('_', '-')} {options[name]}"
            raise InvalidInputError(option, "it belongs to --calibrate", "add --calibrate")
    if report is not None:
        check_ready(report)  # before minutes of measuring
    with working(as_json=as_json, quiet=quiet) as progress:
        from noisescale.run.advise import advise as run

        advice = run(
            workload,
            overrides=list(overrides),
            data=data,
            seed=seed,
            margin=margin,
            on_progress=progress,
            **options,
        )
        if report is not None:
            write_page(advice, report)
    show(advice, "render_advice", as_json=as_json)
    if report is not None and not as_json:
        click.echo(f"Report: {report}")


@cli.command()
@workload_options
@click.option("--steps", type=COUNT, help="Optimizer steps; until the workload's target if absent.")
@click.option("--batch-size", type=COUNT, help="Global batch size; the recipe's if absent.")
@click.option(
    "--source",
    metavar="auto|examples|microbatches",
    default="auto",
    show_default=True,
    help="Where the squared gradient norms come from.",
)
@click.option("--frozen", is_flag=True, help="Hold the weights at their start.")
@click.option(
    "--preconditioner",
    metavar="none|adam",
    default="none",
    show_default=True,
    help="Norm of gradients: plain, or divided as the recipe's Adam divides them.",
)
@click.option("--curvature", is_flag=True, help="Also the Hessian's largest eigenvalue.")
def measure(
    workload: str,
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the gradient noise scale along a short training."""
    with working(as_json=as_json, quiet=quiet) as progress:
        from noisescale.run.measuring import measure_workload

        measurement = measure_workload(
            workload, overrides=list(overrides), on_progress=progress, **options
        )
    show(measurement, "render_measurement", as_json=as_json)


@cli.command()
@click.option("--global-batch-size", type=COUNT, help="Examples per optimizer step.")
@click.option("--micro-batch-size", type=COUNT, help="Examples per pass on one device.")
@click.option("--accumulation", type=COUNT, help="Passes per optimizer step on one device.")
@click.option("--replicas", type=COUNT, help="Devices that average their gradients.")
@click.option("--max-micro", type=COUNT, help="Largest micro-batch that fits one device.")
@click.option(
    "--unit",
    type=click.Choice(["examples", "sequences", "tokens"]),
    default="examples",
    show_default=True,
    help="What is counted.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def split(as_json: bool, **sizes: Any) -> None:
    """Complete a split: global = micro x accumulation x replicas."""
    from noisescale.plan.split import split_batch

    show(split_batch(**sizes), "render_split", as_json=as_json)


cli.add_command(convert)
cli.add_command(schedule)


@cli.command(short_help="Fit the steps law to a CSV file or a store of tuned runs.")
@click.argument("file", metavar="FILE.csv|STORE")
@click.option("--target", help="Which goal's rows to fit, where there are several.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tradeoff(file: str, target: str | None, as_json: bool) -> None:
    """Fit steps = Smin (1 + Bcrit/B) to a CSV with the columns batch_size and steps.

    A folder is taken for a store of noisescale sweep.
    """
    from noisescale.run.tradeoff_file import read_tradeoff

    show(read_tradeoff(file, target=target), "render_tradeoff", as_json=as_json)


for _command in (sweep, branch, audit, report):
    cli.add_command(_command)
