"""What a fit of the steps law came to, in one sentence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noisescale.records import Interval

Array = npt.NDArray[np.float64]

RISE, RISE_P = 1.1, 0.01
"""Steps are said to rise when a power of the batch size, fitted to them, rises over the tested
sizes by this factor, and would so by chance with less than this probability. (assumed)"""


def explain(
    critical: Interval,
    *,
    sizes: Array,
    logs: Array,
    brackets: bool,
    lack_of_fit_p: float | None,
) -> str:
    """Explain a fit's outcome in one sentence, with the remedy where there is one.

    Args:
        critical: the fitted critical batch.
        sizes: shape (n,), batch sizes of the rows that reached the target, two distinct at least.
        logs: shape (n,), logarithms of their steps.
        brackets: whether the sizes lie on both sides of the critical batch.
        lack_of_fit_p: p-value of the lack of fit, where there are repeats.
    """
    smallest, largest = f"{sizes.min():g}", f"{sizes.max():g}"
    rise = _rise(sizes, logs)
    if rise is not None:
        return (
            f"steps rise with the batch size, by a factor {rise:.3g} from {smallest} to {largest}:"
            " the steps law does not describe these data; tune the learning rate at every size"
        )
    if critical.point is not None:
        where = "lie on both sides of" if brackets else "all lie on one side of"
        text = f"the tested sizes {smallest} to {largest} {where} the critical batch"
    elif critical.low and critical.high is None:
        text = (
            f"steps fall in proportion up to batch size {largest}: the critical batch is at "
            f"least {critical.low:.3g}, no upper end can be given; add larger batch sizes"
        )
    elif critical.high is not None:
        text = (
            f"steps hardly fall from batch size {smallest} on: the critical batch is at most "
            f"{critical.high:.3g}, no lower end above 0 can be given; add smaller batch sizes"
        )
    else:
        text = (
            "the noise leaves the critical batch open on both sides; add repeats, and batch "
            f"sizes below {smallest} and above {largest}"
        )
    if lack_of_fit_p is not None and lack_of_fit_p < 0.01:
        text += f"; the steps law does not fit (lack of fit p = {lack_of_fit_p:.2g})"
    return text


def _rise(sizes: Array, logs: Array) -> float | None:
    """Return the factor by which steps rise over the tested sizes; None when they do not.

    Linear regression of log steps on log size; the law's slope lies between -1 and 0.
    """
    from scipy.special import stdtr

    x = np.log(sizes) - np.log(sizes).mean()
    slope = float(x @ logs / (x @ x))
    factor = float(np.exp(slope * np.ptp(x)))
    if factor < RISE:
        return None
    rest = float(np.square(logs - logs.mean() - slope * x).sum())
    # Rows on one line leave no rest: then nothing is left to chance.
    error = np.sqrt(rest / (len(x) - 2) / (x @ x))
    chance = float(stdtr(len(x) - 2, -slope / error)) if error > 0 else 0.0
    return factor if chance < RISE_P else None
