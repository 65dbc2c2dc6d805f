"""Bias and coverage of the step-by-step estimator when per-example norms are sketched.

    python benchmarks/coverage_sketch.py [--repeats 4000] [--out FILE.json]

Every example's gradient is a matrix M_i = G + sqrt(noise scale) Z_i of 8 x 4 entries with
|G|^2 = E|Z_i|^2 = 1, and its squared norm is replaced by |r_i^T M_i|^2 with fresh random signs r_i.
Bounds, fixed before the first full run, are those of ``coverage.py``.

Problems:
  full      G and Z_i of full rank, Gaussian
  rank 1    G = p q^T, Z_i = u_i q^T with Gaussian u_i: every M_i has rank 1 and the same right
            factor, where a sketch is at its worst
  aligned   Z_i = a_i G, one direction alone: the noise of the norms and of the signs is largest
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from coverage import BATCH_SIZES, NOISE_SCALES, STEPS, Cell, step_cell, tabulate

from problems import Draws

OUTER, INNER = 8, 4
PROBLEMS = ("full", "rank 1", "aligned")
# Entries of Z that are drawn at a time.
CHUNK = 1 << 24


def signal(rng: np.random.Generator, kind: str) -> np.ndarray:
    """G of one problem, |G| = 1: (OUTER, INNER)."""
    if kind == "full":
        g = rng.standard_normal((OUTER, INNER))
    else:
        g = np.outer(rng.standard_normal(OUTER), rng.standard_normal(INNER))
    return g / np.linalg.norm(g)


def noise(rng: np.random.Generator, kind: str, g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Z with E|Z_i|^2 = 1: (*shape, OUTER, INNER)."""
    if kind == "full":
        return rng.standard_normal((*shape, OUTER, INNER)) / (OUTER * INNER) ** 0.5
    if kind == "aligned":
        return rng.standard_normal((*shape, 1, 1)) * g
    right = g[np.argmax(np.abs(g).sum(1))]
    right = right / np.linalg.norm(right)
    left = rng.standard_normal((*shape, OUTER, 1)) / OUTER**0.5
    return left * right


def block(kind: str, batch_size: int, steps: int, repeats: int, seed: int) -> list[Cell]:
    """Every noise scale on one set of draws."""
    rng = np.random.default_rng(seed)
    g = signal(rng, kind)
    found: dict[float, list[tuple[np.ndarray, np.ndarray]]] = {s: [] for s in NOISE_SCALES}
    step = max(1, CHUNK // (steps * batch_size * OUTER * INNER))
    for start in range(0, repeats, step):
        shape = (min(step, repeats - start), steps, batch_size)
        z = noise(rng, kind, g, shape)
        signs = rng.integers(0, 2, (*shape, 1, OUTER)) * 2.0 - 1.0
        of_g, of_z = (signs @ g)[..., 0, :], (signs @ z)[..., 0, :]
        mean_z = z.mean(2).reshape(*shape[:2], -1)
        for scale in NOISE_SCALES:
            sketched = ((of_g + scale**0.5 * of_z) ** 2).sum((-1, -2))
            found[scale].append((sketched, g.reshape(-1) + scale**0.5 * mean_z))
    cells = []
    for scale, drawn in found.items():
        weighted, mean = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        where = ("sketch", kind, "-", scale, batch_size, steps, "examples")
        draws = Draws(batch_size, batch_size, weighted, mean)
        cells.append(Cell(*where, **step_cell(draws, scale)))
    return cells


def jobs(repeats: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Every block, the long ones first."""
    seed = 0
    for steps in reversed(STEPS):
        for batch_size in reversed(BATCH_SIZES):
            for kind in PROBLEMS:
                seed += 1
                yield kind, batch_size, steps, repeats, seed


def _run(job: tuple[str, int, int, int, int]) -> list[Cell]:
    return block(*job)


def main() -> None:
    tabulate(__doc__, jobs, _run, lambda c: (c.problem, c.steps, c.batch_size))


if __name__ == "__main__":
    main()
