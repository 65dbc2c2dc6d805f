from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors.executor import WorkerSpec
from noisescale.run.executors.running import run_plans
from noisescale.run.executors.slurm import SlurmExecutor
from noisescale.run.store import TrialStore
from run.executors.fake_slurm import install, submitted
from stub_trials import TRAIN
from trial_results import plan, result

STUB = WorkerSpec(workload=None, train=TRAIN)


def test_without_submitit_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingExtraError, match=r"noisescale\[slurm\]"):
        SlurmExecutor(STUB)


class Cluster:
    """A fake Slurm on PATH and an executor for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.home = folder / "slurm"
        self._monkeypatch = monkeypatch

    def start(self, acts: Sequence[str] = (), **options: Any) -> SlurmExecutor:
        pytest.importorskip("submitit", reason="submitit is not installed")
        path = install(self.home, acts)
        self._monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
        return self.executor(**options)

    def executor(self, **options: Any) -> SlurmExecutor:
        # Long enough that a busy machine never takes a slow job for a lost one.
        settings = {"grace": 3.0, "poll": 0.05, "trials_per_job": 4, **options}
        return SlurmExecutor(STUB, folder=self.folder / "shared", **settings)

    def run(self, executor: SlurmExecutor, plans: Sequence[TrialPlan]) -> dict[str, TrialResult]:
        found: list[TrialResult] = []
        executor.run(plans, on_result=found.append)
        assert len({each.plan.key for each in found}) == len(found) == len(plans)
        return {each.plan.key: each for each in found}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def expected(plans: Sequence[TrialPlan]) -> dict[str, TrialResult]:
    return {each.key: result(each, seconds=0.0) for each in plans}


def test_lost_delayed_and_duplicated_jobs_cost_no_result(cluster: Cluster) -> None:
    executor = cluster.start(["lose", "twice", "delay"])
    plans = [plan(seed) for seed in range(12)]
    store = TrialStore.open(cluster.folder / "store", workload="made-up 1")
    assert run_plans(plans, store, executor) == 0
    assert {each.plan.key: each for each in store.results()} == expected(plans)
    assert len((store.path / "trials.jsonl").read_text().splitlines()) == 12
    # The lost job's four trials come again as two jobs of two.
    assert submitted(cluster.home) == ["lose", "twice", "delay", "ok", "ok"]


def test_a_trial_whose_jobs_are_always_lost_is_recorded(cluster: Cluster) -> None:
    executor = cluster.start(["lose"] * 3, trials_per_job=1, retries=2, slots=1, grace=0.1)
    (found,) = cluster.run(executor, [plan(0)]).values()
    assert found.outcome is TrialOutcome.CRASHED
    assert found.detail.endswith("ended without a result (COMPLETED), 3 times")


def test_a_job_killed_for_memory_is_infeasible(cluster: Cluster) -> None:
    executor = cluster.start(["OUT_OF_MEMORY", "OUT_OF_MEMORY"], trials_per_job=1, retries=1)
    (found,) = cluster.run(executor, [plan(0)]).values()
    assert found.outcome is TrialOutcome.INFEASIBLE_MEMORY


def test_one_failure_within_a_job_ends_one_trial(cluster: Cluster) -> None:
    executor = cluster.start()
    plans = [plan(0, workload="raise"), plan(1, workload="vanish"), plan(2)]
    found = cluster.run(executor, plans)
    outcomes = [found[each.key].outcome.value for each in plans]
    assert outcomes == ["crashed", "crashed", "reached"]
    assert submitted(cluster.home) == ["ok"]


def test_sbatch_that_refuses_is_asked_again_and_then_reported(cluster: Cluster) -> None:
    executor = cluster.start(["refuse", "refuse"])
    assert cluster.run(executor, [plan(0)]) == expected([plan(0)])
    (cluster.home / "acts").write_text("refuse " * 5)
    with pytest.raises(InvalidInputError, match=r"sbatch refused 5 times.*Socket timed out"):
        cluster.run(executor, [plan(1)])


def test_a_deaf_controller_loses_no_job(cluster: Cluster) -> None:
    executor = cluster.start(["delay"])
    (cluster.home / "deaf").touch()
    assert cluster.run(executor, [plan(0)]) == expected([plan(0)])
    assert submitted(cluster.home) == ["delay"]


def test_stopping_cancels_the_jobs(cluster: Cluster) -> None:
    executor = cluster.start(["stuck"])
    executor.run(
        [plan(0)],
        on_result=lambda each: None,
        should_stop=lambda: any((cluster.home / "queue").iterdir()),
    )
    assert (cluster.home / "cancelled").read_text() == "100 "


def test_what_a_killed_driver_left_is_taken_over(cluster: Cluster) -> None:
    executor = cluster.start()
    results = executor.folder / "results"
    results.mkdir(parents=True)
    crashed = result(plan(1), "crashed")
    for each in (result(plan(0)), crashed):
        (results / f"{each.plan.key}.json").write_text(json.dumps({"result": each.to_dict()}))
    # Job 7 is in the queue, and its result comes at the first look but one.
    (cluster.home / "queue" / "7").write_text("0")
    notes = [{"job": "7", "keys": [plan(2).key]}, {"job": "6", "keys": [plan(3).key]}]
    (executor.folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, notes)) + '\n{"job')
    found: list[TrialResult] = []

    def come() -> bool:
        if len(found) == 3:
            late = result(plan(2)).to_dict()
            (results / f"{plan(2).key}.json").write_text(json.dumps({"result": late}))
        return False

    plans = [plan(seed) for seed in range(4)]
    executor.run(plans, on_result=found.append, should_stop=come)
    assert sorted(each.plan.seed for each in found) == [0, 1, 2, 3]
    assert {each.outcome for each in found} == {TrialOutcome.REACHED}
    assert submitted(cluster.home) == ["ok"]  # of plans 1 and 3
    assert list(results.iterdir()) == []


def test_what_cannot_be_trained_is_refused(cluster: Cluster) -> None:
    executor = cluster.start()
    with pytest.raises(InvalidInputError, match="batch size 9: at most 8 is required; take 8"):
        cluster.run(executor, [plan(0, workload="refuse")])
    with pytest.raises(InvalidInputError, match="Slurm's parameters"):
        cluster.executor(parameters={"colour": "blue"})


def test_a_machine_without_slurm_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PATH", str(cluster.folder))
    with pytest.raises(InvalidInputError, match="Slurm: it is not on this machine"):
        cluster.executor()


def test_submitits_own_processes(cluster: Cluster) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    executor = cluster.executor(cluster="local", grace=1.0)
    plans = [plan(seed) for seed in range(3)]
    assert cluster.run(executor, plans) == expected(plans)
