"""The parent's end of the process that forks others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from noisescale.run.trials.processes.nurse import LONGEST

# The child's import path is the parent's, so that whatever can be imported here can be there.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from noisescale.run.trials.processes.nurse import start; start()"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

REPLY_SECONDS = 5.0
"""What the nurse gets to tell a death that is noticed otherwise. (assumed)"""

KILLED = -signal.SIGKILL


class Nursery:
    """A spawned process that has torch loaded, and what it says of those that it forked.

    It ignores Ctrl-C, and is killed with all that it forked when this process ends, however
    it does.

    Args:
        package: descriptor of a file that holds the workload.
    """

    def __init__(self, package: int) -> None:
        self._package = package
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Nothing is ever written to it: that it closes is what it says.
        their_line, self._lifeline = os.pipe()
        self._status: dict[int, int] = {}
        self._gone = False
        try:
            self._process = self._start([theirs.fileno(), their_line, package])
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(their_line)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can fork."""
        self._listen(0)
        return not self._gone and self._process.poll() is None

    def fork(self, connection: int, words: int) -> None:
        """Have a process forked that trains for the other end of a connection.

        Args:
            connection: its end.
            words: a file for what it prints.
        """
        with suppress(OSError):
            socket.send_fds(self._control, [b"fork"], [connection, words])

    def kill(self, pid: int) -> None:
        """Kill one that was forked, and what it started."""
        with suppress(OSError):
            self._control.send(f"kill {pid}".encode())

    def status(self, pid: int, *, wait: bool = False) -> int | None:
        """Return the exit status of one that was forked (minus the signal's number), None if alive.

        Args:
            pid: its id.
            wait: it is about to die, or dead.
        """
        self._listen(0)
        while wait and pid not in self._status and not self._gone:
            if not self._listen(REPLY_SECONDS):
                break
        return self._status.get(pid, KILLED if wait or self._gone else None)

    def close(self) -> None:
        """Kill it and all that it forked."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._control.close()
        os.close(self._lifeline)

    def _listen(self, seconds: float) -> bool:
        """Take messages; return whether any came."""
        heard = False
        try:
            self._control.settimeout(seconds)
            while message := self._control.recv(LONGEST):
                word, *numbers = message.decode().split()
                if word == "died":
                    self._status[int(numbers[0])] = int(numbers[1])
                heard = True
                self._control.settimeout(0)
            self._gone = True
        except (BlockingIOError, TimeoutError):
            pass
        except OSError:
            self._gone = True
        return heard

    def _start(self, descriptors: list[int]) -> subprocess.Popen[bytes]:
        path = json.dumps([str(entry) for entry in sys.path])
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, path, *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, "1")},
            # Ctrl-C on the terminal is for the parent to handle.
            process_group=0,
        )
