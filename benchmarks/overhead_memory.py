"""Peak memory of one whole step, of one method in a process of its own.

Two figures, both beyond what the training holds between plain steps (parameters, buffers,
optimizer state, batch), so that buffers which a method keeps count as its own:

  tensors   bytes that torch's allocator has out at the step's peak: exact and repeatable on the
            CPU, from the profiler's record of every allocation since before the model was made;
            on CUDA from torch.cuda.max_memory_allocated. The bounds are judged on this one.
  resident  CPU only: growth of the process from before the step to its high-water mark (VmHWM,
            reset through /proc/self/clear_refs), least of five steps, with malloc told to hand
            everything over 64 KiB back at once. It sees the scratch space of the kernels' own
            libraries too, but not what a method holds on to between steps, and it is rough below
            a few MiB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from overhead_methods import Method, PlainStep, UnavailableError
from overhead_models import Problem
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP = 3
RSS_STEPS = 5
_MARK = "the measured step"
_PROMPT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _ready(method: Method, problem: Problem) -> PlainStep:
    step = method.make(problem)
    for _ in range(WARM_UP):
        step.clear()
        step.run()
    step.clear()
    gc.collect()
    return step


def peak_of(events: Iterable[Any]) -> int:
    """Most bytes out at any time from the marked step on, of the profiler's raw events."""
    ordered = sorted(events, key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in ordered if event.name() == _MARK)
    live = peak = 0
    for event in ordered:
        if event.name() == "[memory]":
            live += event.nbytes()
        if event.start_ns() >= began:
            peak = max(peak, live)
    return peak


def cpu_peak(method: Method, problem: Problem) -> int:
    """Bytes of tensors at the step's peak beyond the model, the batch and the optimizer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step = _ready(method, problem)
        with record_function(_MARK):
            step.run()
    assert record.profiler is not None
    # Not in the public interface: what the profiler's own memory timeline is made from.
    peak = peak_of(record.profiler.kineto_results.events())
    return peak - step.resident() - _bytes(step.x) - _bytes(step.y)


def cuda_peak(method: Method, problem: Problem) -> int:
    """The same from the caching allocator's counters."""
    before = torch.cuda.memory_allocated()
    step = _ready(method, problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    held = step.resident() + _bytes(step.x) + _bytes(step.y)
    return torch.cuda.max_memory_allocated() - before - held


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def rss_growth(method: Method, problem: Problem) -> int:
    """Bytes of resident memory that a step adds at its peak, least of several steps."""
    step = _ready(method, problem)
    trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    found = []
    for _ in range(RSS_STEPS):
        step.clear()
        gc.collect()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step.run()
        found.append(_status("VmHWM") - before)
    return min(found)


def answer(method: Method, problem: Problem, figure: str) -> dict[str, Any]:
    """Measure one figure in this process; the child's side of :func:`measure`."""
    warnings.simplefilter("ignore")
    peak = cuda_peak if problem.device != "cpu" else cpu_peak
    figures = {"tensors": peak, "resident": rss_growth}
    try:
        return {"bytes": figures[figure](method, problem)}
    except UnavailableError as error:
        return {"status": f"not available: {error}"}
    except Exception as error:  # noqa: BLE001 - what a peer refuses is a result
        first = (str(error).splitlines() or [""])[0]
        return {"status": f"refuses: {type(error).__name__}: {first[:160]}"}


def measure(script: Path, problem: Problem, method: str, arguments: list[str]) -> dict[str, Any]:
    """Measure both figures, each in a fresh process; None or a status where there is none."""
    row: dict[str, Any] = {"method": method, "tensors": None, "resident": None, "status": ""}
    for figure in ("tensors", "resident") if problem.device == "cpu" else ("tensors",):
        command = [sys.executable, str(script), *arguments]
        child = subprocess.run(
            [*command, "--memory-of", problem.name, method, figure],
            env=os.environ | (_PROMPT_MALLOC if figure == "resident" else {}),
            capture_output=True,
            text=True,
        )
        if child.returncode:
            return row | {"status": f"failed: {child.stderr.strip().splitlines()[-1:]}"}
        found = json.loads(child.stdout.strip().splitlines()[-1])
        row[figure] = found.get("bytes")
        row["status"] = found.get("status", "")
        if row["status"]:
            break
    return row


def table(
    problem: Problem,
    *,
    script: Path,
    methods: Sequence[str],
    arguments: list[str],
    bound: float,
    bounded: Sequence[str],
) -> list[dict[str, Any]]:
    """Measure every method on a problem, print the rows, return them."""
    print(f"\n{problem.name}, B {problem.batch_size}: peak of one step, MiB (ratio to plain)")
    rows: list[dict[str, Any]] = []
    for method in ("plain", *(name for name in methods if name != "plain")):
        row = measure(script, problem, method, arguments)
        rows.append(row)
        for figure in ("tensors", "resident"):
            size, base = row[figure], rows[0][figure]
            row[f"{figure}_ratio"] = size / base if size is not None and base else None
        ratio = row["tensors_ratio"]
        judged = method in bounded and not row["status"].startswith("not available")
        row["met"] = (ratio is not None and ratio <= bound) if judged else None
        print(f"  {method:13}{_cells(row)}{_verdict(row['met'], bound)}", flush=True)
    return rows


def _cells(row: dict[str, Any]) -> str:
    if row["status"]:
        return f" {row['status']}"
    return "".join(
        f"  {figure} {row[figure] / 2**20:8.1f} ({row[f'{figure}_ratio']:.2f})"
        for figure in ("tensors", "resident")
        if row[figure] is not None
    )


def _verdict(met: bool | None, bound: float) -> str:
    if met is None:
        return ""
    return f"  at most {bound:g}: {'met' if met else 'MISSED'}"
