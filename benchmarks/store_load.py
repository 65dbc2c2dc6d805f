"""How long a store of many trials takes to open and to summarise, and in how much memory.

    python benchmarks/store_load.py [--trials 100000] [--out benchmarks/out/store_load.json]

Bounds, for 100,000 trials of two targets each: opened and summarised in at most 5 s, less than 1 GB
at the process's peak. The store is written by one process and read by another, fresh one, whose
start and imports count in the memory and not in the seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from noisescale.records import Crossing, Recipe, TrialOutcome, TrialPlan, TrialResult
from noisescale.run.store import TrialStore

SECONDS = 5.0
PEAK_BYTES = 1e9
TARGETS = ("validation_error<0.05", "validation_loss<0.2")
CHUNK = 1000


def made_up(number: int, draws: np.random.Generator) -> TrialResult:
    """One result with the spread of a real sweep: 12 batch sizes, seeds, two goals."""
    plan = TrialPlan(
        workload="made-up 0123456789abcdef",
        recipe=Recipe(lr=float(draws.lognormal()), batch_size=2 ** (number % 12), momentum=0.9),
        seed=number,
        order_seed=number,
        targets=TARGETS,
        max_steps=100_000,
    )
    first = float(draws.uniform(10, 1e5)) if draws.random() < 0.7 else None
    crossings = tuple(
        Crossing(target=target, first=first, sustained=first, closest=float(draws.random()))
        for target in TARGETS
    )
    outcome = TrialOutcome.NOT_REACHED if first is None else TrialOutcome.REACHED
    return TrialResult(
        plan=plan,
        outcome=outcome,
        steps=number,
        crossings=crossings,
        stopped_by="budget" if first is None else "targets",
        seconds=float(draws.random()),
    )


def write(folder: Path, trials: int) -> float:
    """Fill a store; seconds per trial."""
    draws = np.random.default_rng(0)
    store = TrialStore.open(folder, workload="made-up 0123456789abcdef")
    began = time.perf_counter()
    with store.lock():
        for start in range(0, trials, CHUNK):
            numbers = range(start, min(start + CHUNK, trials))
            store.append(*(made_up(number, draws) for number in numbers))
    return (time.perf_counter() - began) / trials


def read(folder: Path) -> dict[str, float]:
    """Open and summarise; meant for a fresh process."""
    began, processor = time.perf_counter(), time.process_time()
    store = TrialStore.open(folder)
    opened = time.perf_counter()
    rows = store.summary()
    ended = time.perf_counter()
    processor = time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in store.items():
        pass
    return {
        "records_seconds": time.perf_counter() - ended,
        "trials": len(store),
        "groups": len(rows),
        "open_seconds": opened - began,
        "summary_seconds": ended - opened,
        "processor_seconds": processor,
        "peak_bytes": peak,
    }


def verdict(met: bool) -> str:
    """Spell whether a bound is met."""
    return "MET" if met else "MISSED"


def main() -> None:
    """Write, read in a fresh process, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/store_load.json"))
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(read(arguments.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        per_trial = write(Path(folder), arguments.trials)
        size = (Path(folder) / "trials.jsonl").stat().st_size
        command = [sys.executable, __file__, "--read", folder]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {**json.loads(answer), "append_seconds_per_trial": per_trial, "file_bytes": size}
    seconds = found["open_seconds"] + found["summary_seconds"]
    print(
        f"{found['trials']} trials ({size / 1e6:.0f} MB): opened in {found['open_seconds']:.2f} s,"
        f" summarised in {found['summary_seconds']:.2f} s: {verdict(seconds <= SECONDS)}"
        f" ({found['processor_seconds']:.2f} s of processor time);"
        f" peak {found['peak_bytes'] / 1e9:.2f} GB: {verdict(found['peak_bytes'] < PEAK_BYTES)};"
        f" as records in {found['records_seconds']:.2f} s;"
        f" written in {1e6 * per_trial:.0f} us per trial"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
