from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records.trial import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.trials import TrialProcesses, TrialProgress, train_trial, train_trials
from run.trials.perilous import PARENT, dropping, perilous
from run.trials.small import plans, small_workload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads train elsewhere")

WORKLOAD = perilous()
TARGETS = ("train_loss<1.37", "validation_error<0.72")


@pytest.fixture(scope="module")
def processes() -> Iterator[TrialProcesses]:
    with pytest.MonkeyPatch.context() as patch, TrialProcesses(WORKLOAD) as made:
        patch.setenv(PARENT, str(os.getpid()))
        assert made.start(2), made.refused
        yield made


@pytest.fixture
def crew(processes: TrialProcesses) -> TrialProcesses:
    """The same processes, all of them ready."""
    assert processes.start(2), processes.refused
    return processes


def chosen(**changes: Any) -> list[TrialPlan]:
    settings = {"targets": TARGETS, "rates": (0.03, 0.3, 1.0), "seeds": (0, 1), "max_steps": 40}
    return plans(**{**settings, **changes})


def told(results: Sequence[TrialResult]) -> list[Any]:
    """What must not depend on who trained: all but time, engine and rounding."""
    return [(r.plan, r.outcome, r.steps, r.stopped_by, r.evaluated_at) for r in results]


def alone(given: Sequence[TrialPlan]) -> list[TrialResult]:
    return [train_trial(WORKLOAD, plan, keep_curves=True) for plan in given]


def pids(processes: TrialProcesses) -> list[int]:
    return [process.pid for process in processes.processes]


def runs(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(some: Sequence[int]) -> bool:
    until = time.monotonic() + 10
    while any(map(runs, some)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(runs, some))


class StopSlow:
    """Stops one rate as soon as it is asked, and notes what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
        self.keys = [each.key for each in progress]
        self.seen.append(tuple(each.steps for each in progress))
        return {each.key for each in progress if each.plan.recipe.lr == 0.001}


@pytest.mark.parametrize("engine", ["stacked", "alone", "auto"])
def test_results_are_those_of_one_by_one(crew: TrialProcesses, engine: str) -> None:
    given = chosen()
    before, seen = pids(crew), []
    ours = train_trials(
        WORKLOAD, given, engine=engine, workers=2, processes=crew, keep_curves=True,
        on_result=seen.append,
    )  # fmt: skip
    theirs = alone(given)
    assert told(ours) == told(theirs)
    assert sorted(map(id, seen)) == sorted(map(id, ours))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: pytest.approx(v, abs=1e-9) for k, v in b.values.items()} == a.values
    assert pids(crew) == before


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_a_judge_here_stops_trials_there(crew: TrialProcesses, engine: str) -> None:
    given = plans(rates=(0.001, 0.3), max_steps=400, targets=("train_loss<0.6",))
    judge = StopSlow()
    raced = train_trials(
        WORKLOAD, given, engine=engine, workers=2, processes=crew, judge=judge, keep_curves=True
    )
    assert judge.keys == [plan.key for plan in given]
    assert any(any(steps) for steps in judge.seen)
    free = alone([plan for plan in given if plan.recipe.lr == 0.3])
    assert told([r for r in raced if r.plan.recipe.lr == 0.3]) == told(free)
    for result in raced:
        if result.plan.recipe.lr == 0.001:
            assert result.stopped_by == "race"
            assert result.outcome is TrialOutcome.NOT_REACHED
            assert result.steps < 400


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_a_death_costs_only_what_it_was_training(crew: TrialProcesses, engine: str) -> None:
    """Trials of the same stack, and those of a process that somebody kills, begin again."""
    given = chosen(rates=(0.03, 1e7, 0.3))
    killed = []

    def kill(result: TrialResult) -> None:
        # One that just ended by itself is listed until all it left has been told.
        alive = [p.pid for p in crew.processes if p.working and runs(p.pid)]
        if alive and not killed:
            killed.append(alive[0])
            os.kill(killed[0], signal.SIGKILL)

    ours = train_trials(
        WORKLOAD, given, engine=engine, workers=2, processes=crew, keep_curves=True, on_result=kill
    )
    for result, plain in zip(ours, alone(given), strict=True):
        if result.plan.recipe.lr == 1e7:
            assert result.outcome is TrialOutcome.CRASHED
            assert "exit status 7" in result.detail
        else:
            assert told([result]) == told([plain])
    assert killed
    assert gone(killed)


def test_a_trial_whose_process_is_killed_again_has_crashed(crew: TrialProcesses) -> None:
    (plan,) = chosen(rates=(0.01,), seeds=(0,), max_steps=100_000, targets=("train_loss<0",))
    other = chosen(rates=(0.3,), seeds=(1,))[0]
    killed: set[int] = set()

    class Killer:
        def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
            if len(killed) < 2 and progress[0].steps:
                for process in crew.processes:
                    if 0 in process.begun and process.pid not in killed:
                        killed.add(process.pid)
                        os.kill(process.pid, signal.SIGKILL)
            return set()

    found = train_trials(
        WORKLOAD, [plan, other], engine="alone", workers=2, processes=crew, judge=Killer(),
        keep_curves=True,
    )  # fmt: skip
    assert found[0].outcome is TrialOutcome.CRASHED
    assert "SIGKILL, 2 times" in found[0].detail
    assert told(found[1:]) == told(alone([other]))
    assert len(killed) == 2


def test_stopping_from_outside_interrupts(crew: TrialProcesses) -> None:
    given = plans(targets=("train_loss<0",), max_steps=100_000)

    class Watch:
        """Lets go of the trials once one of them is known to have moved."""

        moved = False

        def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
            self.moved |= any(each.steps for each in progress)
            return set()

    for engine in ("stacked", "alone"):
        watch = Watch()
        results = train_trials(
            WORKLOAD, given, engine=engine, workers=2, processes=crew, judge=watch,
            should_stop=lambda watch=watch: watch.moved,
        )  # fmt: skip
        assert {r.outcome for r in results} == {TrialOutcome.INTERRUPTED}
        assert any(r.steps for r in results)


@pytest.mark.parametrize("problem", [OSError("no space left"), KeyboardInterrupt()])
def test_what_is_raised_here_ends_the_processes(
    crew: TrialProcesses, problem: BaseException
) -> None:
    def full(result: TrialResult) -> None:
        raise problem

    before = pids(crew)
    with pytest.raises(type(problem)):
        train_trials(WORKLOAD, chosen(), workers=2, processes=crew, on_result=full)
    assert gone(before)
    assert not crew.processes


def test_little_memory_makes_trials_wait(crew: TrialProcesses) -> None:
    given = chosen()
    ours = train_trials(
        WORKLOAD, given, engine="stacked", workers=2, processes=crew, memory_bytes=1,
        keep_curves=True,
    )  # fmt: skip
    assert told(ours) == told(alone(given))


def test_models_that_draw_are_trained_side_by_side() -> None:
    workload = perilous(dropping)
    given = plans(rates=(0.1, 0.3), max_steps=30)
    with TrialProcesses(workload) as made:
        assert made.start(2), made.refused
        ours = train_trials(workload, given, workers=2, processes=made)
    assert [r.crossings for r in ours] == [train_trial(workload, p).crossings for p in given]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(sent: signal.Signals) -> None:
    program = """if True:
        from run.trials.perilous import perilous
        from run.trials.small import plans
        from noisescale.run.trials import TrialProcesses, train_trials
        workload = perilous()
        with TrialProcesses(workload) as made:
            made.start(2)
            print(*[process.pid for process in made.processes], flush=True)
            train_trials(
                workload, plans(targets=("train_loss<0",), max_steps=10**7),
                workers=2, processes=made,
            )
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        children = [int(text) for text in parent.stdout.readline().split()]
        assert len(children) == 2
        assert all(map(runs, children))
        time.sleep(0.3)
        parent.send_signal(sent)
        try:
            parent.wait(timeout=20)
        finally:
            parent.kill()  # or leaving the block would wait for it
    assert gone(children)


def test_what_cannot_be_sent_is_trained_by_threads() -> None:
    workload = small_workload()  # its model is a lambda
    given = plans(max_steps=30)
    with TrialProcesses(workload) as made:
        ours = train_trials(workload, given, workers=2, processes=made)
        assert not made.start(2)
        assert "cannot be sent" in made.refused
        again = train_trials(workload, given, workers=2, processes=made)
    assert not made.processes
    theirs = [train_trial(workload, plan) for plan in given]
    for results in (ours, again):
        assert [r.steps for r in results] == [r.steps for r in theirs]


def test_another_workload_there_is_refused() -> None:
    made = TrialProcesses(WORKLOAD)
    process: Any = SimpleNamespace(ready=False)
    made.welcome(process, [("ready", [1.0])])
    assert not process.ready
    assert "another one" in made.refused
    made = TrialProcesses(WORKLOAD)
    made.welcome(process, [("unloadable", "cannot be loaded: no module")])
    assert "no module" in made.refused


def test_processes_that_die_while_loading_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "noisescale.run.trials.processes.nursery"
    monkeypatch.setattr(f"{module}._PROGRAM", "raise SystemExit(1)")
    with TrialProcesses(WORKLOAD) as made:
        assert not made.start(2)
        assert "processes died while loading" in made.refused
        given = chosen()
        results = train_trials(WORKLOAD, given, workers=2, processes=made, keep_curves=True)
    assert told(results) == told(alone(given))


def test_much_data_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noisescale.run.trials.processes.pool.LARGEST", 1000)
    with TrialProcesses(WORKLOAD) as made:
        assert not made.start(2)
        assert "copied" in made.refused


def test_no_interpreter_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with TrialProcesses(WORKLOAD) as made:
        assert not made.start(2)
        assert "no process can be started" in made.refused


def test_short_training_is_not_worth_a_start() -> None:
    with TrialProcesses(WORKLOAD) as made:
        train_trials(WORKLOAD, chosen(max_steps=5), workers=2, processes=made)
        assert not made.processes


def test_bad_input(crew: TrialProcesses) -> None:
    other = dataclasses.replace(WORKLOAD)
    with pytest.raises(InvalidInputError, match="same object"):
        train_trials(other, chosen(), workers=2, processes=crew)
    with pytest.raises(InvalidInputError, match="clip_norm"):
        train_trials(WORKLOAD, chosen(clip_norm=1.0), engine="stacked", workers=2, processes=crew)
