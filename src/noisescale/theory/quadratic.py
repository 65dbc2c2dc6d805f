"""The noisy quadratic: the world in which everything is known exactly.

Loss L(w) = 1/2 sum_i h_i w_i^2; the gradient of one example is h w + xi with
xi ~ N(0, diag(c)). Oracle for tests, built-in workload and docs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoisyQuadratic:
    """A quadratic loss with Gaussian gradient noise, both diagonal.

    Attributes:
        curvature: h, shape (d,), positive.
        noise: c, shape (d,), variances of one example's gradient, at least 0.
    """

    curvature: Array
    noise: Array

    def __post_init__(self) -> None:
        if self.curvature.shape != self.noise.shape or np.any(self.curvature <= 0):
            raise InvalidInputError(
                f"curvature of shape {self.curvature.shape}",
                "positive curvatures, one noise variance each, are required",
                "pass two arrays of equal shape",
            )

    def loss(self, weights: Array) -> Array:
        """L(w) for weights of shape (..., d)."""
        return np.asarray(0.5 * (self.curvature * weights**2).sum(-1))

    def grad_sq(self, weights: Array) -> Array:
        """|G|^2 for weights of shape (..., d)."""
        return np.asarray(((self.curvature * weights) ** 2).sum(-1))

    @property
    def trace_cov(self) -> float:
        """tr(Sigma), the same everywhere."""
        return float(self.noise.sum())

    def b_simple(self, weights: Array) -> Array:
        """tr(Sigma)/|G|^2 in examples. Source: McCandlish et al. 2018, eq. 2.9."""
        return np.asarray(self.trace_cov / self.grad_sq(weights))

    def b_noise(self, weights: Array) -> Array:
        """tr(H Sigma)/(G' H G) in examples. Source: McCandlish et al. 2018, eq. 2.8."""
        gradient = self.curvature * weights
        return np.asarray(
            (self.curvature * self.noise).sum() / (self.curvature * gradient**2).sum(-1)
        )

    def expected_loss_change(self, weights: Array, *, lr: float, batch_size: float) -> Array:
        """E[L] after one SGD step minus L before, exact.

        -lr |G|^2 + lr^2/2 (G'HG + tr(H Sigma)/B).

        Args:
            weights: shape (..., d).
            lr: learning rate.
            batch_size: B, examples.

        Returns:
            Change in loss, shape (...).

        Source: McCandlish et al. 2018, eq. 2.5.
        """
        gradient = self.curvature * weights
        bent = (self.curvature * gradient**2).sum(-1)
        noisy = (self.curvature * self.noise).sum() / batch_size
        return np.asarray(-lr * (gradient**2).sum(-1) + 0.5 * lr**2 * (bent + noisy))

    def best_lr(self, weights: Array, *, batch_size: float) -> Array:
        """The rate that lowers the expected loss most: lr_max / (1 + B_noise/B).

        Args:
            weights: shape (..., d).
            batch_size: B, examples.

        Returns:
            Learning rate, shape (...).

        Source: McCandlish et al. 2018, eq. 2.6.
        """
        gradient = self.curvature * weights
        largest = (gradient**2).sum(-1) / (self.curvature * gradient**2).sum(-1)
        return np.asarray(largest / (1 + self.b_noise(weights) / batch_size))

    def stationary_variance(self, *, lr: float, batch_size: float, momentum: float = 0.0) -> Array:
        """Variance of each weight once SGD has forgotten its start, exact at any stable rate.

        (lr c/B)(1 + m) / [(1 - m) h (2(1 + m) - lr h)].

        Args:
            lr: learning rate, below 2 (1 + m)/h for every h.
            batch_size: B, examples.
            momentum: m of v <- m v + g, w <- w - lr v.

        Returns:
            shape (d,).

        Raises:
            InvalidInputError: the rate is not stable.

        Source: derived from the stationary second-moment equations; for m = 0 Mandt et al.
        2017, sec. 3, with the term of second order in lr kept.

        >>> world = NoisyQuadratic(np.array([1.0]), np.array([1.0]))
        >>> float(world.stationary_variance(lr=1.0, batch_size=1.0)[0])
        1.0
        """
        h, m = self.curvature, momentum
        if lr * h.max() >= 2 * (1 + m):
            raise InvalidInputError(
                f"lr {lr}",
                f"a rate below 2 (1 + momentum)/curvature = {2 * (1 + m) / h.max():g} is stable",
                "lower the rate",
            )
        variance = (lr * self.noise / batch_size) * (1 + m)
        return np.asarray(variance / ((1 - m) * h * (2 * (1 + m) - lr * h)))

    def sgd(
        self,
        rng: np.random.Generator,
        start: Array,
        *,
        lr: float,
        batch_size: int,
        steps: int,
        momentum: float = 0.0,
    ) -> tuple[Array, Array]:
        """Run SGD; return the weights before each step and the batch gradients seen there.

        Args:
            rng: source of the noise.
            start: shape (..., d), one run for each leading index.
            lr: learning rate.
            batch_size: B, examples.
            steps: how many steps.
            momentum: m of v <- m v + g, w <- w - lr v.

        Returns:
            (weights, batch-mean gradients), each of shape (..., steps, d).
        """
        weights, velocity = start.copy(), np.zeros_like(start)
        path = np.empty((*start.shape[:-1], steps, start.shape[-1]))
        seen = np.empty_like(path)
        spread = np.sqrt(self.noise / batch_size)
        for step in range(steps):
            path[..., step, :] = weights
            gradient = self.curvature * weights + rng.standard_normal(start.shape) * spread
            seen[..., step, :] = gradient
            velocity = momentum * velocity + gradient
            weights = weights - lr * velocity
        return path, seen
