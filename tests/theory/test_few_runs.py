from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, t

from noisescale.errors import InvalidInputError
from noisescale.theory.few_runs import TAILS, CriticalPrior, first_pair, predict_curve

SIZES = [float(2**k) for k in range(1, 13)]
PRIOR = CriticalPrior(point=80, low=20, high=320)


def law(size: float, critical: float = 100.0) -> float:
    return 100 * (1 + critical / size)


def test_the_posterior_is_that_of_integration_in_two_dimensions() -> None:
    sizes, steps, errors = np.array([16.0, 256]), np.array([800.0, 150]), np.array([0.1, 0.2])
    curve = predict_curve(
        batch_size=sizes, steps=steps, log_error=errors, prior=PRIOR, sizes=SIZES, law_error=1e-9
    )

    a, b = np.linspace(3, 7, 601)[:, None], np.linspace(-4, 12, 3001)
    density = t.pdf((b - math.log(PRIOR.point)) / PRIOR.deviation, TAILS)
    for size, count, error in zip(sizes, steps, errors, strict=True):
        density = density * norm.pdf((np.log(count) - a - np.log1p(np.exp(b) / size)) / error)
    of_b = density.sum(axis=0) / density.sum()
    critical = curve.critical_batch
    for end, expected in ((critical.low, 0.025), (critical.point, 0.5), (critical.high, 0.975)):
        assert end is not None
        assert of_b[b <= math.log(end)].sum() == pytest.approx(expected, abs=3e-3)
    of_a = density.sum(axis=1) / density.sum()
    for end, expected in ((curve.steps_min.low, 0.025), (curve.steps_min.high, 0.975)):
        assert end is not None
        assert of_a[a[:, 0] <= math.log(end)].sum() == pytest.approx(expected, abs=3e-3)


def test_exact_rows_leave_nothing_to_the_prior() -> None:
    curve = predict_curve(
        batch_size=[8, 1024],
        steps=[law(8), law(1024)],
        log_error=[1e-3, 1e-3],
        prior=CriticalPrior(point=400, low=100, high=1600),
        sizes=SIZES,
        law_error=1e-3,
    )
    for point in curve.curve:
        assert point.steps == pytest.approx(law(point.batch_size), rel=0.01)
    assert curve.critical_batch.point == pytest.approx(100, rel=0.01)
    assert curve.steps_min.point == pytest.approx(100, rel=0.01)
    assert curve.examples_min.point == pytest.approx(1e4, rel=0.01)
    assert [p.batch_size for p in curve.curve if p.measured] == [8, 1024]


def test_one_run_leaves_the_prior_as_it_is() -> None:
    curve = predict_curve(batch_size=[64], steps=[300], log_error=[0.05], prior=PRIOR, sizes=SIZES)
    assert curve.critical_batch.low == pytest.approx(PRIOR.low, rel=0.01)
    assert curve.critical_batch.high == pytest.approx(PRIOR.high, rel=0.01)


@pytest.mark.parametrize("errors", [0.03, 0.1])
def test_bias_and_coverage(errors: float) -> None:
    """Truths drawn from the prior, tuned steps with their own and the law's error."""
    rng, repeats, law_error = np.random.default_rng(3), 150, 0.07
    few = [2.0, 16.0, 64.0, 256.0, 2048.0]
    hits, misses, critical_hits = [], [], []
    for _ in range(repeats):
        critical = PRIOR.point * math.exp(PRIOR.deviation * rng.standard_t(TAILS))
        truth = np.log([law(size, critical) for size in few])
        spread = rng.standard_normal(len(few)) * law_error
        pair = [1, 3]
        noisy = np.exp((truth + spread)[pair] + errors * rng.standard_normal(2))
        curve = predict_curve(
            batch_size=[few[i] for i in pair],
            steps=noisy,
            log_error=[errors, errors],
            prior=PRIOR,
            sizes=few,
        )
        rest = [0, 2, 4]
        seen = (truth + spread)[rest]
        low = np.log([curve.curve[i].low for i in rest])
        high = np.log([curve.curve[i].high for i in rest])
        hits.append(np.mean((low <= seen) & (seen <= high)))
        misses.append(np.mean(np.log([curve.curve[i].steps for i in rest]) - truth[rest]))
        ends = curve.critical_batch.low, curve.critical_batch.high
        critical_hits.append(ends[0] <= critical <= ends[1])
    # Three standard errors of a share at 95 % in 150 repeats: 5.3 %.
    assert 0.95 - 0.053 < np.mean(critical_hits) < 0.95 + 0.053
    assert 0.95 - 0.053 < np.mean(hits) < 0.95 + 0.053
    assert abs(np.mean(misses)) < 3 * np.std(misses) / math.sqrt(repeats)


class TestBracketing:
    def predict(self, sizes: list[int], critical: float, allowed: list[int] | None = None):
        return predict_curve(
            batch_size=sizes,
            steps=[law(size, critical) for size in sizes],
            log_error=[0.02] * len(sizes),
            prior=PRIOR,
            sizes=SIZES,
            allowed=allowed,
            law_error=0.02,
        )

    def test_both_sides(self) -> None:
        curve = self.predict([16, 512], 100.0)
        assert curve.brackets
        assert curve.next_batch_size is None
        assert "both sides" in curve.detail

    def test_all_below(self) -> None:
        curve = self.predict([16, 128], 1500.0)
        assert not curve.brackets
        assert curve.next_batch_size is not None
        assert curve.next_batch_size > 1024
        assert f"tune {curve.next_batch_size}" in curve.detail

    def test_all_above(self) -> None:
        curve = self.predict([64, 512], 12.0)
        assert not curve.brackets
        assert curve.next_batch_size in (2, 4)

    def test_no_size_left(self) -> None:
        curve = self.predict([16, 128], 1500.0, allowed=[16, 32, 64, 128])
        assert not curve.brackets
        assert curve.next_batch_size is None
        assert "no other may" in curve.detail

    def test_moving_on_brackets(self) -> None:
        sizes = [16, 128]
        for _ in range(3):
            curve = self.predict(sizes, 1500.0)
            if curve.next_batch_size is None:
                break
            sizes.append(curve.next_batch_size)
        assert curve.brackets


@pytest.mark.parametrize(
    ("prior", "options", "pair"),
    [
        (PRIOR, {}, [16, 256]),
        (PRIOR, {"largest": 128}, [16, 128]),
        (PRIOR, {"smallest": 64}, [64, 256]),
        (
            CriticalPrior(point=5000, low=100, high=9000),
            {"largest": 1437},
            [1024, 1437],
        ),
        (CriticalPrior(point=1.5, low=0.1, high=9), {}, [1, 8]),
    ],
)
def test_the_first_pair(prior: CriticalPrior, options: dict[str, int], pair: list[int]) -> None:
    assert first_pair(prior, **options) == pair


@pytest.mark.parametrize(
    "wrong",
    [{"low": 0.0}, {"low": 100.0}, {"high": math.inf}, {"high": 70.0}, {"level": 1.0}],
)
def test_bad_priors(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="critical batch"):
        CriticalPrior(**({"point": 80.0, "low": 20.0, "high": 320.0} | wrong))


def test_bad_rows() -> None:
    with pytest.raises(InvalidInputError, match="one entry per tuned"):
        predict_curve(batch_size=[1, 2], steps=[3], log_error=[0.1], prior=PRIOR, sizes=SIZES)
    with pytest.raises(InvalidInputError, match="log_error"):
        predict_curve(batch_size=[1], steps=[3], log_error=[0], prior=PRIOR, sizes=SIZES)
