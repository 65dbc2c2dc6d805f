"""What an audit is asked for, checked, with what is left out chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.run.dry_run import check_batch_size
from noisescale.workload import Workload

MICRO = 8
"""Examples per micro-batch, where the batch is at least twice as large. (assumed)"""

REPLICAS = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """How the batch is split.

    Attributes:
        batch_size: examples.
        micro: examples per micro-batch.
        replicas: processes; 1 for none.
        replicas_asked: whether that number was given, so that it cannot be let drop.
    """

    batch_size: int
    micro: int
    replicas: int
    replicas_asked: bool

    @property
    def micro_batches(self) -> int:
        """Passes per step."""
        return -(-self.batch_size // self.micro)


def read_request(
    workload: Workload, *, batch_size: int | None, micro: int | None, replicas: int | None
) -> Request:
    """Check the sizes, and choose those that are None.

    Raises:
        InvalidInputError: they do not split a batch of the workload's data.
    """
    size = _count("batch_size", batch_size, workload.recipe.batch_size)
    check_batch_size(workload, size)
    if size < 2:
        raise InvalidInputError(
            f"batch size {size}", "at least 2 examples are required to split them", "give more"
        )
    each = _count("micro", micro, min(MICRO, size // 2))
    world = _count("replicas", replicas, REPLICAS if size % REPLICAS == 0 else 1)
    if each > size:
        raise InvalidInputError(
            f"micro {each}",
            f"it cannot be larger than the batch of {size}",
            f"give at most {size // 2}",
        )
    if each == size and world == 1:
        raise InvalidInputError(
            f"micro {each}",
            f"it does not split the batch of {size}, and neither do replicas",
            f"give at most {size // 2}",
        )
    if size % world:
        raise InvalidInputError(
            f"replicas {world}",
            f"a divisor of the batch of {size} is required: replicas count alike",
            _nearest_divisors(size, world),
        )
    return Request(batch_size=size, micro=each, replicas=world, replicas_asked=replicas is not None)


def _count(name: str, value: Any, chosen: int) -> int:
    if value is None:
        return chosen
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(
            f"{name} {value!r}", "a whole number of at least 1 is required", f"change {name}"
        )
    return value


def _nearest_divisors(size: int, wanted: int) -> str:
    """Name the divisors next to a number, and the batches next to a size.

    >>> _nearest_divisors(32, 3)
    'take 2 or 4 replicas, or a batch of 30 or 33'
    >>> _nearest_divisors(4, 9)
    'take 4 replicas, or a batch of 9'
    """
    divisors = [d for d in range(2, size + 1) if size % d == 0]
    near = [max((d for d in divisors if d < wanted), default=0)]
    near.append(min((d for d in divisors if d > wanted), default=0))
    batches = [size // wanted * wanted, -(-size // wanted) * wanted]
    replicas = " or ".join(str(d) for d in near if d)
    sizes = " or ".join(str(b) for b in batches if b)
    return f"take {replicas} replicas, or a batch of {sizes}"
