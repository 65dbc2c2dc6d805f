"""What "batch size" means: global = micro x accumulation x replicas, any missing one inferred."""

from __future__ import annotations

import math
import operator
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import BatchSplit

MAX_SIZE = 2**40
"""Largest size taken: far above any real batch in tokens, and its divisors are found at once."""


def split_batch(
    *,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    replicas: int | None = None,
    max_micro: int | None = None,
    unit: str = "examples",
) -> BatchSplit:
    """Complete a batch split: global = micro x accumulation x replicas.

    What the other three fix is inferred. Where a choice is left, ``replicas`` is 1 and the
    micro-batch is the largest divisor of one replica's share that is not above ``max_micro``
    (no accumulation without ``max_micro``).

    Args:
        global_batch_size: ``unit`` per optimizer step over all devices.
        micro_batch_size: ``unit`` per pass on one device.
        accumulation: passes per optimizer step on one device.
        replicas: devices that average their gradients.
        max_micro: largest micro-batch that fits one device.
        unit: what is counted.

    Returns:
        The complete split.

    Raises:
        InvalidInputError: a value is no integer from 1 to 2^40, two of them contradict, nothing
            is given to start from, or the batch does not divide; then the nearest valid splits
            on both sides are named.

    Source: arithmetic; DeepSpeed's train_batch_size identity.

    >>> print(split_batch(global_batch_size=512, replicas=8, max_micro=16))
    global 512 = micro 16 x accumulation 4 x replicas 8 (examples)
    >>> print(split_batch(micro_batch_size=8, accumulation=4, replicas=2))
    global 64 = micro 8 x accumulation 4 x replicas 2 (examples)
    """
    total = _size("global_batch_size", global_batch_size)
    micro = _size("micro_batch_size", micro_batch_size)
    passes = _size("accumulation", accumulation)
    devices = _size("replicas", replicas)
    limit = _size("max_micro", max_micro)
    if total is None and micro is None:
        raise InvalidInputError(
            "no global_batch_size and no micro_batch_size",
            "one of them is required",
            "give global_batch_size",
        )
    if micro is not None and limit is not None and micro > limit:
        raise InvalidInputError(
            f"micro_batch_size {micro}",
            f"contradicts max_micro {limit}",
            f"give a micro_batch_size of at most {limit} or raise max_micro",
        )
    if total is None:
        return _split(micro or 1, passes or 1, devices or 1, unit)
    return _divide(total, micro, passes, devices, limit, unit)


def _divide(
    total: int,
    micro: int | None,
    passes: int | None,
    devices: int | None,
    limit: int | None,
    unit: str,
) -> BatchSplit:
    """Complete a split whose global batch size is given."""
    if devices is None and (micro is None or passes is None):
        devices = 1
    given = {"micro_batch_size": micro, "accumulation": passes, "replicas": devices}
    known = math.prod(value for value in given.values() if value is not None)
    if None not in given.values():
        _refuse_contradiction(total, known, given)
    elif total % known:
        raise InvalidInputError(
            f"global_batch_size {total}",
            f"does not divide by {_product(given)}",
            _nearest(total, known, given, limit),
        )
    return _split(*_complete(total // known, micro, passes, devices, limit), unit)


def _complete(
    rest: int, micro: int | None, passes: int | None, devices: int | None, limit: int | None
) -> tuple[int, int, int]:
    """Hand the factor ``rest`` to whatever is missing."""
    if micro is not None:
        if passes is None:
            return micro, rest, devices or 1
        return micro, passes, devices or rest
    if passes is None:
        size = _largest_divisor(rest, limit or rest)
        return size, rest // size, devices or 1
    if limit is not None and rest > limit:
        raise InvalidInputError(
            f"accumulation {passes}",
            f"gives micro-batches of {rest}, which contradicts max_micro {limit}",
            f"give an accumulation of at least {math.ceil(rest * passes / limit)}",
        )
    return rest, passes, devices or 1


def _refuse_contradiction(total: int, product: int, given: dict[str, int | None]) -> None:
    if product == total:
        return
    raise InvalidInputError(
        f"global_batch_size {total}",
        f"contradicts {_product(given)} = {product}",
        f"give global_batch_size {product} or leave one of the four out",
    )


def _nearest(total: int, known: int, given: dict[str, int | None], limit: int | None) -> str:
    """Name the nearest valid splits below and above, each as "504 = 28 x 3 x 6"."""
    names = []
    for rest in (total // known, total // known + 1):
        if rest == 0:
            continue
        micro, passes, devices = given.values()
        if limit is not None and passes is not None and micro is None:
            rest = min(rest, limit)
        parts = _complete(rest, micro, passes, devices, limit)
        names.append(f"{known * rest} = {' x '.join(map(str, parts))}")
    distinct = list(dict.fromkeys(names))
    are = "splits are" if len(distinct) > 1 else "split is"
    return f"the nearest valid {are} {' or '.join(distinct)} (micro x accumulation x replicas)"


def _product(given: dict[str, int | None]) -> str:
    return " x ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``limit``."""
    root = math.isqrt(number)
    if limit <= root:
        return next(size for size in range(limit, 0, -1) if number % size == 0)
    best = 1
    for small in range(1, root + 1):
        if number % small == 0:
            best = max(best, *(d for d in (small, number // small) if d <= limit), 1)
    return best


def _split(micro: int, passes: int, devices: int, unit: str) -> BatchSplit:
    return BatchSplit(
        global_batch_size=micro * passes * devices,
        micro_batch_size=micro,
        accumulation=passes,
        replicas=devices,
        unit=unit,
    )


def _size(name: str, value: Any) -> int | None:
    """Accept None or a positive integer (numpy's too, bools not)."""
    if value is None:
        return None
    try:
        size = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = None
    if size is None or size < 1:
        raise InvalidInputError(
            f"{name} {value!r}", "a positive integer is required", f"give {name} 1 or more"
        )
    if size > MAX_SIZE:
        raise InvalidInputError(
            f"{name} {size}", f"at most {MAX_SIZE} is required", f"give a smaller {name}"
        )
    return size
