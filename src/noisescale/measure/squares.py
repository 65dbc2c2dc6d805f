"""Sums of squares that keep their precision."""

from __future__ import annotations

import torch
from torch import Tensor

# How a sum of squares of n numbers keeps its precision in float32: a dot product adds up in as few
# as one running sum per lane. Of equal numbers it loses 8e-7 for n = 2^12, 2e-5 for 2^16 and 5e-4
# for 2^20, depending on the processor. Norms of short rows lose 9e-7 whatever the length, and write
# no squares to memory. (measured)
_DOT_LENGTH = 1 << 12
_ROW = 1 << 10
# Rows shorter than this are not worth a norm of their own. (assumed)
_LEAST_ROW = 1 << 4

_FULL = (torch.float32, torch.float64)


def squared_norm(gradient: Tensor) -> Tensor:
    """Return sum g^2 as a 0-d tensor, summed in float32 at least.

    Args:
        gradient: any shape, any floating dtype; sparse gradients are coalesced.
    """
    g = gradient.detach() if gradient.requires_grad else gradient
    if g.is_cuda or g.is_sparse or g.dtype not in _FULL:
        return _unusual(g)
    # Few calls: between large products the processor's caches know none of them.
    dims = g.dim()
    if dims == 2 and _LEAST_ROW <= g.shape[1] <= _ROW and g.shape[0] <= _DOT_LENGTH:
        norms: Tensor = torch.linalg.vector_norm(g, dim=1)
        return torch.dot(norms, norms)
    return _summed(g if dims == 1 else g.reshape(-1))


def _summed(flat: Tensor) -> Tensor:
    size = flat.numel()
    if size <= _DOT_LENGTH:
        return torch.dot(flat, flat)
    rest = size % _ROW
    rows = flat[: size - rest].view(-1, _ROW)
    total: Tensor = torch.linalg.vector_norm(rows, dim=1).square_().sum()
    tail = flat[size - rest :]
    return total + torch.dot(tail, tail) if rest else total


def _unusual(g: Tensor) -> Tensor:
    if g.is_sparse:
        g = g.coalesce().values()
    if g.is_cuda:
        wide = torch.promote_types(g.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(g, dtype=wide)
        return norm.square()
    flat = g.reshape(-1)
    return _summed(flat if g.dtype in _FULL else flat.float())
