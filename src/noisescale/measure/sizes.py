"""Which micro-batch sizes a scan tries, and when one has collapsed."""

from __future__ import annotations

from collections.abc import Sequence

from noisescale.records import SpeedPoint

# A size collapses when its throughput falls below this share of the best so far. (assumed)
COLLAPSE = 1 / 3
# Steps quicker than this many seconds have not collapsed: memory that is swapped comes back in
# tenths of seconds, while threads that wait for one another on a busy machine cost
# milliseconds. (assumed)
COLLAPSED_STEP = 0.1


def candidate_sizes(largest: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, ... up to ``largest``, and ``largest`` itself.

    >>> candidate_sizes(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    powers = [2**exponent for exponent in range(largest.bit_length())]
    between = [power + power // 2 for power in powers if power >= 2]
    return sorted({size for size in powers + between if size < largest} | {largest})


def thin(sizes: Sequence[int], factor: float) -> list[int]:
    """Keep sizes that grow by at least ``factor``, the first and the last always.

    >>> thin([4, 6, 8, 12, 16, 20], 2)
    [4, 8, 16, 20]
    """
    kept = [sizes[0]]
    for size in sizes[1:]:
        if size >= factor * kept[-1] or size == sizes[-1]:
            kept.append(size)
    return kept


def collapses(size: int, seconds: float, smaller: Sequence[SpeedPoint]) -> bool:
    """Whether throughput collapsed at a size: memory that is swapped raises no error.

    Args:
        size: the size judged.
        seconds: its step time, waiting for a core not counted: on a busy machine long steps
            are interrupted and short ones are not, which looks like a collapse.
        smaller: the points at smaller sizes.
    """
    if not smaller or seconds < COLLAPSED_STEP:
        return False
    best = max(other.examples_per_second for other in smaller)
    last = max(smaller, key=lambda other: other.micro_batch_size)
    slower_than_proportional = seconds / last.seconds_per_step > size / last.micro_batch_size
    return size / seconds < COLLAPSE * best and slower_than_proportional
