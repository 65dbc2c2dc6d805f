from __future__ import annotations

import math

import pytest

from noisescale.records import Recipe, Target
from noisescale.run.rate_check import check_rate
from noisescale.run.rate_verdict import Trial, judge, leader
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import TrainingRun

RECIPE = Recipe(lr=0.1, batch_size=8)
GOAL = Target.parse("train_loss<0.1")


def trial(factor, steps=None, *, seed=0, loss=1.0, diverged=False, length=100) -> Trial:
    losses = [math.nan if diverged else loss] * length
    run = TrainingRun(
        batch_size=8,
        lr=factor,
        seed=seed,
        steps=length,
        losses=losses,
        steps_to_target=steps,
        initial_loss=2.0,
        diverged=diverged,
    )
    return Trial(factor, seed, run)


def verdict(*trials):
    check = judge(trials, recipe=RECIPE, target=GOAL)
    return check.verdict, check.best_lr, check.measured_lr


def test_the_best_rate_is_near_best():
    assert verdict(trial(0.5, 150), trial(1, 100), trial(2, 140)) == ("near_best", 0.1, 0.1)


def test_a_tie_goes_to_the_recipe():
    assert verdict(trial(1, 105), trial(2, 100), trial(4, 100)) == ("near_best", 0.1, 0.1)


def test_one_grid_factor_off_and_a_little_slower_is_near_best():
    assert verdict(trial(1, 120), trial(2, 100)) == ("near_best", 0.2, 0.1)


@pytest.mark.parametrize(("best", "word"), [(2, "too_low"), (0.5, "too_high")])
def test_one_grid_factor_off_and_much_slower_is_told(best, word):
    found = verdict(trial(1, 130), trial(best, 100))
    assert found[0] == word
    assert found[2] == pytest.approx(0.1 * best)


def test_two_grid_factors_off_is_told_even_if_little_slower():
    assert verdict(trial(1, 120), trial(2, 119), trial(4, 100))[0] == "too_low"


def test_a_recipe_that_diverges_or_never_arrives():
    assert verdict(trial(1, diverged=True), trial(0.5, 100))[0] == "too_high"
    assert verdict(trial(1), trial(4, 100))[0] == "too_low"


def test_every_rate_diverges():
    check = judge([trial(1, diverged=True)], recipe=RECIPE, target=GOAL)
    assert (check.verdict, check.best_lr, check.measured_lr) == ("too_high", None, 0.1)
    assert check.trials[0].final_loss is None
    assert check.trials[0].outcome == "diverged"


def test_seeds_are_averaged_and_one_that_diverges_spoils_a_rate():
    pair = [trial(1, 100), trial(1, 120, seed=1)]
    assert leader([*pair, trial(2, 60), trial(2, diverged=True, seed=1)]) == 1
    assert leader([*pair, trial(2, 60), trial(2, 100, seed=1)]) == 2


def test_a_run_cut_short_by_the_race_makes_its_rate_no_faster():
    slow = [trial(1, 600), trial(1, seed=1, length=100)]
    check = judge([*slow, trial(2, 90), trial(2, 90, seed=1)], recipe=RECIPE, target=GOAL)
    assert "it takes 600 steps" in check.detail


def test_without_the_goal_the_training_loss_decides():
    assert verdict(trial(1, loss=1.5), trial(2, loss=1.0))[0] == "too_low"
    assert verdict(trial(1, loss=1.0), trial(2, loss=1.5))[0] == "near_best"
    assert verdict(trial(1, loss=1.05), trial(2, loss=1.0))[0] == "near_best"


def test_losses_within_the_seed_spread_are_unclear():
    seeds = [trial(1, loss=1.0), trial(1, loss=1.3, seed=1)]
    found = verdict(*seeds, trial(2, loss=1.05), trial(0.5, loss=1.2))
    assert found[0] == "unclear"
    assert found[2] == 0.1


def test_losses_are_compared_after_equal_steps():
    longer = trial(2, loss=1.0)
    longer.run.losses[50:] = [0.0] * 50
    assert leader([trial(1, loss=1.0, length=50), longer]) == 1


@pytest.mark.parametrize(("rate", "word"), [(0.02, "too_low"), (1.5, "near_best")])
def test_the_quadratic_is_judged_by_real_runs(rate, word):
    workload = resolve_workload("quadratic", overrides=[f"lr={rate}"])
    told = []
    check = check_rate(
        workload,
        target=workload.target,
        seconds=30,
        on_progress=lambda what, share: told.append(share),
    )
    assert check.verdict == word
    assert told == sorted(told)
    if word == "too_low":
        # Three rates were added above the grid, since the best lay at its end.
        assert check.measured_lr > 4 * rate
    reached = [t.steps_to_target for t in check.trials if t.steps_to_target is not None]
    assert max(reached[1:]) <= 1.5 * reached[0] + 50


def test_a_rate_far_too_high_is_found_by_widening():
    workload = resolve_workload("quadratic", overrides=["lr=40"])
    check = check_rate(workload, target=workload.target, seconds=30)
    assert check.verdict == "too_high"
    assert check.best_lr is not None
    assert check.best_lr < 10


def test_without_time_only_the_recipe_is_tried():
    workload = resolve_workload("quadratic")
    check = check_rate(workload, target=workload.target, seconds=1e-6)
    assert len(check.trials) == 1
    assert check.verdict in ("unclear", "near_best")
