"""Measured steps: kept on the device while they are recent, floats per group afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.gradients import Inventory, StepNorms
from noisescale.theory.noise_scale import unbiased_moments

Array = npt.NDArray[np.float64]

# Steps that wait on the device before one bulk transfer moves them. (assumed)
_PENDING = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """One entry per measured, finite step.

    Attributes:
        step: shape (T,), optimizer steps done before it.
        examples: shape (T,), examples in the step, in the meter's unit.
        grad_sq: shape (T,), unbiased |G|^2.
        trace_cov: shape (T,), unbiased tr(Sigma) per unit of ``examples``.
    """

    step: npt.NDArray[np.int64]
    examples: Array
    grad_sq: Array
    trace_cov: Array

    def until(self, end: int) -> History:
        """Return the first ``end`` entries."""
        return History(
            step=self.step[:end],
            examples=self.examples[:end],
            grad_sq=self.grad_sq[:end],
            trace_cov=self.trace_cov[:end],
        )


class StepLog:
    """Squared norms of every measured step, per group; steps that are not finite are counted."""

    def __init__(self, inventory: Inventory) -> None:
        self.groups = list(dict.fromkeys(slot.group for slot in inventory.slots))
        self.skipped = 0
        self.restarts = 0
        self.largest_unit = 0
        self.unequal = False
        self._seen: list[int] = []
        self._inventory = inventory
        self._pending: list[tuple[int, float, StepNorms]] = []
        # Columns: step, examples, units, effective examples, weighted (G), mean (G).
        self._rows = np.zeros((0, 4 + 2 * len(self.groups)))
        self._chunks: list[Array] = []

    def add(self, step: int, norms: StepNorms, loss_scale: float) -> None:
        """Append a step whose gradients are ``loss_scale`` times the true ones.

        When a parameter was left out since the last step, the log starts again: steps over
        different parameters do not mix.
        """
        seen = self._inventory.seen
        if seen != self._seen and (self._pending or len(self)):
            self.clear()
            self.restarts += 1
        self._seen = seen
        self.largest_unit = max(self.largest_unit, norms.largest_unit)
        self.unequal |= norms.effective < norms.examples * (1 - 1e-9)
        self._pending.append((step, loss_scale, norms))
        if len(self._pending) >= _PENDING:
            self._flush()

    def clear(self) -> None:
        """Forget every step."""
        self._pending.clear()
        self._chunks.clear()
        self._rows = self._rows[:0]

    def _flush(self) -> None:
        if not self._pending:
            return
        norms = [n for _, _, n in self._pending]
        # One transfer for all of them; float64 only on the host, where every machine has it.
        weighted = torch.stack([n.weighted for n in norms]).cpu().double().numpy()
        mean = torch.stack([n.mean for n in norms]).cpu().double().numpy()
        scale = np.array([s for _, s, _ in self._pending]) ** -2.0
        weighted *= (scale * [n.weighted_factor for n in norms])[:, None]
        mean *= (scale * [n.mean_factor for n in norms])[:, None]
        finite = np.isfinite(weighted).all(1) & np.isfinite(mean).all(1)
        self.skipped += int((~finite).sum())
        counts = [[s, n.examples, n.units, n.effective] for s, _, n in self._pending]
        member = np.array(
            [[slot.group == group for group in self.groups] for slot in self._inventory.slots],
            dtype=np.float64,
        )
        rows = np.hstack(
            [np.array(counts, dtype=np.float64)[finite]]
            + [values[finite] @ member for values in (weighted, mean)]
        )
        self._chunks.append(rows)
        self._pending.clear()

    @property
    def rows(self) -> Array:
        """All finite steps, flushed: shape (T, 4 + 2 groups)."""
        self._flush()
        if self._chunks:
            self._rows = np.concatenate([self._rows, *self._chunks])
            self._chunks.clear()
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def history(
        self,
        group: str | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        population_size: int | None = None,
    ) -> History:
        """Compute the moments of the steps ``first:last``, of one group or of the whole model."""
        rows = self.rows[first:last]
        width = len(self.groups)
        columns = slice(None) if group is None else [self.groups.index(group)]
        if not len(rows):
            return History(
                step=np.zeros(0, np.int64),
                examples=np.zeros(0),
                grad_sq=np.zeros(0),
                trace_cov=np.zeros(0),
            )
        grad_sq, trace_cov = unbiased_moments(
            units=rows[:, 2],
            examples=rows[:, 3],
            weighted_sq=rows[:, 4 : 4 + width][:, columns].sum(1),
            mean_sq=rows[:, 4 + width :][:, columns].sum(1),
            population_size=population_size,
        )
        return History(
            step=rows[:, 0].astype(np.int64),
            examples=rows[:, 1].copy(),
            grad_sq=grad_sq,
            trace_cov=trace_cov,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values and one float64 tensor."""
        rows = torch.from_numpy(self.rows.copy())
        return {
            "groups": list(self.groups),
            "missing": self._inventory.missing,
            "skipped": self.skipped,
            "restarts": self.restarts,
            "largest_unit": self.largest_unit,
            "rows": rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            InvalidInputError: the state was taken with other groups.
        """
        if list(state["groups"]) != self.groups:
            raise InvalidInputError(
                f"state with groups {', '.join(state['groups'])}",
                f"the groups of this meter are {', '.join(self.groups)}",
                "make the meter with the same model and groups",
            )
        self.clear()
        for index, slot in enumerate(self._inventory.slots):
            if slot.name in state["missing"]:
                self._inventory.drop(index, state["missing"][slot.name])
        self._seen = self._inventory.seen
        self.skipped, self.restarts = int(state["skipped"]), int(state["restarts"])
        self.largest_unit = int(state["largest_unit"])
        self._rows = torch.as_tensor(state["rows"]).double().cpu().numpy().copy()
