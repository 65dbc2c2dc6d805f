"""Steps to the target times seconds per step: wall time to the target at each batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from noisescale.errors import InvalidInputError
from noisescale.records import SpeedCurve, SpeedPoint, TimeToTarget, TunedSteps


def time_to_target(
    points: Sequence[TunedSteps], speed: SpeedCurve, *, replicas: int = 1
) -> list[TimeToTarget]:
    """Join tuned steps with a speed curve.

    seconds(B) = S(B) * passes * t(micro), with t interpolated between measured micro-batch
    sizes in logarithms, the device's share B/replicas split into the number of passes (a power
    of two) that takes the least time. Communication between replicas is not counted. The
    interval adds the error of the steps and that of the median time (1.253 sigma/sqrt(n),
    sigma from the quartiles of a normal law) in quadrature.

    Args:
        points: tuned steps by batch size.
        speed: measured seconds per step by micro-batch size.
        replicas: devices that share a batch.

    Returns:
        One entry for each batch size; ``seconds`` is None where the target was not reached.

    Raises:
        InvalidInputError: nothing was measured, or there are no replicas.
    """
    if not speed.points or replicas < 1:
        raise InvalidInputError(
            f"{len(speed.points)} measured sizes, {replicas} replicas",
            "at least one of each is required",
            "scan the speed again",
        )
    return [_joined(point, speed, replicas) for point in points]


def _joined(point: TunedSteps, speed: SpeedCurve, replicas: int) -> TimeToTarget:
    share = math.ceil(point.batch_size / replicas)
    largest = speed.points[-1].micro_batch_size
    fewest = math.ceil(math.log2(max(share / largest, 1)))
    most = max(fewest, math.floor(math.log2(share)))
    choices = [(2**k, math.ceil(share / 2**k)) for k in range(fewest, most + 1)]
    passes, micro = min(choices, key=lambda c: c[0] * seconds_of_pass(speed, micro=c[1]))
    seconds = passes * seconds_of_pass(speed, micro=micro)
    error = _timing_error(speed, micro)

    def end(steps: float | None, sign: int) -> float | None:
        if steps is None or point.steps is None:
            return None
        half = math.hypot(math.log(steps / point.steps), 1.96 * error)
        return float(point.steps * seconds * math.exp(sign * half))

    return TimeToTarget(
        batch_size=point.batch_size,
        micro_batch_size=micro,
        accumulation=passes,
        replicas=replicas,
        seconds_per_step=seconds,
        seconds=None if point.steps is None else point.steps * seconds,
        low=end(point.low, -1),
        high=end(point.high, 1),
    )


def seconds_of_pass(speed: SpeedCurve, *, micro: int) -> float:
    """Seconds of a step of one micro-batch, interpolated in logarithms.

    Below the smallest measured size its time is taken: a pass does not get quicker than that.

    Args:
        speed: measured seconds per step.
        micro: examples of the pass, at most the largest measured.
    """
    below, above = _neighbours(speed, micro)
    if below.micro_batch_size == above.micro_batch_size:
        return below.seconds_per_step
    width = math.log(above.micro_batch_size / below.micro_batch_size)
    share = math.log(micro / below.micro_batch_size) / width
    return float(below.seconds_per_step ** (1 - share) * above.seconds_per_step**share)


def _neighbours(speed: SpeedCurve, micro: int) -> tuple[SpeedPoint, SpeedPoint]:
    below = [p for p in speed.points if p.micro_batch_size <= micro]
    above = [p for p in speed.points if p.micro_batch_size >= micro]
    first, last = speed.points[0], speed.points[-1]
    return (below[-1] if below else first), (above[0] if above else last)


def _timing_error(speed: SpeedCurve, micro: int) -> float:
    """Return the standard error of the log of a median time."""
    point = _neighbours(speed, micro)[0]
    spread = math.log(point.seconds_high / point.seconds_low) / 1.349
    return 1.253 * spread / math.sqrt(max(point.repeats, 1))
