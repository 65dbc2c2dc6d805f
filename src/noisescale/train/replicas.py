"""How many replicas train together, and what they must agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from noisescale.errors import InvalidInputError
from noisescale.train.arguments import whole


def replicas_here(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Complete the number of replicas and this one's rank from torch.distributed.

    Args:
        num_replicas: as the user gives it; None for the world's size, or 1 without one.
        rank: as the user gives it; None for this process's, or 0 without one.

    Returns:
        Both.

    Raises:
        InvalidInputError: they are no whole numbers, or the rank is not below the number.

    >>> replicas_here(None, None), replicas_here(4, 3)
    ((1, 0), (4, 3))
    """
    together = in_process_group()
    if num_replicas is None:
        num_replicas = distributed.get_world_size() if together else 1
    if rank is None:
        rank = distributed.get_rank() if together else 0
    num_replicas, rank = whole("num_replicas", num_replicas), whole("rank", rank, least=0)
    if rank >= num_replicas:
        raise InvalidInputError(
            f"rank {rank}",
            f"must be below num_replicas {num_replicas}",
            "give both, or neither under torch.distributed",
        )
    return num_replicas, rank


@contextlib.contextmanager
def synchronised(model: Any, now: bool) -> Iterator[None]:
    """Let a model's gradients be averaged over the replicas in here, or leave that out.

    Args:
        model: a module, wrapped by DistributedDataParallel or FSDP or sharded by fully_shard.
        now: whether to average.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard
        model.set_requires_gradient_sync(now)
        yield
    elif not now and hasattr(model, "no_sync"):  # DistributedDataParallel, FSDP
        with model.no_sync():
            yield
    else:
        yield


def in_process_group() -> bool:
    """Whether this process trains with others."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_replicas(value: float) -> float:
    """Return the sum of a number over all processes of the default group.

    Without a group it is the number itself. It waits for the others, and for the device.
    """
    if not in_process_group():
        return value
    cell = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.all_reduce(cell)
    return float(cell)


def as_the_first_says(value: int) -> int:
    """Return the first process's number in all processes of the default group."""
    if not in_process_group():
        return value
    cell = torch.tensor(value, dtype=torch.int64, device=_device())
    distributed.broadcast(cell, src=0)
    return int(cell)


def _device() -> torch.device:
    # NCCL has collectives for tensors on the GPU only.
    backend: Any = distributed.get_backend()
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
