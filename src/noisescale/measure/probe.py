"""The child process of a scan: loads the workload once and runs real steps at given sizes.

It reads one header line, the pickled loader and then one JSON line per size from standard
input, and answers in JSON lines on what was standard output when it started. What the
workload itself prints goes to standard error.

Where the system can fork, the child imports torch and forks a worker that does everything
else. The worker may be killed at any time; everything it found out by then is with the
parent, and the next worker need not import torch again.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import platform
import queue
import runpy
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import move, take
from noisescale.measure.memory import ProcessPeak, peak_meter, release_free_memory, resident_bytes
from noisescale.measure.real_step import RealStep
from noisescale.measure.step_time import StepTime, enough, seconds_in_queue, summary
from noisescale.records import Recipe
from noisescale.workload import Workload, data_size

# Steps before the timed ones: the first makes the optimizer's state and whatever is compiled
# or tuned per size, the second runs with it. (assumed)
_WARM_UP = 2
# Steps on the worst-case batch once the optimizer's state exists: fragmentation settles in
# the first two or three. (assumed)
_WORST_CASE = 3


def main() -> None:
    """Serve one parent until it closes the pipe."""
    link = _Link()
    _volunteer_for_out_of_memory_killer()
    _import_what_steps_need()
    if sys.platform == "linux" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _fork_workers(link)
    _work(link)


def _fork_workers(link: _Link) -> None:
    """Return in a fresh worker, again and again; leave when the parent asks for no more."""
    while True:
        with warnings.catch_warnings():
            # Python warns of threads in the forking process: there are only idle ones here.
            warnings.simplefilter("ignore", DeprecationWarning)
            worker = os.fork()
        if worker == 0:
            return
        _, status = os.waitpid(worker, 0)
        try:
            link.send(event="ended", code=os.waitstatus_to_exitcode(status))
        except BrokenPipeError:
            os._exit(0)  # the parent is gone
        link.wait_for_next()


def _work(link: _Link) -> None:
    """Load the workload and run sizes until killed."""
    link.listen()
    link.send(event="started", process_id=os.getpid())
    try:
        bench = Bench.load(link.header, link.take_payload())
    except InvalidInputError as error:
        link.send(event="invalid", parts=[error.value, error.requirement, error.remedy])
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises is bad input
        link.send(event="invalid", parts=_as_bad_input(error))
    else:
        gc.freeze()  # so that the collection before every size need not look at all modules
        link.send(event="ready", **bench.describe())
        while True:
            link.send(**bench.try_size(**link.command()))
    # No orderly shutdown: it would wait for the thread that reads the pipe.
    os._exit(0)


class _Link:
    """The pipe to the parent, kept apart from what the workload prints and reads."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._in = os.fdopen(os.dup(0), "rb")
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self.header: dict[str, Any] = json.loads(self._in.readline())
        self._payload = self._in.read(self.header["payload_bytes"])
        self._commands: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen(self) -> None:
        """Read commands from now on, in a thread: that notices the parent's end at once."""
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_for_next(self) -> None:
        """Wait until the parent asks for another worker; exit if it does not."""
        for line in iter(self._in.readline, b""):
            # Any other command was meant for the worker that has ended.
            if "next" in json.loads(line):
                return
        os._exit(0)

    def take_payload(self) -> bytes:
        """Return the pickled loader and keep no copy: it may hold the data."""
        payload, self._payload = self._payload, b""
        return payload

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def command(self) -> dict[str, Any]:
        return self._commands.get()

    def _listen(self) -> None:
        for line in self._in:
            self._commands.put(json.loads(line))
        # The parent is gone or done. No clean-up: a step may be running in the main thread.
        os._exit(0)


@dataclass
class Bench:
    """A loaded workload on which steps are run.

    Attributes:
        workload: what the loader returned.
        step: its training step.
        device: where model and batches are.
        baseline_bytes: memory on the device before the first step.
        resident_bytes: resident memory of this process then.
        limit_bytes: memory on the device that may be used above the baseline.
    """

    workload: Workload
    step: RealStep
    device: torch.device
    baseline_bytes: int
    resident_bytes: int
    limit_bytes: int

    def __post_init__(self) -> None:
        self._meter = peak_meter(self.device)
        self._order = torch.randperm(self.workload.train_size)
        self._drawn = 0

    @classmethod
    def load(cls, header: dict[str, Any], payload: bytes) -> Bench:
        """Load a workload and note the memory that it takes before the first step."""
        if header["threads"] is not None:
            torch.set_num_threads(header["threads"])
        workload = _load_workload(header["main"], payload)
        torch.manual_seed(0)
        model = workload.model()
        if not isinstance(model, nn.Module):
            raise InvalidInputError(
                f"workload {workload.name!r}: model() returned {type(model).__name__}",
                "a torch.nn.Module is required",
                "return the model",
            )
        device = _device_of(model, header["device"])
        model.to(device)
        _load_program(workload.recipe, device)
        release_free_memory()
        meter = peak_meter(device)
        baseline = meter.now()
        limit = min(header["limit_bytes"] or sys.maxsize, meter.limit(header["margin"]))
        if device.type == "cuda":
            meter.enforce(limit)  # type: ignore[union-attr]
        step = RealStep(model, workload.loss, workload.recipe)
        for group in step.optimizer.param_groups:
            # The same work, but the weights hold still: a rate that is wrong for some size
            # can neither blow up nor change what is timed.
            group["lr"] = 0.0
        return cls(workload, step, device, baseline, ProcessPeak().now(), limit)

    def describe(self) -> dict[str, Any]:
        """Return what the parent needs to know of the workload and this process."""
        train, evaluate = self.workload.train, self.workload.evaluate
        tensors = isinstance(train, torch.Tensor | tuple | TensorDataset)
        return {
            "train_size": self.workload.train_size,
            "evaluate_size": 0 if evaluate is None else data_size(evaluate),
            "shapes_vary": not tensors,
            "watched": resident_bytes(os.getpid()) is not None,
            "worst_case": self.workload.worst_case_batch is not None,
            "unit": "examples" if self.workload.recipe.unit == "examples" else "sequences",
            "device": _device_name(self.device),
            "device_type": self.device.type,
            "baseline_bytes": self.baseline_bytes,
            "resident_bytes": self.resident_bytes,
            "limit_bytes": self.limit_bytes,
        }

    def try_size(self, *, size: int, slice_seconds: float, seconds_left: float) -> dict[str, Any]:
        """Run one size and return the message about it."""
        try:
            return {"event": "measured", **self._measure(size, slice_seconds, seconds_left)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            return {"event": "out of memory", "reason": _one_line(error)}
        except InvalidInputError as error:
            parts = [error.value, error.requirement, error.remedy]
            return {"event": "error", "reason": str(error), "parts": parts}
        except Exception as error:  # noqa: BLE001 - whatever the user's code raises is the result
            return {"event": "error", "reason": _one_line(error), "parts": None}

    def _measure(self, size: int, slice_seconds: float, seconds_left: float) -> dict[str, Any]:
        stop_at = time.perf_counter() + seconds_left
        release_free_memory()
        self._meter.reset()
        self.step.model.train()
        self._warm_up(size, slice_seconds)
        times = self._timed_steps(size, slice_seconds, stop_at)
        self._evaluate(size)
        peak = self._meter.peak() - self.baseline_bytes
        return {"peak_bytes": max(0, peak), **summary(times)}

    def _warm_up(self, size: int, slice_seconds: float) -> None:
        for _ in range(_WARM_UP):
            if self._timed_step(self._draw(size)).whole > slice_seconds:
                break
        if self.workload.worst_case_batch is not None:
            for _ in range(_WORST_CASE):
                self._timed_step(lambda: self.workload.worst_case_batch(size))  # type: ignore[misc]

    def _timed_steps(self, size: int, slice_seconds: float, stop_at: float) -> list[StepTime]:
        times: list[StepTime] = []
        began = time.perf_counter()
        while not enough(len(times), began, slice_seconds, stop_at):
            times.append(self._timed_step(self._draw(size)))
        return times

    def _timed_step(self, fetch: Callable[[], Any]) -> StepTime:
        queued = seconds_in_queue()
        began = time.perf_counter()
        batch = move(fetch(), self.device)
        fetched = time.perf_counter()
        self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ended = time.perf_counter()
        return StepTime(fetched - began, ended - fetched, seconds_in_queue() - queued)

    def _draw(self, size: int) -> Callable[[], Any]:
        """Return what fetches the next batch; its indices are drawn before the clock runs."""
        places = (self._drawn + torch.arange(size)) % len(self._order)
        self._drawn += size
        indices = self._order[places]
        return lambda: take(self.workload.train, indices, self.workload.collate)

    def _evaluate(self, size: int) -> None:
        data = self.workload.evaluate
        if data is None:
            return
        model = self.step.model.eval()
        batch = take(data, torch.arange(min(size, data_size(data))), self.workload.collate)
        with torch.no_grad():
            batch = move(batch, self.device)
            self.workload.loss(model, batch)
            if self.workload.metrics is not None:
                self.workload.metrics(model, batch)


def _load_workload(main_module: dict[str, str] | None, payload: bytes) -> Workload:
    if main_module is not None:
        _import_main(**main_module)
    source = pickle.loads(payload)
    if isinstance(source, tuple):
        name, arguments = source
        module, _, attribute = name.partition(":")
        source = getattr(importlib.import_module(module), attribute)(**arguments)
    elif not isinstance(source, Workload):
        source = source()
    if not isinstance(source, Workload):
        raise InvalidInputError(
            f"loader returned {type(source).__name__}",
            "a noisescale.Workload is required",
            "return the Workload",
        )
    return source


def _import_main(*, kind: str, name: str) -> None:
    """Import the parent's script under another name, as multiprocessing does."""
    run = runpy.run_path if kind == "path" else runpy.run_module
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(run(name, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def _import_what_steps_need() -> None:
    """Make an optimizer, since torch imports half of itself at the first one."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def _load_program(recipe: Recipe, device: torch.device) -> None:
    """Step a one-weight model, so that what torch loads at a first step is in the baseline."""
    tiny = nn.Linear(1, 1).to(device)
    step = RealStep(tiny, lambda model, batch: model(batch).mean(), recipe)
    step(torch.ones(2, 1, device=device))


def _device_of(model: nn.Module, wanted: str | None) -> torch.device:
    if wanted is not None:
        return torch.device(wanted)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine() or "CPU"


def _volunteer_for_out_of_memory_killer() -> None:
    """If memory runs out all the same, the kernel should take this process, not the parent."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _as_bad_input(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return [
        f"workload: {_one_line(error)}{where}",
        "it must load in a process of its own",
        "correct it, or pass a loader that can be imported",
    ]
