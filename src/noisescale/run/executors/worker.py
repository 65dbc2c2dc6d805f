"""A process that trains one trial after another for :class:`LocalExecutor`.

It reads JSON lines from one pipe and writes JSON lines to another; its standard output is the
user's. It ignores Ctrl-C, which is for its parent, and dies with its parent, and what the user's
code started in it too: at once by the kernel on Linux, by the end of its pipe anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, NoReturn

from noisescale.errors import InvalidInputError
from noisescale.records import TrialPlan
from noisescale.run.executors.executor import WorkerSpec
from noisescale.run.executors.one_trial import limit_threads, load_trainer, run_one

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Inbox:
    """What the parent sends, read by a thread so that it is heard during a trial as well."""

    def __init__(self, descriptor: int) -> None:
        self.stopped = threading.Event()
        self._file = os.fdopen(descriptor, "rb")
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def first(self) -> dict[str, Any]:
        """Return the settings, which come before all else."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            end_group()
        settings: dict[str, Any] = json.loads(line)
        threading.Thread(target=self._read, daemon=True).start()
        return settings

    def next(self) -> dict[str, Any]:
        """Wait for the next plan."""
        return self._messages.get()

    def _read(self) -> None:
        for line in self._file:
            message = json.loads(line)
            if "stop" in message:
                self.stopped.set()
            else:
                self._messages.put(message)
        end_group()


class Outbox:
    """Whole lines to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, **message: Any) -> None:
        """Send one message; that the parent is gone ends this process."""
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            end_group()


def main(inbox: Inbox, outbox: Outbox, lifeline: int) -> None:
    """Load what the parent names, then train what it sends, for ever."""
    die_with_parent(lifeline)
    settings = inbox.first()
    try:
        trainer = load_trainer(WorkerSpec.from_dict(settings["spec"]))
        limit_threads(settings["threads"])
        outbox.send(ready=True)
        while True:
            plan = TrialPlan.from_dict(inbox.next()["plan"])
            result = run_one(trainer, plan, inbox.stopped.is_set)
            outbox.send(result=result.to_dict())
    except InvalidInputError as problem:
        outbox.send(refused=[problem.value, problem.requirement, problem.remedy])


def die_with_parent(lifeline: int) -> None:
    """Ask Linux to kill this group when the parent's end of a pipe closes, which stays silent.

    A thread that waits for that, as :class:`Inbox` has, needs Python's lock, which a trial may
    hold for long. That the parent is dead already is found by reading the settings.
    """
    if sys.platform != "linux":
        return
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        # Where something else holds the pipe open; kills this process alone.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def end_group() -> NoReturn:
    """End this process and what the user's code started in it."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def start() -> None:
    """Run as the parent starts it: ``... IN OUT LIFELINE`` are the numbers of its pipes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptors = [int(text) for text in sys.argv[-3:]]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    main(Inbox(descriptors[0]), Outbox(descriptors[1]), descriptors[2])
