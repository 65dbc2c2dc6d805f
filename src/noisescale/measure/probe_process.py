"""The parent's end of a probe: starts the child, watches its worker, notices its death."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.measure.memory import resident_bytes

# Memory grows by at most some 50 MB between two looks: one core faults in 2 to 4 GB/s. (measured
# on one machine) The margin has to be larger than that.
_LOOK_EVERY = 0.02
# The child's import path is the parent's, so that whatever can be imported here can be there.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop());"
    "from noisescale.measure.probe import main; main()"
)
_INSIDE = "NOISESCALE_PROBE"

_REMEDY = (
    "put it into a module of its own and pass functools.partial(...) of a function there "
    "that returns the Workload"
)


@dataclass(frozen=True)
class Parcel:
    """A pickled loader and where the child finds ``__main__``, if the loader needs it."""

    payload: bytes
    main_module: dict[str, str] | None


def pack(source: Any) -> Parcel:
    """Pickle a workload or a loader for the child.

    Raises:
        InvalidInputError: it cannot be pickled, or lives in a script that cannot be imported.
    """
    if os.environ.get(_INSIDE):
        raise InvalidInputError(
            "a scan started by the process of another scan",
            "the workload's file must not scan when it is imported",
            "put the call under if __name__ == '__main__':",
        )
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(source)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise InvalidInputError(
            f"workload of type {type(source).__name__}",
            f"it must be picklable, since it is run in a process of its own ({error})",
            _REMEDY,
        ) from None
    return Parcel(buffer.getvalue(), _main_module() if pickler.needs_main else None)


class ProbeProcess:
    """One child process and its worker, of which there is one at a time.

    :meth:`kill` leaves no process behind.

    Args:
        parcel: what :func:`pack` made.
        settings: ``threads``, ``device``, ``margin``, ``limit_bytes``, as JSON.
    """

    def __init__(self, parcel: Parcel, settings: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps([str(entry) for entry in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, _INSIDE: "1"},
            # A group of its own: Ctrl-C is for the parent to handle, and processes that the
            # workload starts can be killed with it.
            start_new_session=True,
        )
        self._closed = False
        self._worker: int | None = None
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        header = {
            **settings,
            "main": parcel.main_module,
            "payload_bytes": len(parcel.payload),
        }
        try:
            self._write(json.dumps(header).encode() + b"\n" + parcel.payload)
        except BaseException:
            self.kill()
            raise

    def send(self, **command: Any) -> None:
        """Send one command; that the child is dead is noticed by :meth:`receive`."""
        self._write(json.dumps(command).encode() + b"\n")

    def receive(self, *, until: float | None, resident_limit: int | None) -> dict[str, Any]:
        """Wait for the worker's next message.

        Args:
            until: ``time.monotonic()`` at which to give up; None: never.
            resident_limit: resident memory in bytes above which the worker is killed.

        Returns:
            The message, or ``{"event": "late"}``, ``{"event": "over limit", "reason": ...}``
            or ``{"event": "died", "reason": ...}``; after these three the worker is dead.
        """
        while True:
            message = self._next_message()
            if message is not None and message["event"] == "started":
                self._worker = message["process_id"]
            elif message is not None and message["event"] == "ended":
                return self._died(message["code"])
            elif message is not None:
                return message
            used = resident_bytes(self._worker) if self._worker is not None else None
            if resident_limit is not None and used is not None and used > resident_limit:
                self._end_worker()
                return {"event": "over limit", "reason": "memory grew above the limit"}
            if until is not None and time.monotonic() > until:
                self._end_worker()
                return {"event": "late", "reason": "the time ended"}

    def restart(self) -> bool:
        """Replace the worker by a fresh one; False when the child has to be started anew."""
        if self._worker is not None:
            self._end_worker()
        if self._closed or self._process.poll() is not None:
            return False
        self._errors.seek(0)
        self._errors.truncate()
        self.send(next=True)
        return True

    def kill(self) -> None:
        """Kill the child and what it started, and wait until it is gone."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _end_worker(self) -> None:
        """Kill the worker; the child itself too where it is the worker."""
        if self._worker is None or self._worker == self._process.pid:
            self.kill()
            return
        with suppress(ProcessLookupError):
            os.kill(self._worker, signal.SIGKILL)
        while self._process.poll() is None:
            if (self._next_message() or {"event": "none"})["event"] == "ended":
                self._worker = None
                return

    def _next_message(self) -> dict[str, Any] | None:
        """Return the next message, None when none comes in the time between two looks."""
        with suppress(queue.Empty):
            return json.loads(self._lines.get(timeout=_LOOK_EVERY))  # type: ignore[no-any-return]
        if self._process.poll() is not None and self._nothing_left_to_read():
            return {"event": "ended", "code": self._process.wait()}
        return None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def _nothing_left_to_read(self) -> bool:
        # Not a plain join: a process forked by the workload may hold the pipe open.
        self._reader.join(timeout=1.0)
        return self._lines.empty()

    def _write(self, content: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(content)
            self._process.stdin.flush()

    def _died(self, code: int) -> dict[str, Any]:
        self._worker = None
        return {"event": "died", "reason": f"the process died: {_death(code)}{self._last_words()}"}

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""


def _death(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, most likely out of memory" if name == "SIGKILL" else name


class _Pickler(pickle.Pickler):
    """Notes whether anything pickled by name lives in ``__main__``."""

    needs_main = False

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | types.FunctionType) and thing.__module__ == "__main__":
            self.needs_main = True
        return NotImplemented


def _main_module() -> dict[str, str]:
    """Return how the child imports this program's script.

    Only a script that guards its work is imported: importing any other would run it again.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or not Path(file).is_file() or not _is_guarded(Path(file)):
        raise InvalidInputError(
            "workload defined in the running script or notebook",
            "it must be importable without running the rest",
            f"{_REMEDY}, or put the script's work under if __name__ == '__main__':",
        )
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return {"kind": "module", "name": spec.name}
    return {"kind": "path", "name": os.path.abspath(file)}


def _is_guarded(script: Path) -> bool:
    """Whether a script has ``if __name__ == "__main__":`` at its top level."""
    try:
        statements = ast.parse(script.read_bytes()).body
    except SyntaxError:
        return False
    tests = [ast.unparse(node.test) for node in statements if isinstance(node, ast.If)]
    return any("__name__" in test and "__main__" in test for test in tests)
