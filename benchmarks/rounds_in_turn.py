"""Steps timed in turn, so that all of them meet the same moods of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

Step = Callable[[], object]


def in_turn(steps: dict[str, Step], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each step in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for place in range(warm_up + rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if place >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times
