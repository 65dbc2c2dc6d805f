"""Sums over examples of squared gradients, coordinate by coordinate, weighted or not.

A norm that weighs the coordinates of a gradient mixes the two sides of an outer product, so
Gram matrices do not help: what has several positions per example is materialised, a buffer at
a time, and squared in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.parts import Outer, Part, Rows, chunks, merged
from noisescale.measure.rules.scratch import buffers
from noisescale.measure.rules.windows import Windows


def weighted_square_sum(parts: Sequence[Part], shape: torch.Size, weight: Tensor) -> Tensor:
    """Sum over examples i and coordinates j of w_j g_ij^2, g_i the sum over the parts.

    With one position per example g_i = l_i r_i^T and the sum is that of
    ((l^2) W) * (r^2), one product of matrices.

    Args:
        parts: the uses of one parameter by the same examples.
        shape: the parameter's.
        weight: w, the parameter's shape, contiguous.

    Returns:
        Shape ().
    """
    if len(parts) == 1 and isinstance(parts[0], Tensor) and parts[0].dim() == 2:
        return torch.dot(parts[0].square().sum(0), weight)
    parts = merged(parts)
    if len(parts) == 1 and _one_position(parts[0]):
        if isinstance(parts[0], Outer) and parts[0].groups == 1:
            return _joined(parts[0].left[:, 0], parts[0].right[:, 0], weight)
        left, right, table = _squared_sides(parts[0], weight)
        return torch.matmul(left, table).mul_(right).sum()
    if len(parts) == 1 and isinstance(parts[0], Rows):
        ids, squares = _row_squares(parts[0])
        return squares.mul_(weight.view(parts[0].count, -1)[ids]).sum()
    table = _table(parts, weight)
    sums = [torch.mv(squares, table[k]).sum() for k, squares in _squares(parts, shape)]
    return torch.stack(sums).sum()


def _joined(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """((left^2) W) * (right^2), summed, in memory that is used again."""
    n, outer, inner = len(left), left.shape[1], right.shape[1]
    with buffers(left, (n, outer), (n, inner), (n, inner)) as (one, other, product):
        torch.mul(left, left, out=one)
        torch.mul(right, right, out=other)
        torch.mm(one, weight.view(outer, inner), out=product)
        return product.mul_(other).sum()


def coordinate_square_sum(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """Sum over examples i of g_ij^2, g_i the sum over the parts: the parameter's shape."""
    parts = merged(parts)
    if len(parts) == 1 and _one_position(parts[0]):
        left, right, _ = _squared_sides(parts[0], None)
        return torch.matmul(left.mT, right).reshape(shape)
    if len(parts) == 1 and isinstance(parts[0], Rows):
        ids, squares = _row_squares(parts[0])
        table = squares.new_zeros(parts[0].count, squares.shape[1])
        return table.index_add_(0, ids, squares).view(shape)
    sums: dict[int, Tensor] = {}
    for k, squares in _squares(parts, shape):
        sums[k] = sums[k] + squares.sum(0) if k in sums else squares.sum(0)
    return torch.stack([sums[k] for k in sorted(sums)], dim=-1).reshape(shape)


def _one_position(part: Part) -> bool:
    return isinstance(part, Outer) and part.left.shape[1] == 1


def _squared_sides(part: Part, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors squared, (groups, examples, width), and the weight in their layout."""
    assert isinstance(part, Outer)
    if part.groups == 1:
        left, right = part.left[:, 0].square(), part.right[:, 0].square()
        return left, right, left if weight is None else weight.view(left.shape[1], -1)
    left, right = (
        t.reshape(-1, part.groups, t.shape[2]).transpose(0, 1).square()
        for t in (part.left, part.right)
    )
    if weight is None:
        weight = left.new_empty(0)
    else:
        weight = weight.view(part.groups, left.shape[2], right.shape[2])
    return left, right, weight


def _row_squares(part: Rows) -> tuple[Tensor, Tensor]:
    """Ids, and the squares of what each example's rows of that id add up to."""
    ids, rows = part.ids, part.rows
    examples, length, width = rows.shape
    if length == 1:
        return ids.reshape(-1), rows.reshape(-1, width).square()
    owner = torch.arange(examples, device=ids.device).unsqueeze(1)
    pairs, where = torch.unique(ids + owner * part.count, return_inverse=True)
    sums = rows.new_zeros(len(pairs), width)
    sums.index_add_(0, where.reshape(-1), rows.reshape(-1, width))
    return pairs % part.count, sums.square_()


def _table(parts: Sequence[Part], weight: Tensor) -> Tensor:
    """The weight by the blocks that :func:`_squares` yields, one per row."""
    if len(parts) == 1 and isinstance(parts[0], Windows) and not parts[0].whole:
        return weight.flatten(2).permute(2, 0, 1).flatten(1)
    return weight.view(1, -1)


def _squares(parts: Sequence[Part], shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
    """Yield a block's number and the squares (examples, block), in buffers that are reused."""
    part = parts[0] if len(parts) == 1 else None
    if isinstance(part, Windows):
        yield from _window_squares(part)
    elif isinstance(part, Tensor):
        some = torch.split(part, _step(shape.numel()))
        yield from ((0, rows.flatten(1).square()) for rows in some)
    elif isinstance(part, Outer):
        yield from _product_squares(part)
    else:
        yield from ((0, rows.square_().flatten(1)) for rows in chunks(parts, shape))


def _step(elements: int) -> int:
    return max(1, _parts.PRODUCT_ELEMENTS // max(1, elements))


def _product_squares(part: Outer) -> Iterator[tuple[int, Tensor]]:
    groups, outer, inner = part.groups, part.left.shape[2], part.right.shape[2]
    step = min(len(part.left), _step(groups * outer * inner) * groups)
    with buffers(part.left, (step, outer, inner)) as (room,):
        sides = torch.split(part.left, step), torch.split(part.right, step)
        for left, right in zip(*sides, strict=True):
            block = torch.bmm(left.mT, right, out=room[: len(left)])
            yield 0, block.square_().view(len(left) // groups, -1)


def _window_squares(part: Windows) -> Iterator[tuple[int, Tensor]]:
    if part.whole:
        yield from ((0, found.square_().flatten(1)) for _, found in part.gradients())
        return
    for rows, offset, block in part.products():
        yield offset, block.square_().view(rows.stop - rows.start, -1)
