"""Inner products of mean gradients over groups of draws, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noisescale.measure.gradients import Inventory

_MOST_GROUPS = 32
# Above this many parameters gradients are sketched to the width below. (assumed: 32 vectors of
# 2^20 floats are 128 MB; a sketch of width m adds a relative variance of about 2/m to a product)
_LARGEST_EXACT = 1 << 20
_SKETCH_WIDTH = 1 << 18
_LEAST_WIDTH = 1 << 10
# Columns that are widened to float64 at a time.
_COLUMNS = 1 << 16

Array = npt.NDArray[np.float64]


class _Sketch:
    """Count-sketch: every coordinate goes to a random bucket with a random sign.

    Inner products of sketches are unbiased. Source: Charikar, Chen, Farach-Colton 2002.
    """

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        self.width = width
        self._bucket = torch.randint(width, (size,), generator=generator, dtype=torch.int32)
        self._sign = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1

    def __call__(self, vector: Tensor) -> Tensor:
        self._bucket = self._bucket.to(vector.device)
        self._sign = self._sign.to(vector.device)
        out = vector.new_zeros(self.width)
        return out.index_add_(0, self._bucket, vector * self._sign)


@dataclass(eq=False)
class _Group:
    """Sums over consecutive draws.

    Attributes:
        draws: how many.
        examples: in all of them.
        units: examples or micro-batches told apart.
        weighted: sum of b_i |m_i|^2 over the units; shape (parameters,).
        rows: examples * mean gradient per parameter group, maybe sketched.
    """

    draws: int
    examples: int
    units: int
    weighted: Array
    rows: dict[str, Tensor]

    def merge(self, other: _Group) -> None:
        self.draws += other.draws
        self.examples += other.examples
        self.units += other.units
        self.weighted = self.weighted + other.weighted
        self.rows = {name: row + other.rows[name] for name, row in self.rows.items()}


class MeanGradients:
    """Mean gradients and squared norms over at most 32 runs of consecutive draws, about equal.

    Args:
        inventory: whose seen parameters make the vectors.
        seed: of the sketch's own random state.
        largest_exact: parameters up to which no sketch is needed; default 2^20.
        sketch_width: total width of the sketches; default 2^18.
    """

    def __init__(
        self,
        inventory: Inventory,
        *,
        seed: int = 0,
        largest_exact: int | None = None,
        sketch_width: int | None = None,
    ) -> None:
        self._slots = inventory.slots
        self._blocks: dict[str, list[int]] = {}
        for index in inventory.seen:
            self._blocks.setdefault(self._slots[index].group, []).append(index)
        sizes = {g: sum(self._slots[i].tensor.numel() for i in b) for g, b in self._blocks.items()}
        total = sum(sizes.values())
        self.sketched = total > (largest_exact or _LARGEST_EXACT)
        generator = torch.Generator().manual_seed(seed)
        self._sketches: dict[str, _Sketch] = {}
        for group, size in sizes.items():
            width = max(_LEAST_WIDTH, (sketch_width or _SKETCH_WIDTH) * size // total)
            if self.sketched and size > width:
                self._sketches[group] = _Sketch(size, width, generator)
        self._groups: list[_Group] = []
        self._capacity = 1
        self._total: dict[str, Tensor] = {}

    def add(
        self, gradients: Mapping[int, Tensor], weighted: Array, *, examples: int, units: int
    ) -> None:
        """Add one draw.

        Args:
            gradients: its mean gradient per parameter index.
            weighted: sum of b_i |m_i|^2 over its units; shape (parameters,).
            examples: its size.
            units: units told apart in it.
        """
        rows = {}
        for name, vector in self._vectors(gradients, examples):
            before = self._total.get(name)
            self._total[name] = vector if before is None else before + vector
            rows[name] = self._sketches[name](vector) if name in self._sketches else vector
        self._append(_Group(1, examples, units, weighted, rows))

    def _append(self, draw: _Group) -> None:
        last = self._groups[-1] if self._groups else None
        # A group needs at least two units, or it has no spread of its own.
        if last is not None and (last.draws < self._capacity or last.units < 2):
            last.merge(draw)
            return
        if len(self._groups) == _MOST_GROUPS:
            for into, other in zip(self._groups[::2], self._groups[1::2], strict=True):
                into.merge(other)
            del self._groups[1::2]
            self._capacity *= 2
        self._groups.append(draw)

    @property
    def groups(self) -> list[_Group]:
        """The groups; a last one of less than half the size joins the one before."""
        if len(self._groups) > 1:
            before, last = self._groups[-2:]
            if 2 * last.examples < before.examples or last.units < 2:
                before.merge(last)
                self._groups.pop()
        return self._groups

    def _vectors(
        self, gradients: Mapping[int, Tensor], examples: int
    ) -> Iterator[tuple[str, Tensor]]:
        for name, block in self._blocks.items():
            parts = [
                gradients[i].reshape(-1)
                if i in gradients
                else torch.zeros_like(self._slots[i].tensor).reshape(-1)
                for i in block
            ]
            # Sums over many draws: float64 where the device has it, float32 at least.
            device = parts[0].device
            dtype = torch.float32 if device.type == "mps" or self.sketched else torch.float64
            yield name, torch.cat([p.detach().to(device, dtype) for p in parts]) * examples

    def _names(self, group: str | None) -> list[str]:
        return list(self._blocks) if group is None else [group]

    @property
    def examples(self) -> npt.NDArray[np.int64]:
        """Examples of each group: shape (K,)."""
        return np.array([group.examples for group in self.groups], np.int64)

    @property
    def units(self) -> npt.NDArray[np.int64]:
        """Units of each group: shape (K,)."""
        return np.array([group.units for group in self.groups], np.int64)

    def weighted_sq(self, group: str | None = None) -> Array:
        """Sum of b_i |m_i|^2 over each group's units: shape (K,)."""
        columns = [i for name in self._names(group) for i in self._blocks[name]]
        return np.array([part.weighted[columns].sum() for part in self.groups])

    def gram(self, group: str | None = None) -> Array:
        """Inner products of the groups' mean gradients: shape (K, K)."""
        sizes = self.examples.astype(np.float64)
        total = np.zeros((len(sizes), len(sizes)))
        for name in self._names(group):
            rows = torch.stack([part.rows[name] for part in self.groups])
            for part in torch.split(rows, _COLUMNS, dim=1):
                wide = part.cpu().double()
                total += (wide @ wide.T).numpy()
        return np.asarray(total / np.outer(sizes, sizes))

    def mean_sq(self, group: str | None = None) -> float:
        """|mean gradient over all draws|^2, exact also where products are sketched."""
        square = 0.0
        for name in self._names(group):
            for part in torch.split(self._total[name], _COLUMNS):
                square += float(part.cpu().double().square().sum())
        return square / float(self.examples.sum()) ** 2
