"""Progress on standard error: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

Progress = Callable[[str, float | None], None]
"""``progress(what, share)``: what is being done, and the share done if it is known."""

BAR_EVERY = 0.1
LINE_EVERY = 5.0
"""Seconds between updates of the bar, and between lines."""


@contextmanager
def showing(stream: IO[str], *, quiet: bool) -> Iterator[Progress]:
    """Yield what shows progress on a stream, as fits the stream.

    Args:
        stream: where to; a terminal gets a bar.
        quiet: show nothing.
    """
    if quiet:
        yield _nothing
    elif stream.isatty():
        with _bar(stream) as progress:
            yield progress
    else:
        yield _lines(stream)


def _nothing(_what: str, _share: float | None = None) -> None:
    """Show nothing."""


@contextmanager
def _bar(stream: IO[str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    # markup=False: file names and messages of the user's are text.
    text = TextColumn("{task.description}", markup=False)
    console = Console(file=stream)
    with Bar(text, BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        last = [0.0]

        def progress(what: str, share: float | None = None) -> None:
            now = time.monotonic()
            if now - last[0] < BAR_EVERY:
                return
            last[0] = now
            total = None if share is None else 1.0
            bar.update(task, description=what, total=total, completed=share or 0.0)

        yield progress


def _lines(stream: IO[str]) -> Progress:
    last = [-LINE_EVERY]
    stage = [""]

    def progress(what: str, share: float | None = None) -> None:
        now = time.monotonic()
        # A new stage is told at once, steps within one only now and then.
        if what.partition(":")[0] == stage[0] and now - last[0] < LINE_EVERY:
            return
        last[0], stage[0] = now, what.partition(":")[0]
        done = "" if share is None else f" ({share:.0%})"
        print(f"noisescale: {what}{done}", file=stream, flush=True)

    return progress
