"""Bias and coverage of the step-by-step estimator under an adaptive optimizer's norm.

    python benchmarks/coverage_preconditioned.py [--repeats 4000] [--out FILE.json]

Weights and v are held. The gradient of an example is N(G, Sigma) with Sigma diagonal and all
components of G equal; v is what Adam's average tends to, v_j = G_j^2 + Sigma_jj / B, and squares
are divided by v_j^(power / 2). Sigma is scaled so that tr(P Sigma P) / |P G|^2 (power 2; likewise
for power 1) is the noise scale. With ``of 4`` the sums of squares are those of 4 examples per step,
drawn at random from its B.

Bounds, fixed before the first full run: coverage 92-98 %; bias and medians as in ``coverage.py``,
the bound on medians where all examples are taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from coverage import BATCH_SIZES, NOISE_SCALES, STEPS, Cell, step_cell, tabulate

from problems import SPECTRA, Draws, spectrum

BOUNDS = (0.92, 0.98)
DIMENSION = 8
DRAWN = 4
# Gradient entries that are drawn at a time.
CHUNK = 1 << 23


def scaled_problem(
    kind: str, batch_size: int, noise_scale: float, power: int
) -> tuple[np.ndarray, np.ndarray]:
    """G and the variances of one example in the optimizer's norm, |G| = 1: (d,) each."""
    g = np.ones(DIMENSION)

    def ratio(size: float) -> tuple[float, np.ndarray, np.ndarray]:
        variance = spectrum(kind, DIMENSION) * size
        weight = (g**2 + variance / batch_size) ** (-power / 2)
        signal, noise = weight * g**2, weight * variance
        return noise.sum() / signal.sum(), signal, noise

    low, high = 1e-6, 1e12
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(middle)[0] < noise_scale else (low, middle)
    _, signal, noise = ratio(low)
    return np.sqrt(signal / signal.sum()), noise / signal.sum()


def block(
    kind: str, batch_size: int, steps: int, power: int, drawn: int, repeats: int, seed: int
) -> list[Cell]:
    """Every noise scale that this v allows."""
    rng = np.random.default_rng(seed)
    cells = []
    for scale in NOISE_SCALES:
        g, variance = scaled_problem(kind, batch_size, scale, power)
        if variance.sum() < 0.99 * scale:
            continue  # v grows with the noise itself, which leaves its ratio bounded
        weighted, mean = [], []
        step = max(1, CHUNK // (steps * batch_size * DIMENSION))
        for start in range(0, repeats, step):
            shape = (min(step, repeats - start), steps, batch_size, DIMENSION)
            each = rng.standard_normal(shape, dtype=np.float32)
            each *= np.sqrt(variance, dtype=np.float32)
            each += g.astype(np.float32)
            # Examples are exchangeable: the first ones are a random draw.
            taken = each[:, :, : drawn or batch_size]
            squares = np.einsum("rtbd,rtbd->rt", taken, taken, dtype=np.float64)
            weighted.append(squares * batch_size / taken.shape[2])
            mean.append(each.mean(2, dtype=np.float64))
        draws = Draws(batch_size, batch_size, np.concatenate(weighted), np.concatenate(mean))
        problem = f"power {power}, of {drawn or 'all'}"
        found = step_cell(draws, scale)
        if drawn:
            found["median_ratio"] = None
        where = ("adam", problem, kind, scale, batch_size, steps, "examples")
        cells.append(Cell(*where, **found, bounds=BOUNDS))
    return cells


def jobs(repeats: int) -> Iterator[tuple[str, int, int, int, int, int, int]]:
    """Every block, the long ones first."""
    seed = 0
    for steps in reversed(STEPS):
        for batch_size in reversed(BATCH_SIZES):
            for kind in SPECTRA:
                for power, drawn in ((2, 0), (2, DRAWN), (1, 0)):
                    seed += 1
                    yield kind, batch_size, steps, power, drawn, repeats, seed


def _run(job: tuple[str, int, int, int, int, int, int]) -> list[Cell]:
    return block(*job)


def main() -> None:
    tabulate(__doc__, jobs, _run, lambda c: (c.problem, c.spectrum, c.steps, c.batch_size))


if __name__ == "__main__":
    main()
