"""Problems with known answers: true |G|^2 = 1 and tr(Sigma) = the noise scale, exactly.

Each draws many independent measurement series at once and returns what a gradient source
sees, so that estimators can be judged on thousands of repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SPECTRA = ("isotropic", "power law", "rank 1")


def spectrum(kind: str, dimension: int) -> Array:
    """Eigenvalues of the covariance, sum 1."""
    values = {
        "isotropic": np.ones(dimension),
        "power law": 1 / np.arange(1, dimension + 1),
        "rank 1": np.eye(dimension)[0],
    }[kind]
    return values / values.sum()


@dataclass(frozen=True)
class Draws:
    """R series of T steps.

    units: k; examples: B; weighted_sq (R, T): sum b_i |m_i|^2; mean: (R, T, d) batch-mean
    gradients.
    """

    units: int
    examples: int
    weighted_sq: Array
    mean: Array

    @property
    def mean_sq(self) -> Array:
        return (self.mean**2).sum(-1)


def quadratic_draws(
    rng: np.random.Generator,
    *,
    repeats: int,
    steps: int,
    batch_size: int,
    units: int,
    kind: str,
    noise_scale: float,
    dimension: int = 32,
) -> Draws:
    """Quadratic loss, gradient of an example = G + N(0, Sigma).

    G points in a generic direction: all components equal, |G| = 1.
    Sufficient statistics are drawn directly: the batch mean is N(G, Sigma/B), and
    sum_i b_i |m_i - m|^2 is a sum of eigenvalues times chi-square with k - 1 degrees of freedom.
    """
    eigenvalues = spectrum(kind, dimension) * noise_scale
    live = np.flatnonzero(eigenvalues)
    mean = np.full((repeats, steps, dimension), dimension**-0.5)
    shape = (repeats, steps, len(live))
    mean[..., live] += rng.standard_normal(shape) * np.sqrt(eigenvalues[live] / batch_size)
    between = (rng.chisquare(units - 1, shape) * eigenvalues[live]).sum(-1)
    return Draws(units, batch_size, between + batch_size * (mean**2).sum(-1), mean)


def regression_draws(
    rng: np.random.Generator,
    *,
    repeats: int,
    steps: int,
    batch_size: int,
    units: tuple[int, ...],
    kind: str,
    noise_scales: tuple[float, ...],
    dimension: int = 8,
) -> dict[tuple[float, int], Draws]:
    """Linear regression y = x w* + noise, x ~ N(0, C), loss (x w - y)^2 / 2, held weights.

    With delta = w - w*: G = C delta and Sigma = C (delta'C delta + s^2) + G G' (Isserlis), so
    tr(Sigma) = tr(C)(delta'C delta + s^2) + |G|^2. G is chosen along the eigenvalues with
    |G| = 1, and s^2 makes tr(Sigma) the noise scale. Per-example gradients are products of
    Gaussians, far from Gaussian themselves. One draw of (x, noise) serves every noise scale
    and every split into units.
    """
    eigenvalues = spectrum(kind, dimension)
    live = eigenvalues[eigenvalues > 0]
    true = live / np.sqrt((live**2).sum())
    delta = true / live
    explained = float((live * delta**2).sum())
    series = (repeats, steps)
    sums = {(n, k): np.empty(series) for n in noise_scales for k in units}
    means = {n: np.empty((*series, len(live))) for n in noise_scales}
    chunk = max(1, int(2e6 / (steps * batch_size * len(live))))
    for start in range(0, repeats, chunk):
        part = slice(start, min(start + chunk, repeats))
        count = part.stop - part.start
        shape = (count, steps, batch_size)
        x = rng.standard_normal((*shape, len(live)), dtype=np.float32)
        x *= np.sqrt(live, dtype=np.float32)
        signal = x @ delta.astype(np.float32)
        noise = rng.standard_normal(shape, dtype=np.float32)
        squares = (x * x).sum(-1)
        for scale in noise_scales:
            residual = signal - np.float32(np.sqrt(scale - 1 - explained)) * noise
            each = residual[..., None] * x
            means[scale][part] = each.mean(2, dtype=np.float64)
            for k in units:
                if k == batch_size:
                    sums[scale, k][part] = (squares * residual**2).sum(-1, dtype=np.float64)
                    continue
                size = batch_size // k
                unit_means = each.reshape(count, steps, k, size, -1).mean(3, dtype=np.float64)
                sums[scale, k][part] = size * (unit_means**2).sum((-1, -2))
    return {(n, k): Draws(k, batch_size, sums[n, k], means[n]) for n in noise_scales for k in units}
