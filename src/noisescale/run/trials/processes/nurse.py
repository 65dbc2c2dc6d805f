"""A process that has loaded torch and forks others, each of which trains what our parent sends.

It does nothing else, so that it has one thread and nobody's lock when it forks: a process whose
torch has computed in several threads could not be forked safely. A fork takes milliseconds
where loading torch takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import NoReturn

from noisescale.run.executors.worker import die_with_parent, end_group

LONGEST = 64
"""Bytes of a message either way: ``fork``, ``kill PID``; ``died PID STATUS``."""


class Nurse:
    """Forks what the parent asks for, and tells it who died.

    Args:
        control: messages from the parent, with descriptors, and to it.
        lifeline: read end of a pipe that closes when the parent ends.
        package: file that holds the workload.
    """

    def __init__(self, control: socket.socket, lifeline: int, package: int) -> None:
        self._control, self._lifeline, self._package = control, lifeline, package
        self._alive: set[int] = set()
        self._wake, wake = os.pipe()
        for end in (self._wake, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken

    def serve(self) -> NoReturn:
        """Do what is asked until the parent is gone."""
        while True:
            control = self._control.fileno()
            ready, _, _ = select.select([control, self._wake], [], [])
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                self._reap()
            if control in ready:
                message, descriptors, _, _ = socket.recv_fds(self._control, LONGEST, 2)
                if not message:
                    os._exit(0)
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)
                word, *rest = message.decode().split()
                if word == "fork":
                    self._fork(*descriptors)
                elif int(rest[0]) in self._alive:  # not waited for: the number is still its own
                    _kill(int(rest[0]))

    def _fork(self, connection: int, words: int) -> None:
        own = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(connection, words, own)
        os.close(connection)
        os.close(words)
        self._alive.add(pid)

    def _become(self, connection: int, words: int, nurse: int) -> NoReturn:
        """Be the child, and never come back."""
        status = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Who is to be killed belongs to an open file: this group needs one of its own.
            die_with_parent(os.open(f"/proc/self/fd/{self._lifeline}", os.O_RDONLY))
            if os.getppid() != nurse:
                end_group()
            self._control.close()
            for stream in (1, 2):
                os.dup2(words, stream)
            from noisescale.run.trials.processes.child import Line, main

            main(Line(Connection(connection)), self._package)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001  what is left is to say so
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                # What it was training is tried again by torch's optimizers, which import this:
                # another second, once, and not at the start.
                import torch._dynamo  # noqa: F401

                self._alive.discard(pid)
                _kill(pid, waited=True)
                self._tell(f"died {pid} {os.waitstatus_to_exitcode(status)}")

    def _tell(self, message: str) -> None:
        try:
            self._control.send(message.encode())
        except OSError:
            os._exit(1)


def _kill(pid: int, *, waited: bool = False) -> None:
    """Kill a process and what it started, or only the latter once it has been waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not waited:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def start() -> None:
    """Run as the parent starts it: ``... CONTROL LIFELINE PACKAGE`` are descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, lifeline, package = (int(text) for text in sys.argv[-3:])
    for descriptor in (control, lifeline, package):
        os.set_inheritable(descriptor, False)
    die_with_parent(lifeline)
    import noisescale.run.trials.processes.child  # noqa: F401  torch, before the first fork

    Nurse(socket.socket(fileno=control), lifeline, package).serve()
