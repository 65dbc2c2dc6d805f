"""Which batch size: three limits, a table of time against compute, one recommendation.

Everything is measured or follows from the steps law S = Smin (1 + Bcrit/B),
E = Emin (1 + B/Bcrit) (McCandlish et al. 2018, eq. 2.11). The waste of a batch size is E/Emin,
judged at the lower end of the critical batch's wider band.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.plan.reasons import Reasons, judged_time
from noisescale.records import (
    AdviceRow,
    CriticalBatch,
    MemoryLimit,
    Record,
    SpeedCurve,
    ThroughputKnee,
)
from noisescale.theory.tradeoff import examples_ratio, steps_ratio

MAX_ROWS = 20
"""Assumed: rows that people still read."""
KNEE_SHARE = 0.9
"""Assumed: share of the best throughput from which larger micro-batches stop to pay."""
NEARBY = 1.5**0.5
"""Assumed: a row may stand for sizes up to this factor around its round number, so that no
size between a power of two and its 3/2 is left out."""
SAME_SPEED = 0.05
"""Assumed: relative difference of the time per example that counts as none."""


@dataclass(frozen=True, kw_only=True)
class Choice(Record):
    """The table and what it recommends.

    Attributes:
        table: one row per global batch size, smallest first.
        recommended: one row of the table, or None with the reason in ``reasons``.
        reasons: plain sentences, the most important first.
    """

    table: tuple[AdviceRow, ...]
    recommended: AdviceRow | None
    reasons: tuple[str, ...]


def memory_limit(curve: SpeedCurve) -> MemoryLimit:
    """Return the largest micro-batch size that was run and fits.

    >>> memory_limit(SpeedCurve(points=(), failures=(), limit_bytes=8, baseline_bytes=1,
    ...     margin=0.1, device="cpu", stopped="does not fit")).micro_batch_size is None
    True
    """
    largest = max(curve.points, key=lambda point: point.micro_batch_size, default=None)
    tested = [point.micro_batch_size for point in curve.points]
    tested += [failure.micro_batch_size for failure in curve.failures]
    return MemoryLimit(
        micro_batch_size=largest.micro_batch_size if largest else None,
        peak_bytes=largest.peak_bytes if largest else None,
        limit_bytes=curve.limit_bytes,
        largest_tested=max(tested, default=0),
    )


def throughput_knee(curve: SpeedCurve) -> ThroughputKnee | None:
    """Return the smallest tested size with at least 90 % of the best throughput.

    None when no size ran. ``data_bound`` tells that waiting for data takes more than half of
    the step there: a larger micro-batch then does not help, a faster loader does.
    """
    if not curve.points:
        return None
    enough = KNEE_SHARE * max(point.examples_per_second for point in curve.points)
    knee = min(
        (point for point in curve.points if point.examples_per_second >= enough),
        key=lambda point: point.micro_batch_size,
    )
    return ThroughputKnee(
        micro_batch_size=knee.micro_batch_size,
        examples_per_second=knee.examples_per_second,
        data_bound=knee.data_seconds > knee.seconds_per_step / 2,
    )


def seconds_per_step(curve: SpeedCurve, micro: int, accumulation: int) -> float:
    """Return the seconds of one optimizer step of ``accumulation`` passes on one device.

    accumulation x the measured step at ``micro``: an upper estimate, since each measured step
    holds an optimizer update of which the accumulated step needs only one. Communication
    between replicas is not counted.

    Args:
        curve: the scan.
        micro: a micro-batch size that was run and fits.
        accumulation: passes per optimizer step, at least 1.

    Returns:
        Seconds.

    Raises:
        InvalidInputError: this micro-batch size was not run, or did not fit.
    """
    for point in curve.points:
        if point.micro_batch_size == micro:
            return accumulation * point.seconds_per_step
    raise InvalidInputError(
        f"micro-batch size {micro}",
        f"a size that was run is required: {[p.micro_batch_size for p in curve.points]}",
        "choose one of them or scan this size too",
    )


def choose(
    *,
    speed: SpeedCurve,
    critical: CriticalBatch,
    devices: Sequence[int] = (1,),
    max_waste: float = 1.5,
    dataset_size: int,
    unit: str = "examples",
    tie: float = 0.05,
    include: Iterable[int] = (),
    own: int | None = None,
    obstacle: str | None = None,
) -> Choice:
    """Lay out time against compute, and recommend one global batch size.

    Among the rows whose waste at ``critical.low`` is at most ``max_waste`` the one with the
    least time to target, relative_time = (1 + Bcrit/B) x seconds per step; rows within ``tie``
    of it count as equal and the smallest batch is taken. Without a point estimate time is
    judged at ``critical.low``; without a lower end nothing is recommended.

    Args:
        speed: measured steps per micro-batch size; only sizes that ran and fit are used.
        critical: the critical batch with its wider band, in ``unit``.
        devices: numbers of replicas that may be used.
        max_waste: largest acceptable E/Emin, above 1.
        dataset_size: training examples; no global batch is larger.
        unit: what every size here counts.
        tie: relative difference of time that counts as none.
        include: global batch sizes that get a row of their own where the tested micro-batch
            sizes can make them.
        own: the recipe's global batch size: it gets a row alike, and a reason that compares it
            with the recommended one.
        obstacle: why nothing can be recommended whatever the numbers, with its remedy; it
            becomes the first reason.

    Returns:
        The table (at most ``MAX_ROWS`` rows and those of ``include`` and ``own``), smallest batch
        first, the recommended row or None, and the reasons.

    Raises:
        InvalidInputError: a number is out of range, or the units differ.

    Source: McCandlish et al. 2018, eq. 2.11; the rule is this library's own.
    """
    check_wishes(devices=devices, max_waste=max_waste)
    _check(speed, critical, dataset_size, unit, tie)
    asked = {*include, *(() if own is None else (own,))}
    splits = _splits(speed, critical, devices, dataset_size, asked)
    table = _rows(splits, critical, max_waste)
    recommended = None if obstacle else _recommend(table, tie)
    reasons = Reasons(
        table=table,
        critical=critical,
        memory=memory_limit(speed),
        knee=throughput_knee(speed),
        max_waste=max_waste,
        tie=tie,
        unit=unit,
        own=own,
        obstacle=obstacle,
    ).sentences(recommended)
    return Choice(table=table, recommended=recommended, reasons=reasons)


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One way to make a global batch of tested micro-batches."""

    micro: int
    accumulation: int
    replicas: int
    seconds: float

    @property
    def size(self) -> int:
        return self.micro * self.accumulation * self.replicas

    @property
    def order(self) -> tuple[float, int, int]:
        """Least seconds first; of equals the fewest devices, then the fewest passes."""
        return self.seconds, self.replicas, self.accumulation


def check_wishes(*, devices: Sequence[int], max_waste: float) -> None:
    """Refuse numbers of devices or a waste that :func:`choose` cannot use, before measuring.

    Raises:
        InvalidInputError: they cannot be used.
    """
    if not _are_counts(devices):
        shown = list(devices) if isinstance(devices, tuple) else devices
        raise InvalidInputError(
            f"devices {shown!r}",
            "a sequence of positive integers is required",
            "give for example (1, 2, 4)",
        )
    if not (is_number(max_waste) and math.isfinite(max_waste) and max_waste > 1):
        value = f"{max_waste:g}" if is_number(max_waste) else repr(max_waste)
        raise InvalidInputError(
            f"max_waste {value}",
            "a finite ratio above 1 is required (1 means no waste, which no batch reaches)",
            "give for example 1.5",
        )


def _are_counts(devices: Any) -> bool:
    if isinstance(devices, str | bytes | Mapping) or not isinstance(devices, Iterable):
        return False
    counts = list(devices)
    return bool(counts) and all(is_number(n) and n >= 1 and n == n // 1 for n in counts)


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number (numpy's too), bools not.

    >>> is_number(2), is_number(1.5), is_number("1"), is_number(True)
    (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(
    speed: SpeedCurve, critical: CriticalBatch, dataset_size: int, unit: str, tie: float
) -> None:
    for name, value in (("speed", speed.unit), ("critical batch", critical.unit)):
        if value != unit:
            raise InvalidInputError(
                f"{name} counted in {value}", f"{unit} are required", f"convert it to {unit}"
            )
    if dataset_size < 1:
        raise InvalidInputError(
            f"dataset_size {dataset_size}", "at least 1 is required", "pass the training data"
        )
    if not 0 <= tie < 1:
        raise InvalidInputError(
            f"tie {tie:g}", "a share from 0 up to 1 is required", "give for example 0.05"
        )


def _splits(
    speed: SpeedCurve,
    critical: CriticalBatch,
    devices: Sequence[int],
    dataset_size: int,
    include: Iterable[int],
) -> list[_Split]:
    """Choose the rows' global batch sizes and their fastest splits, smallest first."""
    micros = [point.micro_batch_size for point in speed.points]
    if not micros:
        return []
    blocks = sorted({(micro, int(count)) for micro in micros for count in devices})
    smallest = min(micro * count for micro, count in blocks)

    def fastest(size: int) -> _Split:
        fitting = [block for block in blocks if size % math.prod(block) == 0]
        return min((_split(speed, size, *block) for block in fitting), key=lambda one: one.order)

    sizes = {smallest, *include}
    for goal in _goals(smallest, dataset_size, critical):
        sizes.add(_near(goal, blocks, dataset_size, fastest))
    made = [size for size in sizes if any(size % math.prod(block) == 0 for block in blocks)]
    return [fastest(size) for size in sorted(made) if 1 <= size <= dataset_size]


def _split(speed: SpeedCurve, size: int, micro: int, replicas: int) -> _Split:
    passes = size // (micro * replicas)
    seconds = seconds_per_step(speed, micro, passes)
    return _Split(micro=micro, accumulation=passes, replicas=replicas, seconds=seconds)


def _goals(smallest: int, dataset_size: int, critical: CriticalBatch) -> list[int]:
    """Round numbers for the rows: powers of two, then their 3/2, nearest the critical batch."""
    wanted = critical.point or critical.low or math.sqrt(smallest * dataset_size)
    goals: list[int] = []
    for factor in (1, 3):
        numbers = [factor << power for power in range(dataset_size.bit_length())]
        inside = [number for number in numbers if smallest < number < dataset_size * NEARBY]
        inside.sort(key=lambda number: abs(math.log(number / wanted)))
        # One row is kept for the smallest size that runs.
        goals += inside[: MAX_ROWS - 1 - len(goals)]
    return goals


def _near(
    goal: int,
    blocks: Sequence[tuple[int, int]],
    dataset_size: int,
    fastest: Callable[[int], _Split],
) -> int:
    """Return the size nearest to ``goal`` among those about as fast per example as any near.

    Without a size in the neighbourhood this is the smallest size that can be made.
    """
    whole = [math.prod(block) for block in blocks]
    sizes = {block * (goal // block + extra) for block in whole for extra in (0, 1)}
    near = [size for size in sizes if goal / NEARBY < size < goal * NEARBY and size <= dataset_size]
    cost = {size: fastest(size).seconds / size for size in near}
    limit = (1 + SAME_SPEED) * min(cost.values(), default=0.0)
    quick = [size for size in near if cost[size] <= limit]
    return min(quick, key=lambda size: (abs(math.log(size / goal)), size), default=min(whole))


def _rows(
    splits: Sequence[_Split], critical: CriticalBatch, max_waste: float
) -> tuple[AdviceRow, ...]:
    """Put the steps law on top of the splits."""
    judged = critical.point or critical.low
    best = min((_time(split, judged) or math.inf for split in splits), default=math.inf)

    def relative(split: _Split, end: float | None) -> float | None:
        time = _time(split, end)
        return None if time is None else time / best

    rows = []
    for split in splits:
        waste = _examples(split, critical.low)
        rows.append(
            AdviceRow(
                global_batch_size=split.size,
                micro_batch_size=split.micro,
                accumulation=split.accumulation,
                replicas=split.replicas,
                steps_ratio=_steps(split, critical.point),
                steps_ratio_low=_steps(split, critical.low),
                steps_ratio_high=_steps(split, critical.high),
                examples_ratio=_examples(split, critical.point),
                examples_ratio_low=_examples(split, critical.high),
                examples_ratio_high=waste,
                seconds_per_step=split.seconds,
                relative_time=relative(split, critical.point),
                relative_time_low=relative(split, critical.low),
                relative_time_high=relative(split, critical.high),
                # The margin keeps a batch of exactly the largest waste despite rounding.
                allowed=waste is not None and waste <= max_waste * (1 + 1e-12),
            )
        )
    return tuple(rows)


def _steps(split: _Split, critical: float | None) -> float | None:
    if not critical:
        return None
    return float(steps_ratio(batch_size=split.size, critical_batch=critical))


def _examples(split: _Split, critical: float | None) -> float | None:
    if not critical:
        return None
    return float(examples_ratio(batch_size=split.size, critical_batch=critical))


def _time(split: _Split, critical: float | None) -> float | None:
    """Return the time to target in units of Smin seconds."""
    ratio = _steps(split, critical)
    return None if ratio is None else ratio * split.seconds


def _recommend(table: Sequence[AdviceRow], tie: float) -> AdviceRow | None:
    """Return the smallest allowed row within ``tie`` of the least time among the allowed."""
    allowed = [row for row in table if row.allowed]
    best = min(map(judged_time, allowed), default=math.inf)
    ties = [row for row in allowed if judged_time(row) <= best * (1 + tie)]
    return min(ties, key=lambda row: row.global_batch_size, default=None)
