"""What a worker takes up and brings to its next evaluation: a stack, or one trial by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from noisescale.records.trial import TrialPlan
from noisescale.run.trials.alone import LoneTrial
from noisescale.run.trials.passages import Passages
from noisescale.workload import Workload

ShouldStop = Callable[[], bool]


@dataclass(kw_only=True, eq=False)
class RunningTrial:
    """A trial while it is trained.

    Attributes:
        plan: its configuration.
        place: among the plans that were given.
        passages: its evaluations.
        seconds: its share of the time taken so far.
        steps: optimizer steps done.
        engine: ``stacked`` or ``alone``.
        stopped_by: what ended it when its evaluations did not.
        detail: one line on a crash.
    """

    plan: TrialPlan
    place: int
    passages: Passages
    seconds: float = 0.0
    steps: int = 0
    engine: str = "alone"
    stopped_by: str = ""
    detail: str = ""

    @cached_property
    def key(self) -> str:
        """The plan's, computed once."""
        return self.plan.key

    @property
    def goes_on(self) -> bool:
        """Whether it is to be trained further."""
        return self.passages.goes_on and not self.stopped_by


class Unit(Protocol):
    """Trials that are brought forward together."""

    trials: list[RunningTrial]

    @property
    def steps(self) -> int:
        """Optimizer steps done."""

    def advance(self, should_stop: ShouldStop | None = None) -> None:
        """Train to the next evaluation and evaluate what is due."""

    def drop_ended(self) -> list[RunningTrial]:
        """Let go of the trials that have ended, and return them."""


class LoneUnit:
    """One trial by itself, with a random state of its own.

    Attributes:
        trials: that one; empty once it has ended.
        steps: optimizer steps done.

    Args:
        workload: model and data.
        trial: not begun.
        isolated: whether to give the trial torch's random state while it is trained; only one
            unit may be trained at a time then.
    """

    def __init__(self, workload: Workload, trial: RunningTrial, *, isolated: bool) -> None:
        self.trials = [trial]
        self._isolated = isolated
        with torch.random.fork_rng():
            torch.manual_seed(trial.plan.seed)
            self._lone = LoneTrial(workload, trial.plan)
            self._random = torch.random.get_rng_state()

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self._lone.steps

    def advance(self, should_stop: ShouldStop | None = None) -> None:
        """Train to the next evaluation and evaluate."""
        began = time.perf_counter()
        if self._isolated:
            with torch.random.fork_rng():
                torch.random.set_rng_state(self._random)
                self._go(should_stop)
                self._random = torch.random.get_rng_state()
        else:
            self._go(should_stop)
        for trial in self.trials:
            trial.seconds += time.perf_counter() - began

    def drop_ended(self) -> list[RunningTrial]:
        """Let go of the trial if it has ended, and return it."""
        ended = [trial for trial in self.trials if not trial.goes_on]
        self.trials = [trial for trial in self.trials if trial.goes_on]
        return ended

    def _go(self, should_stop: ShouldStop | None) -> None:
        (trial,) = self.trials
        while self._lone.steps < trial.passages.next_step:
            if should_stop is not None and should_stop():
                trial.stopped_by = "interruption"
                break
            self._lone.step()
        else:
            self._lone.evaluate(trial.passages)
        trial.steps = self._lone.steps
