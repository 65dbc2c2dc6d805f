"""Calibration by a few tuned batch sizes, on small real trainings and on made-up trials."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest

from noisescale.errors import InvalidInputError
from noisescale.plan.critical import FACTORS, critical_batch
from noisescale.records import (
    Advice,
    Crossing,
    NoiseScale,
    Outcome,
    ParametersSeen,
    Recipe,
    TrialOutcome,
    TrialResult,
)
from noisescale.run.advise import advise
from noisescale.run.calibrate import calibrate, prior_of
from noisescale.run.resolve import resolve_workload
from noisescale.theory.few_runs import CriticalPrior

WIDE = CriticalPrior(point=100, low=10, high=1000)


def lawful(smallest: float, critical: float, noise: float = 0.0):
    """Return a trainer of made-up trials that follow the steps law with a bowl in log rate."""

    def train(request, engine, *, race=True):
        def run(plans, *, finished, on_result, should_stop):
            for plan in plans:
                size = plan.recipe.batch_size
                best = 0.5 / (1 + critical / size)
                off = math.log(plan.recipe.lr / best)
                wobble = noise * math.sin(7 * plan.seed + size)
                steps = smallest * (1 + critical / size) * math.exp(0.2 * off**2 + wobble)
                crossing = Crossing(
                    target=plan.targets[0], first=steps, sustained=steps, closest=0.01
                )
                on_result(
                    TrialResult(
                        plan=plan,
                        outcome=TrialOutcome.REACHED,
                        steps=math.ceil(steps),
                        crossings=(crossing,),
                        stopped_by="targets",
                        seconds=0.0,
                    )
                )

        return contextlib.nullcontext(run)

    return train


@pytest.mark.parametrize("critical", [12.0, 100.0, 700.0])
def test_the_law_is_found_wherever_the_critical_batch_lies(monkeypatch, critical):
    monkeypatch.setattr("noisescale.run.calibrate.trained_by_engine", lawful(40, critical, 0.03))
    found = calibrate("digits", prior=WIDE)
    low, *_, high = [row.batch_size for row in found.tuned]
    assert low < critical < high
    assert found.predicted.brackets
    curve = {row.batch_size: row for row in found.predicted.curve}
    for size in (1, 32, 1024):
        true = 40 * (1 + critical / size)
        assert curve[size].low < true < curve[size].high
        # Tuned steps are known to 3 % or so; a curve from two of them to a few times that.
        assert curve[size].steps == pytest.approx(true, rel=0.15)
    assert found.complete
    assert found.trials == sum(row.trials for row in found.tuned)


def test_a_third_size_is_tuned_where_two_lie_on_one_side(monkeypatch):
    monkeypatch.setattr("noisescale.run.calibrate.trained_by_engine", lawful(40, 700.0))
    wrong = CriticalPrior(point=8, low=1, high=64)
    found = calibrate("digits", prior=wrong)
    assert len(found.tuned) == 3
    assert found.tuned[-1].batch_size > 32
    assert found.predicted.critical_batch.point > 100
    two = calibrate("digits", prior=wrong, most_sizes=2)
    assert len(two.tuned) == 2
    assert not two.predicted.brackets


def test_a_store_keeps_the_trials(monkeypatch, tmp_path):
    monkeypatch.setattr("noisescale.run.calibrate.trained_by_engine", lawful(40, 100.0))
    first = calibrate("digits", prior=WIDE, store=tmp_path / "kept")

    def none(request, engine, *, race=True):
        raise AssertionError

    def refuses(request, engine, *, race=True):
        return contextlib.nullcontext(lambda plans, **_: none(request, engine))

    monkeypatch.setattr("noisescale.run.calibrate.trained_by_engine", refuses)
    again = calibrate("digits", prior=WIDE, store=tmp_path / "kept")
    assert again.predicted == first.predicted
    assert again.tuned == first.tuned


def test_time_that_is_up_leaves_what_was_tuned(monkeypatch):
    monkeypatch.setattr("noisescale.run.calibrate.trained_by_engine", lawful(40, 100.0))
    found = calibrate("digits", prior=WIDE, seconds=1e-9)
    assert not found.complete
    assert found.predicted is None
    assert "no tuned batch size" in found.detail


def test_a_real_training_end_to_end() -> None:
    found = advise("digits", seconds=6, overrides=["lr=0.5"], calibrate=True)
    critical = found.limits.critical_batch
    assert found.calibration.predicted is not None
    assert critical.basis == "tradeoff"
    assert critical.point == found.calibration.predicted.critical_batch.point
    assert (critical.low, critical.high) == (critical.sampling_low, critical.sampling_high)
    assert Advice.from_json(found.to_json()).calibration == found.calibration


def test_what_it_needs() -> None:
    with pytest.raises(InvalidInputError, match="most_sizes 1: at least 2"):
        calibrate("digits", prior=WIDE, most_sizes=1)
    aimless = dataclasses.replace(resolve_workload("digits"), target=None)
    with pytest.raises(InvalidInputError, match="calibrate without a target"):
        advise(aimless, seconds=2, calibrate=True)


def noise(outcome: Outcome, value, low, high) -> NoiseScale:
    return NoiseScale(
        b_simple=value,
        low=low,
        high=high,
        level=0.95,
        outcome=outcome,
        detail="",
        grad_sq=None,
        trace_cov=None,
        steps=100,
        examples=3200.0,
        unit="examples",
        source="examples",
        population="train_set",
        parameters_seen=ParametersSeen(seen=1, total=1, missing={}),
    )


def test_the_prior_is_the_wider_band_or_wide() -> None:
    recipe = Recipe(lr=0.1, batch_size=32)
    known = critical_batch(
        noise=noise(Outcome.DETERMINED, 50.0, 40.0, 60.0), optimizer="sgd", phase=""
    )
    prior, _ = prior_of(known, recipe)
    assert (prior.low, prior.point, prior.high) == (known.low, known.point, known.high)
    bound = critical_batch(
        noise=noise(Outcome.LOWER_BOUND, None, 40.0, None), optimizer="sgd", phase=""
    )
    prior, _ = prior_of(bound, recipe)
    assert prior.low < 40 * FACTORS["sgd"].low < prior.point < prior.high
    unknown = critical_batch(
        noise=noise(Outcome.TOO_FEW_STEPS, None, None, None), optimizer="sgd", phase=""
    )
    prior, why = prior_of(unknown, recipe)
    assert prior.point == 32
    assert "recipe" in why
