"""Coverage of the intervals of ``fit_tradeoff`` on synthetic steps-to-target curves.

True curves S = Smin (1 + Bcrit/B) with lognormal noise; the share of repeats whose interval
holds the truth, for Smin, Emin and Bcrit, judged unconditionally: an open interval that holds
the truth counts, "too few" never does. The goal is 92 to 98 %.

    python benchmarks/coverage_tradeoff.py [--repeats 1000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from noisescale import Tradeoff, fit_tradeoff
from noisescale.records import Interval

STEPS_MIN, CRITICAL = 300.0, 100.0
GOAL = (0.92, 0.98)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One design: which sizes are run, how often, how noisy, and with which step budget."""

    design: str
    sizes: int
    low: float
    high: float
    repeats: int
    noise: float
    budget: float | None = None

    def batch_sizes(self) -> np.ndarray:
        """Return the batch size of every run."""
        sizes = np.round(np.geomspace(self.low, self.high, self.sizes))
        return np.repeat(sizes, self.repeats)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured in one cell."""

    cell: Cell
    coverage: dict[str, float]
    determined: float
    too_few: float
    censored_rows: float
    median_bias: float
    milliseconds: float

    def met(self, name: str) -> bool:
        """Whether the coverage of Smin, Emin or Bcrit lies in the goal."""
        return GOAL[0] <= self.coverage[name] <= GOAL[1]


def cells() -> Iterator[Cell]:
    for noise in (0.05, 0.15):
        for sizes in (6, 12):
            for repeats in (1, 3):
                yield Cell(
                    design="brackets",
                    sizes=sizes,
                    low=4,
                    high=2048,
                    repeats=repeats,
                    noise=noise,
                )
        for low, high in ((4, 128), (64, 2048)):
            yield Cell(design="one side", sizes=6, low=low, high=high, repeats=3, noise=noise)
        # Too narrow to bracket: many intervals stay open at the end that the data do not show.
        for low, high in ((1, 16), (800, 12_800)):
            yield Cell(design="open", sizes=6, low=low, high=high, repeats=1, noise=noise)
        # The true curve needs 7,800 steps at B = 4 and 2,700 at 12.5: the budget cuts there.
        for sizes, repeats in ((6, 1), (12, 1), (6, 3)):
            yield Cell(
                design="censored",
                sizes=sizes,
                low=4,
                high=2048,
                repeats=repeats,
                noise=noise,
                budget=2700,
            )


def measure(cell: Cell, repeats: int, seed: int) -> Result:
    generator = np.random.default_rng(seed)
    sizes = cell.batch_sizes()
    truth = {"Smin": STEPS_MIN, "Emin": STEPS_MIN * CRITICAL, "Bcrit": CRITICAL}
    held = dict.fromkeys(truth, 0)
    fits: list[Tradeoff] = []
    start = time.perf_counter()
    for _ in range(repeats):
        noise = np.exp(cell.noise * generator.standard_normal(len(sizes)))
        steps = STEPS_MIN * (1 + CRITICAL / sizes) * noise
        budget = np.inf if cell.budget is None else cell.budget
        fit = fit_tradeoff(
            batch_size=sizes, steps=np.minimum(steps, budget), censored=steps > budget
        )
        fits.append(fit)
        intervals = (fit.steps_min, fit.examples_min, fit.critical_batch)
        for name, interval in zip(truth, intervals, strict=True):
            held[name] += contains(interval, truth[name])
    seconds = time.perf_counter() - start
    points = [fit.critical_batch.point for fit in fits if fit.critical_batch.point is not None]
    return Result(
        cell=cell,
        coverage={name: count / repeats for name, count in held.items()},
        determined=len(points) / repeats,
        too_few=sum(fit.steps_min.low is None for fit in fits) / repeats,
        censored_rows=float(np.mean([fit.fit.censored for fit in fits])),
        median_bias=float(np.median(points)) / CRITICAL - 1 if points else float("nan"),
        milliseconds=1000 * seconds / repeats,
    )


def contains(interval: Interval, value: float) -> bool:
    if interval.low is None:
        return False
    return interval.low <= value and (interval.high is None or value <= interval.high)


def line(result: Result) -> str:
    cell = result.cell
    marks = "  ".join(
        f"{100 * share:5.1f} {'met   ' if result.met(name) else 'MISSED'}"
        for name, share in result.coverage.items()
    )
    design = f"{cell.design:<9} {cell.low:>3g}..{cell.high:<5g} {cell.sizes:>2} x {cell.repeats}"
    return (
        f"{design}  {100 * cell.noise:>3.0f} %  {marks}  {100 * result.determined:>5.1f}"
        f"  {result.censored_rows:>5.1f}  {100 * result.median_bias:>+5.1f}"
        f"  {result.milliseconds:>5.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/coverage_tradeoff.json"))
    arguments = parser.parse_args()
    print(f"true Smin {STEPS_MIN:g}, Bcrit {CRITICAL:g}; {arguments.repeats} repeats per cell")
    print(
        "design    sizes    n x reps  noise  Smin %        Emin %        Bcrit %       "
        "determ. %  late  bias %  ms"
    )
    results = []
    for seed, cell in enumerate(cells()):
        results.append(measure(cell, arguments.repeats, seed))
        print(line(results[-1]), flush=True)
    checks = [result.met(name) for result in results for name in result.coverage]
    print(f"{sum(checks)} of {len(checks)} intervals cover 92 to 98 %")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(result) | {"met": {name: result.met(name) for name in result.coverage}}
        for result in results
    ]
    arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
