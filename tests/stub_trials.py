"""Stand-ins for training: fast, exact, and ill-behaved where a plan's workload says so."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import TrialPlan, TrialResult
from trial_results import result

TRAIN = "stub_trials:train"
SLEEP = 0.02


def train(
    workload: Any,
    plan: TrialPlan,
    *,
    keep_curves: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> TrialResult:
    """Do what the last word of the plan's workload says; else reach the targets."""
    act = _ACTS.get(plan.workload.split()[0])
    if act is not None:
        answer = act(plan, should_stop)
        if answer is not None:
            return answer
    time.sleep(SLEEP)
    return result(
        plan, seconds=0.0, detail=f"worker {os.getpid()}" if "pid" in plan.workload else ""
    )


def _raise(plan: TrialPlan, _: Any) -> None:
    raise ValueError("two\nlines")


def _memory(plan: TrialPlan, _: Any) -> None:
    raise MemoryError


def _torch_memory(plan: TrialPlan, _: Any) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def _leave(plan: TrialPlan, _: Any) -> None:
    sys.exit(3)


def _vanish(plan: TrialPlan, _: Any) -> None:
    print("so long", flush=True)
    os._exit(7)


def _die(plan: TrialPlan, _: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _abort(plan: TrialPlan, _: Any) -> None:
    os.abort()


def _die_once(plan: TrialPlan, _: Any) -> None:
    """Die at the first try; the workload's second word is a folder that remembers."""
    mark = Path(plan.workload.split()[1]) / f"{plan.key}.tried"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _meet(plan: TrialPlan, _: Any) -> None:
    """Wait for a trial in another process; the workload's second word is where they meet."""
    place = Path(plan.workload.split()[1])
    (place / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(place.iterdir())) < 2:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.01)


def _refuse(plan: TrialPlan, _: Any) -> None:
    raise InvalidInputError("batch size 9", "at most 8 is required", "take 8")


def _wait(plan: TrialPlan, should_stop: Callable[[], bool] | None) -> TrialResult:
    assert should_stop is not None
    while not should_stop():
        time.sleep(0.01)
    return result(plan, "interrupted", stopped_by="interruption")


def _hang(plan: TrialPlan, _: Any) -> None:
    """Start a process that outlives its parent, and never come back."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(600)


_ACTS: dict[str, Callable[[TrialPlan, Any], TrialResult | None]] = {
    "raise": _raise,
    "memory": _memory,
    "torch_memory": _torch_memory,
    "leave": _leave,
    "vanish": _vanish,
    "die": _die,
    "abort": _abort,
    "die_once": _die_once,
    "meet": _meet,
    "refuse": _refuse,
    "wait": _wait,
    "hang": _hang,
}
