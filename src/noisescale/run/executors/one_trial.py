"""The worker's side of every executor: load a workload, train one trial, report its end.

Imports no torch by itself, so that a worker starts as fast as its workload allows.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import TrialPlan, TrialResult
from noisescale.run.executors.executor import ShouldStop, WorkerSpec, without_result

Trainer = Callable[[TrialPlan, ShouldStop], TrialResult]


def load_trainer(spec: WorkerSpec) -> Trainer:
    """Import the workload and the function that trains; return it bound to both.

    Raises:
        InvalidInputError: the workload cannot be loaded.
    """
    workload = _workload(spec)
    module, _, attribute = spec.train.partition(":")
    train = getattr(importlib.import_module(module), attribute)

    def trainer(plan: TrialPlan, should_stop: ShouldStop) -> TrialResult:
        result: TrialResult = train(
            workload, plan, keep_curves=spec.keep_curves, should_stop=should_stop
        )
        return result

    return trainer


def run_one(trainer: Trainer, plan: TrialPlan, should_stop: ShouldStop) -> TrialResult:
    """Train one trial; whatever it raises, exit included, is a result.

    Raises:
        InvalidInputError: the plan itself cannot be trained: no other result would be true.
    """
    began = time.perf_counter()
    try:
        return trainer(plan, should_stop)
    except InvalidInputError:
        raise
    except (Exception, SystemExit) as problem:  # noqa: BLE001 - a crash is one of the outcomes
        why = "memory" if is_out_of_memory(problem) else "crash"
        seconds = time.perf_counter() - began
        return without_result(plan, why=why, detail=in_one_line(problem), seconds=seconds)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, torch's ways included."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)


def in_one_line(problem: BaseException) -> str:
    """Spell an exception for a table's cell."""
    words = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {words}" if words else type(problem).__name__


def limit_threads(threads: int) -> None:
    """Bound torch's threads, if torch is loaded: slots share the cores."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _workload(spec: WorkerSpec) -> Any:
    if spec.workload is None:
        return None
    from noisescale.run.resolve import resolve_workload

    return resolve_workload(spec.workload, data=spec.data, overrides=spec.overrides or None)
