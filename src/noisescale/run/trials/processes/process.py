"""The parent's end of one process that trains trials."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from noisescale.run.trials.bench import SlotPlan
from noisescale.run.trials.processes.nursery import Nursery


class Process:
    """A process in a group of its own.

    Args:
        nursery: has it forked.

    Attributes:
        connection: pickled messages both ways.
        pid: its id, which is that of its group; 0 until it has said so.
        ready: whether it has loaded its workload.
        places: of the trials that it is to train and has no result of.
        begun: of those that it was training when it last said so.
        slots: the units that it was given.
        working: whether it has something to do.
        began: ``time.monotonic()`` when it was given that.
    """

    def __init__(self, nursery: Nursery) -> None:
        self.pid = 0
        self.ready = self.working = False
        self.places: set[int] = set()
        self.begun: set[int] = set()
        self.slots: list[SlotPlan] = []
        self.began = 0.0
        self._nursery = nursery
        self._ended = False
        # Appending, so that it can be emptied here while the process goes on writing.
        self._words = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed by kill()
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            nursery.fork(theirs.fileno(), self._words.fileno())

    def train(self, slots: Sequence[SlotPlan], places: Sequence[int], *message: Any) -> None:
        """Give it units of the trials at some places; that it is dead is noticed later."""
        self._words.truncate(0)
        self.slots, self.places, self.begun = list(slots), set(places), set()
        self.working, self.began = True, time.monotonic()
        self.send("work", places, *message)

    def send(self, *message: Any) -> None:
        """Send a message; that it is dead is noticed by :meth:`death`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> list[tuple[Any, ...]]:
        """Return the messages that have come; waits for nothing."""
        messages: list[tuple[Any, ...]] = []
        try:
            while not self._ended and self.connection.poll():
                message = self.connection.recv()
                if message[0] == "born":
                    self.pid = message[1]
                else:
                    messages.append(message)
        except (EOFError, OSError):
            self._ended = True
        return messages

    def death(self) -> int | None:
        """Return its exit status once it is dead (minus the signal's number), else None.

        Its last messages may still be waiting in :meth:`receive`.
        """
        if self._ended:
            if self.pid:
                self._nursery.kill(self.pid)  # it can say nothing any more
            return self._nursery.status(self.pid, wait=bool(self.pid)) or 0
        return self._nursery.status(self.pid)

    def last_words(self) -> str:
        """Return the last line that it printed during its work; empty if none."""
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""

    def kill(self) -> None:
        """Kill it and what it started, and wait until it is gone."""
        if self.pid and self._nursery.status(self.pid) is None:
            self._nursery.kill(self.pid)
            self._nursery.status(self.pid, wait=True)
        # One that has not been heard of ends by itself once its connection is closed.
        self.connection.close()
        self._words.close()
