"""Built-in workloads as the tuning benchmarks take them: shakespeare validates on part of its data.

A trial of shakespeare is nearly all evaluation on the full 1,742 validation sequences (0.5 s each
time, for 0.03 s of a step); on the first 256 of them, 16,384 characters, it is an eighth of that.
Decided before its first trial was run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisescale.run.resolve import resolve_workload
from noisescale.workload import Workload

EXAMPLES = {"shakespeare": 256}
"""First examples of the validation data, by workload; all of them for the others."""


def validated_in_part(name: str, data: Path | None, overrides: Mapping[str, Any]) -> Workload:
    """Return the workload that a sweep or an advice is asked for."""
    workload = resolve_workload(name, data=data, overrides=overrides)
    count = EXAMPLES.get(name)
    if count is None or workload.evaluate is None:
        return workload
    return dataclasses.replace(workload, evaluate=tuple(part[:count] for part in workload.evaluate))
