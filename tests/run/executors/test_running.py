from __future__ import annotations

from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, TrialOutcome, TrialResult
from noisescale.run.executors.executor import WorkerSpec
from noisescale.run.executors.local import LocalExecutor
from noisescale.run.executors.running import run_plans
from noisescale.run.resolve import resolve_workload
from noisescale.run.store import TrialStore
from noisescale.run.trials.alone import train_trial
from stub_trials import TRAIN
from trial_results import plan, result

STUB = WorkerSpec(workload=None, train=TRAIN)


def test_the_same_call_again_continues(tmp_path: Path) -> None:
    plans = [plan(seed) for seed in range(5)]
    store = TrialStore.open(tmp_path, workload="made-up 1")
    executor = LocalExecutor(STUB, slots=1)
    told: list[TrialResult] = []
    left = run_plans(
        plans, store, executor, on_result=told.append, should_stop=lambda: len(told) >= 2
    )
    assert left == 5 - len(told) > 0
    again = TrialStore.open(tmp_path, workload="made-up 1")
    assert run_plans(plans, again, executor, on_result=told.append) == 0
    assert sorted(each.plan.seed for each in told) == [0, 1, 2, 3, 4]
    assert run_plans(plans, again, executor, on_result=told.append) == 0
    assert len(told) == 5
    assert {each.plan.key: each for each in again.results()} == {
        each.key: result(each, seconds=0.0) for each in plans
    }


def test_crashed_trials_are_run_again_when_asked(tmp_path: Path) -> None:
    store = TrialStore.open(tmp_path, workload="made-up 1")
    with store.lock():
        store.append(result(plan(0), "crashed"))
    executor = LocalExecutor(STUB, slots=1)
    run_plans([plan(0)], store, executor)
    assert store.outcome(plan(0).key) is TrialOutcome.CRASHED
    run_plans([plan(0)], store, executor, again=(TrialOutcome.CRASHED,))
    assert store.outcome(plan(0).key) is TrialOutcome.REACHED


def test_a_locked_store_is_refused_before_anything_runs(tmp_path: Path) -> None:
    holder = TrialStore.open(tmp_path, workload="made-up 1")
    other = TrialStore.open(tmp_path, workload="made-up 1")
    with holder.lock(), pytest.raises(InvalidInputError, match="another driver"):
        run_plans([plan(0)], other, LocalExecutor(STUB, slots=1))


def test_a_real_workload_by_its_name_gives_what_it_gives_here(tmp_path: Path) -> None:
    one = plan(
        workload="quadratic 1",
        recipe=Recipe(lr=1.0, batch_size=64),
        targets=("train_loss<5.0",),
        max_steps=40,
    )
    store = TrialStore.open(tmp_path, workload="quadratic 1")
    executor = LocalExecutor(WorkerSpec(workload="quadratic"), slots=1)
    assert run_plans([one], store, executor) == 0
    (there,) = store.results()
    here = train_trial(resolve_workload("quadratic"), one)
    assert there.outcome is here.outcome is TrialOutcome.REACHED
    assert (there.steps, there.crossings) == (here.steps, here.crossings)
