"""Noise scales under the norm of a preconditioned optimizer."""

from __future__ import annotations

from noisescale.errors import InvalidInputError


def restating_share(*, batch_size: float, new_batch_size: float) -> float:
    """Share of per-example second moments that restates Adam's v at another batch size.

    At batch size B a coordinate's v averages E[gbar^2] = G^2 + s2/B, and per-example second
    moments average s = G^2 + s2, with s2 the coordinate's variance. At B' it would be::

        v' = v + s2 (1/B' - 1/B) = (1 - share) v + share s,
        share = (1/B' - 1/B) / (1 - 1/B)

    For B' < B the share lies in (0, 1] and v' cannot be negative. For B' > B it is negative, and
    noise in v and s may push v' below what any s2 allows: since G^2 >= 0, v' >= v B / B'.

    Args:
        batch_size: B, examples behind v, above 1.
        new_batch_size: B', examples, at least 1.

    Returns:
        The share.

    Raises:
        InvalidInputError: B is not above 1, or B' is below 1.

    Source: E[gbar^2] per coordinate as in McCandlish et al. 2018, eq. 2.10; the algebra is ours.

    >>> restating_share(batch_size=4, new_batch_size=1)
    1.0
    >>> restating_share(batch_size=4, new_batch_size=4)
    0.0
    """
    if batch_size <= 1 or new_batch_size < 1:
        raise InvalidInputError(
            f"batch sizes {batch_size:g} and {new_batch_size:g}",
            "more than one example behind v, and at least one in the new batch, are required",
            "measure at a batch of two or more",
        )
    return (1 / new_batch_size - 1 / batch_size) / (1 - 1 / batch_size)
