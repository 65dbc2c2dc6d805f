"""Grow the batch in place of decaying the rate: the same noise at every example, fewer steps."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.sizes import Ladder, Sizes
from noisescale.records import BatchPiece, BatchSchedule, RateSchedule, RateSegment

LEAST_FACTOR = 1.05
"""Smallest ratio of neighbouring sizes along a continuous fall. (assumed: below it sizes change
every few steps and nothing is saved by that)"""

EXPONENTS = {"linear": 1.0, "square_root": 2.0}
"""How the batch size goes with the inverse of the rate, by coupling. (paper: Smith et al. 2018,
sec. 4, for SGD's lr / B; Malladi et al. 2022, sec. 5, for Adam's lr / sqrt(B))"""


def grow(
    rate: RateSchedule,
    *,
    batch_size: int,
    coupling: str,
    total: int | None = None,
    sizes: Sizes | None = None,
    growth_factor: float = 2.0,
    tolerates: Callable[[float], float] | None = None,
) -> BatchSchedule:
    """Let the batch grow where the rate would fall, up to a limit, and decay the rate from there.

    Wanted is B(p) = B0 (highest rate so far / rate at p), squared for the square-root coupling:
    then the rate stays at its highest. Taken is the largest allowed size that is not above it,
    and the rate, coupled to the size, makes up for the rest: the temperature is the original's
    at every step, and the rate never above what the original has run with.

    Args:
        rate: the original's rate by position.
        batch_size: B0, the original's batch size, in the rate's unit.
        coupling: ``linear`` or ``square_root``.
        total: length of the training; needed where the rate falls to nothing.
        sizes: what may be taken; ``largest`` is the limit of growth.
        growth_factor: ratio of neighbouring sizes where the rate falls continuously.
        tolerates: largest batch size that a temperature tolerates, by the temperature over that
            of the original's highest rate (1 at first, then less); must not fall as the
            temperature falls.

    Returns:
        The schedule, without steps of its own: a rate that never falls leaves B0.

    Raises:
        InvalidInputError: ``batch_size`` is not among ``sizes``, the coupling keeps no
            temperature, or nothing limits the growth.

    Source: Smith, Kindermans, Ying and Le 2018 (arXiv:1711.00489), secs. 3-4.

    >>> from noisescale.plan.schedule.rates import step
    >>> decay = step(0.1, milestones=[6000, 12000], gamma=0.2)
    >>> [piece.batch_size for piece in grow(decay, batch_size=128, coupling="linear").pieces]
    [128, 640, 3200]
    """
    allowed = sizes or Sizes()
    _check(batch_size, coupling, growth_factor, allowed)
    growing = _Growing(rate, batch_size, coupling, allowed, growth_factor, tolerates)
    pieces = [
        BatchPiece(start=start, batch_size=size)
        for start, size in _merged(growing.sizes_along(total))
    ]
    return BatchSchedule(
        pieces=tuple(pieces),
        unit=rate.unit,
        rate=rate,
        reference_batch_size=batch_size,
        coupling=coupling,
        total=total,
    )


def _check(batch_size: int, coupling: str, factor: float, sizes: Sizes) -> None:
    if coupling not in EXPONENTS:
        raise InvalidInputError(
            f"coupling {coupling!r}", "no rule by which a larger batch stands for a lower rate",
            "give linear (SGD) or square_root (Adam)",
        )  # fmt: skip
    if not LEAST_FACTOR <= factor < math.inf:
        raise InvalidInputError(
            f"growth_factor {factor!r}",
            f"a factor of at least {LEAST_FACTOR} is required",
            "give 2",
        )
    if not sizes.bottom <= batch_size <= sizes.top or sizes.at_most(batch_size) != batch_size:
        near = sizes.at_most(batch_size)
        raise InvalidInputError(
            f"batch_size {batch_size}",
            f"is none of the sizes allowed (from {sizes.bottom} to {sizes.top} in multiples of"
            f" {sizes.multiple_of})",
            f"the nearest is {near}",
        )


class _Growing:
    """The size by position; along a segment it is monotone, so changes are found by bisection."""

    def __init__(
        self,
        rate: RateSchedule,
        batch_size: int,
        coupling: str,
        sizes: Sizes,
        factor: float,
        tolerates: Callable[[float], float] | None,
    ) -> None:
        self.rate, self.batch_size, self.sizes = rate, batch_size, sizes
        self.exponent = EXPONENTS[coupling]
        self.tolerates = tolerates
        self.highest = max(max(s.first, s.last or 0.0) for s in rate.segments)
        self.ladder = Ladder(base=batch_size, factor=factor, sizes=sizes)

    def sizes_along(self, total: int | None) -> Iterator[tuple[int, int]]:
        """Yield (position, size) wherever the size may change."""
        peak = 0.0
        segments = self.rate.segments
        stops = [*(segment.start for segment in segments[1:]), total]
        for segment, stop in zip(segments, stops, strict=True):
            if total is not None and segment.start >= total:
                return
            end = stop if stop is None or total is None else min(stop, total)
            for start, until, part in _parts(segment, end):
                peak = max(peak, part.first)
                self._refuse_endless(part.at(until - 1), peak, total)
                yield from self._along(part, start, until, peak)
                peak = max(peak, part.at(until - 1))

    def _along(
        self, segment: RateSegment, start: int, end: int, peak: float
    ) -> Iterator[tuple[int, int]]:
        def size_at(position: int) -> int:
            return self._size(segment.at(position), peak, constant=segment.shape == "constant")

        position = start
        while position < end:
            size = size_at(position)
            yield position, size
            position = _first(range(position + 1, end), functools.partial(_differs, size_at, size))

    def _size(self, lr: float, peak: float, *, constant: bool) -> int:
        wanted = self._wanted(lr, peak)
        return (self.sizes if constant or self.sizes.powers else self.ladder).at_most(wanted)

    def _wanted(self, lr: float, peak: float) -> float:
        highest = max(peak, lr)
        if lr > 0:
            # Far below any rate that can be told from 0, the power would overflow.
            wanted = self.batch_size * math.pow(min(highest / lr, 1e100), self.exponent)
        else:
            wanted = math.inf if highest else float(self.batch_size)
        return wanted if self.tolerates is None else min(wanted, self._tolerated(lr))

    def _refuse_endless(self, lr: float, peak: float, total: int | None) -> None:
        if self.sizes.largest < UNLIMITED:
            return
        if self._wanted(lr, peak) > (UNLIMITED if total is None else total):
            # The end of a wave is not quite 0. (assumed)
            least = f"{lr:.3g}" if lr > 1e-6 * peak else "nothing"
            raise InvalidInputError(
                f"growth in place of a rate that falls to {least}",
                "the batch would outgrow the whole training",
                "give max_batch_size or dataset_size",
            )

    def _tolerated(self, lr: float) -> float:
        assert self.tolerates is not None
        share = lr / self.highest if self.highest else 1.0
        return max(float(self.batch_size), self.tolerates(share)) if share else math.inf


UNLIMITED = Sizes().largest


def _parts(segment: RateSegment, stop: int | None) -> Iterator[tuple[int, int, RateSegment]]:
    """Cut a segment where its rate stops to change."""
    moving = segment.stop if segment.shape != "constant" else None
    if moving is None:
        yield segment.start, segment.start + 1 if stop is None else stop, segment
        return
    end = moving if stop is None else min(moving, stop)
    yield segment.start, end, segment
    if stop is None or stop > end:
        held = RateSegment(start=moving, first=segment.last or 0.0)
        yield moving, moving + 1 if stop is None else stop, held


def _differs(size_at: Callable[[int], int], size: int, position: int) -> bool:
    return size_at(position) != size


def _first(positions: range, holds: Callable[[int], bool]) -> int:
    """Return the first position from which on something holds, or the end."""
    return positions.start + bisect.bisect_left(positions, True, key=holds)


def _merged(changes: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Leave out what changes nothing."""
    before = None
    for start, size in changes:
        if size != before:
            yield start, size
        before = size
