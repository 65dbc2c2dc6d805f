"""The whole steps law from two or three tuned batch sizes and a noise scale.

The noise scale says roughly where the critical batch lies; tuned steps on both sides of it say
the rest. Where all tuned sizes lie on one side of it the law cannot be told: another is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Interval, PredictedCurve, PredictedSteps
from noisescale.theory.runs_checked import checked_runs, positive
from noisescale.theory.tuned_steps import student

Array = npt.NDArray[np.float64]

LAW_ERROR = 0.07
"""Departure of tuned steps from the steps law, in log steps, beyond their own errors.
(measured: 4 to 10 % rms)"""
APART = 4.5
"""The pair of sizes to tune lies this factor below and above the critical batch. (measured:
benchmarks/calibrate_check.py; 3.5 leaves the ends of the curve less certain;
pairs 8 to 16 times apart predicted the curve to 12 %, measured)"""
CLEAR = 1.25
"""A size is on one side of the critical batch when it is so by this factor. (assumed)"""
SURE = 0.8
"""Probability with which it must be. (assumed)"""
TAILS = 5.0
"""Degrees of freedom of the prior on log Bcrit: a noise scale is now and then far off.
(assumed)"""
NODES = 1001
"""Places of log Bcrit on the grid: many to a standard error of tuned steps. (assumed)"""


@dataclass(frozen=True, kw_only=True)
class CriticalPrior:
    """What a noise scale says of the critical batch before any tuned run.

    Attributes:
        point: the middle, in the unit of the batch sizes.
        low: lower end of the band.
        high: upper end.
        level: probability of the band.
    """

    point: float
    low: float
    high: float
    level: float = 0.95

    def __post_init__(self) -> None:
        ordered = 0 < self.low <= self.point <= self.high < math.inf and self.low < self.high
        if not ordered or not 0 < self.level < 1:
            raise InvalidInputError(
                f"critical batch {self.point:g} within [{self.low:g}, {self.high:g}]",
                "0 < low <= point <= high, a band of some width, is required",
                "give a band with both ends",
            )

    @property
    def deviation(self) -> float:
        """Standard deviation of log Bcrit, from the width of the band."""
        return math.log(self.high / self.low) / 2 / student(level=self.level, freedom=TAILS)


def first_pair(prior: CriticalPrior, *, smallest: int = 1, largest: int | None = None) -> list[int]:
    """Return the two batch sizes to tune first: one below, one above the critical batch.

    Args:
        prior: where the noise scale puts the critical batch.
        smallest: least allowed size.
        largest: largest allowed size, such as the number of examples; None for any.

    Returns:
        Powers of two about ``point / 4.5`` and ``point * 4.5``, within what is allowed, the
        smaller first.

    >>> first_pair(CriticalPrior(point=100, low=30, high=300))
    [16, 512]
    """
    below, above = _power(prior.point / APART), _power(prior.point * APART)
    most = largest or above
    low = min(max(below, smallest), most)
    high = min(max(above, smallest), most)
    if low == high:
        low, high = max(smallest, high // 8), min(most, max(low * 8, high))
    return [low, high]


def predict_curve(
    *,
    batch_size: npt.ArrayLike,
    steps: npt.ArrayLike,
    log_error: npt.ArrayLike,
    prior: CriticalPrior,
    sizes: Sequence[float],
    allowed: Sequence[int] | None = None,
    level: float = 0.95,
    law_error: float = LAW_ERROR,
) -> PredictedCurve:
    """Predict steps at every batch size from a few tuned ones and a prior on Bcrit.

    log S = a + log(1 + exp(b)/B), normal errors of known size (each row's own and the law's),
    any a alike, b = log Bcrit by Student's t about the noise scale. For each b the posterior of
    a is normal; a grid over b and a mixture of normals do the rest. The band is for tuned steps
    at a size, so it holds the law's own error as well.

    Args:
        batch_size: shape (n,), tuned sizes, one at least.
        steps: shape (n,), their tuned steps.
        log_error: shape (n,), standard errors of log(steps).
        prior: where the noise scale puts the critical batch.
        sizes: batch sizes to predict.
        allowed: batch sizes that may be tuned next; default: ``sizes`` that are whole.
        level: probability of the band and the intervals.
        law_error: departure of tuned steps from the law, in log steps.

    Returns:
        The predicted curve, and the size to tune next where the tuned ones do not lie on both
        sides of the critical batch.

    Raises:
        InvalidInputError: shapes differ or a value is not positive.

    Source: the law is McCandlish et al. 2018, eq. 2.11; Bayesian regression with one parameter
    on a grid.

    >>> prior = CriticalPrior(point=80, low=20, high=320)
    >>> curve = predict_curve(batch_size=[16, 512], steps=[725, 119.5], log_error=[0.01, 0.01],
    ...                       prior=prior, sizes=[16, 64, 512], law_error=0.001)
    >>> curve.brackets, round(curve.critical_batch.point), round(curve.curve[1].steps)
    (True, 100, 256)
    """
    tuned, logs, errors = _tuned(batch_size, steps, log_error)
    wanted = np.sort(positive("sizes", sizes))
    post = _Posterior(np.log(tuned), logs, np.hypot(errors, law_error), prior)
    named = [round(b) for b in wanted.tolist() if float(b).is_integer()]
    at = post.steps(np.log(wanted), law_error, level)
    probability = post.above(np.log(tuned.min() * CLEAR)), post.below(np.log(tuned.max() / CLEAR))
    following = post.next_size(tuned, probability, named if allowed is None else list(allowed))
    brackets = min(probability) >= SURE
    return PredictedCurve(
        curve=tuple(
            PredictedSteps(batch_size=b, steps=m, low=low, high=high, measured=b in tuned)
            for b, m, low, high in zip(wanted.tolist(), *np.exp(at).tolist(), strict=True)
        ),
        critical_batch=post.critical(level),
        steps_min=_interval(post.level_of(level, examples=False)),
        examples_min=_interval(post.level_of(level, examples=True)),
        brackets=brackets,
        next_batch_size=None if brackets else following,
        tuned=tuple(tuned.tolist()),
        level=level,
        detail=_detail(tuned, probability, following),
    )


def _tuned(
    batch_size: npt.ArrayLike, steps: npt.ArrayLike, log_error: npt.ArrayLike
) -> tuple[Array, Array, Array]:
    sizes, counts = positive("batch_size", batch_size), positive("steps", steps)
    errors = positive("log_error", log_error)
    if sizes.ndim != 1 or not len(sizes) or not sizes.shape == counts.shape == errors.shape:
        raise InvalidInputError(
            f"batch_size of shape {sizes.shape}, steps {counts.shape}, log_error {errors.shape}",
            "one entry per tuned batch size is required",
            "pass arrays of equal length",
        )
    if len(np.unique(sizes)) > 1:
        checked_runs(sizes, counts, None, 0.95)
    return sizes, np.log(counts), errors


class _Posterior:
    """Posterior of b on a grid, and of a given b."""

    def __init__(self, x: Array, y: Array, errors: Array, prior: CriticalPrior) -> None:
        middle, spread = math.log(prior.point), prior.deviation
        self.b = np.linspace(middle - 10 * spread - 1, middle + 10 * spread + 1, NODES)
        lifted = y - np.logaddexp(0.0, self.b[:, None] - x)
        weight = 1 / errors**2
        self.a = lifted @ weight / weight.sum()
        self.a_error = float(weight.sum() ** -0.5)
        rest = (weight * np.square(lifted - self.a[:, None])).sum(axis=1)
        tail = (TAILS + 1) / 2 * np.log1p(np.square((self.b - middle) / spread) / TAILS)
        log_density = -rest / 2 - tail
        density = np.exp(log_density - log_density.max())
        self.mass = density / density.sum()

    def above(self, log_size: float) -> float:
        """Probability that the critical batch is above a size."""
        return float(self.mass[self.b > log_size].sum())

    def below(self, log_size: float) -> float:
        """Probability that it is below."""
        return float(self.mass[self.b < log_size].sum())

    def quantile(self, share: float) -> float:
        """Quantile of b."""
        return float(np.interp(share, np.cumsum(self.mass) - self.mass / 2, self.b))

    def critical(self, level: float) -> Interval:
        tails = (1 - level) / 2, 0.5, (1 + level) / 2
        low, middle, high = (math.exp(self.quantile(share)) for share in tails)
        return Interval(point=middle, low=low, high=high)

    def level_of(self, level: float, *, examples: bool) -> Array:
        """Quantiles of log Smin, or of log Emin, shape (3, 1)."""
        centre = self.a + self.b if examples else self.a
        return self._mixture(centre[:, None], self.a_error, level)

    def steps(self, x: Array, law_error: float, level: float) -> Array:
        """Median and band of log steps at log sizes x, shape (3, len(x))."""
        centre = self.a[:, None] + np.logaddexp(0.0, self.b[:, None] - x)
        return self._mixture(centre, math.hypot(self.a_error, law_error), level)

    def _mixture(self, centre: Array, spread: float, level: float) -> Array:
        """Quantiles of a mixture of normals by bisection: median, low, high."""
        from scipy.special import ndtr

        keep = self.mass > 1e-7
        centre, mass = centre[keep], self.mass[keep]
        found = []
        for share in (0.5, (1 - level) / 2, (1 + level) / 2):
            low, high = centre.min(axis=0) - 8 * spread, centre.max(axis=0) + 8 * spread
            for _ in range(30):
                middle = (low + high) / 2
                less = mass @ ndtr((middle - centre) / spread) < share
                low, high = np.where(less, middle, low), np.where(less, high, middle)
            found.append((low + high) / 2)
        return np.array(found)

    def next_size(
        self, tuned: Array, probability: tuple[float, float], allowed: Sequence[int]
    ) -> int | None:
        """Return the allowed size that best closes the side that is open; None where none does."""
        middle = math.exp(self.quantile(0.5))
        down = probability[0] <= probability[1]
        aim = min(middle, tuned.min()) / APART if down else max(middle, tuned.max()) * APART
        beyond = [b for b in allowed if (b < tuned.min() if down else b > tuned.max())]
        return min(beyond, key=lambda b: abs(math.log(b / aim)), default=None)


def _interval(logs: Array) -> Interval:
    middle, low, high = np.exp(logs[:, 0]).tolist()
    return Interval(point=middle, low=low, high=high)


def _detail(tuned: Array, probability: tuple[float, float], following: int | None) -> str:
    span = f"the tuned sizes {', '.join(f'{b:g}' for b in np.sort(tuned).tolist())}"
    if min(probability) >= SURE:
        return f"{span} lie on both sides of the critical batch"
    side = "below" if probability[0] <= probability[1] else "above"
    if following is None:
        return f"{span} leave it open whether one lies {side} the critical batch, and no other may"
    return f"{span} leave it open whether one lies {side} the critical batch: tune {following} too"


def _power(size: float) -> int:
    return int(2 ** max(round(math.log2(size)), 0))
