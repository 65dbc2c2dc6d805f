"""Places in a stream of epochs, and the global batches that lie between them."""

from __future__ import annotations

from typing import NamedTuple

from noisescale.errors import InvalidInputError


class Place(NamedTuple):
    """Where a batch begins or ends.

    Attributes:
        epoch: from 0.
        offset: examples of this epoch that lie before it.
        position: examples in all batches before it; dropped ones do not count.
        number: batches before it.
    """

    epoch: int
    offset: int
    position: int
    number: int


START = Place(0, 0, 0, 0)


class GlobalBatch(NamedTuple):
    """One batch over all replicas.

    Attributes:
        start: where it begins.
        size: its examples.
        stop: where it ends.
    """

    start: Place
    size: int
    stop: Place


def step_through(place: Place, size: int, examples: int, last: str) -> GlobalBatch | None:
    """Return the batch that begins at a place.

    Args:
        place: where it begins.
        size: examples wanted, at most one epoch's.
        examples: per epoch.
        last: what becomes of an epoch's last examples where they are fewer than ``size``:
            ``keep``, ``drop`` or ``carry``.

    Returns:
        The batch; None where what is left of the epoch makes none.

    >>> step_through(START, 4, 10, "keep").stop
    Place(epoch=0, offset=4, position=4, number=1)
    >>> step_through(Place(0, 8, 8, 2), 4, 10, "carry").stop
    Place(epoch=1, offset=2, position=12, number=3)
    """
    left = examples - place.offset
    if left < size and last != "carry":
        if last == "drop" or left <= 0:
            return None
        size = left
    ahead = place.offset + size
    stop = Place(
        place.epoch + ahead // examples,
        ahead % examples,
        place.position + size,
        place.number + 1,
    )
    return GlobalBatch(place, size, stop)


def share(size: int, rank: int, replicas: int) -> tuple[int, int]:
    """Return the first example and the one after the last that a replica takes of a batch.

    Shares are consecutive and differ by at most one example.

    >>> [share(10, rank, 4) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return rank * size // replicas, (rank + 1) * size // replicas


def require_shares(size: int, replicas: int, *, uneven: bool) -> None:
    """Refuse a batch that replicas cannot share.

    Args:
        size: its examples.
        replicas: how many share it.
        uneven: whether shares may differ by one example.

    Raises:
        InvalidInputError: shares would differ, or a replica would get nothing.
    """
    if size % replicas == 0 or (uneven and size >= replicas):
        return
    enough = size >= replicas
    raise InvalidInputError(
        f"a batch of {size} examples over {replicas} replicas",
        "equal shares are required" if enough else "every replica needs an example",
        "choose multiples, and last='drop' or 'carry'"
        + (", or uneven_shares=True and multiply the loss by loss_scale" if enough else ""),
    )
