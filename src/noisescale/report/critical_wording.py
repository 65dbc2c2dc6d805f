"""A critical batch in words."""

from __future__ import annotations

from noisescale.records import CriticalBatch
from noisescale.report.wording import interval, number, outcome, percent, quantity

_BASIS = {
    "noise_scale": "gradient noise scale",
    "tradeoff": "steps-to-target curve",
    "branch": "branched runs",
}


def critical_point(critical: CriticalBatch) -> str:
    """State the critical batch in a few words."""
    if critical.point is not None:
        return quantity(critical.point, critical.unit)
    if critical.low is not None:
        return interval(critical.low, critical.high, critical.unit)
    return f"not determined ({outcome(critical.outcome)})"


def critical_lines(critical: CriticalBatch, level: float) -> list[tuple[str, str]]:
    """Return what stands under the critical batch: (name, value), the bands first."""
    if critical.basis != "noise_scale":
        return [
            (f"interval ({percent(level)})", interval(critical.low, critical.high)),
            ("basis", basis(critical)),
            ("phase", critical.phase),
        ]
    factor = f"{number(critical.factor)} ({interval(critical.factor_low, critical.factor_high)})"
    return [
        (
            f"sampling band ({percent(level)})",
            interval(critical.sampling_low, critical.sampling_high),
        ),
        ("with model error", interval(critical.low, critical.high)),
        ("basis", basis(critical)),
        ("phase", critical.phase),
        (f"factor for {critical.optimizer}", factor),
    ]


def basis(critical: CriticalBatch) -> str:
    """Name what a critical batch was read from."""
    return _BASIS.get(critical.basis, critical.basis)
