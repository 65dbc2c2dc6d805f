"""The parent's end of one local worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

from noisescale.records import TrialPlan
from noisescale.run.executors.executor import WorkerSpec

# The child's import path is the parent's, so that whatever can be imported here can be there.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from noisescale.run.executors.worker import start; start()"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerProcess:
    """One worker: a fresh process (spawned, not forked) in a process group of its own.

    Args:
        spec: what it trains.
        threads: for torch.

    Attributes:
        output: descriptor to wait on; readable when :meth:`receive` has something to say.
        ready: whether it has loaded its workload.
        plan: what it trains now; None when idle.
        began: ``time.monotonic()`` when it got that.
    """

    def __init__(self, spec: WorkerSpec, *, threads: int) -> None:
        self.ready = False
        self.plan: TrialPlan | None = None
        self.began = 0.0
        self._partial = b""
        self._ended = False
        # Appending, so that it can be emptied here while the worker goes on writing.
        self._words = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed by kill()
        theirs_in, self._input = os.pipe()
        self.output, theirs_out = os.pipe()
        # Nothing is ever written to it: that it closes is what it says.
        their_line, self._lifeline = os.pipe()
        theirs = [theirs_in, theirs_out, their_line]
        try:
            self._process = self._start(theirs, threads)
        except BaseException:
            self._close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        os.set_blocking(self.output, False)
        self._send(spec=spec.to_dict(), threads=threads)

    def train(self, plan: TrialPlan) -> None:
        """Give it its next trial; that it is dead is noticed by :meth:`death`."""
        self._words.truncate(0)
        self.plan, self.began = plan, time.monotonic()
        self._send(plan=plan.to_dict())

    def stop(self) -> None:
        """Ask it to end its trial early."""
        self._send(stop=True)

    def receive(self) -> list[dict[str, Any]]:
        """Return the whole messages that have come; waits for nothing."""
        with suppress(BlockingIOError):
            while True:
                block = os.read(self.output, 1 << 20)
                if not block:
                    self._ended = True
                    break
                self._partial += block
        *lines, self._partial = self._partial.split(b"\n")
        return [json.loads(line) for line in lines]

    def death(self) -> int | None:
        """Return its exit status once it is dead (minus the signal's number), else None.

        Its last messages may still be waiting in :meth:`receive`.
        """
        if self._ended and self._process.poll() is None:
            # Its end of the pipe is closed: it is dying, or can say nothing any more.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
            self._signal_group()
            return self._process.wait()
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group."""
        return self._process.pid

    def last_words(self) -> str:
        """Return the last line that it printed during its trial; empty if none."""
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""

    def kill(self) -> None:
        """Kill it and what it started, and wait until it is gone."""
        self._signal_group()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for descriptor in (self._input, self.output, self._lifeline):
            os.close(descriptor)
        self._words.close()

    def _signal_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _start(self, pipes: list[int], threads: int) -> subprocess.Popen[bytes]:
        path = json.dumps([str(entry) for entry in sys.path])
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, path, *map(str, pipes)],
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
            pass_fds=pipes,
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
            # Ctrl-C on the terminal is for the parent to handle.
            process_group=0,
        )

    def _send(self, **message: Any) -> None:
        with suppress(BrokenPipeError):
            line = json.dumps(message).encode() + b"\n"
            while line:
                line = line[os.write(self._input, line) :]


def name_of_death(status: int) -> str:
    """Spell an exit status.

    >>> name_of_death(-11), name_of_death(3)
    ('was killed by SIGSEGV', 'ended by itself with exit status 3')
    """
    if status >= 0:
        return f"ended by itself with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
