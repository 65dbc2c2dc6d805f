"""Coverage of a sweep's analysis on synthetic response surfaces with a known truth.

The whole pipeline: rates drawn or on a grid that lies anyhow about the best, several seeds, the
race that stops what is slow, divergence above a stability rate, a step budget; then tuned steps,
the steps law and the regimes with their intervals. Judged unconditionally: an open interval that
holds the truth counts, a missing one does not. The goal is 92 to 98 %.

A cell with many repeats is needed to tell 92 from 95 %: with n repeats the bounds are passed by
chance by about 1.4/sqrt(n) (two standard errors at 95 % over 0.43), so that is printed beside.

The estimators were tuned on these cells with seed 0. Any other seed draws noise that they have not
seen: a test of the tuning, though not of other surfaces.

    python benchmarks/coverage_sweep.py [--repeats 200] [--seed 1] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np

from noisescale.records import Interval
from noisescale.theory.sweep_curve import sweep_curve
from surfaces import Search, Surface, hyperbola, three_pieces, trials

GOAL = (0.92, 0.98)
STEPS_MIN, CRITICAL = 100.0, 64.0
PERFECT, USEFUL, PLATEAU = 16.0, 256.0, 100.0
SIZES = tuple(2**k for k in range(1, 13))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A surface, a search and the batch sizes."""

    name: str
    surface: Surface
    search: Search
    sizes: tuple[int, ...] = SIZES
    pieces: bool = False


def cells() -> Iterator[Cell]:
    """Yield the problems."""
    law = hyperbola(steps_min=STEPS_MIN, critical=CRITICAL)
    pieces = three_pieces(plateau=PLATEAU, perfect_end=PERFECT, useful_end=USEFUL)
    for kind, rates, factor in (("grid", 9, 1.6), ("scouts", 7, 1.6), ("draws", 16, 1.4)):
        for noise, seeds, steep in ((0.05, 3, 2.0), (0.1, 5, 1.0), (0.2, 8, 1.5)):
            yield Cell(
                name=f"{kind}, noise {noise}, {seeds} seeds, steepness {steep}",
                surface=Surface(law=law, noise=noise, steepness=steep),
                search=Search(kind=kind, rates=rates, factor=factor, seeds=seeds),
            )
    common = Search(rates=9, seeds=5)
    plain = Surface(law=law, noise=0.1)
    yield Cell(name="no race", surface=plain, search=Search(rates=9, seeds=5, race=False))
    yield Cell(name="six sizes", surface=plain, search=common, sizes=SIZES[::2])
    yield Cell(name="coarse grid", surface=plain, search=Search(rates=7, factor=2.0, seeds=4))
    yield Cell(
        name="stability close to the best",
        surface=Surface(law=law, noise=0.1, steepness=1.0, stability=1.5),
        search=common,
    )
    yield Cell(
        name="seeds alike at all batch sizes",
        surface=Surface(law=law, noise=0.1, shared=0.2, everywhere=0.4),
        search=common,
    )
    yield Cell(
        name="budget cuts the small sizes",
        surface=Surface(law=law, noise=0.1, budget=900.0),
        search=common,
    )
    for noise, seeds in ((0.05, 3), (0.1, 8)):
        yield Cell(
            name=f"three pieces, noise {noise}, {seeds} seeds",
            surface=Surface(law=pieces, noise=noise),
            search=Search(rates=9, seeds=seeds),
            pieces=True,
        )


def holds(interval: Interval | None, truth: float) -> bool:
    """Whether the interval holds the truth; an open end holds everything on its side."""
    if interval is None or interval.low is None:
        return False
    return interval.low <= truth and (interval.high is None or truth <= interval.high)


def once(cell: Cell, rng: np.random.Generator) -> dict[str, list[float]]:
    """Return hits by quantity, and log errors of the tuned steps."""
    common = rng.standard_normal(cell.search.seeds)
    rows = [
        row for size in cell.sizes for row in trials(cell.surface, cell.search, size, rng, common)
    ]
    curve = sweep_curve(rows)
    result: dict[str, list[float]] = {"tuned steps": [], "bias": []}
    for point in curve.batch_sizes:
        truth = cell.surface.law(point.batch_size)
        if point.steps is None:
            continue
        inside = holds(Interval(point=None, low=point.low, high=point.high), truth)
        result["tuned steps"].append(inside)
        result["bias"].append(math.log(point.steps / truth))
    if cell.pieces:
        fit = curve.regimes
        result["end of perfect"] = [holds(fit and fit.perfect_end, PERFECT)]
        result["end of useful"] = [holds(fit and fit.useful_end, USEFUL)]
        result["plateau"] = [holds(fit and fit.plateau, PLATEAU)]
        return result
    law = curve.tradeoff
    result["Smin"] = [holds(law and law.steps_min, STEPS_MIN)]
    result["Emin"] = [holds(law and law.examples_min, STEPS_MIN * CRITICAL)]
    result["Bcrit"] = [holds(law and law.critical_batch, CRITICAL)]
    surface, rates = cell.surface, curve.rate_law
    result["exponent"] = [holds(rates and rates.exponent, surface.rate_power)]
    result["saturation"] = [holds(rates and rates.saturation, surface.rate_batch)]
    return result


def measure(cell: Cell, repeats: int, *, number: int, seed: int) -> dict[str, Any]:
    """Return coverages by quantity.

    Args:
        cell: the problem.
        repeats: sweeps of it.
        number: its place among the cells.
        seed: 0 draws what the estimators were tuned on.
    """
    began, gathered = time.process_time(), dict[str, list[float]]()
    for repeat in range(repeats):
        drawn = [number, repeat, *([seed] if seed else [])]
        for name, values in once(cell, np.random.default_rng(drawn)).items():
            gathered.setdefault(name, []).extend(values)
    bias = gathered.pop("bias")
    return {
        "cell": cell.name,
        "repeats": repeats,
        "seed": seed,
        "coverage": {name: float(np.mean(values)) for name, values in gathered.items()},
        "bias": float(np.mean(bias)),
        "scatter": float(np.std(bias)),
        "milliseconds": 1e3 * (time.process_time() - began) / repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise; the estimators were tuned on 0"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cells whose name holds this")
    a = parser.parse_args()
    results = []
    for number, cell in enumerate(cells()):
        if a.only not in cell.name:
            continue
        result = measure(cell, a.repeats, number=number, seed=a.seed)
        results.append(result)
        shares = ", ".join(f"{k} {100 * v:.1f} %" for k, v in result["coverage"].items())
        print(
            f"{cell.name}: {shares}; bias {result['bias']:+.4f}, scatter {result['scatter']:.4f}, "
            f"{result['milliseconds']:.0f} ms",
            flush=True,
        )
    print(f"\nby chance a share moves by {100 * 0.0218 * 2 / math.sqrt(a.repeats / 100):.1f} %")
    names = [name for result in results for name in result["coverage"]]
    for name in dict.fromkeys(names):
        shares = [r["coverage"][name] for r in results if name in r["coverage"]]
        met = sum(GOAL[0] <= share <= GOAL[1] for share in shares)
        mean = float(np.mean(shares))
        word = "MET" if met == len(shares) else "MISSED"
        print(
            f"{word} {name}: {met} of {len(shares)} cells within 92-98 %, "
            f"least {100 * min(shares):.1f}, mean {100 * mean:.1f}, most {100 * max(shares):.1f}"
        )
    if a.out:
        a.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
