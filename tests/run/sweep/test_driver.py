from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
from torch import nn

import noisescale.run.trials as trials
import response_surfaces as surfaces
from noisescale import InvalidInputError, Workload
from noisescale.records import TrialOutcome, TrialPlan
from noisescale.run.store import TrialStore
from noisescale.run.sweep.driver import sweep
from noisescale.run.sweep.progress import Reporter
from noisescale.run.sweep.summary import summarise_store

TARGET = "validation_error<0.05"
X = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))


def workload(**changes):
    options = {
        "name": "surface",
        "model": lambda: nn.Linear(3, 1),
        "loss": lambda model, batch: (model(batch)[:, 0] - batch[:, 0]).square().mean(),
        "train": X,
        "evaluate": X[:64],
        "recipe": surfaces.RECIPE,
        "metrics": lambda model, batch: {"error": torch.ones(len(batch))},
    }
    return Workload(**{**options, **changes})


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    calls = []

    def train(workload, plans, **options):
        calls.append(list(plans))
        return surfaces.train(workload, plans, **options)

    monkeypatch.setattr(trials, "train_trials", train, raising=False)
    return calls


def run(**options):
    given = {"targets": TARGET, "batch_sizes": "8:64", "seeds": 4, "max_steps": 20_000}
    return sweep(workload(), **{**given, **options})


def test_the_known_critical_batch_lies_in_the_interval(no_training):
    found = run(batch_sizes="2:512")
    assert [row.batch_size for row in found.batch_sizes] == [2**i for i in range(1, 10)]
    assert all(row.outcome == "reached" for row in found.batch_sizes)
    critical = found.tradeoff.critical_batch
    assert critical.low < surfaces.CRITICAL < critical.high
    assert found.complete
    assert found.trials == sum(len(call) for call in no_training)
    assert {curve.crossing for curve in found.curves} == {"first", "sustained"}


def test_the_same_call_again_trains_nothing_and_says_the_same(tmp_path, no_training):
    one = run(store=tmp_path / "store")
    trained = len(no_training)
    two = run(store=tmp_path / "store")
    assert len(no_training) == trained
    assert (two.batch_sizes, two.tradeoff) == (one.batch_sizes, one.tradeoff)


def test_more_seeds_add_to_what_is_there(tmp_path, no_training):
    run(store=tmp_path / "store", race=False)
    before = {plan.key for call in no_training for plan in call}
    no_training.clear()
    more = run(store=tmp_path / "store", seeds=6, race=False)
    new = [plan for call in no_training for plan in call]
    assert before.isdisjoint(plan.key for plan in new)
    assert max(plan.seed for plan in new) == 5
    assert more.trials > len(new)


def test_killed_anywhere_it_ends_with_the_same_table(tmp_path, monkeypatch):
    whole = run(store=tmp_path / "whole", race=False)
    allowed = 7

    def dies(workload, plans, *, on_result, **options):
        left = [allowed]

        def count(result):
            on_result(result)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return surfaces.train(workload, plans, on_result=count, **options)

    monkeypatch.setattr(trials, "train_trials", dies)
    for _attempt in range(100):
        try:
            again = run(store=tmp_path / "torn", race=False)
            break
        except KeyboardInterrupt:
            continue
    assert again.batch_sizes == whole.batch_sizes
    keys = [sorted(TrialStore.open(tmp_path / name).keys()) for name in ("whole", "torn")]
    assert keys[0] == keys[1]


def test_time_that_is_up_leaves_the_rest_for_another_call(tmp_path, monkeypatch):
    def slow(workload, plans, **options):
        time.sleep(0.05)
        return surfaces.train(workload, plans, **options)

    monkeypatch.setattr(trials, "train_trials", slow)
    part = run(store=tmp_path / "store", seconds=0.12, batch_sizes="4:256")
    assert not part.complete
    assert part.unfinished
    assert "again" in part.warnings[0]
    rest = run(store=tmp_path / "store", batch_sizes="4:256")
    assert rest.complete
    assert rest.unfinished == ()


def test_several_targets_share_their_trials():
    found = run(targets=[TARGET, "validation_error<0.02"], batch_sizes="4:256")
    assert found.targets == (TARGET, "validation_error<0.02")
    assert len(found.curves) == 4
    easy, hard = found.curves[0], found.curves[2]
    for one, other in zip(easy.batch_sizes, hard.batch_sizes, strict=True):
        assert other.steps / one.steps == pytest.approx(2.5, rel=0.3)


def test_a_target_out_of_reach_says_how_close_each_came():
    found = run(max_steps=3, batch_sizes="8,32")
    assert all(row.outcome == "not_reached" for row in found.batch_sizes)
    assert all(row.closest is not None for row in found.batch_sizes)
    assert any("closest" in warning for warning in found.warnings)


def test_all_diverged_at_a_batch_size_is_said(monkeypatch):
    def diverges(workload, plans, *, on_result, **options):
        for plan in plans:
            result = surfaces.outcome_of(plan)
            if plan.recipe.batch_size == 8:
                crossings = tuple(
                    type(c)(target=c.target, first=None, sustained=None, closest=None)
                    for c in result.crossings
                )
                result = type(result)(
                    **{**vars(result),
                       "outcome": TrialOutcome.DIVERGED, "crossings": crossings}
                )  # fmt: skip
            on_result(result)

    monkeypatch.setattr(trials, "train_trials", diverges)
    found = run(batch_sizes="8:64")
    assert found.batch_sizes[0].outcome == "diverged"
    assert any("batch size 8: every trial diverged" in warning for warning in found.warnings)


def test_two_drivers_on_one_store(tmp_path):
    run(store=tmp_path / "store", batch_sizes="8,16")
    with TrialStore.open(tmp_path / "store").lock(), pytest.raises(InvalidInputError):
        run(store=tmp_path / "store", batch_sizes="8,16")


def test_a_store_of_another_workload(tmp_path):
    run(store=tmp_path / "store", batch_sizes="8,16")
    other = workload(model=lambda: nn.Linear(3, 2))
    with pytest.raises(InvalidInputError, match="workload"):
        sweep(other, targets=TARGET, batch_sizes="8", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": "2:64,1000"}, "batch size 1000"),
        ({"batch_sizes": "8:2"}, "FROM:TO"),
        ({"batch_sizes": "eight"}, "FROM:TO"),
        ({"batch_sizes": "0"}, "batch size 0"),
        ({"batch_sizes": []}, "batch sizes"),
        ({"targets": "validation_eror<0.1"}, "did you mean error"),
        ({"targets": "validation_error<2"}, "met before the first step"),
        ({"targets": "error"}, "NAME<VALUE"),
        ({"targets": None}, "names no target"),
        ({"search": "gird"}, "did you mean grid"),
        ({"over": ["momentum=0.5:0.9"]}, "quasi-random"),
        ({"over": ["lr=2:1"]}, "ascending"),
        ({"over": ["lr=0.1:1"]}, "--set lr="),
        ({"slots": 2}, "executor"),
        ({"trials": 0}, "trials 0"),
        ({"seeds": 0}, "seeds 0"),
        ({"max_examples": -1}, "max_examples -1"),
        ({"executor": "lokal"}, "did you mean local"),
        ({"executor": "local"}, "as an object"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InvalidInputError) as problem:
        run(**options)
    assert words in str(problem.value)


def test_progress_counts_up(no_training):
    seen = []
    run(on_progress=seen.append)
    assert seen
    shares = [news.share for news in seen]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 1.0
    assert any(best.steps for best in seen[-1].bests.values())


def test_bounds_of_the_rate_say_where_a_random_search_begins():
    """Not about the recipe's rate, which is 0.3."""
    found = run(search="quasi-random", over=["lr=0.01:0.02"], batch_sizes="16", max_steps=5)
    rates = sorted(row.lr for row in found.settings)
    assert sum(0.01 <= rate <= 0.02 for rate in rates) >= 24  # all that come before a widening


def test_what_failed_is_said_with_its_reason(monkeypatch):
    def crashes(workload, plans, *, on_result, **options):
        for plan in plans:
            result = surfaces.outcome_of(plan)
            if plan.recipe.batch_size == 8:
                result = dataclasses.replace(
                    result,
                    outcome=TrialOutcome.CRASHED,
                    crossings=tuple(dataclasses.replace(c, first=None, sustained=None)
                                    for c in result.crossings),
                    stopped_by="crash",
                    detail="ValueError: the reason",
                )  # fmt: skip
            on_result(result)

    monkeypatch.setattr(trials, "train_trials", crashes)
    (warning,) = run(batch_sizes="8,16").warnings
    assert warning == "batch size 8: of 10 trials 10 crashed: ValueError: the reason"


def test_what_crashed_is_run_again_when_asked(tmp_path, monkeypatch):
    def crashes(workload, plans, *, on_result, **options):
        for plan in plans:
            result = surfaces.outcome_of(plan)
            on_result(
                dataclasses.replace(
                    result,
                    outcome=TrialOutcome.CRASHED,
                    crossings=tuple(
                        dataclasses.replace(c, first=None, sustained=None) for c in result.crossings
                    ),
                    stopped_by="crash",
                )
            )

    monkeypatch.setattr(trials, "train_trials", crashes)
    broken = run(batch_sizes="16", store=tmp_path / "store")
    assert set(broken.outcomes) == {"crashed"}
    monkeypatch.setattr(trials, "train_trials", surfaces.train)
    assert set(run(batch_sizes="16", store=tmp_path / "store").outcomes) == {"crashed"}
    mended = run(batch_sizes="16", store=tmp_path / "store", rerun_crashed=True)
    assert "crashed" not in mended.outcomes
    assert mended.batch_sizes[0].steps is not None
    again = run(batch_sizes="16", store=tmp_path / "store")
    assert again.batch_sizes == mended.batch_sizes


def test_optimizers_in_one_store_are_said(tmp_path):
    run(batch_sizes="16", store=tmp_path / "store")
    run(
        batch_sizes="16",
        store=tmp_path / "store",
        overrides={"optimizer": "adamw", "momentum": None},
    )
    found = summarise_store(tmp_path / "store")
    assert "adamw" in found.optimizer
    assert any("a folder of its own" in warning for warning in found.warnings)


def test_what_a_store_held_is_no_progress_of_this_call():
    plans = [surfaces_plan(seed) for seed in range(8)]
    held = {plan.key: surfaces.outcome_of(plan) for plan in plans[:4]}
    seen = []
    reporter = Reporter(sizes=1, target=TARGET, tell=seen.append)
    reporter.began -= 100.0
    reporter.begin(16, plans, held)
    assert seen[-1].share == 0.5
    assert seen[-1].seconds_left is None
    held[plans[4].key] = surfaces.outcome_of(plans[4])
    reporter.last = -math.inf
    reporter.report(16, plans, held)
    # an eighth took 100 s, three are left
    assert seen[-1].seconds_left == pytest.approx(300.0, rel=0.01)


def surfaces_plan(seed):
    return TrialPlan(
        workload="surface", recipe=surfaces.RECIPE, seed=seed, order_seed=seed,
        targets=(TARGET,), max_steps=1000,
    )  # fmt: skip


class Here:
    """An executor that trains in place."""

    def __init__(self):
        self.rounds, self.entered = 0, False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *_reason):
        self.entered = False

    def run(self, plans, *, on_result, should_stop=None):
        assert self.entered, "an executor keeps its workers between rounds"
        self.rounds += 1
        surfaces.train(None, plans, on_result=on_result, should_stop=should_stop)


def test_an_executor_trains_the_same_table(tmp_path):
    executor = Here()
    found = run(executor=executor, store=tmp_path / "one")
    here = run(race=False, store=tmp_path / "two")
    assert executor.rounds > 3
    assert not executor.entered
    assert found.batch_sizes == here.batch_sizes
