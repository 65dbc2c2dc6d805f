"""Buffers that stay: fresh memory costs a page fault every few kilobytes on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

# Elements of the largest buffer that is kept. (assumed: 32 MB in float32)
_LARGEST = 1 << 23


class _Kept(threading.local):
    """The free buffer of this thread, by kind of number."""

    def __init__(self) -> None:
        self.free: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


@contextmanager
def buffers(like: Tensor, *shapes: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Lend uninitialised tensors of these shapes for the time of the block.

    Args:
        like: gives dtype and device. Off the CPU, and inside another loan, the memory is new.
        shapes: of the tensors.
    """
    sizes = [prod(shape) for shape in shapes]
    # Rounded up to cache lines, so that no two tensors share one.
    room = [-(-size // 16) * 16 for size in sizes]
    kept = like.device.type == "cpu" and type(like) is Tensor
    flat = _kept.free.pop(like.dtype, None) if kept else None
    if flat is None or flat.numel() < sum(room):
        flat = like.new_empty(sum(room))
    try:
        parts = torch.split(flat[: sum(room)], room)
        yield [
            part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]
    finally:
        if kept and flat.numel() <= _LARGEST:
            _kept.free[like.dtype] = flat


def release() -> None:
    """Give this thread's buffers back."""
    _kept.free.clear()
