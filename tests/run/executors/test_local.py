from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors import local
from noisescale.run.executors.executor import WorkerSpec, held
from noisescale.run.executors.local import LocalExecutor
from noisescale.run.executors.memory_evidence import count_oom_kills
from stub_trials import TRAIN
from trial_results import plan, result

STUB = WorkerSpec(workload=None, train=TRAIN)
TESTS = str(Path(__file__).parents[2])


def run(*plans: TrialPlan, slots: int = 2, retries: int = 2) -> dict[str, TrialResult]:
    found: list[TrialResult] = []
    LocalExecutor(STUB, slots=slots, retries=retries).run(plans, on_result=found.append)
    assert len({each.plan.key for each in found}) == len(found)
    return {each.plan.key: each for each in found}


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: set[int]) -> bool:
    """Wait for processes to end; the kernel needs a moment."""
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    own = {int(text) for task in tasks for text in task.read_text().split()}
    return own | {deeper for child in own for deeper in children(child)}


@pytest.fixture
def workers() -> Callable[[], set[int]]:
    """Tells which processes this one has started since, whatever other tests have left."""
    before = children(os.getpid())
    return lambda: children(os.getpid()) - before


def test_every_plan_gets_its_result() -> None:
    plans = [plan(seed) for seed in range(6)]
    assert run(*plans) == {each.key: result(each, seconds=0.0) for each in plans}


def test_slots_work_side_by_side_and_workers_are_used_again(tmp_path: Path) -> None:
    found = run(*(plan(seed, workload=f"meet {tmp_path}") for seed in range(6)), slots=2)
    assert {each.outcome for each in found.values()} == {TrialOutcome.REACHED}
    met = {int(mark.name) for mark in tmp_path.iterdir()}
    assert len(met) == 2
    assert os.getpid() not in met


def test_held_workers_are_used_by_the_next_run(workers: Callable[[], set[int]]) -> None:
    found: list[TrialResult] = []
    executor = LocalExecutor(STUB, slots=1)
    with held(executor):
        for seed in range(2):
            executor.run([plan(seed, workload="pid")], on_result=found.append)
        kept = workers()
        executor.run([plan(2)], on_result=found.append, should_stop=lambda: True)
        assert gone(kept)  # told to stop
        executor.run([plan(3, workload="die")], on_result=found.append)
    assert found[0].detail == found[1].detail == f"worker {kept.pop()}"
    assert found[2].outcome is TrialOutcome.CRASHED
    assert not workers()


@pytest.mark.parametrize(
    ("act", "outcome", "detail"),
    [
        ("raise", "crashed", "ValueError: two lines"),
        ("memory", "infeasible_memory", "MemoryError"),
        ("torch_memory", "infeasible_memory", "RuntimeError: DefaultCPUAllocator"),
        ("leave", "crashed", "SystemExit: 3"),
        ("vanish", "crashed", "process ended by itself with exit status 7 (so long)"),
        ("die", "crashed", "process was killed by SIGKILL, 2 times"),
        ("abort", "crashed", "process was killed by SIGABRT"),
    ],
)
def test_one_failure_ends_one_trial(act: str, outcome: str, detail: str) -> None:
    bad, others = plan(0, workload=act), [plan(seed) for seed in range(1, 4)]
    found = run(bad, *others, retries=1)
    assert found[bad.key].outcome == outcome
    assert detail in found[bad.key].detail
    assert [c.target for c in found[bad.key].crossings] == list(bad.targets)
    assert all(found[each.key].outcome is TrialOutcome.REACHED for each in others)


def test_a_trial_whose_worker_was_killed_is_tried_again(tmp_path: Path) -> None:
    plans = [plan(seed, workload=f"die_once {tmp_path}") for seed in range(3)]
    found = run(*plans)
    assert {each.outcome for each in found.values()} == {TrialOutcome.REACHED}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_kill_is_for_want_of_memory_only_on_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(local, "count_oom_kills", lambda: next(counts))
    starved, aborted = plan(0, workload="die"), plan(1, workload="abort")
    found = run(starved, aborted, retries=0)
    assert found[starved.key].outcome is TrialOutcome.INFEASIBLE_MEMORY
    assert found[starved.key].detail.endswith("was killed by SIGKILL, for want of memory")
    assert found[aborted.key].outcome is TrialOutcome.CRASHED


def test_the_systems_counters_are_read(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("oom_kill_disable 9\noom_kill 3\npgfault 5\n")
    (tmp_path / "events").write_text("oom 7\noom_kill 2\noom_group_kill 8\n")
    files = tuple(str(tmp_path / name) for name in ("vmstat", "events", "absent"))
    assert count_oom_kills(files) == 5
    assert count_oom_kills() >= 0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="batch size 9: at most 8 is required; take 8"):
        run(plan(0, workload="refuse"))
    with pytest.raises(InvalidInputError, match=r"workload 'no_such_module:x'.*no module"):
        LocalExecutor(WorkerSpec(workload="no_such_module:x", train=TRAIN), slots=1).run(
            [plan(0)], on_result=lambda each: None
        )
    broken = WorkerSpec(workload=None, train="no_such_module:x")
    with pytest.raises(InvalidInputError, match=r"while loading it.*ModuleNotFoundError|No module"):
        LocalExecutor(broken, slots=1).run([plan(0)], on_result=lambda each: None)
    with pytest.raises(InvalidInputError, match="slots 0"):
        LocalExecutor(STUB, slots=0)


def test_stopping_lets_running_trials_report() -> None:
    found: list[TrialResult] = []
    plans = [plan(0), plan(1, workload="wait"), plan(2, workload="wait"), plan(3)]
    executor = LocalExecutor(STUB, slots=1)
    executor.run(plans, on_result=found.append, should_stop=lambda: len(found) > 0)
    outcomes = [each.outcome for each in found]
    assert outcomes[0] is TrialOutcome.REACHED
    assert set(outcomes[1:]) <= {TrialOutcome.INTERRUPTED}
    assert len(found) <= 2


def test_a_hanging_trial_is_killed_when_stopped(
    monkeypatch: pytest.MonkeyPatch, workers: Callable[[], set[int]]
) -> None:
    monkeypatch.setattr(local, "STOP_SECONDS", 0.1)
    seen: set[int] = set()

    def should_stop() -> bool:
        seen.update(workers())
        return len(seen) >= 2  # the worker and what its trial started

    LocalExecutor(STUB, slots=1).run(
        [plan(0, workload="hang")], on_result=lambda each: None, should_stop=should_stop
    )
    assert gone(seen)


def test_what_on_result_raises_ends_the_run_and_the_workers(
    workers: Callable[[], set[int]],
) -> None:
    seen: set[int] = set()

    def full(each: TrialResult) -> None:
        seen.update(workers())
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        LocalExecutor(STUB, slots=2).run([plan(seed) for seed in range(9)], on_result=full)
    assert seen
    assert gone(seen)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(sent: signal.Signals) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from stub_trials import TRAIN; from trial_results import plan\n"
        "from noisescale.run.executors.executor import WorkerSpec\n"
        "from noisescale.run.executors.local import LocalExecutor\n"
        "ends = [plan(0), plan(1)] + [plan(s, workload='hang') for s in (2, 3)]\n"
        "LocalExecutor(WorkerSpec(workload=None, train=TRAIN), slots=2).run(\n"
        "    ends, on_result=lambda each: print(each.outcome, flush=True))\n"
    )
    command = [sys.executable, "-c", code, TESTS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as driver:
        assert driver.stdout is not None
        assert [driver.stdout.readline().strip() for _ in range(2)] == ["reached"] * 2
        until = time.monotonic() + 10
        while len(theirs := children(driver.pid)) < 4 and time.monotonic() < until:
            time.sleep(0.02)  # two workers, each with the process that its trial started
        driver.send_signal(sent)
        try:
            _, errors = driver.communicate(timeout=30)
        finally:
            driver.kill()  # or leaving the block would wait for it
    assert driver.returncode in (-sent, 1, 130)
    assert len(theirs) == 4
    assert gone(theirs)
    assert ("KeyboardInterrupt" in errors) == (sent == signal.SIGINT)


def test_threads_are_shared_out() -> None:
    assert LocalExecutor(STUB, slots=10_000).threads == 1
    assert LocalExecutor(STUB, slots=1).threads >= 1
    assert LocalExecutor(STUB, slots=3, threads=5).threads == 5
