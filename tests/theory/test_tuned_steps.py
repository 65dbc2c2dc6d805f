from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import TrialOutcome, TrialRow, TunedSteps, TuningOutcome
from noisescale.theory.tuned_steps import student, tuned_steps
from surfaces import Search, Surface, hyperbola, trials

REACHED, LATE, LOST = TrialOutcome.REACHED, TrialOutcome.NOT_REACHED, TrialOutcome.DIVERGED
CENTRE = 100 * (1 + 64 / 16)


def row(
    rate: float,
    seed: str,
    steps: float,
    outcome: TrialOutcome = REACHED,
    *,
    closest: float | None = None,
    **more: object,
) -> TrialRow:
    values = {"lr": rate, **more}
    return TrialRow(
        batch_size=16, values=values, seed=seed, outcome=outcome, steps=steps, closest=closest
    )


def bowl(rate: float) -> float:
    return 100 * (rate + 1 / rate) / 2


def grid(seeds: Sequence[float], rates: Sequence[float] = (0.35, 0.5, 0.71, 1, 1.41, 2, 2.8)):
    """Trials of a bowl; each seed is slower than the bowl by its factor, at every rate."""
    return [row(r, str(i), f * bowl(r)) for i, f in enumerate(seeds) for r in rates]


def test_the_best_is_the_point_with_the_fewest_steps_wherever_the_minimum_lies() -> None:
    """The search widens by it; the smooth minimum may lie nearer to another point."""
    steps = {0.5: 79.0, 0.8: 51.0, 1.3: 58.0, 2.0: 120.0}
    rows = [
        row(rate, str(i), n * f) for i, f in enumerate((0.95, 1.05)) for rate, n in steps.items()
    ]
    found = tuned_steps(rows)
    assert found.best == {"lr": 0.8}
    assert found.outcome is TuningOutcome.REACHED


class TestAnExactBowl:
    def test_the_minimum_between_the_points(self) -> None:
        found = tuned_steps(grid([1.0] * 3, [0.4, 0.6, 0.9, 1.35, 2.0]))
        assert found.steps == pytest.approx(100, rel=0.005)
        assert found.optimum["lr"] == pytest.approx(1, rel=0.05)
        assert found.best == {"lr": 0.9}
        assert found.temperature == pytest.approx(0.9 / 16)
        assert found.outcome is TuningOutcome.REACHED
        assert (found.points, found.seeds, found.trials, found.reached) == (5, 3, 15, 15)

    def test_what_seeds_have_in_common_is_the_error(self) -> None:
        factors = np.array([0.8, 1.0, 1.1, 1.3])
        found = tuned_steps(grid(factors))
        logs = np.log(factors)
        error = logs.std(ddof=1) / 2
        assert found.steps == pytest.approx(100 * math.exp(logs.mean()), rel=0.01)
        assert found.freedom == 3
        assert found.log_error == pytest.approx(error, rel=0.05)
        half = student(level=0.95, freedom=3) * (found.log_error or 0)
        assert found.high == pytest.approx((found.steps or 0) * math.exp(half))
        values = np.array(list(found.seed_values.values()))
        np.testing.assert_allclose(values - values.mean(), logs - logs.mean(), atol=1e-3)

    def test_temperature_counts_momentum(self) -> None:
        rows = [row(r, s, bowl(r), momentum=0.9) for r in (0.5, 1.0, 2.0) for s in "ab"]
        assert tuned_steps(rows).temperature == pytest.approx(1.0 / 0.1 / 16)

    def test_the_best_family(self) -> None:
        rows = [
            row(r, s, bowl(r) * slow, schedule=kind)
            for kind, slow in (("constant", 1.2), ("cosine", 1.0))
            for r in (0.5, 0.7, 1.0, 1.4, 2.0)
            for s in "ab"
        ]
        found = tuned_steps(rows)
        assert found.best["schedule"] == "cosine"
        assert found.steps == pytest.approx(100, rel=0.02)

    def test_two_dimensions(self) -> None:
        rows = [
            row(r, s, bowl(r) * (1 + math.log((1 - m) / 0.1) ** 2 / 4), momentum=m)
            for r in (0.4, 0.6, 0.9, 1.35, 2.0)
            for m in (0.8, 0.87, 0.92, 0.95)
            for s in "ab"
        ]
        found = tuned_steps(rows)
        assert found.steps == pytest.approx(100, rel=0.02)
        assert found.optimum["momentum"] == pytest.approx(0.9, abs=0.01)


class TestOutcomes:
    def test_an_edge(self) -> None:
        found = tuned_steps(grid([1.0, 1.1], [1.0, 1.4, 2.0]))
        assert found.outcome is TuningOutcome.EDGE
        assert found.on_edge == ("lr",)
        assert "widen the search" in found.detail

    def test_no_edge_where_larger_rates_diverge(self) -> None:
        rows = grid([1.0, 1.1], [0.4, 0.6, 0.9])
        rows += [row(1.35, s, 10.0, LOST) for s in "01"]
        found = tuned_steps(rows)
        assert found.outcome is TuningOutcome.REACHED
        assert found.diverged == 2

    def test_never_reached_says_how_close_it_came(self) -> None:
        rows = [row(r, s, 900.0, LATE, closest=0.1 + r) for r in (0.5, 1.0) for s in "ab"]
        found = tuned_steps(rows, target="validation_error<0.05")
        assert found.outcome is TuningOutcome.NOT_REACHED
        assert (found.steps, found.low, found.high) == (None, 900, None)
        assert found.closest == 0.6
        assert "the closest came to 0.6" in found.detail
        assert TunedSteps.from_json(found.to_json()) == found

    def test_closest_above(self) -> None:
        rows = [row(1.0, s, 900.0, LATE, closest=c) for s, c in (("a", 0.2), ("b", 0.3))]
        assert tuned_steps(rows, target="validation_accuracy>0.5").closest == 0.3

    def test_all_diverged(self) -> None:
        found = tuned_steps([row(r, "a", 5.0, LOST) for r in (0.5, 1.0)])
        assert found.outcome is TuningOutcome.DIVERGED
        assert "smaller learning rates" in found.detail

    def test_one_seed_says_what_is_missing(self) -> None:
        assert "one seed" in tuned_steps(grid([1.0])).detail
        apart = [row(r, f"own {r}", bowl(r)) for r in (0.5, 0.71, 1.0, 1.41, 2.0)]
        assert "one seed" not in tuned_steps(apart).detail

    def test_nothing_ran(self) -> None:
        found = tuned_steps([row(1.0, "a", 5.0, TrialOutcome.CRASHED)])
        assert found.outcome is TuningOutcome.NOTHING_RAN
        assert found.failed == 1

    def test_a_minority_of_lost_seeds_does_not_decide(self) -> None:
        rows = grid([1.0, 1.05, 0.95, 1.02, 0.98])
        whole = tuned_steps(rows)
        hurt = [
            row(r.values["lr"], r.seed, 10.0, LOST) if (r.seed, r.values["lr"]) == ("0", 1) else r
            for r in rows
        ]
        assert tuned_steps(hurt).steps == pytest.approx(whole.steps or 0, rel=0.02)

    def test_a_point_that_most_seeds_never_pass_is_no_best(self) -> None:
        rows = grid([1.0] * 3)
        rows += [row(1.2, "0", 20.0), row(1.2, "1", 500.0, LATE), row(1.2, "2", 10.0, LOST)]
        assert tuned_steps(rows).steps == pytest.approx(100, rel=0.03)


class TestSurfaces:
    def simulate(self, surface: Surface, search: Search, repeats: int) -> tuple[float, float]:
        """Return the coverage and the mean log error."""
        hits, errors = 0, []
        for seed in range(repeats):
            rng = np.random.default_rng(seed)
            found = tuned_steps(trials(surface, search, 16, rng))
            assert found.steps is not None
            assert found.low is not None
            assert found.high is not None
            hits += found.low <= CENTRE <= found.high
            errors.append(math.log(found.steps / CENTRE))
        return hits / repeats, float(np.mean(errors))

    @pytest.mark.parametrize("kind", ["grid", "scouts", "draws"])
    def test_coverage_and_bias(self, kind: str) -> None:
        surface = Surface(law=hyperbola(), noise=0.1, steepness=1.5)
        search = Search(kind=kind, seeds=5, rates=16 if kind == "draws" else 9, factor=1.5)
        repeats = 80
        share, bias = self.simulate(surface, search, repeats)
        # Three standard errors of a share of 95 % in 80 repeats: 7.3 %.
        assert share > 0.95 - 0.073
        assert abs(bias) < 0.02

    def test_trials_without_repeats(self) -> None:
        """One seed for each of many rates: the scatter about the bowl is the error."""
        surface = Surface(law=hyperbola(), noise=0.1, shared=0.0)
        hits, repeats = 0, 80
        for seed in range(repeats):
            rng = np.random.default_rng(seed)
            rows = trials(surface, Search(seeds=1, rates=30, factor=1.12, race=False), 16, rng)
            rows = [r.__class__(**{**r.__dict__, "seed": str(i)}) for i, r in enumerate(rows)]
            found = tuned_steps(rows)
            assert found.low is not None
            assert found.high is not None
            hits += found.low <= CENTRE <= found.high
        assert hits / repeats > 0.95 - 0.073

    def test_the_race_does_not_change_the_answer(self) -> None:
        """The same trials with and without it, as far as the race let them run."""
        surface = Surface(law=hyperbola(), noise=0.1)
        shifts = []
        for seed in range(40):
            with_, without = (
                tuned_steps(
                    trials(surface, Search(race=race), 16, np.random.default_rng(seed))
                ).steps
                for race in (True, False)
            )
            shifts.append(math.log((with_ or 1) / (without or 1)))
        # Less than half of what the seeds' noise of 0.1 over the root of 5 leaves open.
        assert np.sqrt(np.mean(np.square(shifts))) < 0.5 * 0.1 / math.sqrt(5)
        assert abs(np.mean(shifts)) < 0.02


class TestBadInput:
    def test_several_batch_sizes(self) -> None:
        other = TrialRow(batch_size=8, values={}, seed="a", outcome=REACHED, steps=1)
        with pytest.raises(InvalidInputError, match="2 trials at 2 batch sizes"):
            tuned_steps([row(1.0, "a", 5.0), other])

    def test_no_trials(self) -> None:
        with pytest.raises(InvalidInputError, match="0 trials"):
            tuned_steps([])

    def test_step_zero(self) -> None:
        with pytest.raises(InvalidInputError, match="choose a harder target"):
            tuned_steps([row(1.0, "a", 0.0)])

    def test_level(self) -> None:
        with pytest.raises(InvalidInputError, match="level 1"):
            tuned_steps([row(1.0, "a", 5.0)], level=1.0)
