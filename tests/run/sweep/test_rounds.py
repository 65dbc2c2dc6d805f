from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

import response_surfaces as surfaces
from noisescale.records import TrialOutcome
from noisescale.run.executors.executor import without_result
from noisescale.run.sweep.rounds import WIDENINGS, Search, Tuning
from noisescale.run.sweep.space import Dimension
from noisescale.run.sweep.standing import standing

TARGET = "validation_error<0.05"


def tuning(batch_size=16, rate=0.3, search=None, targets=(TARGET,), **changes):
    tau = rate / batch_size
    options = {
        "workload": "surface-1",
        "recipe": surfaces.RECIPE,
        "batch_size": batch_size,
        "centre": tau,
        "dimensions": (Dimension(name="lr", low=tau / 8, high=tau * 8),),
        "search": search or Search(seeds=4),
        "targets": tuple(targets),
        "max_steps": 20_000,
    }
    return Tuning(**{**options, **changes})


def run_all(what, done=None, judge=None):
    done = {} if done is None else done
    rounds = 0
    while plans := what.next_plans(done):
        done.update({r.plan.key: r for r in surfaces.train(None, plans, judge=judge)})
        rounds += 1
        assert rounds < 30
    return done


def best(what, done, target=TARGET, seeds=4):
    by_rate = {}
    for plan in what.plans(done):
        by_rate.setdefault(plan.recipe.lr, []).append(done[plan.key])
    whole = {lr: standing(r, target) for lr, r in by_rate.items() if len(r) >= seeds}
    return min(whole, key=lambda lr: whole[lr])


@pytest.mark.parametrize("rate", [0.003, 0.05, 0.3, 5.0])
def test_a_grid_that_starts_anywhere_finds_the_best_rate(rate):
    what = tuning(rate=rate)
    done = run_all(what)
    found = best(what, done)
    assert abs(math.log(found / surfaces.best_rate(16))) < math.log(1.7)
    rates = sorted({plan.recipe.lr for plan in what.plans(done)})
    assert rates[0] < found < rates[-1]


def test_the_scouts_do_not_run_all_seeds():
    what = tuning()
    done = run_all(what)
    counts = [len([p for p in what.plans(done) if p.recipe.lr == lr])
              for lr in {p.recipe.lr for p in what.plans(done)}]  # fmt: skip
    assert set(counts) == {2, 4}


def test_a_full_grid_runs_every_seed_of_every_rate():
    what = tuning(search=Search(trials=12, seeds=3, full=True), rate=0.4)
    first = what.next_plans({})
    assert len(first) == 36
    assert len({plan.recipe.lr for plan in first}) == 12
    assert len({plan.seed for plan in first}) == 3


def test_every_target_gets_its_own_best():
    hard = "validation_error<0.01"
    what = tuning(targets=(TARGET, hard))
    done = run_all(what)
    for target in (TARGET, hard):
        assert abs(math.log(best(what, done, target) / surfaces.best_rate(16))) < math.log(1.7)


@pytest.mark.parametrize("kind", ["grid", "quasi-random"])
def test_a_kill_at_any_moment_changes_no_decision(kind):
    what = tuning(search=Search(kind=kind, trials=6, seeds=4), rate=0.08)
    undisturbed = run_all(what)
    keys = list(undisturbed)
    for kept in range(0, len(keys), 3):
        # whatever part of a round was done, in whatever order, the same trials follow
        partly = {key: undisturbed[key] for key in keys[:kept] + keys[kept + 1 : kept + 2]}
        assert set(run_all(what, partly)) == set(undisturbed)


def test_a_quasi_random_box_widens_towards_the_optimum():
    box = (
        Dimension(name="lr", low=1e-4 / 8, high=1e-4 * 8),
        Dimension(name="weight_decay", low=1e-6, high=1e-3),
    )
    search = Search(kind="quasi-random", trials=8, seeds=3)
    what = tuning(rate=16e-4, search=search, dimensions=box)
    done = run_all(what)
    found = best(what, done, seeds=3)
    assert found > 16e-4 * 8
    assert abs(math.log(found / surfaces.best_rate(16))) < 1.2
    assert all(plan.recipe.weight_decay > 0 for plan in what.plans(done))


def test_points_repeat_for_a_seed_and_differ_between_seeds():
    search = Search(kind="quasi-random", trials=8)
    one, same, other = (tuning(search=search, seed=seed).next_plans({}) for seed in (0, 0, 1))
    assert one == same
    assert {p.recipe.lr for p in one}.isdisjoint({p.recipe.lr for p in other})


def test_a_target_out_of_reach_ends_without_filling():
    what = tuning(max_steps=3, search=Search(trials=3, seeds=5))
    done = run_all(what)
    seeds = {plan.seed for plan in what.plans(done)}
    assert seeds == {0, 1}
    assert len(what.plans(done)) <= 2 * (3 + 4 * WIDENINGS)


@pytest.mark.parametrize("kind", ["grid", "quasi-random"])
@pytest.mark.parametrize("outcome", [TrialOutcome.CRASHED, TrialOutcome.INFEASIBLE_MEMORY])
def test_where_everything_crashes_no_more_is_tried(kind, outcome):
    what = tuning(search=Search(kind=kind, trials=4))
    first = what.next_plans({})
    done = {plan.key: without_result(plan, why="crash", detail="") for plan in first}
    done = {key: dataclasses.replace(result, outcome=outcome) for key, result in done.items()}
    assert what.next_plans(done) == []
    assert what.best_rate(done) is None


def test_where_everything_diverges_smaller_rates_are_tried():
    what = tuning(search=Search(trials=3))
    first = what.next_plans({})
    done = {plan.key: without_result(plan, why="crash", detail="") for plan in first}
    done = {k: dataclasses.replace(r, outcome=TrialOutcome.DIVERGED) for k, r in done.items()}
    least = min(plan.recipe.lr for plan in first)
    assert all(plan.recipe.lr < least for plan in what.next_plans(done))


def test_interrupted_trials_run_again():
    what = tuning()
    first = what.next_plans({})
    result = surfaces.outcome_of(first[0])
    halted = dataclasses.replace(result, outcome=TrialOutcome.INTERRUPTED)
    assert first[0] in what.next_plans({first[0].key: halted})
    assert first[0] not in what.next_plans({first[0].key: result})


def test_plans_are_each_named_once():
    what = tuning(search=Search(trials=9, seeds=4))
    plans = what.plans(run_all(what))
    assert len({plan.key for plan in plans}) == len(plans)
    pairs = itertools.combinations(plans, 2)
    assert all((a.recipe, a.seed) != (b.recipe, b.seed) for a, b in pairs)
