"""SGD with a velocity on one direction of the noisy quadratic, as an exact linear recursion.

Curvature h, gradient h w + noise of variance c/B. The state is (w, v); its mean and covariance
follow from one matrix. Oracle for the scaling rules: stability, drift, stationary variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.theory.ranges import fraction, positive

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recursion:
    """state <- matrix state + noise xi / sqrt(B), with xi of variance c.

    Attributes:
        matrix: shape (2, 2), on (w, v).
        noise: shape (2,), what a unit of gradient noise adds.
    """

    matrix: Array
    noise: Array

    @property
    def radius(self) -> float:
        """Spectral radius: the mean converges below 1 and diverges above it."""
        return float(np.abs(np.linalg.eigvals(self.matrix)).max())

    def drift(self) -> float:
        """Logarithm of the slowest mode's factor per step, with its sign turned: -ln radius."""
        return -float(np.log(self.radius))

    def mean(self, start: float, steps: int) -> float:
        """Return E w after some steps from w = start, v = 0.

        Args:
            start: weight at the start.
            steps: how many.
        """
        state = np.linalg.matrix_power(self.matrix, steps) @ np.array([start, 0.0])
        return float(state[0])

    def stationary_variance(self, *, noise: float, batch_size: float) -> float:
        """Variance of w once the start is forgotten: S = M S M' + n n' c/B.

        Args:
            noise: c, variance of one example's gradient.
            batch_size: B, examples; positive.

        Raises:
            InvalidInputError: the recursion is not stable.

        Source: discrete Lyapunov equation, solved as a linear system of four.
        """
        if self.radius >= 1:
            raise InvalidInputError(
                f"spectral radius {self.radius:g}", "below 1 a variance exists", "lower the rate"
            )
        kicks = np.outer(self.noise, self.noise) * noise / positive("batch_size", batch_size)
        system = np.eye(4) - np.kron(self.matrix, self.matrix)
        return float(np.linalg.solve(system, kicks.reshape(4))[0])


def sgd_recursion(
    *,
    curvature: float,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> Recursion:
    """Return torch's SGD on one direction: v <- m v + (1 - d) g, w <- w - lr v.

    Nesterov: w <- w - lr (g + m v). Adam with a frozen preconditioner P is the same with
    d = m = beta1 and the curvature h/P. torch takes the very first gradient undampened; here,
    as Adam does, it is dampened like every other.

    Args:
        curvature: h; positive.
        lr: learning rate; positive.
        momentum: m, in [0, 1).
        dampening: d, in [0, 1); without momentum it is ignored, and Nesterov has none.
        nesterov: whether torch's nesterov is on.

    Raises:
        InvalidInputError: a value is out of its range.

    >>> sgd_recursion(curvature=2.0, lr=0.25).radius
    0.5
    """
    h, lr = positive("curvature", curvature), positive("lr", lr)
    m, d = fraction("momentum", momentum), fraction("dampening", dampening)
    if nesterov and d:
        raise InvalidInputError(
            f"dampening {d:g} with nesterov", "torch has no such optimizer", "give one of the two"
        )
    taken = 1.0 if not m else 1 - d
    added = np.array([taken * h, m])
    # What the weight moves by, as a row over the old (w, v) and as a share of the noise.
    moved = m * added + [h, 0.0] if nesterov else added
    shaken = m * taken + 1 if nesterov else taken
    matrix = np.array([np.array([1.0, 0.0]) - lr * moved, added])
    return Recursion(matrix, np.array([-lr * shaken, taken]))
