"""Bias and coverage of the noise-scale estimators on problems with known answers.

    python benchmarks/coverage.py [--repeats 4000] [--out benchmarks/out/coverage.json]

Bounds, fixed before the first full run: the reported set contains the truth in 93-97 % of
repeats, unconditionally (an empty set or too few steps never counts as covered); |G|^2 and
tr(Sigma) each within 1 % or 3 Monte-Carlo standard errors of the truth; the median ratio
within 3 % in cells that are determined in at least 99 % of repeats. What misses is printed
MISSED.

Blocks:
  steps    weights held, step-by-step estimator; sources: examples, micro-batches (4 per
           step), ranks (2 per step)
  pooled   weights held, all steps one big batch; source: examples
  moving   SGD on the quadratic from far away and near its stationary state; the truth is the
           ratio of the window's mean true values, different in each repeat

Changes after the first full run: bias at moving weights is the mean error over the mean truth,
no longer the mean of ratios to each repeat's own truth (which has no mean when that is small).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from noisescale.theory.frozen import frozen_set
from noisescale.theory.interval import moving_set
from noisescale.theory.noise_scale import unbiased_moments
from noisescale.theory.quadratic import NoisyQuadratic
from problems import SPECTRA, Draws, quadratic_draws, regression_draws, spectrum

NOISE_SCALES = (10.0, 100.0, 1000.0)
BATCH_SIZES = (8, 64)
STEPS = (20, 200)
GROUPS = 20
LEVEL = 0.95
BOUNDS = (0.93, 0.97)
MEDIAN_BOUND = 0.03
BIAS_BOUND = 0.01


@dataclass
class Cell:
    """One cell of the table: coverage, share determined, bias in standard errors."""

    block: str
    problem: str
    spectrum: str
    noise_scale: float
    batch_size: int
    steps: int
    source: str
    coverage: float
    missed_low: float
    missed_high: float
    empty: float
    determined: float
    grad_sq: float
    grad_sq_se: float
    trace_ratio: float
    trace_ratio_se: float
    median_ratio: float | None
    bounds: tuple[float, float] = BOUNDS

    def verdicts(self) -> list[str]:
        """Names of the bounds that this cell misses."""
        missed = [] if self.bounds[0] <= self.coverage <= self.bounds[1] else ["coverage"]
        for name, value, error in (
            ("|G|^2", self.grad_sq, self.grad_sq_se),
            ("tr", self.trace_ratio, self.trace_ratio_se),
        ):
            if abs(value - 1) > max(BIAS_BOUND, 3 * error):
                missed.append(f"bias of {name}")
        if self.median_ratio is not None and abs(self.median_ratio - 1) > MEDIAN_BOUND:
            missed.append("median")
        return missed


def judge(
    truth: np.ndarray, low: np.ndarray, high: np.ndarray, g: np.ndarray, s: np.ndarray
) -> dict[str, float | None]:
    """Score sets of phi = |G|^2/tr against the truth (all arrays of shape (R,))."""
    empty = high <= 0
    covered = (low <= truth) & (truth <= high) & ~empty
    determined = (low > 0) & ~empty
    share = float(determined.mean())
    median = float(np.median(s / g * truth)) if share >= 0.99 else None
    return {
        "coverage": float(covered.mean()),
        "missed_low": float((low > truth).mean()),
        "missed_high": float((high < truth).mean()),
        "empty": float(empty.mean()),
        "determined": share,
        "median_ratio": median,
    }


def bias(values: np.ndarray, truth: np.ndarray | float, name: str) -> dict[str, float]:
    """Mean over the mean truth, and the Monte-Carlo standard error of that.

    The truth may differ from repeat to repeat: the errors are averaged, not the ratios.
    """
    scale = float(np.mean(truth))
    errors = (values - truth) / scale
    return {
        name: 1 + float(errors.mean()),
        f"{name}_se": float(errors.std() / len(values) ** 0.5),
    }


def step_cell(draws: Draws, noise_scale: float) -> dict[str, float | None]:
    """Judge the step-by-step estimator."""
    g, s = unbiased_moments(
        units=draws.units,
        examples=draws.examples,
        weighted_sq=draws.weighted_sq,
        mean_sq=draws.mean_sq,
    )
    low, high = moving_set(grad_sq=g, trace_cov=s, examples=np.ones(g.shape[1]), level=LEVEL)
    truth = np.full(len(g), 1 / noise_scale)
    mean_g, mean_s = g.mean(1), s.mean(1)
    return (
        judge(truth, low, high, mean_g, mean_s)
        | bias(mean_g, 1.0, "grad_sq")
        | bias(mean_s, noise_scale, "trace_ratio")
    )


def pooled_cell(draws: Draws, noise_scale: float) -> dict[str, float | None]:
    """Judge the pooled estimator at held weights."""
    repeats, steps, dimension = draws.mean.shape
    per_group = steps // GROUPS
    groups = draws.mean.reshape(repeats, GROUPS, per_group, dimension).mean(2)
    weighted = draws.weighted_sq.reshape(repeats, GROUPS, per_group).sum(2)
    gram = groups @ groups.transpose(0, 2, 1)
    size, units = draws.examples * per_group, draws.units * per_group
    traces = (weighted - size * np.diagonal(gram, axis1=1, axis2=2)) / (units - 1)
    g, s = unbiased_moments(
        units=units * GROUPS,
        examples=size * GROUPS,
        weighted_sq=weighted.sum(1),
        mean_sq=gram.mean((1, 2)),
    )
    low, high = frozen_set(gram=gram, group_trace=traces, grad_sq=g, trace_cov=s, level=LEVEL)
    return (
        judge(np.full(repeats, 1 / noise_scale), low, high, g, s)
        | bias(g, 1.0, "grad_sq")
        | bias(s, noise_scale, "trace_ratio")
    )


def sources(batch_size: int) -> dict[str, int]:
    """Units per step of each source."""
    return {"examples": batch_size, "microbatches": 4, "ranks": 2}


def quadratic_block(kind: str, batch_size: int, steps: int, repeats: int, seed: int) -> list[Cell]:
    """Held weights on the quadratic, every noise scale and source."""
    rng = np.random.default_rng(seed)
    cells = []
    for scale in NOISE_SCALES:
        for source, units in sources(batch_size).items():
            draws = quadratic_draws(
                rng,
                repeats=repeats,
                steps=steps,
                batch_size=batch_size,
                units=units,
                kind=kind,
                noise_scale=scale,
            )
            where = ("quadratic", kind, scale, batch_size, steps, source)
            cells.append(Cell("steps", *where, **step_cell(draws, scale)))
            if source == "examples":
                cells.append(Cell("pooled", *where, **pooled_cell(draws, scale)))
    return cells


def regression_block(kind: str, batch_size: int, steps: int, repeats: int, seed: int) -> list[Cell]:
    """Held weights on linear regression, every noise scale and source."""
    units = sources(batch_size)
    drawn = regression_draws(
        np.random.default_rng(seed),
        repeats=repeats,
        steps=steps,
        batch_size=batch_size,
        units=tuple(units.values()),
        kind=kind,
        noise_scales=NOISE_SCALES,
    )
    cells = []
    for scale in NOISE_SCALES:
        for source, k in units.items():
            where = ("regression", kind, scale, batch_size, steps, source)
            cells.append(Cell("steps", *where, **step_cell(drawn[scale, k], scale)))
            if source == "examples":
                cells.append(Cell("pooled", *where, **pooled_cell(drawn[scale, k], scale)))
    return cells


def moving_block(kind: str, batch_size: int, steps: int, repeats: int, seed: int) -> list[Cell]:
    """SGD on the quadratic: autocorrelated true values, drift, fresh batches."""
    rng = np.random.default_rng(seed)
    dimension = 32
    cells = []
    for start in ("far", "stationary"):
        for scale in (10.0, 100.0):
            noise = spectrum(kind, dimension) * scale
            world = NoisyQuadratic(np.linspace(0.2, 1.0, dimension), noise)
            begin = rng.standard_normal((repeats, dimension)) * (3.0 if start == "far" else 0.3)
            burn = 0 if start == "far" else 50
            path, seen = world.sgd(rng, begin, lr=0.2, batch_size=batch_size, steps=burn + steps)
            gradient, mean = path[:, burn:] * world.curvature, seen[:, burn:]
            live = noise[noise > 0]
            between = rng.chisquare(batch_size - 1, (repeats, steps, len(live))) @ live
            weighted = between + batch_size * (mean**2).sum(-1)
            draws = Draws(batch_size, batch_size, weighted, mean)
            cells.append(_moving_cell(draws, gradient, world, (kind, scale, start)))
    return cells


def _moving_cell(
    draws: Draws, gradient: np.ndarray, world: NoisyQuadratic, where: tuple[str, float, str]
) -> Cell:
    kind, scale, start = where
    g, s = unbiased_moments(
        units=draws.units,
        examples=draws.examples,
        weighted_sq=draws.weighted_sq,
        mean_sq=draws.mean_sq,
    )
    true = (gradient**2).sum(-1).mean(1)
    low, high = moving_set(grad_sq=g, trace_cov=s, examples=np.ones(g.shape[1]), level=LEVEL)
    scores = judge(true / world.trace_cov, low, high, g.mean(1), s.mean(1))
    steps = g.shape[1]
    problem = f"SGD, {start}"
    return Cell(
        "moving", problem, kind, scale, draws.examples, steps, "examples",
        **scores, **bias(g.mean(1), true, "grad_sq"), **bias(s.mean(1), scale, "trace_ratio"),
    )  # fmt: skip


def jobs(repeats: int) -> Iterator[tuple[object, ...]]:
    """Every block, the long ones first so that two workers end together."""
    seed = 0
    for steps in reversed(STEPS):
        for block in (regression_block, quadratic_block, moving_block):
            for batch_size in reversed(BATCH_SIZES):
                for kind in SPECTRA:
                    seed += 1
                    yield block, kind, batch_size, steps, repeats, seed


def _run(job: tuple[object, ...]) -> list[Cell]:
    block, *arguments = job
    assert callable(block)
    return list(block(*arguments))


def show(cells: list[Cell]) -> None:
    """Print the table and the count of met and missed bounds."""
    print(
        f"{'block':8}{'problem':17}{'spectrum':11}{'B_simple':>8}{'B':>4}{'steps':>6} "
        f"{'source':13}{'covers':>7}{'too low':>8}{'too high':>9}{'empty':>7}{'determ.':>8}"
        f"{'|G|^2':>7}{'tr':>7}{'median':>7}"
    )
    for cell in cells:
        median = f"{cell.median_ratio:.3f}" if cell.median_ratio is not None else "-"
        missed = cell.verdicts()
        verdict = "  MISSED " + ", ".join(missed) if missed else ""
        # The set of phi lies too high where the set of the noise scale lies too low.
        print(
            f"{cell.block:8}{cell.problem:17}{cell.spectrum:11}{cell.noise_scale:8g}"
            f"{cell.batch_size:4}{cell.steps:6} {cell.source:13}{cell.coverage:7.3f}"
            f"{cell.missed_low:8.3f}{cell.missed_high:9.3f}{cell.empty:7.3f}"
            f"{cell.determined:8.3f}{cell.grad_sq:7.3f}{cell.trace_ratio:7.3f}{median:>7}{verdict}"
        )
    for block in dict.fromkeys(cell.block for cell in cells):
        members = [cell for cell in cells if cell.block == block]
        met = sum(not cell.verdicts() for cell in members)
        covered = [cell.coverage for cell in members]
        print(
            f"{block}: {met} of {len(members)} cells met, {len(members) - met} MISSED;"
            f" coverage {min(covered):.3f} to {max(covered):.3f}"
        )


def tabulate(
    description: str | None,
    jobs: Callable[[int], Iterable[Any]],
    run: Callable[[Any], list[Cell]],
    order: Callable[[Cell], tuple[Any, ...]],
) -> None:
    """Run every job in two processes, print the table, write JSON beside the other benchmarks'.

    Args:
        description: of the command.
        jobs: the jobs, given the number of repeats; the long ones first.
        run: one job.
        order: how the table is sorted.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/out/{name}.json"))
    arguments = parser.parse_args()
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.workers) as pool:
        cells = [cell for part in pool.map(run, jobs(arguments.repeats)) for cell in part]
    cells.sort(key=order)
    show(cells)
    print(f"{len(cells)} cells x {arguments.repeats} repeats: {time.perf_counter() - began:.0f} s")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(cell) | {"missed": cell.verdicts()} for cell in cells]
    arguments.out.write_text(json.dumps(rows, indent=1))


def main() -> None:
    order = {"steps": 0, "pooled": 1, "moving": 2}
    tabulate(
        __doc__,
        jobs,
        _run,
        lambda c: (order[c.block], c.problem, c.spectrum, c.steps, c.batch_size),
    )


if __name__ == "__main__":
    main()
