from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import SweepCurve, TrialOutcome, TrialRow, TunedSteps, TuningOutcome
from noisescale.theory.sweep_curve import curve_of, pooled, shared_shift, sweep_curve
from surfaces import Search, Surface, hyperbola, trials

SIZES = [2**k for k in range(1, 12)]


def sweep(seed: int, **surface: float) -> list[TrialRow]:
    rng = np.random.default_rng(seed)
    made = Surface(law=hyperbola(steps_min=100, critical=64), **{"noise": 0.08} | surface)
    common = rng.standard_normal(4)
    search = Search(rates=7, seeds=4)
    return [row for size in SIZES for row in trials(made, search, size, rng, common)]


def point(size: int, steps: float | None, seeds: dict[str, float] | None = None, **more: object):
    values = {
        "low": None if steps is None else steps * 0.9,
        "high": None if steps is None else steps * 1.1,
        "outcome": TuningOutcome.REACHED if steps else TuningOutcome.NOT_REACHED,
        "best": {},
        "log_error": 0.05 if steps else None,
        "freedom": 3.0 if steps else None,
        "seed_values": seeds or {},
    } | more
    return TunedSteps(batch_size=size, steps=steps, **values)


def law(size: int) -> float:
    return 100 * (1 + 64 / size)


def test_a_whole_sweep() -> None:
    curve = sweep_curve(sweep(0), target="a<1")
    assert [p.batch_size for p in curve.batch_sizes] == SIZES
    assert curve.tradeoff is not None
    assert curve.tradeoff.target == "a<1"
    assert curve.tradeoff.critical_batch.point == pytest.approx(64, rel=0.3)
    assert curve.regimes is not None
    assert curve.regimes.plateau.point == pytest.approx(100, rel=0.2)
    assert curve.rate_law is not None
    assert curve.rate_law.exponent.point == pytest.approx(1, abs=0.3)
    assert SweepCurve.from_json(curve.to_json()) == curve


def test_the_order_of_the_trials_does_not_matter() -> None:
    rows = sweep(1)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    one, two = sweep_curve(rows), sweep_curve(shuffled)
    for a, b in zip(one.batch_sizes, two.batch_sizes, strict=True):
        assert a.steps == pytest.approx(b.steps, rel=1e-4)
        assert a.best == b.best


def test_coverage() -> None:
    hits, repeats = np.zeros(4), 30
    for seed in range(repeats):
        curve = sweep_curve(sweep(seed))
        assert curve.tradeoff is not None
        found = (
            curve.tradeoff.critical_batch,
            curve.tradeoff.steps_min,
            curve.tradeoff.examples_min,
        )
        for i, (interval, truth) in enumerate(zip(found, (64, 100, 6400), strict=True)):
            assert interval.low is not None
            hits[i] += interval.low <= truth <= (interval.high or math.inf)
        hits[3] += np.mean(
            [(p.low or 0) <= law(p.batch_size) <= (p.high or 0) for p in curve.batch_sizes]
        )
    assert (hits / repeats > 0.95 - 0.12).all()  # three standard errors


def test_seeds_alike_at_all_sizes_widen_the_levels_alone() -> None:
    offsets = {"a": -0.2, "b": 0.0, "c": 0.2}
    alike = [point(b, law(b), {s: math.log(law(b)) + o for s, o in offsets.items()}) for b in SIZES]
    apart = [
        point(b, law(b), {f"{s}{b}": math.log(law(b)) + o for s, o in offsets.items()})
        for b in SIZES
    ]
    # Student's t for two degrees of freedom times the standard error of three seeds.
    assert shared_shift(alike) == pytest.approx(4.303 * 0.2 / math.sqrt(3), rel=1e-3)
    assert shared_shift(apart) == 0
    wide, narrow = curve_of(alike), curve_of(apart)
    assert wide.tradeoff is not None
    assert narrow.tradeoff is not None
    assert wide.tradeoff.critical_batch == narrow.tradeoff.critical_batch
    assert wide.tradeoff.steps_min.high == pytest.approx(
        100 * math.exp(shared_shift(alike)), rel=0.05
    )
    assert narrow.tradeoff.steps_min.high == pytest.approx(100, rel=0.05)


def test_variances_are_pooled() -> None:
    rng = np.random.default_rng(0)
    points = []
    for size in SIZES:
        values = math.log(law(size)) + 0.1 * rng.standard_normal(3)
        error = float(values.std(ddof=1)) / math.sqrt(3)
        seeds = dict(zip("abc", values.tolist(), strict=True))
        points.append(point(size, law(size), seeds, log_error=error, freedom=2.0))
    better = pooled(points)
    assert np.std([p.log_error for p in better]) < 0.5 * np.std([p.log_error for p in points])
    assert min(p.freedom or 0 for p in better) > 4
    assert better[0].steps == points[0].steps


def test_a_size_that_did_not_reach_bounds_the_law() -> None:
    points = [point(2, None, low=3000.0)] + [point(b, law(b)) for b in SIZES[1:]]
    curve = curve_of(points)
    assert curve.tradeoff is not None
    assert curve.tradeoff.fit.censored == 1
    assert "no steps at batch sizes 2 (not_reached)" in curve.detail


def test_edges_are_named() -> None:
    points = [point(b, law(b)) for b in SIZES]
    points[3] = point(SIZES[3], law(SIZES[3]), outcome=TuningOutcome.EDGE, on_edge=("lr",))
    assert f"edge of the search at {SIZES[3]}" in curve_of(points).detail


def test_nothing_reached() -> None:
    rows = [
        TrialRow(
            batch_size=size,
            values={"lr": 1.0},
            seed="a",
            outcome=TrialOutcome.DIVERGED,
            steps=3.0,
        )
        for size in (4, 8)
    ]
    curve = sweep_curve(rows)
    assert curve.tradeoff is None
    assert curve.regimes is None
    assert curve.rate_law is None
    assert "4 (diverged), 8 (diverged)" in curve.detail


def test_one_size() -> None:
    curve = curve_of([point(8, 100.0)])
    assert curve.tradeoff is None
    assert curve.rate_law is None


def test_no_trials() -> None:
    with pytest.raises(InvalidInputError, match="no trials of target 'a<1'"):
        sweep_curve([], target="a<1")
