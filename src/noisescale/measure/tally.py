"""What a meter remembers besides its measured steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from noisescale.measure.verdict import SplitCost


@dataclass(eq=False)
class Tally:
    """Counters of one meter.

    Attributes:
        optimizer_steps: optimizer steps so far, measured or not.
        refused: steps that could not be measured.
        refusal: why, for the last of them.
        normalised: whether BatchNorm was in training mode inside the units.
        split_only: whether steps are measured by extra passes alone.
        split_cost: what those passes cost.
        modes: how the per-example norms of the measured steps were computed, each once.
    """

    optimizer_steps: int = 0
    refused: int = 0
    refusal: str = ""
    normalised: bool = False
    split_only: bool = False
    split_cost: SplitCost = field(default_factory=SplitCost)
    modes: list[str] = field(default_factory=list)

    def refuse(self, detail: str) -> None:
        """Count a step that could not be measured."""
        self.refused += 1
        self.refusal = detail

    def measured_by(self, mode: str) -> None:
        """Take note of a measured step's mode."""
        if mode not in self.modes:
            self.modes.append(mode)

    def mode_notes(self) -> list[str]:
        """Say where steps of several modes are averaged together."""
        if len(self.modes) < 2:
            return []
        return [f"steps of modes {' and '.join(self.modes)} are averaged together, all unbiased"]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**vars(self), "split_cost": list(self.split_cost), "modes": list(self.modes)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """Rebuild what :meth:`state_dict` returned, from a dictionary that may hold more."""
        return cls(
            optimizer_steps=int(state["optimizer_steps"]),
            refused=int(state["refused"]),
            refusal=str(state["refusal"]),
            normalised=bool(state["normalised"]),
            split_only=bool(state["split_only"]),
            split_cost=SplitCost(*state["split_cost"]),
            modes=list(state.get("modes", ())),
        )
