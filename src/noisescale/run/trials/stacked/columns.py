"""Training inputs whose zeros are left out of the first layer's products.

Pictures are black at their edges. With the columns of the first weights kept in the order of how
often their inputs are used, and a batch's examples sorted by the last column that they use, a
piece of the batch needs only the first so many columns, forward and backward: the others would be
multiplied by zero. The mean over a batch does not depend on the order of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisescale.run.trials.stacked.pieces import last_columns

MOST_USED = 0.65
"""Share of the columns up to an example's last one, on average, above which sorting is not tried.
(measured: 0.53 on MNIST gives 1.2 to 1.4 times the speed from batch 32 on, 0.70 on digits none)"""

PIECE = 64
"""Examples of a batch in one piece, about. (measured on MNIST: 32 to 128 alike)"""

MOST_PIECES = 8
"""(assumed)"""

LOOKED_AT = 4096
"""Examples looked at together."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Examples of one group's batch, next to each other.

    Attributes:
        examples: which.
        columns: how many of the sorted columns they use.
    """

    examples: slice
    columns: int


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How often the columns of the training inputs are used.

    Attributes:
        order: of the columns, by how many examples use them, descending; shape (features,).
        place: of each column in that order.
        last: how many columns, in that order, each example needs, shape (examples,).
    """

    order: Tensor
    place: Tensor
    last: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Columns | None:
        """Look at all inputs, shape (examples, ...); None where too few columns are left out."""
        flat = inputs.flatten(1)
        parts = [flat[start : start + LOOKED_AT] for start in range(0, len(flat), LOOKED_AT)]
        counts = torch.stack([(part != 0).sum(0) for part in parts]).sum(0)
        order = counts.argsort(descending=True, stable=True)
        last = torch.cat([last_columns(part[:, order] != 0) for part in parts]).clamp(min=1)
        if float(last.double().mean()) > MOST_USED * len(order):
            return None
        return cls(order=order, place=order.argsort(), last=last)

    def arranged(self, indices: Tensor) -> tuple[Tensor, list[Piece]]:
        """Sort a batch's indices and cut it into pieces."""
        last, rows = self.last.index_select(0, indices).sort(stable=True)
        size = len(indices)
        each = -(-size // min(MOST_PIECES, max(1, size // PIECE)))
        ends = [min(start + each, size) for start in range(0, size, each)]
        needed = last[[end - 1 for end in ends]].tolist()
        pieces = [
            Piece(examples=slice(max(0, i * each), end), columns=columns)
            for i, (end, columns) in enumerate(zip(ends, needed, strict=True))
        ]
        return indices.index_select(0, rows), pieces


Pieces = Sequence[Sequence[Piece]]
"""Of each group's batch."""
