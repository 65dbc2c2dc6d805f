"""The usual rate schedules, by position in the data: each is a few segments.

Every one may begin with a linear warm-up. Positions count examples, sequences or tokens, so the
schedule does not change with the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from noisescale.errors import InvalidInputError
from noisescale.records import RateSchedule, RateSegment
from noisescale.records.rate_schedule import require_position


def constant(
    lr: float, *, warmup: int = 0, warmup_from: float = 0.0, unit: str = "examples"
) -> RateSchedule:
    """One rate throughout.

    Args:
        lr: learning rate.
        warmup: position at which the warm-up ends.
        warmup_from: share of ``lr`` that the warm-up begins with.
        unit: what positions count.

    >>> constant(0.5, warmup=100).at(50)
    0.25
    """
    return _warmed([RateSegment(start=0, first=lr)], lr, warmup, warmup_from, unit)


def step(
    lr: float,
    *,
    milestones: Iterable[int],
    gamma: float = 0.1,
    warmup: int = 0,
    warmup_from: float = 0.0,
    unit: str = "examples",
) -> RateSchedule:
    """Multiply the rate by ``gamma`` at every milestone.

    Args:
        lr: learning rate before the first milestone.
        milestones: positions; one that is named twice counts twice.
        gamma: what is kept of the rate at each; at least 0.
        warmup: position at which the warm-up ends.
        warmup_from: share of ``lr`` that the warm-up begins with.
        unit: what positions count.

    Raises:
        InvalidInputError: ``gamma`` is negative, or a milestone is no position.

    >>> step(1.0, milestones=[100, 200], gamma=0.5).at(200)
    0.25
    """
    if not 0 <= gamma < float("inf"):
        raise InvalidInputError(
            f"gamma {gamma!r}", "a number of at least 0 is required", "give 0.1"
        )
    ends = sorted(require_position("milestone", milestone) for milestone in milestones)
    rates = {0: lr} | {end: lr * gamma**count for count, end in enumerate(ends, start=1)}
    segments = [RateSegment(start=start, first=rate) for start, rate in rates.items()]
    return _warmed(segments, lr, warmup, warmup_from, unit)


def cosine(
    lr: float,
    *,
    total: int,
    floor: float = 0.0,
    warmup: int = 0,
    warmup_from: float = 0.0,
    unit: str = "examples",
) -> RateSchedule:
    """Fall along half a cosine from the end of the warm-up to ``total``.

    Args:
        lr: learning rate at its highest.
        total: position at which ``floor`` is reached.
        floor: share of ``lr`` that is left in the end.
        warmup: position at which the warm-up ends.
        warmup_from: share of ``lr`` that the warm-up begins with.
        unit: what positions count.

    Raises:
        InvalidInputError: the training is not longer than its warm-up, or ``floor`` is negative.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.

    >>> cosine(1.0, total=200, floor=0.1).at(100)
    0.55
    """
    return _falling("cosine", lr, warmup, total, floor, warmup, warmup_from, unit)


def linear(
    lr: float,
    *,
    total: int,
    floor: float = 0.0,
    warmup: int = 0,
    warmup_from: float = 0.0,
    unit: str = "examples",
) -> RateSchedule:
    """Fall along a straight line from the end of the warm-up to ``total``.

    Args and errors are those of :func:`cosine`.

    >>> linear(1.0, total=200).at(150)
    0.25
    """
    return _falling("linear", lr, warmup, total, floor, warmup, warmup_from, unit)


def warmup_stable_decay(
    lr: float,
    *,
    total: int,
    decay: int,
    floor: float = 0.0,
    shape: str = "linear",
    warmup: int = 0,
    warmup_from: float = 0.0,
    unit: str = "examples",
) -> RateSchedule:
    """Hold the rate after the warm-up, and let it fall over the last ``decay``.

    Args:
        lr: learning rate while it is held.
        total: position at which ``floor`` is reached.
        decay: length of the fall.
        floor: share of ``lr`` that is left in the end.
        shape: of the fall: ``linear`` or ``cosine``.
        warmup: position at which the warm-up ends.
        warmup_from: share of ``lr`` that the warm-up begins with.
        unit: what positions count.

    Raises:
        InvalidInputError: warm-up and fall do not fit into ``total``, or ``floor`` is negative.

    Source: Hu et al. 2024 (arXiv:2404.06395), sec. 4 (WSD).

    >>> schedule = warmup_stable_decay(1.0, total=1000, decay=200)
    >>> schedule.at(799), schedule.at(900)
    (1.0, 0.5)
    """
    require_position("decay", decay)
    if warmup + decay > total:
        raise InvalidInputError(
            f"warm-up {warmup} and decay {decay}", f"must fit into the total of {total}",
            "shorten one of them",
        )  # fmt: skip
    return _falling(shape, lr, total - decay, total, floor, warmup, warmup_from, unit)


def listed(points: Sequence[tuple[int, float]], *, unit: str = "examples") -> RateSchedule:
    """Hold each rate from its position on.

    Args:
        points: (position, rate) in ascending order, the first at 0.
        unit: what positions count.

    Raises:
        InvalidInputError: the positions do not ascend from 0, or a rate is negative.

    >>> listed([(0, 0.1), (500, 0.02)]).at(499)
    0.1
    """
    segments = tuple(RateSegment(start=position, first=rate) for position, rate in points)
    return RateSchedule(segments=segments, unit=unit)


def _falling(
    shape: str,
    lr: float,
    start: int,
    total: int,
    floor: float,
    warmup: int,
    warmup_from: float,
    unit: str,
) -> RateSchedule:
    """Hold until ``start`` and fall until ``total``."""
    if not 0 <= floor < float("inf"):
        raise InvalidInputError(f"floor {floor!r}", "a share of at least 0 is required", "give 0")
    if total <= start:
        raise InvalidInputError(
            f"total {total}", f"must be above {start}, where the fall begins", "lengthen it"
        )
    fall = RateSegment(start=start, stop=total, shape=shape, first=lr, last=floor * lr)
    held = [RateSegment(start=0, first=lr)] if start else []
    return _warmed([*held, fall], lr, warmup, warmup_from, unit)


def _warmed(
    segments: Sequence[RateSegment], lr: float, warmup: int, warmup_from: float, unit: str
) -> RateSchedule:
    """Replace what lies before the warm-up's end by a linear rise to ``lr``."""
    require_position("warmup", warmup)
    if not 0 <= warmup_from <= 1:
        raise InvalidInputError(
            f"warmup_from {warmup_from!r}", "a share from 0 to 1 is required", "give 0"
        )
    if not warmup:
        return RateSchedule(segments=tuple(segments), unit=unit)
    rise = RateSegment(start=0, stop=warmup, shape="linear", first=warmup_from * lr, last=lr)
    ends = [*(segment.start for segment in segments[1:]), math.inf]
    kept = [
        segment if segment.start >= warmup else RateSegment(start=warmup, first=segment.first)
        for segment, end in zip(segments, ends, strict=True)
        if end > warmup
    ]
    return RateSchedule(segments=(rise, *kept), unit=unit)
