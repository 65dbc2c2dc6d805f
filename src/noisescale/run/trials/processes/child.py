"""A process that trains what its parent sends, as one worker does in a thread."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from noisescale.records.trial import TrialPlan, TrialResult
from noisescale.run.executors.worker import end_group
from noisescale.run.trials.bench import Bench, SlotPlan
from noisescale.run.trials.freed_memory import reuse_freed_memory
from noisescale.run.trials.job import begun_never
from noisescale.run.trials.judge import TrialProgress
from noisescale.run.trials.processes.likeness import likeness
from noisescale.run.trials.units import RunningTrial
from noisescale.run.trials.workers import Workers

TOLD_SHARE = 0.1
"""Share of the time that telling the parent how far trials are may take. (assumed: a late verdict
costs steps of trials that are hopeless)"""


class Line:
    """The connection to the parent, whose end ends this process.

    Attributes:
        halted: the parent wants all trials to end.
        hopeless: keys of trials that it wants stopped.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self.halted = False
        self.hopeless: set[str] = set()

    def send(self, *message: Any) -> None:
        """Send a message."""
        try:
            self._connection.send(message)
        except OSError:
            end_group()

    def work(self) -> tuple[Any, ...]:
        """Wait for the next work; word on the last, which has ended, is left aside."""
        while True:
            kind, *content = self._receive()
            if kind == "work":
                self.halted, self.hopeless = False, set()
                return tuple(content)

    def listen(self) -> bool:
        """Take what has come, and return whether all trials are to end."""
        while self._poll.poll(0):
            kind, *content = self._receive()
            self.halted |= kind == "halt"
            if kind == "race":
                self.hopeless |= content[0]
        return self.halted

    def _receive(self) -> tuple[Any, ...]:
        try:
            message: tuple[Any, ...] = self._connection.recv()
        except (EOFError, OSError):
            end_group()
        return message


class Assignment:
    """Trials that the parent wants trained: its judge, its receiver of results.

    Args:
        line: to the parent.
        places: of the trials among the parent's.
        judged: whether a judge wants to know how far they are.
    """

    def __init__(self, line: Line, places: Sequence[int], *, judged: bool) -> None:
        self._line, self._places = line, places
        self._judged = judged
        self._told: dict[str, TrialProgress] = {}
        self._begun: list[int] = []

    def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
        """Tell the parent what has changed, and return what it wants stopped."""
        news = []
        for place, now in zip(self._places, progress, strict=True):
            before = self._told.get(now.key)
            if now.running and (before is None or before.steps != now.steps):
                self._told[now.key] = now
                news.append((place, now.steps, now.crossings))
        if news:
            self._line.send("progress", news)
        self._line.listen()
        return self._line.hopeless

    def begin(self, trials: Sequence[RunningTrial]) -> None:
        """Tell the parent what would be to blame for this process's death."""
        begun = [self._places[trial.place] for trial in trials]
        if begun != self._begun:
            self._begun = begun
            self._line.send("begun", begun)

    def train(
        self, bench: Bench, plans: Sequence[TrialPlan], slots: Sequence[SlotPlan], **options: Any
    ) -> None:
        """Train all trials and send their results."""
        left: dict[str, list[int]] = {}
        for plan, place in zip(plans, self._places, strict=True):
            left.setdefault(plan.key, []).append(place)

        def deliver(result: TrialResult) -> None:
            self._line.send("result", left[result.plan.key].pop(), result)

        trials = begun_never(plans, keep_curves=options["keep_curves"])
        crew = Workers(
            bench.slots(slots, trials, isolated=options["isolated"]),
            trials,
            capacity=options["capacity"],
            judge=self if self._judged else None,
            on_result=deliver,
            should_stop=self._line.listen,
            on_begin=self.begin,
            judged_share=TOLD_SHARE,
        )
        crew.run(1)


def main(line: Line, package: int) -> None:
    """Load the workload, then train what the parent sends, for ever."""
    line.send("born", os.getpid())
    torch.set_num_threads(1)
    reuse_freed_memory()
    try:
        settings, workload = torch.load(
            f"/proc/self/fd/{package}", mmap=True, weights_only=False, map_location="cpu"
        )
        dtype, precision = settings
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        bench = Bench(workload)
        line.send("ready", likeness(workload))
    except Exception as problem:  # noqa: BLE001  loading runs anybody's code
        line.send("unloadable", f"cannot be loaded: {type(problem).__name__}: {problem}")
        return
    while True:
        places, plans, slots, judged, options = line.work()
        try:
            Assignment(line, places, judged=judged).train(bench, plans, slots, **options)
        except Exception as problem:  # noqa: BLE001  for the parent to raise
            line.send("raised", f"{type(problem).__name__}: {problem}", _sendable(problem))
        line.send("done")


def _sendable(problem: Exception) -> Exception | None:
    import pickle

    with suppress(Exception):
        return problem if isinstance(pickle.loads(pickle.dumps(problem)), type(problem)) else None
    return None
