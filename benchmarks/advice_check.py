"""The advice against training: does its wider band hold the tuned steps to target?

    python benchmarks/advice_check.py [--out benchmarks/out/advice_check.json]

For `digits` and `digits-cnn`, each with SGD and with momentum 0.9, goal validation_error<0.05:
`noisescale advise` gives a table; then training is tuned at five batch sizes around its
recommendation (tuned_steps.py), and every point is held against the table.

Fixed before the first full run:
  sizes    recommendation x (1/8, 1/sqrt 8, 1, sqrt 8, 8), rounded, kept within 1 and the
           training set; where clipping makes two equal, steps of sqrt 8 continue inwards
  measured S(B) / Smin, with Smin from the steps law fitted to the five tuned points
  inside   S(B)/Smin between 1 + low/B and 1 + high/B, low and high the wider band of the
           critical batch, each end widened by the tuned point's own standard error (x 2)
  bound    at least 90 % of the 20 points inside; band at most a factor 5 wide
  figure   rms of log(measured / table's point)
The optimizer factors behind the band come from other workloads (optimizer_factor.py).
Also shown: Bcrit of the tuned points against the advised band.

Changes after the first full run: the advice itself pools up to four runs (its band was 5.5 wide).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tuned_steps import tune, write_json

from noisescale import advise
from noisescale.records import Advice
from noisescale.theory.tradeoff import fit_tradeoff

OUT = Path(__file__).parent / "out"
GOAL = 0.05
TRAIN_SIZE = 1437
CASES = {
    ("digits", "sgd"): {},
    ("digits", "momentum"): {"momentum": 0.9, "lr": 0.05},
    ("digits-cnn", "sgd"): {"momentum": 0.0, "lr": 0.5},
    ("digits-cnn", "momentum"): {},
}
STEP = math.sqrt(8)
BOUND = 0.9
WIDEST = 5.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One tuned batch size against the table.

    Attributes:
        batch_size: global batch size, examples.
        steps: tuned steps to the goal.
        log_se: standard error of ln(steps).
        measured: steps over the fitted Smin.
        table: the table's S/Smin at the point estimate.
        low: at the lower end of the wider band.
        high: at its upper end.
        inside: whether the measured ratio lies in the band, two standard errors allowed.
        strictly: the same without allowing for the tuned point's own error.
    """

    batch_size: int
    steps: float
    log_se: float
    measured: float
    table: float
    low: float
    high: float
    inside: bool
    strictly: bool


def sizes_around(recommended: int) -> list[int]:
    """Return five distinct batch sizes around a recommendation."""
    exponents = list(range(-2, 3))
    while True:
        raw = {e: round(recommended * STEP**e) for e in exponents}
        if raw[exponents[-1]] > TRAIN_SIZE:
            exponents = [e - 1 for e in exponents]
        elif len({max(1, size) for size in raw.values()}) < len(exponents):
            exponents = [e + 1 for e in exponents]
        else:
            return [max(1, raw[e]) for e in exponents]


def held_against(advice: Advice, tuned: list[tuple[int, float, float]]) -> tuple[list[Point], dict]:
    """Compare tuned (batch size, steps, log_se) with the advised band."""
    critical = advice.limits.critical_batch
    assert critical.point is not None
    assert critical.low is not None
    assert critical.high is not None
    fit = fit_tradeoff(batch_size=[b for b, _, _ in tuned], steps=[s for _, s, _ in tuned])
    smin = fit.steps_min.point
    if smin is None:  # the sizes do not reach the plateau: scale by the advised curve instead
        logs = [math.log(s / (1 + critical.point / b)) for b, s, _ in tuned]
        smin = math.exp(sum(logs) / len(logs))
    points = []
    for size, steps, log_se in tuned:
        measured, slack = steps / smin, math.exp(2 * log_se)
        low, high = 1 + critical.low / size, 1 + critical.high / size
        points.append(
            Point(
                batch_size=size,
                steps=steps,
                log_se=log_se,
                measured=measured,
                table=1 + critical.point / size,
                low=low,
                high=high,
                inside=low / slack <= measured <= high * slack,
                strictly=low <= measured <= high,
            )
        )
    return points, fit.to_dict()


def case(workload: str, optimizer: str, overrides: dict[str, float], seconds: float) -> dict:
    """Advise, tune, compare; return everything."""
    advice = advise(workload, overrides=overrides)
    critical = advice.limits.critical_batch
    assert advice.recommended is not None, advice.reasons
    recommended = advice.recommended.global_batch_size
    tuned = tune(
        workload,
        optimizer=optimizer,
        batch_sizes=sizes_around(recommended),
        goals=(GOAL,),
        seconds_each=seconds,
        out=OUT / f"tuned-advice-{workload}-{optimizer}.json",
    )
    reached = [(p.batch_size, p.steps, p.log_se or 0.0) for p in tuned if p.steps]
    points, fit = held_against(advice, reached)
    print(
        f"\n{workload}, {optimizer}: recommended {recommended}, lr {advice.rate_check.measured_lr}"
    )
    print(
        f"critical batch {critical.point:.1f}, sampling {critical.sampling_low:.1f} to"
        f" {critical.sampling_high:.1f}, wider {critical.low:.1f} to {critical.high:.1f}"
        f" (factor {critical.high / critical.low:.2f});"
        f" tuned Bcrit {fit['critical_batch']}"
    )
    for p in points:
        verdict = "inside" if p.inside else "OUTSIDE"
        print(
            f"  B {p.batch_size:5d}  {p.steps:8.1f} steps +- {100 * p.log_se:.0f} %"
            f"  S/Smin {p.measured:7.2f}  table {p.table:7.2f} ({p.low:.2f} to {p.high:.2f})"
            f"  {verdict}{'' if p.strictly == p.inside else ' (within 2 s.e.)'}"
        )
    return {
        "workload": workload,
        "optimizer": optimizer,
        "recommended": recommended,
        "critical": critical.to_dict(),
        "fit": fit,
        "points": [asdict(p) for p in points],
    }


def summary(results: list[dict]) -> None:
    """Print the figures that the bound is about."""
    points = [p for r in results for p in r["points"]]
    inside = sum(p["inside"] for p in points)
    strictly = sum(p["strictly"] for p in points)
    rms = math.sqrt(sum(math.log(p["measured"] / p["table"]) ** 2 for p in points) / len(points))
    width = max(r["critical"]["high"] / r["critical"]["low"] for r in results)
    print(
        f"\n{inside} of {len(points)} points inside ({strictly} without allowing for their own"
        f" error): {'met' if inside >= BOUND * len(points) else 'MISSED'}"
    )
    print(f"widest band a factor {width:.2f}: {'met' if width <= WIDEST else 'MISSED'}")
    print(f"rms log error of the table's point {rms:.3f}")


def main() -> None:
    """Run the four cases and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT / "advice_check.json")
    parser.add_argument("--seconds-each", type=float, default=90.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    results = []
    for (workload, optimizer), overrides in CASES.items():
        results.append(case(workload, optimizer, overrides, arguments.seconds_each))
        write_json(arguments.out, results)
    summary(results)
    print(f"{time.perf_counter() - began:.0f} s; {json.dumps(str(arguments.out))}")


if __name__ == "__main__":
    main()
