"""Threads that bring units of trials forward, the least advanced one first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from noisescale.errors import InvalidInputError
from noisescale.records.trial import TrialResult
from noisescale.run.trials.judge import Judge, TrialProgress
from noisescale.run.trials.outcomes import failure, trial_result
from noisescale.run.trials.stacked.stack import Stack
from noisescale.run.trials.units import RunningTrial, ShouldStop, Unit

JUDGED_SHARE = 0.02
"""Share of the time that a judge may take. (assumed)"""


class Slot:
    """A unit, or the trials that will be one when there is room for it.

    Attributes:
        unit: None before it is made.
        width: most trials that it may hold.

    Args:
        trials: that it will hold.
        trial_bytes: memory that each takes.
        make: makes the unit.
        again: makes a slot of one trial alone, should this unit fail; None when it has one.
        width: as above.
    """

    def __init__(
        self,
        trials: Sequence[RunningTrial],
        *,
        trial_bytes: int,
        make: Callable[[], Unit],
        again: Callable[[RunningTrial], Slot] | None = None,
        width: int = 1,
    ) -> None:
        self.unit: Unit | None = None
        self.width, self.make, self.again = width, make, again
        self._planned, self._trial_bytes = list(trials), trial_bytes

    @property
    def trials(self) -> list[RunningTrial]:
        """Trials that have not ended."""
        return self._planned if self.unit is None else self.unit.trials

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return 0 if self.unit is None else self.unit.steps

    @property
    def bytes(self) -> int:
        """Memory that it takes once it is made."""
        return self._trial_bytes * len(self.trials)

    def give_up(self) -> list[RunningTrial]:
        """Return the trials that it held, and hold none."""
        trials = self.trials
        self._planned = []
        if self.unit is not None:
            self.unit.trials = []
        return trials

    def take_over(self, other: Slot) -> bool:
        """Join another slot's stack if they fit together and are equally far."""
        ours, theirs = self.unit, other.unit
        fits = len(self.trials) + len(other.trials) <= self.width
        if not fits or not isinstance(ours, Stack) or not isinstance(theirs, Stack):
            return False
        if not ours.may_join(theirs):
            return False
        ours.join(theirs)
        return True


class Workers:
    """Trains all units with some threads.

    A thread computes while the others do: torch lets go of Python's lock inside its kernels.

    Args:
        slots: the units to be.
        trials: all trials, in the order of the plans.
        capacity: bytes that units in memory may take together; one always may.
        judge: stops hopeless trials.
        on_result: called with each result as soon as its trial ends, by one thread at a time.
        should_stop: asked before every step, by several threads; once true all trials end.
        on_begin: told the trials of a unit before it is brought forward.
        judged_share: share of the time that the judge may take.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        trials: Sequence[RunningTrial],
        *,
        capacity: int,
        judge: Judge | None = None,
        on_result: Callable[[TrialResult], None] | None = None,
        should_stop: ShouldStop | None = None,
        on_begin: Callable[[Sequence[RunningTrial]], None] | None = None,
        judged_share: float = JUDGED_SHARE,
    ) -> None:
        self._on_begin, self._judged_share = on_begin, judged_share
        self._waiting, self._trials = list(slots), list(trials)
        self._capacity, self._judge = capacity, judge
        self._on_result, self._asked = on_result, should_stop
        self._idle: list[Slot] = []
        self._busy: list[Slot] = []
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._threads = 1
        self._problem: BaseException | None = None
        self._halted = False
        self._judged_at = self._judge_took = 0.0
        self._progress = [_progress(trial) for trial in trials]
        self.results: dict[int, TrialResult] = {}

    def run(self, threads: int) -> None:
        """Train until every trial has ended.

        Raises:
            Exception: what ``on_result``, ``judge`` or ``should_stop`` raised, or our own defect.
        """
        self._threads = threads
        if threads == 1:
            self._work()
        else:
            self._run_threads(threads)
        if self._problem is not None:
            raise self._problem
        for trial in self._trials:
            if trial.place not in self.results:
                trial.stopped_by = trial.stopped_by or "interruption"
                self._hand_over(trial)

    def _run_threads(self, threads: int) -> None:
        pool = [threading.Thread(target=self._thread, daemon=True) for _ in range(threads)]
        for thread in pool:
            thread.start()
        try:
            for thread in pool:
                thread.join()
        except BaseException:
            self._halted = True
            for thread in pool:
                thread.join()
            raise

    def _thread(self) -> None:
        torch.set_num_threads(1)
        self._work()

    def _work(self) -> None:
        try:
            while (slot := self._take()) is not None:
                self._bring_forward(slot)
        except BaseException as problem:
            with self._changed:
                self._problem = self._problem or problem
                self._halted = True
                self._changed.notify_all()
            if not isinstance(problem, Exception):
                raise

    def _should_stop(self) -> bool:
        if not self._halted and self._asked is not None and self._asked():
            self._halted = True
        return self._halted

    def _take(self) -> Slot | None:
        """Return what to bring forward; None when nothing is left for this thread."""
        with self._changed:
            while not self._should_stop():
                slot = self._next()
                if slot is not None:
                    self._busy.append(slot)
                    return slot
                if not self._busy and not self._waiting:
                    break
                self._changed.wait()
            self._changed.notify_all()
            return None

    def _next(self) -> Slot | None:
        if self._waiting and self._has_room(self._waiting[0]):
            return self._waiting.pop(0)
        if not self._idle:
            return None
        slot = min(self._idle, key=lambda slot: slot.steps)
        self._idle.remove(slot)
        return slot

    def _has_room(self, slot: Slot) -> bool:
        # With nobody to compare them, finishing a lone trial that is begun keeps it cached.
        if self._judge is None and self._idle and slot.width == 1:
            return False
        taken = sum(each.bytes for each in self._idle + self._busy)
        return not taken or taken + slot.bytes <= self._capacity

    def _bring_forward(self, slot: Slot) -> None:
        if self._on_begin is not None:
            self._on_begin(slot.trials)
        try:
            if slot.unit is None:
                with self._making:  # models are drawn from torch's one random state
                    slot.unit = slot.make()
            slot.unit.advance(self._should_stop)
            ended = slot.unit.drop_ended()
        except InvalidInputError:
            raise
        except Exception as problem:  # noqa: BLE001  a crash is one of the outcomes
            ended = self._failed(slot, problem)
        with self._changed:
            self._busy.remove(slot)
            for trial in ended:
                self._hand_over(trial)
            self._ask_judge(slot.trials)
            if slot.trials and not self._joined(slot):
                self._idle.append(slot)
            self._changed.notify_all()

    def _failed(self, slot: Slot, problem: Exception) -> list[RunningTrial]:
        """Let a failed stack's trials begin again one by one; a lone trial has ended."""
        trials = slot.give_up()
        if slot.again is not None:
            with self._changed:
                self._waiting += [slot.again(trial) for trial in trials]
            return []
        for trial in trials:
            trial.stopped_by, trial.detail = failure(problem)
        return trials

    def _joined(self, slot: Slot) -> bool:
        """Let another stack take over a narrow one's trials, unless threads would lack work."""
        if len(self._idle) + len(self._busy) < self._threads:
            return False
        return any(other.take_over(slot) for other in self._idle)

    def _ask_judge(self, moved: Sequence[RunningTrial]) -> None:
        if self._judge is None or self._halted:
            return
        for trial in moved:
            self._progress[trial.place] = _progress(trial)
        if time.perf_counter() - self._judged_at < self._judge_took / self._judged_share:
            return
        began = time.thread_time()  # not what others took of the processor meanwhile
        hopeless = self._judge.hopeless(self._progress)
        for trial in self._trials:
            if trial.goes_on and trial.key in hopeless:
                trial.stopped_by = "race"
        self._judged_at = time.perf_counter()
        self._judge_took = time.thread_time() - began

    def _hand_over(self, trial: RunningTrial) -> None:
        result = trial_result(
            trial.plan,
            trial.passages,
            seconds=trial.seconds,
            engine=trial.engine,
            steps=trial.steps,
            stopped_by=trial.stopped_by,
            detail=trial.detail,
        )
        self._progress[trial.place] = _progress(trial)
        self.results[trial.place] = result
        if self._on_result is not None:
            self._on_result(result)


def _progress(trial: RunningTrial) -> TrialProgress:
    return TrialProgress(
        key=trial.key,
        plan=trial.plan,
        steps=max(0, trial.passages.steps),
        crossings=trial.passages.crossings,
        running=trial.goes_on,
    )
