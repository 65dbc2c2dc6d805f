"""What one use of a parameter adds to the gradient of every example, and its squared norm.

A parameter's gradient for one example is a sum over its uses, and over the positions within
each use. A use is kept as factors as long as it can be: squared norms of sums then come out
of inner products between factors, without the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisescale.measure.rules.scratch import buffers
from noisescale.measure.rules.windows import Windows
from noisescale.measure.squares import squared_norm

# Elements of one unfolded or materialised buffer. (measured on one CPU core: of 2^16 to 2^25,
# convolutions of 32 and 64 channels at 14x14 and 28x28 are fastest, or within noise of it, at
# 2^20 to 2^22)
CHUNK_ELEMENTS = 1 << 21

# Elements of products that are squared while they are in the processor's cache: largest that is
# as fast as smaller ones (measured).
PRODUCT_ELEMENTS = 1 << 20

# Convolutions with fewer positions, or positions times input channels, are unfolded. (measured by
# benchmarks/cost_model.py: mean regret 1.004)
LEAST_SHIFTED_ELEMENTS = 1024
LEAST_SHIFTED_POSITIONS = 32

# torch's norm on a CPU adds up in one pass: over more elements than this it can lose more than
# 4e-6 in float32, where a sum by halves does not. (measured)
_NORM_LENGTH = 1 << 12


@dataclass(frozen=True, eq=False)
class Outer:
    """Gradients sum_t left_t right_t^T.

    Attributes:
        left: shape (examples * groups, t, o).
        right: shape (examples * groups, t, i); groups * o * i are the parameter's elements.
        groups: diagonal blocks of the weight; an example's blocks are adjacent.
        known: the sum over the examples of its squared norm, where that is known.
    """

    left: Tensor
    right: Tensor
    groups: int = 1
    known: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradients that are rows of a table: row ``ids_t`` gets ``rows_t``, repeated ids add up.

    Attributes:
        ids: shape (examples, t).
        rows: shape (examples, t, width).
        count: rows of the table.
    """

    ids: Tensor
    rows: Tensor
    count: int


Part = Tensor | Outer | Rows | Windows
"""A tensor is the gradients themselves, shape (examples, *parameter shape)."""


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: squares of half precision overflow and vanish."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def row_sq(rows: Tensor) -> Tensor:
    """Squared norm of every example: shape (examples, ...) -> (examples,)."""
    return row_norms(rows).square()


def row_norms(rows: Tensor) -> Tensor:
    """Norm of every example: shape (examples, ...) -> (examples,)."""
    flat = rows if rows.dim() == 2 else rows.reshape(len(rows), -1)
    if flat.shape[1] > _NORM_LENGTH and not flat.is_cuda:
        return flat.square().sum(1).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms


def product_square_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the items of |sum_t left_t right_t^T|_F^2: (n, t, o), (n, t, i) -> ().

    Either through the t x t Gram matrices or through the o x i product itself, whichever
    needs fewer operations.

    Source: Gram form, Li et al. 2021 (arXiv:2110.05679), section 4.
    """
    _, length, outer = left.shape
    inner = right.shape[2]
    if length == 1:
        # Source: Goodfellow 2015 (arXiv:1510.01799).
        return squared_norm(row_norms(left) * row_norms(right))
    if forms_products(length, outer, inner):
        return product_form(left, right)
    return gram_form(left, right)


def product_form(left: Tensor, right: Tensor) -> Tensor:
    """:func:`product_square_sum` by way of the products."""
    # Products are faster with the longer side last. (measured)
    left, right = (left, right) if left.shape[2] <= right.shape[2] else (right, left)
    return _added([squared_norm(product) for product in _products(left, right)])


def gram_form(left: Tensor, right: Tensor) -> Tensor:
    """:func:`product_square_sum` by way of Gram matrices."""
    items, length, _ = left.shape
    step = max(1, CHUNK_ELEMENTS // (length * length))
    return _added(
        [_gram_inner(left[i : i + step], right[i : i + step]) for i in range(0, items, step)]
    )


def forms_products(length: int, outer: int, inner: int) -> bool:
    """Whether the products themselves need fewer operations than Gram matrices."""
    return length > 1 and length * (inner + outer) >= inner * outer


def _products(left: Tensor, right: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Yield left_i^T right_i of some items at a time, in memory that is used again."""
    items, _, outer = left.shape
    inner = right.shape[2]
    step = min(items, multiple * max(1, PRODUCT_ELEMENTS // (multiple * inner * outer)))
    with buffers(left, (step, outer, inner)) as (product,):
        for i in range(0, items, step):
            one, other = left[i : i + step], right[i : i + step]
            yield torch.bmm(one.mT, other, out=product[: len(one)])


def total_and_square_sum(part: Outer | Windows, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return :func:`total` and :func:`square_sum`, forming every product once."""
    if isinstance(part, Windows):
        return part.total_and_square_sum(shape)
    total = part.left.new_empty(part.groups, part.left.shape[2], part.right.shape[2])
    partial: Tensor | None = None
    sums: list[Tensor] = []
    for product in _products(part.left, part.right, part.groups):
        several = product.view(-1, *total.shape)
        if not sums:
            torch.sum(several, 0, out=total)
        else:
            partial = torch.empty_like(total) if partial is None else partial
            total += torch.sum(several, 0, out=partial)
        sums.append(squared_norm(product))
    return total.view(shape), _added(sums)


def _gram_inner(left: Tensor, right: Tensor) -> Tensor:
    items, length, _ = left.shape
    shape = (items, length, length)
    with buffers(left, shape, shape) as (one, other):
        torch.bmm(left, left.mT, out=one)
        torch.bmm(right, right.mT, out=other)
        return one.mul_(other).sum()


def _added(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def square_sum(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """Squared norm of the sum over the parts, cross terms included, summed over the examples.

    Args:
        parts: the uses of one parameter by the same examples.
        shape: the parameter's.

    Returns:
        Shape ().
    """
    parts = merged(parts)
    if len(parts) == 1:
        return _single_square_sum(parts[0])
    known = any(isinstance(part, Outer) and part.known is not None for part in parts)
    if all(_pairs_up(part) for part in parts) and (known or _gram_is_cheaper(parts, shape)):
        return _gram_square_sum(parts)
    return _added([squared_norm(rows) for rows in chunks(parts, shape)])


def chunks(parts: Sequence[Part], shape: torch.Size) -> Iterator[Tensor]:
    """Yield the gradients of some examples at a time: shape (some, *shape)."""
    step = max(1, CHUNK_ELEMENTS // max(1, shape.numel()))
    for i in range(0, _examples(parts[0]), step):
        yield sum_of([_cut(part, slice(i, i + step)) for part in parts], shape)


def sum_of(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """Gradient of every example: shape (examples, *shape)."""
    first, *others = [_dense(part, shape) for part in parts]
    for other in others:
        first = first + other
    return first


def total(part: Part, shape: torch.Size) -> Tensor:
    """Gradient summed over the examples: the parameter's shape."""
    if isinstance(part, Tensor):
        return part.sum(0)
    if isinstance(part, Windows):
        return part.total(shape)
    if isinstance(part, Outer):
        left, right = (t.reshape(-1, part.groups, *t.shape[1:]) for t in (part.left, part.right))
        return torch.einsum("ngto,ngti->goi", left, right).reshape(shape)
    rows = part.rows.new_zeros(part.count, part.rows.shape[2])
    return rows.index_add_(0, part.ids.reshape(-1), part.rows.flatten(0, 1)).reshape(shape)


def check(part: Part, shape: torch.Size) -> None:
    """Refuse gradients that are not one per example of this parameter.

    Raises:
        ValueError: the shape is another one.
    """
    if isinstance(part, Tensor) and part.shape[1:] != shape:
        raise ValueError(
            f"gradients of shape {tuple(part.shape)}; (examples, *{tuple(shape)}) is required"
        )


def _examples(part: Part) -> int:
    if isinstance(part, Windows):
        return part.examples
    if isinstance(part, Outer):
        return part.left.shape[0] // part.groups
    return len(part if isinstance(part, Tensor) else part.ids)


def _cut(part: Part, rows: slice) -> Part:
    if isinstance(part, Windows):
        return part.cut(rows)
    if isinstance(part, Outer):
        g = part.groups
        items = slice(rows.start * g, rows.stop * g)
        return Outer(part.left[items], part.right[items], g)
    if isinstance(part, Rows):
        return Rows(part.ids[rows], part.rows[rows], part.count)
    return part[rows]


def _dense(part: Part, shape: torch.Size) -> Tensor:
    if isinstance(part, Tensor):
        return part
    if isinstance(part, Windows):
        return part.dense(shape)
    if isinstance(part, Outer):
        return torch.bmm(part.left.mT, part.right).reshape(-1, *shape)
    examples, _, width = part.rows.shape
    table = part.rows.new_zeros(examples * part.count, width)
    where = part.ids + part.count * _numbers(part.ids).unsqueeze(1)
    table.index_add_(0, where.reshape(-1), part.rows.reshape(-1, width))
    return table.view(examples, *shape)


def _numbers(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)


def merged(parts: Sequence[Part]) -> list[Part]:
    """Join parts of one kind along their positions."""
    outers: dict[tuple[int, int], list[Outer]] = {}
    rows = [part for part in parts if isinstance(part, Rows)]
    merged: list[Part] = [part for part in parts if isinstance(part, Tensor | Windows)]
    for part in parts:
        if isinstance(part, Outer):
            outers.setdefault((part.groups, part.left.shape[2]), []).append(part)
    for (groups, _), same in outers.items():
        left = [part.left for part in same]
        right = [part.right for part in same]
        merged.append(same[0] if len(same) == 1 else Outer(_join(left), _join(right), groups))
    if rows:
        ids, values = [part.ids for part in rows], [part.rows for part in rows]
        joined = Rows(_join(ids), _join(values), rows[0].count) if len(rows) > 1 else rows[0]
        merged.append(joined)
    return merged


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=1)


def _single_square_sum(part: Part) -> Tensor:
    if isinstance(part, Tensor):
        return squared_norm(part)
    if isinstance(part, Rows):
        return _rows_square_sum(part)
    if isinstance(part, Windows):
        return part.square_sum()
    return product_square_sum(part.left, part.right)


def _rows_square_sum(part: Rows) -> Tensor:
    """Rows of equal ids add up before they are squared."""
    ids, rows = part.ids, part.rows
    examples, length, width = rows.shape
    del examples
    if length == 1:
        return squared_norm(rows)
    if rows.is_cuda and length <= width:
        # Sorting would make the host wait.
        return (torch.bmm(rows, rows.mT) * _same(ids, ids)).sum()
    pairs, where = torch.unique(ids + _numbers(ids).unsqueeze(1) * part.count, return_inverse=True)
    sums = rows.new_zeros(len(pairs), width)
    sums.index_add_(0, where.reshape(-1), rows.reshape(-1, width))
    return squared_norm(sums)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(2) == b.unsqueeze(1)


# A table that is also a matrix: sum_t e_{ids_t} rows_t^T is an outer product whose left factor
# is one-hot.


def _pairs_up(part: Part) -> bool:
    return isinstance(part, Rows) or (isinstance(part, Outer) and part.groups == 1)


def _sides(part: Part) -> tuple[Tensor, Tensor]:
    assert isinstance(part, Rows | Outer)
    return (part.ids, part.rows) if isinstance(part, Rows) else (part.left, part.right)


def _gram_is_cheaper(parts: Sequence[Part], shape: torch.Size) -> bool:
    lengths = [_sides(part)[0].shape[1] for part in parts]
    widths = [_sides(part)[1].shape[2] for part in parts]
    if len(set(widths)) > 1:
        return False  # factors of differently shaped views of the parameter
    gram, dense = sum(lengths) ** 2 * widths[0], shape.numel() * len(parts)
    for part, length in zip(parts, lengths, strict=True):
        if isinstance(part, Outer):
            gram += length**2 * part.left.shape[2]
            dense += length * shape.numel()
    return gram < dense


def _gram_square_sum(parts: Sequence[Part]) -> Tensor:
    """Sum over the examples and all pairs of positions of (left . left') (right . right')."""
    result: Tensor | None = None
    for i, one in enumerate(parts):
        for other in parts[: i + 1]:
            if one is other and isinstance(one, Outer) and one.known is not None:
                result = one.known if result is None else result + one.known
                continue
            (left, right), (left_, right_) = _sides(one), _sides(other)
            term = (_left_gram(left, left_) * torch.bmm(right, right_.mT)).sum()
            term = term if one is other else 2 * term
            result = term if result is None else result + term
    assert result is not None
    return result


def _left_gram(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of left factors, each (n, t, o) or the ids (n, t) of one-hot ones."""
    if a.dim() == 2 and b.dim() == 2:
        return _same(a, b)
    if a.dim() == 2:
        return _left_gram(b, a).mT
    if b.dim() == 2:
        return torch.gather(a, 2, b.unsqueeze(1).expand(-1, a.shape[1], -1))
    return torch.bmm(a, b.mT)
