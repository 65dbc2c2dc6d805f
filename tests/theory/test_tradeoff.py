from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import log_ndtr
from scipy.stats import f as f_law

from noisescale.errors import InvalidInputError
from noisescale.records import Interval, Outcome, Tradeoff
from noisescale.theory.steps_likelihood import StepsLikelihood, _Tobit, profile_intervals
from noisescale.theory.tradeoff import (
    batch_size_for_examples,
    batch_size_for_steps,
    examples_ratio,
    fit_tradeoff,
    overhead_batch_size,
    steps_ratio,
)

Array = npt.NDArray[np.float64]
positive = st.floats(1e-3, 1e6)


def law(sizes: npt.ArrayLike, steps_min: float = 300.0, critical: float = 100.0) -> Array:
    return steps_min * (1 + critical / np.asarray(sizes, dtype=float))


def noisy(sizes: npt.ArrayLike, noise: float, seed: int, **truth: float) -> Array:
    steps = law(sizes, **truth)
    return steps * np.exp(noise * np.random.default_rng(seed).standard_normal(len(steps)))


def three(fit: Tradeoff) -> tuple[Interval, Interval, Interval]:
    return fit.steps_min, fit.examples_min, fit.critical_batch


class TestClosedForms:
    @settings(deadline=None)
    @given(batch=positive, critical=positive)
    def test_the_hyperbola(self, batch: float, critical: float) -> None:
        # (S/Smin - 1)(E/Emin - 1) = 1, McCandlish et al. 2018, eq. 2.11.
        steps = float(steps_ratio(batch_size=batch, critical_batch=critical))
        examples = float(examples_ratio(batch_size=batch, critical_batch=critical))
        # 1 + x loses up to eps/x of x, for x down to 1e-9.
        assert (steps - 1) * (examples - 1) == pytest.approx(1, rel=1e-6)

    def test_twice_the_fewest_of_both_at_the_critical_batch(self) -> None:
        assert float(steps_ratio(batch_size=37, critical_batch=37)) == 2
        assert float(examples_ratio(batch_size=37, critical_batch=37)) == 2

    @settings(deadline=None)
    @given(ratio=st.floats(1.01, 100), critical=positive)
    def test_inverses(self, ratio: float, critical: float) -> None:
        batch = float(batch_size_for_steps(ratio=ratio, critical_batch=critical))
        assert steps_ratio(batch_size=batch, critical_batch=critical) == pytest.approx(ratio)
        batch = float(batch_size_for_examples(ratio=ratio, critical_batch=critical))
        assert examples_ratio(batch_size=batch, critical_batch=critical) == pytest.approx(ratio)

    @settings(deadline=None)
    @given(base=positive, overhead=st.floats(1, 10), critical=positive)
    def test_overhead_is_the_ratio_of_examples(
        self, base: float, overhead: float, critical: float
    ) -> None:
        batch = float(
            overhead_batch_size(critical_batch=critical, base_batch_size=base, overhead=overhead)
        )
        ratio = examples_ratio(batch_size=batch, critical_batch=critical) / examples_ratio(
            batch_size=base, critical_batch=critical
        )
        assert ratio == pytest.approx(overhead)

    def test_arrays_broadcast(self) -> None:
        np.testing.assert_allclose(
            steps_ratio(batch_size=np.array([50, 100, 200]), critical_batch=100), [3, 2, 1.5]
        )

    @pytest.mark.parametrize(
        ("function", "arguments", "words"),
        [
            (steps_ratio, {"batch_size": 0, "critical_batch": 1}, "batch_size 0"),
            (examples_ratio, {"batch_size": 1, "critical_batch": -1}, "critical_batch -1"),
            (steps_ratio, {"batch_size": float("inf"), "critical_batch": 1}, "batch_size inf"),
            (batch_size_for_steps, {"ratio": 1.0, "critical_batch": 1}, "ratio 1"),
            (batch_size_for_examples, {"ratio": 0.5, "critical_batch": 1}, "ratio 0.5"),
            (
                overhead_batch_size,
                {"critical_batch": 1, "base_batch_size": 1, "overhead": 0.9},
                "overhead 0.9",
            ),
        ],
    )
    def test_bad_input(
        self, function: Callable[..., Any], arguments: dict[str, float], words: str
    ) -> None:
        with pytest.raises(InvalidInputError, match=words):
            function(**arguments)


class TestExactData:
    @settings(max_examples=25, deadline=None)
    @given(
        steps_min=st.floats(10, 1e5),
        critical=st.floats(8, 512),
        seed=st.integers(0, 100),
    )
    def test_the_law_is_recovered(self, steps_min: float, critical: float, seed: int) -> None:
        sizes = np.random.default_rng(seed).permutation([1.0, 4, 16, 64, 256, 1024, 4096])
        fit = fit_tradeoff(batch_size=sizes, steps=law(sizes, steps_min, critical))
        assert fit.outcome is Outcome.DETERMINED
        assert fit.fit.brackets
        # The assumed rounding of 1e-6 in log(steps) is what is left.
        for interval, truth in zip(
            three(fit), (steps_min, steps_min * critical, critical), strict=True
        ):
            assert interval.point == pytest.approx(truth, rel=1e-5)
            assert interval.low == pytest.approx(truth, rel=1e-4)
            assert interval.high == pytest.approx(truth, rel=1e-4)

    def test_exact_data_with_a_censored_row(self) -> None:
        sizes = np.array([1.0, 8, 32, 128, 512, 4096])
        steps = law(sizes)
        fit = fit_tradeoff(batch_size=sizes, steps=np.minimum(steps, 2e4), censored=steps > 2e4)
        assert fit.critical_batch.point == pytest.approx(100, rel=1e-4)


def slow_cost(
    a: float, b: float, log_sigma: float, sizes: Array, logs: Array, late: npt.NDArray[np.bool_]
) -> float:
    """-2 log likelihood, straight from its definition."""
    z = (logs - a - np.log1p(np.exp(b) / sizes)) / np.exp(log_sigma)
    density = -(z[~late] ** 2) / 2 - log_sigma
    return float(-2 * (density.sum() + log_ndtr(-z[late]).sum()))


def slow_interval(
    direction: tuple[float, float], sizes: Array, logs: Array, late: npt.NDArray[np.bool_]
) -> list[float]:
    """Profile interval of direction . (a, b) by general-purpose minimisation."""
    options = {"xatol": 1e-5, "fatol": 1e-7, "maxiter": 20000, "maxfev": 20000}

    def least(function: Callable[[Array], float], start: list[float]) -> tuple[float, Array]:
        result = minimize(function, start, method="Nelder-Mead", options=options)
        return float(result.fun), result.x

    start = [logs.min() - 0.1, np.log(np.median(sizes)), np.log(0.1)]
    bottom, best = least(lambda p: slow_cost(*p, sizes, logs, late), start)
    count = int((~late).sum())
    gap = count * np.log1p(f_law.ppf(0.95, 1, count - 2) / (count - 2))

    def profile(value: float) -> float:
        # The free parameter is b; a follows from a * d0 + b * d1 = value.
        def cost(p: Array) -> float:
            a = value - direction[1] * p[0]
            return slow_cost(a, p[0], p[1], sizes, logs, late)

        return least(cost, [best[1], best[2]])[0] - bottom - gap

    def profile_b(value: float) -> float:
        def cost(p: Array) -> float:
            return slow_cost(p[0], value, p[1], sizes, logs, late)

        return least(cost, [best[0], best[2]])[0] - bottom - gap

    chosen = profile if direction[0] else profile_b
    middle = direction[0] * best[0] + direction[1] * best[1]
    return [float(brentq(chosen, middle, middle + side, xtol=1e-5)) for side in (-3.0, 3.0)]


class TestAgainstTheSlowVersion:
    @pytest.mark.parametrize("budget", [np.inf, 2700.0])
    def test_profile_intervals(self, budget: float) -> None:
        sizes = np.repeat([4.0, 14, 49, 168, 588, 2048], 2)
        steps = noisy(sizes, 0.15, seed=3)
        late = steps > budget
        assert late.any() == np.isfinite(budget)
        steps = np.minimum(steps, budget)
        fit = fit_tradeoff(batch_size=sizes, steps=steps, censored=late)
        directions = ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
        for interval, direction in zip(three(fit), directions, strict=True):
            low, high = slow_interval(direction, sizes, np.log(steps), late)
            assert interval.low is not None
            assert interval.high is not None
            # The search stops at about 1e-5 of the interval's width.
            assert np.log(interval.low) == pytest.approx(low, abs=2e-4)
            assert np.log(interval.high) == pytest.approx(high, abs=2e-4)

    def test_tobit_without_censored_rows_is_least_squares(self) -> None:
        sizes = np.repeat([4.0, 30, 200, 2048], 3)
        logs = np.log(noisy(sizes, 0.1, seed=5))
        nowhere = np.zeros(len(sizes), dtype=bool)
        exact = profile_intervals(
            StepsLikelihood.of(log_sizes=np.log(sizes), log_steps=logs, censored=nowhere),
            level=0.9,
        )
        tobit = profile_intervals(_Tobit(np.log(sizes), logs, len(sizes)), level=0.9)
        for name in ("critical", "steps_min", "examples_min"):
            np.testing.assert_allclose(getattr(tobit, name), getattr(exact, name), atol=1e-4)

    def test_lack_of_fit_and_replication_error(self) -> None:
        sizes = np.repeat([4.0, 30, 200, 2048], 3)
        logs = np.log(noisy(sizes, 0.1, seed=6))
        fit = fit_tradeoff(batch_size=sizes, steps=np.exp(logs))
        groups = logs.reshape(4, 3)
        pure = ((groups - groups.mean(axis=1, keepdims=True)) ** 2).sum()
        squares = minimize(
            lambda p: ((logs - p[0] - np.log1p(np.exp(p[1]) / sizes)) ** 2).sum(),
            [np.log(300), np.log(100)],
            tol=1e-12,
        ).fun
        ratio = (squares - pure) / 2 / (pure / 8)
        assert fit.fit.replication_error == pytest.approx(np.sqrt(pure / 8))
        assert fit.fit.lack_of_fit_p == pytest.approx(f_law.sf(ratio, 2, 8), rel=1e-4)
        assert fit.fit.rms_log_error == pytest.approx(np.sqrt(squares / 12), rel=1e-6)


class TestCoverage:
    @pytest.mark.parametrize(("noise", "budget"), [(0.05, np.inf), (0.15, np.inf), (0.15, 2700)])
    def test_intervals_hold_the_truth_about_as_often_as_they_say(
        self, noise: float, budget: float
    ) -> None:
        # 60 repeats at 95 %: below 52 happens less than once in 100 (binomial); seeds are fixed.
        # The full table: benchmarks/coverage_tradeoff.py.
        sizes, repeats = np.geomspace(4, 2048, 6), 60
        held = np.zeros(3)
        for seed in range(repeats):
            steps = noisy(sizes, noise, seed)
            fit = fit_tradeoff(
                batch_size=sizes, steps=np.minimum(steps, budget), censored=steps > budget
            )
            for index, (interval, truth) in enumerate(
                zip(three(fit), (300, 30_000, 100), strict=True)
            ):
                assert interval.low is not None
                held[index] += interval.low <= truth <= (interval.high or np.inf)
        assert np.all(held >= 52)


class TestOutcomes:
    def test_perfect_scaling_gives_a_lower_bound(self) -> None:
        sizes = np.array([1.0, 2, 4, 8, 16, 32])
        fit = fit_tradeoff(batch_size=sizes, steps=noisy(sizes, 0.1, seed=1, critical=1e5))
        assert fit.outcome is Outcome.LOWER_BOUND
        assert fit.critical_batch.point is None
        assert fit.critical_batch.high is None
        assert fit.critical_batch.low is not None
        assert 10 < fit.critical_batch.low < 1e5
        assert (fit.steps_min.point, fit.steps_min.low) == (None, 0)
        assert fit.steps_min.high is not None
        # What is measured there, the fewest examples, is known.
        assert fit.examples_min.point == pytest.approx(3e7, rel=0.2)
        assert not fit.fit.brackets
        assert "add larger batch sizes" in fit.detail

    def test_the_plateau_gives_no_lower_end(self) -> None:
        sizes = np.array([100.0, 200, 400, 800, 1600, 3200])
        fit = fit_tradeoff(batch_size=sizes, steps=noisy(sizes, 0.1, seed=1, critical=0.1))
        assert fit.outcome is Outcome.LOWER_BOUND
        assert (fit.critical_batch.point, fit.critical_batch.low) == (None, 0)
        assert fit.critical_batch.high is not None
        assert fit.examples_min.low == 0
        assert fit.examples_min.point is None
        assert fit.steps_min.point == pytest.approx(300, rel=0.2)
        assert "add smaller batch sizes" in fit.detail

    def test_noise_that_hides_everything(self) -> None:
        sizes = np.array([50.0, 70, 100, 140])
        fit = fit_tradeoff(batch_size=sizes, steps=np.array([700.0, 500, 720, 520]))
        assert fit.outcome is Outcome.LOWER_BOUND
        assert (fit.critical_batch.low, fit.critical_batch.high) == (0, None)
        assert "open on both sides" in fit.detail

    @pytest.mark.parametrize(
        ("sizes", "late", "found"),
        [
            ([8, 64], [False, False], "2 rows at 2"),
            ([8, 64, 512], [False] * 3, "3 rows at 3"),
            ([8, 8, 64, 64], [False] * 4, "4 rows at 2"),
            ([8, 64, 512, 4096], [True, False, False, False], "3 rows at 3"),
            ([8, 64, 512, 4096], [True] * 4, "0 rows at 0"),
        ],
    )
    def test_too_few(self, sizes: list[int], late: list[bool], found: str) -> None:
        fit = fit_tradeoff(batch_size=sizes, steps=law(sizes), censored=late)
        assert fit.outcome is Outcome.TOO_FEW_STEPS
        assert found in fit.detail
        assert all(interval == Interval(point=None, low=None, high=None) for interval in three(fit))
        assert np.isnan(fit.fit.rms_log_error)
        assert fit.to_dict()["fit"]["rms_log_error"] is None

    def test_a_law_that_does_not_fit_is_named(self) -> None:
        sizes = np.repeat([4.0, 30, 200, 2048], 4)
        wrong = 1e4 * sizes**-0.3 * np.exp(np.tile([-0.02, 0.01, -0.01, 0.02], 4))
        fit = fit_tradeoff(batch_size=sizes, steps=wrong)
        assert fit.fit.lack_of_fit_p is not None
        assert fit.fit.lack_of_fit_p < 1e-6
        assert "does not fit" in fit.detail

    def test_one_side_is_said(self) -> None:
        sizes = np.repeat([1.0, 4, 16, 64], 4)
        fit = fit_tradeoff(batch_size=sizes, steps=noisy(sizes, 0.02, seed=2))
        assert fit.outcome is Outcome.DETERMINED
        assert not fit.fit.brackets
        assert "one side" in fit.detail

    def test_repeats_of_a_censored_size_do_not_judge_the_fit(self) -> None:
        sizes = np.repeat([4.0, 30, 200, 2048], 2)
        steps = noisy(sizes, 0.1, seed=7)
        late = np.arange(8) == 0
        fit = fit_tradeoff(batch_size=sizes, steps=steps, censored=late)
        logs = np.log(steps[2:]).reshape(3, 2)
        pure = ((logs - logs.mean(axis=1, keepdims=True)) ** 2).sum()
        assert fit.fit.replication_error == pytest.approx(np.sqrt(pure / 3))
        assert (fit.fit.points, fit.fit.censored, fit.fit.batch_sizes) == (7, 1, 4)


class TestSymmetries:
    def test_units_of_steps_and_sizes_only_rescale(self) -> None:
        sizes = np.array([4.0, 14, 49, 168, 588, 2048])
        steps = noisy(sizes, 0.1, seed=8)
        one = fit_tradeoff(batch_size=sizes, steps=steps)
        other = fit_tradeoff(batch_size=512 * sizes, steps=10 * steps, unit="tokens")
        assert other.unit == "tokens"
        for a, b, factor in zip(three(one), three(other), (10, 5120, 512), strict=True):
            assert b.point == pytest.approx(factor * (a.point or 0), rel=1e-5)
            assert b.low == pytest.approx(factor * (a.low or 0), rel=1e-4)
            assert b.high == pytest.approx(factor * (a.high or 0), rel=1e-4)

    def test_a_wider_level_holds_the_narrower(self) -> None:
        sizes = np.array([4.0, 14, 49, 168, 588, 2048])
        steps = noisy(sizes, 0.1, seed=9)
        narrow, wide = (
            fit_tradeoff(batch_size=sizes, steps=steps, level=level) for level in (0.5, 0.99)
        )
        for a, b in zip(three(narrow), three(wide), strict=True):
            assert (b.low or 0) < (a.low or 0) < (a.point or 0)
            assert (a.point or 0) < (a.high or 0) < (b.high or 0)

    def test_a_censored_row_moves_the_fit_only_upwards(self) -> None:
        sizes = np.array([4.0, 14, 49, 168, 588, 2048])
        steps = noisy(sizes, 0.1, seed=10)
        plain = fit_tradeoff(batch_size=sizes, steps=steps)
        late = np.arange(6) == 0
        bound = fit_tradeoff(batch_size=sizes, steps=steps, censored=late)
        useless = fit_tradeoff(batch_size=sizes, steps=np.where(late, 1.0, steps), censored=late)
        dropped = fit_tradeoff(batch_size=sizes[1:], steps=steps[1:])
        assert (bound.examples_min.point or 0) >= (plain.examples_min.point or 0) * (1 - 1e-9)
        # A bound far below the law says nothing: the same as no row.
        for a, b in zip(three(useless), three(dropped), strict=True):
            assert (a.low, a.high) == (
                pytest.approx(b.low, rel=1e-4),
                pytest.approx(b.high, rel=1e-4),
            )


def test_numbers_at_the_border_give_no_overflow() -> None:
    fit = fit_tradeoff(batch_size=[8, 16, 32, 1e15], steps=[100, 60, 40, 1e15])
    assert fit.critical_batch.point is None


def test_steps_that_rise_are_told() -> None:
    sizes = [8, 16, 32, 64]
    rising = fit_tradeoff(batch_size=sizes, steps=[100, 130, 200, 300])
    assert "steps rise with the batch size, by a factor 3.06 from 8 to 64" in rising.detail
    assert "does not describe" in rising.detail
    assert rising.critical_batch.point is None
    # The factor: exp(3 (1.5 log 3 + 0.5 log(200/130)) / 5).
    # On one line nothing is left to chance; flat and scattered steps do not rise.
    assert "steps rise" in fit_tradeoff(batch_size=sizes, steps=sizes).detail
    for steps in ([50, 50, 50, 50], [50, 50, 51, 51], [50, 90, 40, 70]):
        assert "steps rise" not in fit_tradeoff(batch_size=sizes, steps=steps).detail


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": [8, 8, 8]}, "all 3 values are 8"),
        ({"batch_size": [8, 16]}, "equal length"),
        ({"censored": [True]}, "equal length"),
        ({"censored": ["false", "false", "true"]}, "True or False"),
        ({"censored": [0, 1, 2]}, "True or False"),
        ({"batch_size": 8, "steps": 3}, "equal length"),
        ({"batch_size": [], "steps": []}, "no rows"),
        ({"batch_size": [8, 0, 32]}, "batch_size 0"),
        ({"batch_size": [8, 16, 1e300]}, "batch_size 1e.300: a number between"),
        ({"steps": [10, 5, 1e16]}, "steps 1e.16: a number between"),
        ({"steps": [10, -5, 3]}, "steps -5"),
        ({"steps": [10, float("nan"), 3]}, "steps nan"),
        ({"steps": [10, float("inf"), 3]}, "steps inf"),
        ({"steps": ["ten", 5, 3]}, "numbers are required"),
        ({"level": 1.0}, "level 1"),
        ({"level": 95}, "level 95"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"batch_size": [8, 16, 32], "steps": [10, 5, 3]}
    with pytest.raises(InvalidInputError, match=words):
        fit_tradeoff(**(arguments | change))


def test_both_definitions_stand_side_by_side() -> None:
    """Bcrit 100 from size 10: 20 % more examples than there is 0.2 x 100 + 1.2 x 10 = 32."""
    sizes = [10, 40, 160, 640]
    fit = fit_tradeoff(batch_size=sizes, steps=[30 * (1 + 100 / b) for b in sizes])
    assert fit.overhead_batch.point == pytest.approx(32, rel=1e-3)
    examples = {b: b * 30 * (1 + 100 / b) for b in (10, 32)}
    assert examples[32] == pytest.approx(1.2 * examples[10])
