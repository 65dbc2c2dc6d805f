"""What a scan of speed and memory did not cover."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Share of the step time spent waiting for a core from which the scan says so. (assumed)
_BUSY = 0.1


def not_probed(
    facts: Mapping[str, Any],
    points: Collection[int],
    left_out: Sequence[int],
    queued: Sequence[float],
) -> list[str]:
    """Say what real training may do beyond what was run, one sentence each.

    Args:
        facts: what the probe says of the workload.
        points: sizes that fit.
        left_out: sizes passed over for lack of time.
        queued: share of each size's step time spent waiting for a core, in [0, 1].
    """
    notes = []
    if left_out:
        sizes = f"micro-batch size{'s' * (len(left_out) > 1)} {', '.join(map(str, left_out))}"
        notes.append(f"{sizes}: left out to stay within the time")
    busy = statistics.fmean(queued or [0.0])
    if busy > _BUSY:
        notes.append(
            "the speed of an idle machine: other programs held the processor for "
            f"{busy:.0%} of the time"
        )
    notes.append("communication between devices: one process ran alone")
    if facts["shapes_vary"] and not facts["worst_case"]:
        notes.append("a worst-case batch: the workload names none, drawn batches were used")
    if not facts["evaluate_size"]:
        notes.append("an evaluation batch: the workload has no evaluation data")
    elif points and max(points) > facts["evaluate_size"]:
        notes.append(f"evaluation batches above {facts['evaluate_size']}, all that there are")
    if not facts["watched"]:
        notes.append("memory between steps: this system does not tell it of other processes")
    if facts["shapes_vary"]:
        notes.append("loader worker processes: data was fetched within the training process")
    return notes
