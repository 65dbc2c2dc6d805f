"""Several runs pooled: more steps, a narrower interval, the same estimand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.records import Outcome
from noisescale.run.measuring import measure_run
from noisescale.run.repeated import measure_runs
from noisescale.run.resolve import resolve_workload

DIGITS = resolve_workload("digits")


def test_pooling_is_the_ratio_of_all_sums_and_narrows_the_interval() -> None:
    found = measure_runs(
        DIGITS,
        recipe=DIGITS.recipe,
        seed=0,
        target=DIGITS.target,
        max_steps=1000,
        max_seconds=60.0,
    )
    assert len(found.runs) == 4
    assert [one.run.seed for one in found.runs] == [0, 1, 2, 3]
    one, all_ = found.first.noise_scale, found.noise_scale
    trace = np.concatenate([run.moments.trace_cov for run in found.runs])
    square = np.concatenate([run.moments.grad_sq for run in found.runs])
    assert all_.b_simple == pytest.approx(trace.mean() / square.mean())
    assert all_.steps == sum(run.noise_scale.steps for run in found.runs)
    assert all_.outcome is Outcome.DETERMINED
    assert math.log(all_.high / all_.low) < 0.75 * math.log(one.high / one.low)


def test_the_first_run_is_the_measurement_alone() -> None:
    alone = measure_run(DIGITS, seed=3, target=DIGITS.target, max_steps=1000)
    found = measure_runs(
        DIGITS,
        recipe=DIGITS.recipe,
        seed=3,
        target=DIGITS.target,
        max_steps=1000,
        max_seconds=60.0,
        runs=1,
    )
    assert found.noise_scale == alone.noise_scale


def test_a_goal_out_of_reach_is_run_once() -> None:
    found = measure_runs(
        DIGITS, recipe=DIGITS.recipe, seed=0, target=DIGITS.target, max_steps=15, max_seconds=60.0
    )
    assert len(found.runs) == 1
    assert found.noise_scale.steps == 15
