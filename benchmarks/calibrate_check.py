"""`advise --calibrate` against full sweeps: does a tuned pair of batch sizes tell the whole curve?

    python benchmarks/full_sweeps.py digits mnist            (and the other optimizers: the truth)
    python benchmarks/calibrate_check.py [CASE ...] [--data DIR]

For every goal of a case `noisescale advise --calibrate` runs with seeds of its own and twelve
seconds of measuring. Its predicted steps stand against the tuned ones of the full sweep
(full_sweeps.py, which must have run) at every batch size of both: the root mean square of
log(predicted / tuned), and the share of tuned steps inside the band. The bound is on the median
over the goals of a case: 0.13 for digits and mnist; 0.2 for digits-cnn and shakespeare, which were
looked at only once everything was frozen. Printed too: batch sizes tuned, trials, seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from full_sweeps import CASES, OPTIMIZERS, OUT
from validated_in_part import validated_in_part

from noisescale.errors import InvalidInputError
from noisescale.records import Advice, TunedSteps, TuningOutcome
from noisescale.run.advise import advise
from noisescale.run.sweep.summary import summarise_store

BOUNDS = {
    "digits-sgd": 0.13,
    "digits-momentum": 0.13,
    "mnist-sgd": 0.13,
    "mnist-momentum": 0.13,
    "digits-cnn-sgd": 0.2,
    "digits-cnn-momentum": 0.2,
    "shakespeare-adamw": 0.2,
}
SECONDS = 12.0
SEED = 1000


def truth(case: str) -> dict[str, dict[int, TunedSteps]]:
    """Tuned steps by goal and batch size, first passage."""
    result = summarise_store(OUT / case)
    return {
        curve.target: {row.batch_size: row for row in curve.batch_sizes}
        for curve in result.curves
        if curve.crossing == "first"
    }


def calibrated(case: str, target: str, data: Path | None) -> Advice:
    """Run the advice."""
    name, _, optimizer = case.rpartition("-")
    overrides = {"lr": CASES[name].lr[optimizer], **OPTIMIZERS[optimizer]}
    return advise(
        validated_in_part(name, data, overrides),
        seconds=SECONDS,
        calibrate=True,
        target=target,
        seed=SEED,
    )


def compared(advice: Advice, rows: dict[int, TunedSteps]) -> dict[str, Any]:
    """Judge one goal."""
    found = advice.calibration
    if found is None or found.predicted is None:
        return {"rms": math.inf, "reason": found.detail if found else "; ".join(advice.reasons)}
    errors, inside = {}, 0
    for row in found.predicted.curve:
        true = rows.get(int(row.batch_size))
        if true is None or true.steps is None or true.outcome is TuningOutcome.NOT_REACHED:
            continue
        errors[int(row.batch_size)] = math.log(row.steps / true.steps)
        inside += row.low <= true.steps <= row.high
    return {
        "rms": math.sqrt(statistics.fmean(e * e for e in errors.values())),
        "inside": inside,
        "sizes": len(errors),
        "errors": errors,
        "tuned": [row.batch_size for row in found.tuned],
        "trials": found.trials,
        "seconds": found.seconds,
        "prior": found.prior.point,
        "critical_batch": found.predicted.critical_batch.to_dict(),
    }


def judge(case: str, data: Path | None) -> dict[str, Any]:
    """Run every goal of a case, and print a line for each."""
    print(f"{case}", flush=True)
    goals = {}
    for target, rows in truth(case).items():
        try:
            goals[target] = found = compared(calibrated(case, target, data), rows)
        except InvalidInputError as problem:
            goals[target] = found = {"rms": math.inf, "reason": str(problem)}
        if "reason" in found:
            print(f"  {target:24} no prediction: {found['reason']}", flush=True)
            continue
        critical = found["critical_batch"]
        print(
            f"  {target:24} rms {found['rms']:.3f}, {found['inside']} of {found['sizes']} in the"
            f" band; tuned {found['tuned']}, {found['trials']} trials, {found['seconds']:.1f} s;"
            f" noise scale {found['prior']:.0f}, Bcrit {critical['point']:.0f}"
            f" ({critical['low']:.0f} to {critical['high']:.0f})",
            flush=True,
        )
    median = statistics.median(found["rms"] for found in goals.values())
    met = "met" if median <= BOUNDS[case] else "MISSED"
    print(f"  median rms {median:.3f} (at most {BOUNDS[case]}): {met}", flush=True)
    return {"median": median, "goals": goals}


def main() -> None:
    """Judge the cases whose full sweeps are there, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(BOUNDS))
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    results = {}
    for case in arguments.cases or BOUNDS:
        if not (OUT / case).exists():
            print(f"{case}: no full sweep in {OUT / case}; run full_sweeps.py first")
            continue
        results[case] = judge(case, arguments.data)
    every = [g for r in results.values() for g in r["goals"].values() if "sizes" in g]
    inside, sizes = sum(g["inside"] for g in every), sum(g["sizes"] for g in every)
    if sizes:
        print(f"in the 95 % band: {inside} of {sizes} tuned steps ({inside / sizes:.0%})")
    path = OUT / "calibrate_check.json"
    path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
