"""Live progress of a sweep: a table on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from noisescale.cli.progress import LINE_EVERY

if TYPE_CHECKING:
    from noisescale.run.sweep.progress import SweepProgress

Tell = Callable[["SweepProgress"], None]

ROWS = 14
"""Batch sizes shown at once; the oldest leave first. (assumed: what a small terminal holds)"""


@contextmanager
def showing_sweep(stream: IO[str], *, quiet: bool) -> Iterator[Tell]:
    """Yield what shows a sweep's progress on a stream, as fits the stream.

    Args:
        stream: where to; a terminal gets a live table.
        quiet: show nothing.
    """
    if quiet:
        yield lambda _news: None
    elif stream.isatty():
        with _table(stream) as tell:
            yield tell
    else:
        yield _lines(stream)


def told(news: SweepProgress) -> str:
    """Say in one line how far a sweep is."""
    best = news.bests[news.batch_size]
    words = f"batch size {news.batch_size:,}: {best.trials} of {best.planned} trials"
    if best.steps is not None:
        words += f", best {best.steps:,.4g} steps at lr {best.lr:g}"
    return f"{words} ({news.share:.0%}{_left(news)})"


def _left(news: SweepProgress) -> str:
    if news.seconds_left is None or news.share >= 1:
        return ""
    left = news.seconds_left
    unit = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    return f", about {unit} left"


def _lines(stream: IO[str]) -> Tell:
    last, size, finished = [-math.inf], [0], [False]

    def tell(news: SweepProgress) -> None:
        now = time.monotonic()
        # A new batch size and the end of all are told at once, the rest only now and then.
        if news.batch_size == size[0] and now - last[0] < LINE_EVERY and news.share < 1:
            return
        if finished[0]:
            return
        last[0], size[0], finished[0] = now, news.batch_size, news.share >= 1
        print(f"noisescale: {told(news)}", file=stream, flush=True)

    return tell


@contextmanager
def _table(stream: IO[str]) -> Iterator[Tell]:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=stream), transient=True, refresh_per_second=4) as live:
        yield lambda news: live.update(drawn(news))


def drawn(news: SweepProgress) -> Any:
    """Draw a sweep's progress: a bar above the best so far of each batch size."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("batch size", "trials", "best steps", "lr"):
        table.add_column(name, justify="right")
    for size, best in list(news.bests.items())[-ROWS:]:
        steps = "-" if best.steps is None else f"{best.steps:,.4g}"
        lr = "-" if best.lr is None else f"{best.lr:g}"
        row = (f"{size:,}", f"{best.trials} / {best.planned}", steps, lr)
        table.add_row(*row, style="bold" if size == news.batch_size else "")
    words = f"{news.target}: {news.trials:,} trials, {news.share:.0%}{_left(news)}"
    bar = Table.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=1.0, completed=news.share, width=60))
    return Group(Text(words), bar, table)
