from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors.executor import WorkerSpec
from noisescale.run.executors.ray import RayExecutor
from noisescale.run.executors.running import run_plans
from noisescale.run.store import TrialStore
from stub_trials import TRAIN
from trial_results import plan, result

STUB = WorkerSpec(workload=None, train=TRAIN)
TESTS = str(Path(__file__).parents[2])


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"noisescale\[ray\]"):
        RayExecutor(STUB)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A real cluster on this machine, shared by the tests below."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def run(*plans: TrialPlan, **options: Any) -> dict[str, TrialResult]:
    found: list[TrialResult] = []
    RayExecutor(STUB, **options).run(plans, on_result=found.append)
    assert len({each.plan.key for each in found}) == len(found)
    return {each.plan.key: each for each in found}


@pytest.mark.slow
def test_every_plan_gets_its_result(cluster: Any) -> None:
    plans = [plan(seed) for seed in range(6)]
    assert run(*plans) == {each.key: result(each, seconds=0.0) for each in plans}


@pytest.mark.slow
def test_one_failure_ends_one_trial(cluster: Any) -> None:
    acts = ("raise", "memory", "die", "leave")
    bad = {act: plan(seed, workload=act) for seed, act in enumerate(acts)}
    good = [plan(seed) for seed in range(10, 13)]
    found = run(*bad.values(), *good, retries=1)
    details = {act: (found[each.key].outcome, found[each.key].detail) for act, each in bad.items()}
    assert details["raise"] == (TrialOutcome.CRASHED, "ValueError: two lines")
    assert details["memory"] == (TrialOutcome.INFEASIBLE_MEMORY, "MemoryError")
    assert details["leave"] == (TrialOutcome.CRASHED, "SystemExit: 3")
    outcome, words = details["die"]
    assert outcome is TrialOutcome.CRASHED
    assert words.startswith("Ray lost the worker (WorkerCrashedError")
    assert words.endswith("2 times")
    assert {found[each.key].outcome for each in good} == {TrialOutcome.REACHED}


@pytest.mark.slow
def test_a_killed_worker_costs_no_result(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    plans = [plan(seed, workload=f"die_once {tmp_path / 'marks'}") for seed in range(2)]
    store = TrialStore.open(tmp_path / "store", workload="made-up 1")
    assert run_plans(plans, store, RayExecutor(STUB)) == 0
    assert {each.outcome for each in store.results()} == {TrialOutcome.REACHED}
    assert len((store.path / "trials.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_killed_driver_costs_no_stored_result(cluster: Any, tmp_path: Path) -> None:
    store = TrialStore.open(tmp_path, workload="made-up 1")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from stub_trials import TRAIN; from trial_results import plan\n"
        "from noisescale.run.executors.executor import WorkerSpec\n"
        "from noisescale.run.executors.ray import RayExecutor\n"
        "from noisescale.run.executors.running import run_plans\n"
        "from noisescale.run.store import TrialStore\n"
        "executor = RayExecutor(WorkerSpec(workload=None, train=TRAIN), address=sys.argv[3])\n"
        "store = TrialStore.open(sys.argv[2], workload='made-up 1')\n"
        "plans = [plan(0), plan(1), plan(2, workload='hang'), plan(3, workload='hang')]\n"
        "run_plans(plans, store, executor, on_result=lambda each: print('stored', flush=True))\n"
    )
    address = cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, TESTS, str(tmp_path), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert [driver.stdout.readline() for _ in range(2)] == ["stored\n"] * 2
        driver.kill()
    plans = [plan(seed) for seed in range(4)]
    assert run_plans(plans, store, RayExecutor(STUB)) == 0
    assert {each.plan.key: each for each in store.results()} == {
        each.key: result(each, seconds=0.0) for each in plans
    }
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused(cluster: Any) -> None:
    with pytest.raises(InvalidInputError, match="batch size 9: at most 8 is required; take 8"):
        run(plan(0, workload="refuse"))
    broken = WorkerSpec(workload=None, train="no_such_module:x")
    with pytest.raises(InvalidInputError, match="ModuleNotFoundError"):
        RayExecutor(broken).run([plan(0)], on_result=lambda each: None)


@pytest.mark.slow
def test_stopping_kills_what_runs(cluster: Any) -> None:
    found: list[TrialResult] = []
    plans = [plan(0), *(plan(seed, workload="hang") for seed in (1, 2))]
    executor = RayExecutor(STUB, slots=2)
    executor.run(plans, on_result=found.append, should_stop=lambda: len(found) == 1)
    assert [each.plan.key for each in found] == [plan(0).key]
    assert run(plan(5))[plan(5).key].outcome is TrialOutcome.REACHED
