"""The time of a step, how often to repeat it, and what the repeats come to."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

# Timed steps: the usual least number, the least when one step takes long, and the most. (assumed)
_REPEATS, _REPEATS_SLOW, _REPEATS_MOST = 5, 3, 200


class StepTime(NamedTuple):
    """Seconds of one step: for the data, for the rest, and those of both spent in a queue."""

    data: float
    compute: float
    queued: float

    @property
    def whole(self) -> float:
        """Seconds from one step to the next."""
        return self.data + self.compute


def enough(repeats: int, began: float, slice_seconds: float, stop_at: float) -> bool:
    """Whether a size has been timed enough.

    Args:
        repeats: timed steps so far.
        began: ``time.perf_counter()`` at the first of them.
        slice_seconds: what a size may take if its steps are quick.
        stop_at: ``time.perf_counter()`` at which the scan's time ends.
    """
    now = time.perf_counter()
    spent = now - began
    return (
        repeats >= _REPEATS_MOST
        or (repeats >= _REPEATS and spent >= slice_seconds)
        or (repeats >= _REPEATS_SLOW and (spent >= 2 * slice_seconds or now >= stop_at))
    )


def summary(times: list[StepTime]) -> dict[str, Any]:
    """Return medians, quartiles and what tells an undisturbed step, as plain values."""
    low, median, high = _quartiles([t.whole for t in times])
    # The queue is read outside the two clocks: now and then it holds more than the step did.
    undisturbed, _, _ = _quartiles([max(1e-9, t.whole - t.queued) for t in times])
    return {
        "seconds_per_step": median,
        "seconds_low": low,
        "seconds_high": high,
        "data_seconds": statistics.median(t.data for t in times),
        "compute_seconds": statistics.median(t.compute for t in times),
        "repeats": len(times),
        "undisturbed_seconds": undisturbed,
        "queued_share": sum(t.queued for t in times) / sum(t.whole for t in times),
    }


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def seconds_in_queue() -> float:
    """Return how long this thread has waited for a core that others held, where that is told."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
