"""A critical batch size from branches of a training: the largest that loses nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from noisescale.errors import InvalidInputError
from noisescale.records import Interval
from noisescale.theory.tuned_steps import student


def verdict(*, low: float | None, high: float | None, tolerance: float) -> str:
    """Say whether an excess loss is ``within`` a tolerance, ``beyond`` it, or ``unclear``.

    Args:
        low: lower end of the excess's interval; None where it is not known.
        high: upper end likewise.
        tolerance: loss that may be lost.

    >>> verdict(low=-0.01, high=0.004, tolerance=0.01)
    'within'
    """
    if high is not None and high <= tolerance:
        return "within"
    return "beyond" if low is not None and low > tolerance else "unclear"


def paired_excess(
    *, losses: Sequence[float], reference: Sequence[float], level: float = 0.95
) -> Interval:
    """Return by how much losses lie above those of the same seeds, with Student's interval.

    Args:
        losses: shape (seeds,).
        reference: shape (seeds,), in the same order of seeds.
        level: confidence level, between 0 and 1.

    Returns:
        The mean difference; ends None with one seed.

    Raises:
        InvalidInputError: the shapes differ or are empty.

    >>> paired_excess(losses=[1.2, 1.4], reference=[1.0, 1.2]).point
    0.2
    """
    if len(losses) != len(reference) or not losses:
        raise InvalidInputError(
            f"{len(losses)} losses and {len(reference)} references",
            "as many of both are required",
            "pass one of each per seed",
        )
    gaps = np.subtract(losses, reference)
    mean = float(np.round(gaps.mean(), 12))
    if len(gaps) < 2:
        return Interval(point=mean, low=None, high=None)
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    half = student(level=level, freedom=len(gaps) - 1) * error
    return Interval(point=mean, low=mean - half, high=mean + half)


def critical_by_branches(
    *,
    batch_sizes: Sequence[int],
    excess: Sequence[Interval],
    tolerance: float,
) -> Interval:
    """Return the largest batch size whose loss, and that of all smaller ones, is kept.

    Args:
        batch_sizes: tried, ascending; the first is the training's own, with no excess.
        excess: loss above the first's, with intervals; an infinite point has diverged.
        tolerance: loss that may be lost.

    Returns:
        The point is the geometric mean of the largest size that keeps the loss, judged by the
        means, and the next one tried; None where all keep it. Low: the largest up to which all
        surely keep it. High: the smallest that surely does not; None where there is none.

    Raises:
        InvalidInputError: shapes differ, sizes do not ascend, or the tolerance is not positive.

    Source: Merrill et al. 2025 (arXiv:2505.23971), sec. 3; the ends by seed noise are ours.

    >>> sizes = [32, 64, 128]
    >>> lost = [Interval(point=x, low=x - 0.002, high=x + 0.002) for x in (0.0, 0.001, 0.1)]
    >>> found = critical_by_branches(batch_sizes=sizes, excess=lost, tolerance=0.01)
    >>> found.low, round(found.point), found.high
    (64.0, 91, 128.0)
    """
    _check(batch_sizes, excess, tolerance)
    kept = _leading(x.point is not None and x.point <= tolerance for x in excess[1:])
    sure = _leading(
        verdict(low=x.low, high=x.high, tolerance=tolerance) == "within" for x in excess[1:]
    )
    # A size that surely fails bounds it, whatever larger ones do.
    failed = [
        float(size)
        for size, x in zip(batch_sizes, excess, strict=True)
        if x.low is not None and x.low > tolerance
    ]
    whole = kept == len(batch_sizes) - 1
    point = None if whole else math.sqrt(batch_sizes[kept] * batch_sizes[kept + 1])
    return Interval(point=point, low=float(batch_sizes[sure]), high=min(failed, default=None))


def _leading(flags: Iterable[bool]) -> int:
    """Count how many are true before the first that is not."""
    count = 0
    for flag in flags:
        if not flag:
            break
        count += 1
    return count


def _check(sizes: Sequence[int], excess: Sequence[Interval], tolerance: float) -> None:
    if len(sizes) != len(excess) or list(sizes) != sorted(set(sizes)) or not sizes:
        raise InvalidInputError(
            f"{len(sizes)} batch sizes and {len(excess)} losses",
            "as many losses as ascending batch sizes are required",
            "sort them by batch size",
        )
    if not tolerance > 0:
        raise InvalidInputError(
            f"tolerance {tolerance:g}", "a positive number is required", "give for example 0.01"
        )
