"""noisescale: what batch size to use, what it costs, and what must change with it.

Importing this package imports neither torch nor scipy; what needs them is loaded when used.
"""

from __future__ import annotations

import importlib
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError, NoisescaleError
from noisescale.records import (
    Advice,
    BatchSplit,
    Measurement,
    NoiseScale,
    Outcome,
    Recipe,
    Target,
    Tradeoff,
)
from noisescale.records.conversion import print_by
from noisescale.records.serial import Record
from noisescale.workload import Workload

__version__ = "0.1.0"

_LAZY = {
    "NoiseMeter": "noisescale.measure.noise_scale",
    "measure_noise_scale": "noisescale.measure.noise_scale",
    "scan_speed": "noisescale.measure.speed",
    "fit_tradeoff": "noisescale.theory.tradeoff",
    "split_batch": "noisescale.plan.split",
    "convert": "noisescale.plan.convert",
    "plan_schedule": "noisescale.plan.schedule.plan",
    "advise": "noisescale.run.advise",
    "audit": "noisescale.run.audit",
    "branch": "noisescale.run.branch.driver",
    "measure_workload": "noisescale.run.measuring",
    "read_tradeoff": "noisescale.run.tradeoff_file",
    "sweep": "noisescale.run.sweep.driver",
}

__all__ = [
    "Advice",
    "BatchSplit",
    "InvalidInputError",
    "Measurement",
    "MissingExtraError",
    "NoiseMeter",
    "NoiseScale",
    "NoisescaleError",
    "Outcome",
    "Recipe",
    "Target",
    "Tradeoff",
    "Workload",
    "__version__",
    "advise",
    "audit",
    "branch",
    "convert",
    "fit_tradeoff",
    "measure_noise_scale",
    "measure_workload",
    "plan_schedule",
    "read_tradeoff",
    "scan_speed",
    "split_batch",
    "sweep",
]


def _conversion_text(conversion: Record) -> str:
    """Return what a terminal shows; rich is imported by the first one only."""
    report = importlib.import_module("noisescale.report.conversion_terminal")
    return str(report.conversion_text(conversion))


print_by(_conversion_text)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
