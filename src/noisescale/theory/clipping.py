"""A clipping threshold beside the size of the batch gradient."""

from __future__ import annotations

import math

from noisescale.theory.ranges import positive


def clip_per_example(*, clip_norm: float, batch_size: float, noise_scale: float) -> float:
    """Clipping threshold over the root mean square of the batch gradient, in units of |G|.

    clip / sqrt(1 + Bn/B), from E|g_B|^2 = |G|^2 (1 + Bn/B).

    Args:
        clip_norm: largest norm of the batch gradient; positive.
        batch_size: B, in the unit of the noise scale; positive.
        noise_scale: Bn; positive.

    Returns:
        The threshold, in units of |G|: the same share of steps is clipped at every batch size,
        as far as norms differ by their scale only.

    Raises:
        InvalidInputError: a value is not positive.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.10.

    >>> clip_per_example(clip_norm=2.0, batch_size=10, noise_scale=30)
    1.0
    """
    share = positive("noise_scale", noise_scale) / positive("batch_size", batch_size)
    return positive("clip_norm", clip_norm) / math.sqrt(1 + share)


def clip_at(*, per_example: float, batch_size: float, noise_scale: float) -> float:
    """Clipping threshold at a batch size: the inverse of :func:`clip_per_example`.

    Args:
        per_example: threshold in units of |G|; positive.
        batch_size: B; positive.
        noise_scale: Bn; positive.

    Returns:
        clip_norm.

    Raises:
        InvalidInputError: a value is not positive.

    Source: as :func:`clip_per_example`.

    >>> clip_at(per_example=1.0, batch_size=10, noise_scale=30)
    2.0
    """
    share = positive("noise_scale", noise_scale) / positive("batch_size", batch_size)
    return positive("per_example", per_example) * math.sqrt(1 + share)
