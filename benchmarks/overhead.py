"""What a NoiseMeter costs, as a ratio to the plain step, beside four other tools, in one run.

    python benchmarks/overhead.py [--problems mlp-128,cnn] [--methods exact,vmap] [--seconds 600]
    python benchmarks/overhead.py --memory     peak memory, every method in its own process
    python benchmarks/overhead.py --quick      smoke run: small batches, the figures mean nothing

A plain step is forward, loss and backward, with the gradients set to None before. In every
round each method takes one step, right beside a plain step of its own (which of the two goes
first is drawn, and so is the order of the methods); what counts is the ratio within the pair.
Short steps are paired once without timing before, so that both start with the same caches.
The table has the median ratio and its distribution-free 95 % interval. A problem ends when the
interval of every row of ours that has a bound is narrower than a third of (bound - 1), or when
--max-pairs or --seconds is reached: the interval reached stands beside the figure. `every-10`
times blocks of ten steps against ten plain ones; `idle` is a meter between two measured steps.
`adam` is closed by an Adam whose own step does nothing.

Error: sum over examples of |g_i|^2 against a float64 loop over single examples. Of the sketch,
which is random by design: its relative standard deviation over 30 steps on the same batch.

glibc hands large freed blocks back to the system, and the next step pays for their pages again:
most of the noise, and of some ratios, on the convolutional net. MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ (say 4000000000 both) keep them; what is set is printed and written down.

Bounds (at most), fixed before the first full run; a verdict is of the median, with `open` where
the interval holds the bound too. The peers need an environment of their own: `make overhead`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import overhead_memory
import torch
from overhead_bounds import (
    BEST,
    MEMORY,
    MEMORY_OF,
    OWN_BOUNDS,
    Row,
    Verdict,
    judge,
    show,
    summary,
)
from overhead_methods import METHODS, MeterStep, Method, PlainStep, UnavailableError
from overhead_models import PROBLEMS, SEED, Problem, true_sum_sq

# Pairs: of a peer, of one slower than SLOW, and the least of a row with a bound.
PEER_PAIRS, SLOW_PAIRS, LEAST_PAIRS = 60, 15, 20
SLOW = 5.0
# A plain step of less seconds is timed right after an untimed pair. (assumed)
SHORT = 0.1
SPREAD_STEPS = 30
# Of --quick: batches are smaller by this factor.
QUICK = 16


def seconds_of(step: PlainStep, device: str) -> float:
    """Time one call, gradients cleared before."""
    step.clear()
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step.run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def prepare(method: Method, problem: Problem, truth: float) -> tuple[Row, PlainStep | None]:
    """Build and warm up a method, and check its sum of squared norms."""
    row = Row(method.name, method.kind)
    try:
        step = method.make(problem)
        for _ in range(3 if step.steps == 1 else 2):
            step.clear()
            step.run()
        found = step.sum_sq()
    except UnavailableError as error:
        row.status = f"not available: {error}"
        return row, None
    except Exception as error:  # noqa: BLE001 - what a peer refuses is a result
        first = (str(error).splitlines() or [""])[0]
        verb = "refuses" if method.kind == "peer" else "FAILED"
        row.status = f"{verb}: {type(error).__name__}: {first[:160]}"
        return row, None
    row.note = step.note()
    if method.name == "sketch" and isinstance(step, MeterStep):
        row.spread = step.spread(SPREAD_STEPS)
    elif method.name != "adam" and found is not None:
        row.error = abs(found / truth - 1)
    step.clear()
    return row, step


class Run:
    """Pairs of steps, interleaved, until the intervals are narrow enough or time is up."""

    def __init__(self, problem: Problem, methods: Iterable[Method], limits: Any) -> None:
        self.problem, self.limits = problem, limits
        self.truth = true_sum_sq(problem)
        self.rows: list[Row] = []
        self.steps: dict[str, PlainStep] = {}
        for method in methods:
            row, step = prepare(method, problem, self.truth)
            self.rows.append(row)
            if step is not None:
                self.steps[method.name] = step
        counts = {step.steps for step in self.steps.values()}
        self.plain = {count: PlainStep(problem, steps=count) for count in counts}
        warm = [seconds_of(step, problem.device) / step.steps for step in self.plain.values()]
        self.short = min(warm, default=0.0) < SHORT

    def wanted(self, row: Row) -> bool:
        """Whether a row needs more pairs."""
        n = len(row.ratios)
        if n >= self.limits.max_pairs:
            return False
        if row.kind == "plain":
            return n < max(PEER_PAIRS, *(len(other.ratios) for other in self.rows))
        bound = OWN_BOUNDS.get(row.method, {}).get(self.problem.name)
        if bound is None:
            return n < (SLOW_PAIRS if n >= LEAST_PAIRS // 4 and row.median > SLOW else PEER_PAIRS)
        if row.method == "exact":
            bound = min(bound, BEST[self.problem.name])
        low, high = row.interval
        return n < LEAST_PAIRS or high - low >= (bound - 1) / 3

    def run(self) -> None:
        """Take rounds."""
        rng, began = random.Random(SEED), time.perf_counter()
        live = [row for row in self.rows if not row.status]
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            first = True
            while todo := [row for row in live if self.wanted(row)]:
                rng.shuffle(todo)
                for row in todo:
                    if not first and time.perf_counter() - began > self.limits.seconds:
                        return
                    self._pair(row, plain_first=rng.random() < 0.5)
                first = False
                gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()

    def _pair(self, row: Row, *, plain_first: bool) -> None:
        step, device = self.steps[row.method], self.problem.device
        plain = self.plain[step.steps]
        pair = (plain, step) if plain_first else (step, plain)
        if self.short and (row.kind != "peer" or row.median <= SLOW):
            # Both meet the caches that they leave to each other, not those of the last method.
            for member in pair:
                seconds_of(member, device)
        seconds = {id(member): seconds_of(member, device) for member in pair}
        row.ratios.append(seconds[id(step)] / seconds[id(plain)])
        row.plain_seconds.append(seconds[id(plain)] / step.steps)
        # What a peer has materialised is handed back before the next pair.
        step.clear()
        plain.clear()


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, the software and the run."""
    here = Path(__file__).parent
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True)
    cuda = arguments.device != "cpu"
    packages = ("noisescale", "torch", "backpack-for-pytorch", "opacus")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": commit.stdout.strip() or None,
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "quick": arguments.quick,
        "seconds": arguments.seconds,
        "max_pairs": arguments.max_pairs,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace a file by this JSON, wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(path)


def row_record(row: Row) -> dict[str, Any]:
    """Return a row as JSON, null where an end of the interval is infinite."""
    ends = [end if math.isfinite(end) else None for end in row.interval]
    return asdict(row) | {"median": row.median if row.ratios else None, "interval": ends}


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON, null for a value that does not exist."""
    value = verdict.value if math.isfinite(verdict.value) else None
    return asdict(verdict) | {"value": value}


def time_all(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Time every problem, print its table, write what there is after each."""
    verdicts: list[Verdict] = []
    for problem in arguments.problems:
        run = Run(problem, [METHODS[name] for name in arguments.methods], arguments)
        run.run()
        judged = judge(problem.name, run.rows)
        verdicts += judged
        show(problem, run.rows, judged)
        found["problems"][problem.name] = {
            "batch_size": problem.batch_size,
            "sum_sq": run.truth,
            "rows": [row_record(row) for row in run.rows],
            "verdicts": [verdict_record(verdict) for verdict in judged],
        }
        write(arguments.out, found)
    summary(verdicts, [problem.name for problem in arguments.problems])


def weigh_all(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Measure the memory of every problem and method."""
    passed = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    for problem in arguments.problems:
        found["problems"][problem.name] = overhead_memory.table(
            problem,
            script=Path(__file__).resolve(),
            methods=arguments.methods,
            arguments=passed,
            bound=MEMORY,
            bounded=MEMORY_OF.get(problem.name, ()),
        )
        write(arguments.out, found)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="names, commas between")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, commas between")
    parser.add_argument("--seconds", type=float, default=600.0, help="of pairs, per problem")
    parser.add_argument("--max-pairs", type=int, default=2000)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small batches, two pairs")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/out/overhead[_memory].json")
    arguments = parser.parse_args()
    for option, known in (("problems", PROBLEMS), ("methods", METHODS)):
        names = getattr(arguments, option).split(",")
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option} {unknown[0]}: choose from {', '.join(known)}")
        setattr(arguments, option, names)
    arguments.problems = [_sized(name, arguments) for name in arguments.problems]
    if arguments.quick:
        arguments.seconds, arguments.max_pairs = 2.0, 2
    if arguments.out is None:
        name = "overhead_memory" if arguments.memory else "overhead"
        arguments.out = Path(f"benchmarks/out/{name}.json")
    return arguments


def _sized(name: str, arguments: argparse.Namespace) -> Problem:
    problem = replace(PROBLEMS[name], device=arguments.device)
    size = max(4, problem.batch_size // QUICK) if arguments.quick else problem.batch_size
    return replace(problem, batch_size=size)


def main() -> None:
    """Measure, print, write JSON."""
    arguments = parsed()
    warnings.simplefilter("ignore")
    # The default of convolutions on CUDA has 10 bits of mantissa; the error column is for float32.
    torch.backends.cudnn.allow_tf32 = False
    if arguments.memory_of:
        name, method, figure = arguments.memory_of
        problem = _sized(name, arguments)
        print(json.dumps(overhead_memory.answer(METHODS[method], problem, figure)))
        return
    found = header(arguments) | {"problems": {}}
    print(
        f"{found['cpu']}, {found['cores']} cores, device {found['device']},"
        f" {found['threads']} threads, torch {torch.__version__}, commit {found['commit']}"
    )
    if found["malloc"]:
        print(f"malloc: {found['malloc']}")
    if arguments.quick:
        print("quick: small batches, two pairs; the figures and verdicts mean nothing")
    began = time.perf_counter()
    (weigh_all if arguments.memory else time_all)(arguments, found)
    print(f"{time.perf_counter() - began:.0f} s; {arguments.out}")


if __name__ == "__main__":
    main()
