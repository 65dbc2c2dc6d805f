"""A race stops trials, and the tuned point stays where it was."""

from __future__ import annotations

import response_surfaces as surfaces
from noisescale.records import Crossing
from noisescale.run.sweep.race import HOPELESS, Race
from noisescale.run.sweep.rounds import Search
from noisescale.run.sweep.standing import standing
from noisescale.run.trials.judge import TrialProgress
from run.sweep.test_rounds import TARGET, best, run_all, tuning

HARD = "validation_error<0.01"
FULL = Search(trials=10, seeds=6, full=True)


def progress(plan, steps, *, first=None, sustained=None, running=True):
    crossings = tuple(
        Crossing(target=target, first=first, sustained=sustained, closest=0.1)
        for target in plan.targets
    )
    return TrialProgress(key=plan.key, plan=plan, steps=steps, crossings=crossings, running=running)


def test_the_tuned_steps_are_those_of_all_trials_in_full():
    for batch_size in (2, 16, 128):
        what = tuning(
            batch_size=batch_size,
            rate=surfaces.best_rate(batch_size),
            search=FULL,
            targets=(TARGET, HARD),
        )
        whole, raced = run_all(what), run_all(what, judge=Race())
        stopped = [r for r in raced.values() if r.stopped_by == "race"]
        assert len(stopped) > len(raced) / 6
        spent = [sum(r.steps for r in of.values()) for of in (raced, whole)]
        assert spent[0] < 0.9 * spent[1]
        for target in (TARGET, HARD):
            lr = best(what, whole, target, seeds=6)
            assert best(what, raced, target, seeds=6) == lr
            of = [key for key, r in whole.items() if r.plan.recipe.lr == lr]
            assert len(of) == 6
            assert standing([raced[k] for k in of], target) == standing(
                [whole[k] for k in of], target
            )


def test_nobody_is_stopped_before_somebody_got_there():
    plans = tuning().next_plans({})
    assert Race().hopeless([progress(plan, 10**6) for plan in plans]) == set()


def test_slow_settings_stop_and_late_seeds_of_good_ones_go_on():
    plans = tuning(search=Search(trials=2, seeds=5, full=True)).next_plans({})
    low, high = sorted({plan.recipe.lr for plan in plans})
    seen = []
    for plan in plans:
        if plan.recipe.lr == high and plan.seed < 4:
            seen.append(progress(plan, 105, first=100.0, sustained=100.0, running=False))
        else:
            seen.append(progress(plan, 105))
    assert Race().hopeless(seen) == set()
    late = [progress(p.plan, round(HOPELESS * 100) + 1) if p.running else p for p in seen]
    stopped = Race().hopeless(late)
    assert stopped == {p.key for p in plans if p.recipe.lr == low}


def test_a_trial_goes_on_while_it_may_win_at_another_target():
    plans = tuning(targets=(TARGET, HARD), search=Search(trials=2, seeds=1)).next_plans({})
    done, slow = plans
    easy = Crossing(target=TARGET, first=10.0, sustained=10.0, closest=0.04)
    none = Crossing(target=HARD, first=None, sustained=None, closest=0.04)
    seen = [
        TrialProgress(key=p.key, plan=p, steps=50, crossings=c, running=p is slow)
        for p, c in (
            (done, (easy, none)),
            (slow, (Crossing(target=TARGET, first=None, sustained=None, closest=1.0), none)),
        )
    ]
    assert Race().hopeless(seen) == set()


def test_results_from_before_race_along():
    what = tuning(search=Search(trials=2, seeds=5, full=True))
    plans = what.next_plans({})
    high = max(plan.recipe.lr for plan in plans)
    before = [surfaces.outcome_of(p) for p in plans if p.recipe.lr == high]
    rest = [progress(p, 10**5) for p in plans if p.recipe.lr != high]
    assert Race(before).hopeless(rest) == {p.key for p in rest}
    assert Race().hopeless(rest) == set()


def test_a_few_seeds_may_have_been_lucky():
    plans = tuning(search=Search(trials=2, seeds=1)).next_plans({})
    fast = progress(plans[1], 100, first=100.0, sustained=100.0, running=False)
    assert Race().hopeless([progress(plans[0], 200), fast]) == set()
    assert Race().hopeless([progress(plans[0], 220), fast]) == {plans[0].key}
