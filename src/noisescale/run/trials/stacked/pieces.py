"""Evaluation data cut into pieces that stay in cache, without the inputs that are zero.

Pictures are black at their edges: where the first layer multiplies its inputs, a column of weights
whose input is zero for every example of a piece need not be read. With the columns sorted by how
often they are used, and the examples by the last column that they use, every piece needs only the
first so many columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

LEFT_OUT = 0.1
"""Columns are sorted when so large a share of the products is left out by it. (assumed: sorting
the weights costs 1 to 3 % of the products)"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Examples that are evaluated together.

    Attributes:
        batch: as the metrics take it.
        leaves: its tensors.
        columns: the order of the input's columns, shape (features,); None where it is theirs.
        inputs: what the network takes, piece by piece, in the batch's order; only the first
            columns where they are sorted.
        labels: by metric, which tensor holds the classes that it compares with; None where it
            does something else. Filled in by who finds out.
    """

    batch: Any
    leaves: Sequence[Any]
    columns: Tensor | None
    inputs: Sequence[Tensor]
    labels: dict[str, int | None] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return sum(map(len, self.inputs))


def cut(batch: Any, place: int, together: int) -> Cut:
    """Cut a batch as it comes.

    Args:
        batch: some examples.
        place: of the input among its tensors.
        together: examples in one piece, at most.
    """
    leaves = tree_leaves(batch)
    pieces = -(-len(leaves[place]) // together)
    return Cut(batch=batch, leaves=leaves, columns=None, inputs=leaves[place].chunk(pieces))


def cut_sorted(batch: Any, place: int, together: int) -> Cut:
    """Cut a batch whose input, flattened, goes into a product; leave out what is zero.

    Args:
        batch: some examples; they come in another order where that helps.
        place: of the input among its tensors.
        together: examples in one piece, at most.
    """
    inputs = tree_leaves(batch)[place].flatten(1)
    columns = (inputs != 0).sum(0).argsort(descending=True, stable=True)
    needed, rows = last_columns(inputs[:, columns] != 0).sort(stable=True)
    lengths = [max(1, int(part[-1])) for part in needed.chunk(-(-len(rows) // together))]
    whole = cut(tree_map(_picker(rows), batch), place, together)
    products = sum(len(x) * length for x, length in zip(whole.inputs, lengths, strict=True))
    if products > (1 - LEFT_OUT) * inputs.numel():
        return cut(batch, place, together)
    pieces = [
        x.flatten(1).index_select(1, columns[:length])
        for x, length in zip(whole.inputs, lengths, strict=True)
    ]
    return Cut(batch=whole.batch, leaves=whole.leaves, columns=columns, inputs=pieces)


def joined(batches: Sequence[Any]) -> list[Any]:
    """Join batches of per-example tensors to one; leave others as they are."""
    flat = [tree_flatten(batch) for batch in batches]
    sizes = [{len(x) if isinstance(x, Tensor) and x.dim() else -1 for x in own} for own, _ in flat]
    if any(len(size) > 1 or -1 in size for size in sizes) or len({len(own) for own, _ in flat}) > 1:
        return list(batches)
    leaves = [torch.cat(same) for same in zip(*(own for own, _ in flat), strict=True)]
    return [tree_unflatten(leaves, flat[0][1])]


def last_columns(used: Tensor) -> Tensor:
    """Return how many columns each example needs, shape (examples,).

    Args:
        used: which columns are not zero, shape (examples, features).

    >>> last_columns(torch.tensor([[False, True], [True, False], [False, False]]))
    tensor([2, 1, 0])
    """
    return (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1)


def _picker(rows: Tensor) -> Callable[[Any], Any]:
    def pick(leaf: Any) -> Any:
        ours = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(rows)
        return leaf.index_select(0, rows) if ours else leaf

    return pick
