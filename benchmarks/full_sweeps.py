"""The gold standard on two workloads: every batch size, every rate, every seed, several goals.

    python benchmarks/full_sweeps.py [digits] [mnist] [--optimizer sgd|momentum] [--data DIR]

`digits`: 12 batch sizes from 1 to all 1,437 examples x 12 rates x 8 seeds; `mnist` (784-100-10): 12
batch sizes from 2 to 4,096 x 11 rates x 3 seeds; grids are widened where a best lies on an edge.
`digits-cnn` and `shakespeare` (AdamW) have no bound: calibrate_check.py is judged on them.
Trials are kept in benchmarks/out/sweeps/NAME-OPTIMIZER: a killed run goes on, and a second one
only reads. Printed: steps to the hardest goal by batch size, and for every goal, by first passage
and by sustained crossing, the slope at small batch sizes, the plateau and the critical batch, each
with its 95 % interval; the wall time against the bound of 2 minutes (12 for mnist; SGD, two cores).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from validated_in_part import validated_in_part

from noisescale.records import Interval, SweepCurve, SweepResult
from noisescale.run.sweep.driver import sweep
from noisescale.run.sweep.progress import SweepProgress

OUT = Path(__file__).parent / "out" / "sweeps"
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "adamw": {},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload.

    Attributes:
        goals: validation errors, the hardest first.
        batch_sizes: as the command line takes them.
        rates: settings of the first grid.
        seeds: runs of each.
        minutes: bound on the wall time; None where there is none.
        targets: what the goals are values of.
        max_examples: budget of a trial; None takes the sweep's own.
        lr: where the search starts, by optimizer, at the recipe's batch size.
    """

    goals: tuple[float, ...]
    batch_sizes: str
    rates: int
    seeds: int
    minutes: float | None
    lr: dict[str, float]
    targets: str = "validation_error"
    max_examples: int | None = None


CASES = {
    "digits": Case(
        goals=(0.05, 0.04, 0.06, 0.07, 0.08, 0.1, 0.15),
        batch_sizes="1:1024,full",
        rates=12,
        seeds=8,
        minutes=2,
        lr={"sgd": 0.5, "momentum": 0.05},
    ),
    "mnist": Case(
        goals=(0.05, 0.06, 0.07, 0.08, 0.1, 0.15),
        batch_sizes="2:4096",
        rates=11,
        seeds=3,
        minutes=12,
        lr={"sgd": 0.2, "momentum": 0.02},
    ),
    "digits-cnn": Case(
        goals=(0.05, 0.1),
        batch_sizes="2:1024",
        rates=8,
        seeds=4,
        minutes=None,
        lr={"sgd": 0.2, "momentum": 0.03},
    ),
    "shakespeare": Case(
        goals=(2.5,),
        batch_sizes="4:128",
        rates=4,
        seeds=2,
        minutes=None,
        lr={"adamw": 0.003},
        targets="validation_loss",
        max_examples=40_000,
    ),
}


def run(name: str, optimizer: str, data: Path | None) -> SweepResult:
    """Sweep, or go on with it."""
    case, last = CASES[name], [time.monotonic()]

    def tell(news: SweepProgress) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"  {news.share:4.0%} {news.trials} trials, {news.seconds:.0f} s", flush=True)

    return sweep(
        validated_in_part(name, data, {"lr": case.lr[optimizer], **OPTIMIZERS[optimizer]}),
        targets=[f"{case.targets}<{goal:g}" for goal in case.goals],
        batch_sizes=case.batch_sizes,
        trials=case.rates,
        seeds=case.seeds,
        full=case.minutes is not None,
        max_examples=case.max_examples,
        store=OUT / f"{name}-{optimizer}",
        on_progress=tell,
    )


def shown(interval: Interval | None) -> str:
    """Write a value and its interval."""
    if interval is None or interval.point is None:
        return "-"
    ends = [f"{end:.3g}" if end is not None else "open" for end in (interval.low, interval.high)]
    return f"{interval.point:.3g} ({ends[0]} to {ends[1]})"


def show(result: SweepResult) -> None:
    """Print the steps and what every goal says."""
    for row in result.batch_sizes:
        steps = shown(Interval(point=row.steps, low=row.low, high=row.high))
        rate = row.best.get("lr")
        print(f"  B {row.batch_size:5d}: {steps:32} lr {rate or float('nan'):.3g} {row.outcome}")
    print(f"  {'goal':24}{'crossing':11}{'slope':26}{'plateau':26}{'Bcrit':26}rms")
    for curve in result.curves:
        print("  " + line(curve))


def line(curve: SweepCurve) -> str:
    """Lay out one goal."""
    regimes, law = curve.regimes, curve.tradeoff
    slope = shown(None if regimes is None else regimes.small_slope)
    plateau = shown(None if law is None else law.steps_min)
    critical = shown(None if law is None else law.critical_batch)
    rms = f"{law.fit.rms_log_error:.3f}" if law is not None else "-"
    return f"{curve.target:24}{curve.crossing:11}{slope:26}{plateau:26}{critical:26}{rms}"


def main() -> None:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=["digits", "mnist"], metavar="|".join(CASES))
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    for name in arguments.names:
        case, before = CASES[name], (OUT / f"{name}-{arguments.optimizer}").exists()
        if arguments.optimizer not in case.lr:
            parser.error(f"{name}: --optimizer {' or '.join(case.lr)} is required")
        print(f"{name}, {arguments.optimizer}")
        result = run(name, arguments.optimizer, arguments.data)
        show(result)
        minutes = result.seconds / 60
        said = "no bound" if case.minutes is None else "continued, no verdict"
        if case.minutes is not None and not before:
            verdict = "met" if minutes <= case.minutes else "MISSED"
            said = f"at most {case.minutes:g}: {verdict}"
        print(f"  {result.trials} trials {dict(result.outcomes)}, {minutes:.2f} minutes ({said})")
        path = OUT / f"{name}-{arguments.optimizer}.json"
        path.write_text(json.dumps(result.to_dict(), indent=1))


if __name__ == "__main__":
    main()
