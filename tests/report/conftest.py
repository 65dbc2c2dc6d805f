"""Example records as a real run would make them, one for every way a measurement can end."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from noisescale.plan.choose import choose, memory_limit, throughput_knee
from noisescale.records import (
    Advice,
    CriticalBatch,
    FitQuality,
    Interval,
    Limits,
    Measurement,
    NoiseScale,
    Outcome,
    ParametersSeen,
    RateCheck,
    RateTrial,
    Recipe,
    SpeedCurve,
    SpeedFailure,
    SpeedPoint,
    Tradeoff,
    TrajectoryRow,
)

SEEN = ParametersSeen(seen=4810, total=4810)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1437)


def step_seconds(micro: int) -> float:
    return 3.4e-4 + 1.3e-6 * micro + 4e-10 * micro**2


def speed_curve() -> SpeedCurve:
    points = []
    for micro in SIZES:
        seconds = step_seconds(micro)
        data = 4e-5 + 3e-7 * micro
        points.append(
            SpeedPoint(
                micro_batch_size=micro,
                seconds_per_step=seconds,
                seconds_low=0.94 * seconds,
                seconds_high=1.11 * seconds,
                data_seconds=data,
                compute_seconds=seconds - data,
                examples_per_second=micro / seconds,
                peak_bytes=120_000 + 2_900 * micro,
                repeats=40,
            )
        )
    return SpeedCurve(
        points=tuple(points),
        failures=(),
        limit_bytes=2_800_000_000,
        baseline_bytes=310_000_000,
        margin=0.1,
        device="CPU, 2 threads",
        stopped="largest size",
        not_probed=("communication between devices is not measured: replicas are ideal",),
    )


def noise_scale(low: float | None, point: float | None, high: float | None) -> NoiseScale:
    outcome = Outcome.DETERMINED if point else Outcome.LOWER_BOUND if low else Outcome.TOO_FEW_STEPS
    return NoiseScale(
        b_simple=point,
        low=low,
        high=high,
        outcome=outcome,
        detail="" if point else "the squared gradient cannot be told from 0 at this many steps",
        grad_sq=0.0213 if point else -0.0004,
        trace_cov=1.944,
        steps=412,
        examples=13184,
        source="examples",
        parameters_seen=SEEN,
    )


def trajectory(windows: int = 16) -> tuple[TrajectoryRow, ...]:
    generator = random.Random(0)
    rows = []
    for window in range(windows):
        true = 18 * math.exp(2.3 * window / windows) * math.exp(generator.gauss(0, 0.16))
        half_line = window in (9, 14, 15)
        rows.append(
            TrajectoryRow(
                step=26 * (window + 1),
                examples=832 * (window + 1),
                loss=2.1 * math.exp(-0.2 * window) + 0.1,
                grad_sq=-1e-4 if half_line else 1.9 / true,
                trace_cov=1.9,
                b_simple=None if half_line else true,
                low=true / 2.2 if half_line else true / 1.5,
                high=None if half_line else true * (1.6 + 0.06 * window),
            )
        )
    return tuple(rows)


CRITICAL = CriticalBatch(
    point=91.3,
    low=41.2,
    high=205.0,
    sampling_low=71.9,
    sampling_high=118.0,
    basis="noise_scale",
    phase="lr 0.5, from the start to validation_error<0.05",
    outcome=Outcome.DETERMINED,
    optimizer="sgd",
    factor=1.0,
    factor_low=0.57,
    factor_high=1.75,
    factor_source="ratios measured on other workloads than this one",
)


def advice_for(
    critical: CriticalBatch,
    *,
    devices: tuple[int, ...] = (1,),
    max_waste: float = 1.5,
    speed: SpeedCurve | None = None,
    dataset_size: int = 1437,
) -> Advice:
    speed = speed or speed_curve()
    choice = choose(
        speed=speed,
        critical=critical,
        devices=devices,
        max_waste=max_waste,
        dataset_size=dataset_size,
    )
    return Advice(
        workload="digits",
        recipe=Recipe(optimizer="sgd", lr=0.5, batch_size=32, dataset_size=dataset_size),
        target="validation_error<0.05",
        unit="examples",
        limits=Limits(
            memory=memory_limit(speed),
            throughput_knee=throughput_knee(speed),
            critical_batch=critical,
        ),
        rate_check=RateCheck(
            lr=0.5,
            best_lr=0.5,
            verdict="near_best",
            detail="of five rates from 0.125 to 2, lr 0.5 reached the target in the fewest steps",
            measured_lr=0.5,
            trials=tuple(
                RateTrial(
                    lr=lr,
                    seed=seed,
                    steps_to_target=steps,
                    final_loss=None if steps is None and lr > 1 else 0.21,
                    outcome="reached" if steps else "diverged" if lr > 1 else "not_reached",
                )
                for lr, steps in (
                    (0.125, None),
                    (0.25, 720.0),
                    (0.5, 410.0),
                    (1.0, 433.0),
                    (2, None),
                )
                for seed in (0, 1)
            ),
        ),
        table=choice.table,
        recommended=choice.recommended,
        reasons=choice.reasons,
        max_waste=max_waste,
        devices=devices,
        speed=speed,
        noise_scale=noise_scale(71.9, 91.3, 118.0),
        trajectory=trajectory(),
        groups={
            "0.weight": noise_scale(61.2, 82.4, 112.0),
            "0.bias": noise_scale(38.0, 52.6, 77.1),
            "2.weight": noise_scale(88.4, 121.0, 180.0),
            "2.bias": noise_scale(25.0, None, None),
        },
        first=noise_scale(20.1, 27.4, 39.9),
        last=noise_scale(96.0, None, None),
        warnings=(),
        seconds=41.7,
        version="0.1.0",
    )


def lower_bound() -> Advice:
    """|G|^2 cannot be told from 0, and the factor's spread leaves no lower end."""
    critical = dataclasses.replace(
        CRITICAL,
        point=None,
        low=None,
        high=None,
        sampling_low=120.0,
        sampling_high=None,
        outcome=Outcome.LOWER_BOUND,
        detail="the squared gradient cannot be told from 0 after 412 steps",
    )
    return dataclasses.replace(
        advice_for(critical),
        noise_scale=noise_scale(120.0, None, None),
        warnings=("the target was not reached within 412 steps; give --seconds 120",),
    )


def half_line() -> Advice:
    """Only a lower end: the waste can be judged, the time cannot."""
    critical = dataclasses.replace(
        CRITICAL,
        point=None,
        low=68.0,
        high=None,
        sampling_low=120.0,
        sampling_high=None,
        outcome=Outcome.LOWER_BOUND,
        detail="the squared gradient cannot be told from 0 after 412 steps",
    )
    return dataclasses.replace(advice_for(critical), noise_scale=noise_scale(120.0, None, None))


def too_few_steps() -> Advice:
    """No interval at all, no trajectory, no groups."""
    critical = dataclasses.replace(
        CRITICAL,
        point=None,
        low=None,
        high=None,
        sampling_low=None,
        sampling_high=None,
        outcome=Outcome.TOO_FEW_STEPS,
        detail="3 steps were measured, at least 8 are needed",
    )
    return dataclasses.replace(
        advice_for(critical),
        noise_scale=noise_scale(None, None, None),
        trajectory=(),
        groups={},
        first=None,
        last=None,
        target=None,
    )


def rate_too_low() -> Advice:
    """The recipe's rate is far below its best: measured elsewhere, and said so."""
    advice = advice_for(CRITICAL)
    check = dataclasses.replace(
        advice.rate_check,
        lr=0.02,
        best_lr=0.5,
        verdict="too_low",
        detail="lr 0.5 reached the target in 410 steps, lr 0.02 did not within 2,000",
        measured_lr=0.5,
        b_simple_at_lr=11.7,
    )
    return dataclasses.replace(
        advice,
        rate_check=check,
        warnings=("the recipe's learning rate is far from its best: tune it first",),
    )


def many_rows() -> Advice:
    """Four device counts: a long table, with a scan that ended at memory."""
    whole = speed_curve()
    points = tuple(
        dataclasses.replace(
            point,
            data_seconds=0.7 * point.seconds_per_step,
            compute_seconds=0.3 * point.seconds_per_step,
        )
        for point in whole.points
        if point.micro_batch_size <= 384
    )
    failures = (SpeedFailure(micro_batch_size=512, reason="out of memory"),)
    speed = dataclasses.replace(whole, points=points, failures=failures, stopped="does not fit")
    critical = dataclasses.replace(CRITICAL, point=913.0, low=412.0, high=2050.0)
    return advice_for(critical, devices=(1, 2, 4, 8), speed=speed, dataset_size=50_000)


def nothing_fits() -> Advice:
    """Not even one example fits: no speed, no rows."""
    advice = too_few_steps()
    failures = (SpeedFailure(micro_batch_size=1, reason="out of memory"),)
    speed = dataclasses.replace(advice.speed, points=(), failures=failures)
    limits = dataclasses.replace(
        advice.limits, memory=memory_limit(speed), throughput_knee=throughput_knee(speed)
    )
    return dataclasses.replace(
        advice, limits=limits, speed=speed, table=(), reasons=("no micro-batch fits in memory",)
    )


def hostile() -> Advice:
    """Every text that a user controls tries to become markup, of the page or the terminal."""
    text = "<script>alert(1)</script>&[bold]$x$"
    advice = many_rows()
    return dataclasses.replace(
        advice,
        workload=text,
        target=text,
        reasons=(text,),
        warnings=(text,),
        groups={text: noise_scale(61.2, 82.4, 112.0)},
        rate_check=dataclasses.replace(advice.rate_check, detail=text),
        limits=dataclasses.replace(
            advice.limits,
            critical_batch=dataclasses.replace(advice.limits.critical_batch, phase=text),
        ),
        speed=dataclasses.replace(advice.speed, device=text, not_probed=(text,)),
        recipe=advice.recipe.with_changes(schedule={"kind": text}),
    )


ADVICES = {
    "determined": lambda: advice_for(CRITICAL),
    "lower_bound": lower_bound,
    "half_line": half_line,
    "too_few_steps": too_few_steps,
    "rate_too_low": rate_too_low,
    "many_rows": many_rows,
    "nothing_fits": nothing_fits,
    "hostile": hostile,
}


@pytest.fixture(params=sorted(ADVICES))
def any_advice(request: pytest.FixtureRequest) -> Advice:
    return ADVICES[request.param]()


@pytest.fixture
def advices() -> dict[str, Advice]:
    return {name: make() for name, make in ADVICES.items()}


def example_measurement() -> Measurement:
    advice = advice_for(CRITICAL)
    return Measurement(
        workload="digits",
        noise_scale=advice.noise_scale,
        groups=advice.groups,
        trajectory=advice.trajectory,
        batch_size=32,
        lr=0.5,
        frozen=False,
        seconds=3.2,
        warnings=("the rate was not checked",),
    )


@pytest.fixture
def measurement() -> Measurement:
    return example_measurement()


def example_tradeoff() -> Tradeoff:
    return Tradeoff(
        steps_min=Interval(point=98.2, low=81.0, high=117.0),
        examples_min=Interval(point=9120.0, low=7700.0, high=10800.0),
        critical_batch=Interval(point=92.9, low=68.0, high=127.0),
        level=0.95,
        outcome=Outcome.DETERMINED,
        detail="",
        fit=FitQuality(
            points=20,
            censored=2,
            batch_sizes=7,
            rms_log_error=0.081,
            replication_error=0.077,
            lack_of_fit_p=0.41,
            brackets=True,
        ),
        target="validation_error<0.05",
    )


@pytest.fixture
def tradeoff() -> Tradeoff:
    return example_tradeoff()
