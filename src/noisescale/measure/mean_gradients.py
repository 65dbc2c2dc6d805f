"""Inner products of mean gradients over groups of draws, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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


class MeanGradients:
    """Sums of gradients over at most 32 runs of consecutive draws, and over all of them.

    Args:
        inventory: whose seen parameters make the vectors.
        seed: of the sketch's own random state.
        largest_exact: parameters up to which no sketch is needed.
        sketch_width: total width of the sketches.
    """

    def __init__(
        self,
        inventory: Inventory,
        *,
        seed: int = 0,
        largest_exact: int = _LARGEST_EXACT,
        sketch_width: int = _SKETCH_WIDTH,
    ) -> None:
        self._slots = inventory.slots
        self._blocks: dict[str, list[int]] = {}
        for index in inventory.seen:
            self._blocks.setdefault(self._slots[index].group, []).append(index)
        sizes = {g: sum(self._slots[i].tensor.numel() for i in b) for g, b in self._blocks.items()}
        total = sum(sizes.values())
        self.sketched = total > largest_exact
        generator = torch.Generator().manual_seed(seed)
        self._sketches: dict[str, _Sketch] = {}
        for group, size in sizes.items():
            width = max(1024, sketch_width * size // total)
            if self.sketched and size > width:
                self._sketches[group] = _Sketch(size, width, generator)
        self._sums: list[dict[str, Tensor]] = []
        self._total: dict[str, Tensor] = {}
        self.examples: list[int] = []

    def add(self, gradients: Mapping[int, Tensor], examples: int) -> None:
        """Add the mean gradient of one draw of ``examples``."""
        row = {}
        for group, vector in self._vectors(gradients, examples):
            before = self._total.get(group)
            self._total[group] = vector if before is None else before + vector
            row[group] = self._sketches[group](vector) if group in self._sketches else vector
        self._sums.append(row)
        self.examples.append(examples)
        if len(self._sums) > _MOST_GROUPS:
            self._merge()

    def _vectors(
        self, gradients: Mapping[int, Tensor], examples: int
    ) -> Iterator[tuple[str, Tensor]]:
        for group, block in self._blocks.items():
            parts = [
                gradients[i].reshape(-1)
                if i in gradients
                else torch.zeros_like(self._slots[i].tensor).reshape(-1)
                for i in block
            ]
            # Sums over many draws: float64 where the device has it, float32 at least.
            device = parts[0].device
            dtype = torch.float32 if device.type == "mps" or self.sketched else torch.float64
            yield group, torch.cat([p.detach().to(device, dtype) for p in parts]) * examples

    def _merge(self) -> None:
        """Add up neighbours: draws stay in order, so drift between groups stays visible."""
        merged = self._sums[::2]
        for into, row in zip(merged, self._sums[1::2], strict=False):
            for group, vector in row.items():
                into[group] = into[group] + vector
        self._sums = merged
        self.examples = [sum(self.examples[i : i + 2]) for i in range(0, len(self.examples), 2)]

    def gram(self, group: str | None = None) -> npt.NDArray[np.float64]:
        """Inner products of the groups' mean gradients: shape (K, K)."""
        total = np.zeros((len(self._sums), len(self._sums)))
        for name in self._blocks if group is None else [group]:
            rows = torch.stack([row[name] for row in self._sums])
            for part in torch.split(rows, 1 << 16, dim=1):
                wide = part.cpu().double()
                total += (wide @ wide.T).numpy()
        sizes = np.asarray(self.examples, np.float64)
        return np.asarray(total / np.outer(sizes, sizes))

    def mean_sq(self, group: str | None = None) -> float:
        """|mean gradient over all draws|^2, exact also where products are sketched."""
        names = self._blocks if group is None else [group]
        square = 0.0
        for name in names:
            for part in torch.split(self._total[name], 1 << 20):
                square += float(part.cpu().double().square().sum())
        return square / sum(self.examples) ** 2
