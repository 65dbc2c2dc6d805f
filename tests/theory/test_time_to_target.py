from __future__ import annotations

import math

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import SpeedCurve, SpeedPoint, TunedSteps, TuningOutcome
from noisescale.theory.time_to_target import seconds_of_pass, time_to_target


def speed(seconds: dict[int, float], spread: float = 1.0) -> SpeedCurve:
    points = [
        SpeedPoint(
            micro_batch_size=micro,
            seconds_per_step=s,
            seconds_low=s / spread,
            seconds_high=s * spread,
            data_seconds=0.0,
            compute_seconds=s,
            examples_per_second=micro / s,
            peak_bytes=1,
            repeats=16,
        )
        for micro, s in seconds.items()
    ]
    return SpeedCurve(
        points=tuple(points),
        failures=(),
        limit_bytes=1,
        baseline_bytes=0,
        margin=0.1,
        device="cpu",
        stopped="largest size",
    )


def tuned(batch_size: int, steps: float | None, half: float = 0.0) -> TunedSteps:
    return TunedSteps(
        batch_size=batch_size,
        steps=steps,
        low=None if steps is None else steps * math.exp(-half),
        high=None if steps is None else steps * math.exp(half),
        outcome=TuningOutcome.REACHED if steps else TuningOutcome.NOT_REACHED,
        best={},
    )


# Seconds 1 + micro/64 at the measured sizes.
CURVE = speed({1: 1.016, 16: 1.25, 64: 2.0, 256: 5.0})


def test_measured_sizes_and_those_between() -> None:
    assert seconds_of_pass(CURVE, micro=64) == 2.0
    assert seconds_of_pass(CURVE, micro=32) == pytest.approx(math.sqrt(1.25 * 2.0))
    assert seconds_of_pass(speed({16: 1.25, 64: 2.0}), micro=4) == 1.25


def test_one_pass_then_several() -> None:
    small, large = time_to_target([tuned(64, 100), tuned(1024, 10)], CURVE)
    assert (small.micro_batch_size, small.accumulation, small.seconds) == (64, 1, 200)
    # 4 passes of 256 at 5 s beat 16 of 64 at 2 s.
    assert (large.micro_batch_size, large.accumulation, large.seconds) == (256, 4, 200)


def test_a_smaller_pass_where_the_large_one_is_slow() -> None:
    slow = speed({64: 1.0, 256: 9.0})
    (joined,) = time_to_target([tuned(256, 10)], slow)
    assert (joined.micro_batch_size, joined.accumulation) == (64, 4)


def test_replicas_share() -> None:
    (joined,) = time_to_target([tuned(512, 10)], CURVE, replicas=8)
    assert (joined.micro_batch_size, joined.seconds_per_step, joined.seconds) == (64, 2.0, 20)


def test_errors_of_steps_and_times_add_in_quadrature() -> None:
    (exact,) = time_to_target([tuned(64, 100, half=0.1)], CURVE)
    assert exact.high == pytest.approx(200 * math.exp(0.1))
    (both,) = time_to_target([tuned(64, 100, half=0.1)], speed({64: 2.0}, spread=math.exp(0.2)))
    timing = 1.96 * 1.253 * (0.4 / 1.349) / 4
    assert both.high == pytest.approx(200 * math.exp(math.hypot(0.1, timing)))
    assert both.low == pytest.approx(200 * math.exp(-math.hypot(0.1, timing)))


def test_a_target_that_was_not_reached() -> None:
    (joined,) = time_to_target([tuned(64, None)], CURVE)
    assert joined.seconds is None
    assert joined.seconds_per_step == 2.0


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="0 measured sizes"):
        time_to_target([tuned(64, 1)], speed({}))
    with pytest.raises(InvalidInputError, match="0 replicas"):
        time_to_target([tuned(64, 1)], CURVE, replicas=0)
