"""Hands trials out to processes, asks the judge, and buries the dead."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import wait
from typing import Any

from noisescale.records.trial import Crossing, TrialResult
from noisescale.run.executors.deaths import Deaths
from noisescale.run.executors.executor import without_result
from noisescale.run.executors.memory_evidence import count_oom_kills
from noisescale.run.executors.worker_process import name_of_death
from noisescale.run.trials.bench import SlotPlan, only, restricted
from noisescale.run.trials.job import Job
from noisescale.run.trials.judge import TrialProgress
from noisescale.run.trials.passages import Passages
from noisescale.run.trials.processes.pool import TrialProcesses
from noisescale.run.trials.processes.process import Process

LOOK_EVERY = 0.05
"""Seconds between two looks at what no pipe announces. (assumed)"""

STOP_SECONDS = 5.0
"""What trials get to end by themselves when all are stopped, before they are killed. (assumed)"""

JUDGED_SHARE = 0.05
"""Share of one core's time that the judge may take. (assumed)"""

RETRIES = 1
"""Times that a trial by itself is tried again after its process was killed. (assumed)"""


class Supervisor:
    """Trains the trials of one job in processes.

    Every process gets an equal share of the stacks at once, and goes through it as a thread
    would; trials one by one are handed out singly, unless a judge is to see them side by side. Of
    a process that dies, the trials that it was training are tried again one by one, alone in
    their process, last of all; the others begin again as they were.

    Args:
        processes: ready.
        job: what is asked.
        slots: the units to be.
        count: processes to use.
    """

    def __init__(
        self, processes: TrialProcesses, job: Job, slots: Sequence[SlotPlan], count: int
    ) -> None:
        self._pool, self._job, self._count = processes, job, count
        self._waiting = list(slots)
        self._suspects: list[SlotPlan] = []
        self._bytes = max((slot.trial_bytes for slot in slots), default=0)
        self._deaths = Deaths(RETRIES)
        self._oom_kills = count_oom_kills()
        self._halted_at: float | None = None
        self._progress = [self._fresh(place) for place in range(len(job.plans))]
        self._place = {plan.key: place for place, plan in enumerate(job.plans)}
        self._judged_at = self._judge_took = 0.0
        self._moved = False
        self._results: dict[int, TrialResult] = {}

    def run(self) -> dict[int, TrialResult]:
        """Train until every trial has ended; return the results by place.

        Some are missing if no process could be started any more.

        Raises:
            Exception: what ``on_result``, ``judge`` or ``should_stop`` raised, or our own defect.
        """
        try:
            while len(self._results) < len(self._job.plans):
                if not self._hand_out():
                    break
                self._look()
                self._ask_judge()
                self._ask_whether_to_stop()
            self._drain()
        except BaseException:
            self._pool.close()  # what they train is nobody's any more
            raise
        return self._results

    @property
    def _crew(self) -> list[Process]:
        return self._pool.processes[: self._count]

    def _hand_out(self) -> bool:
        """Give idle processes work; return whether there is hope for more results."""
        if self._waiting or self._suspects:
            self._pool.grow(self._count)
            for process in self._crew:
                if process.ready and not process.working:
                    self._give(process)
        return bool(self._crew)

    def _give(self, process: Process) -> None:
        slots = self._share(sum(not each.working for each in self._crew))
        if not slots:
            return
        places = sorted(place for slot in slots for place in slot.places)
        options = {
            "keep_curves": self._job.keep_curves,
            "capacity": self._job.capacity // self._count,
            "isolated": self._pool.bench.isolated,
        }
        plans = [self._job.plans[place] for place in places]
        judged = self._job.judge is not None
        process.train(slots, places, plans, restricted(slots, places), judged, options)

    def _share(self, idle: int) -> list[SlotPlan]:
        """Take what one of so many idle processes is to do from what waits."""
        if not self._waiting:
            return [self._suspects.pop(0)] if self._suspects else []
        together = self._job.judge is not None or self._waiting[0].route is not None
        taken = slice(None, None, idle) if together else slice(1)
        share = self._waiting[taken]
        del self._waiting[taken]
        return share

    def _look(self) -> None:
        crew = self._crew
        wait([process.connection for process in crew], timeout=LOOK_EVERY)
        for process in crew:
            status = process.death()
            for message in process.receive():
                self._take(process, message)
            if status is not None:
                self._bury(process, status)

    def _take(self, process: Process, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind in ("ready", "unloadable"):
            self._pool.welcome(process, [message])
        elif kind == "begun":
            process.begun = set(content[0])
        elif kind == "progress":
            self._enter(content[0])
        elif kind == "result":
            place, result = content
            process.places.discard(place)
            self._deliver(place, result)
        elif kind == "raised":
            words, problem = content
            raise problem if problem is not None else RuntimeError(f"a process raised {words}")
        elif kind == "done":
            process.working = False
            if process.places:
                raise RuntimeError(f"{len(process.places)} trials of a process left no result")

    def _enter(self, news: Sequence[tuple[int, int, tuple[Crossing, ...]]]) -> None:
        self._moved = True
        for place, steps, crossings in news:
            if place not in self._results:
                self._progress[place] = dataclasses.replace(
                    self._progress[place], steps=steps, crossings=crossings
                )

    def _deliver(self, place: int, result: TrialResult) -> None:
        if place in self._results:
            return
        self._moved = True
        self._results[place] = result
        self._progress[place] = dataclasses.replace(
            self._progress[place], steps=result.steps, crossings=result.crossings, running=False
        )
        if self._job.on_result is not None:
            self._job.on_result(result)

    def _ask_judge(self) -> None:
        judge = self._job.judge
        if judge is None or not self._moved or self._halted_at is not None:
            return
        if time.perf_counter() - self._judged_at < self._judge_took / JUDGED_SHARE:
            return
        began = time.thread_time()  # not what others took of the processor meanwhile
        hopeless = judge.hopeless(self._progress)
        self._moved = False
        self._judged_at = time.perf_counter()
        self._judge_took = time.thread_time() - began
        for process in self._crew:
            own = {key for key in hopeless if self._place[key] in process.places}
            if own:
                process.send("race", own)

    def _ask_whether_to_stop(self) -> None:
        asked = self._job.should_stop
        if self._halted_at is None:
            if asked is not None and asked():
                self._halt()
        elif time.monotonic() > self._halted_at + STOP_SECONDS:
            for process in self._crew:
                if process.working:
                    self._interrupt(process.places)
                    self._pool.bury(process)

    def _halt(self) -> None:
        self._halted_at = time.monotonic()
        for process in self._crew:
            if process.working:
                process.send("halt")
        left, self._waiting, self._suspects = self._waiting + self._suspects, [], []
        for slot in left:
            self._interrupt(slot.places)

    def _interrupt(self, places: Iterable[int]) -> None:
        for place in sorted(places):
            nothing = without_result(self._job.plans[place], why="interruption", detail="")
            known = self._progress[place]
            self._deliver(
                place,
                dataclasses.replace(nothing, steps=known.steps, crossings=known.crossings),
            )

    def _bury(self, process: Process, status: int) -> None:
        places = process.places - set(self._results)
        if self._halted_at is not None:
            self._interrupt(places)
        else:
            blamed = process.begun & places or places
            self._blame(process, status, sorted(blamed))
            self._waiting += only(process.slots, places - blamed)
            for place in places:
                if place not in self._results:
                    self._progress[place] = self._fresh(place)
        self._pool.bury(process)

    def _blame(self, process: Process, status: int, places: Sequence[int]) -> None:
        """Let the trials that a process died with begin again alone, or end."""
        words = process.last_words()
        detail = f"its process {name_of_death(status)}" + (f": {words}" if words else "")
        for_memory = count_oom_kills() > self._oom_kills
        self._oom_kills = count_oom_kills()
        for place in places:
            result = None
            if len(places) == 1:
                result = self._deaths.verdict(
                    self._job.plans[place],
                    detail,
                    for_memory=for_memory,
                    its_own=status >= 0,
                    seconds=time.monotonic() - process.began,
                )
            if result is not None:
                self._deliver(place, result)
                continue
            self._suspects.append(
                SlotPlan(places=(place,), route=None, width=1, trial_bytes=self._bytes)
            )

    def _drain(self) -> None:
        """Wait until processes have said that they are done, so that the next job finds them."""
        until = time.monotonic() + STOP_SECONDS
        while any(process.working for process in self._crew):
            self._look()
            if time.monotonic() > until:
                self._pool.close()

    def _fresh(self, place: int) -> TrialProgress:
        plan = self._job.plans[place]
        return TrialProgress(
            key=plan.key, plan=plan, steps=0, crossings=Passages(plan).crossings, running=True
        )
