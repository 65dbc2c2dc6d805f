"""The layout in which Shallue et al. published their 168,160 trials.

``BATCH_SIZE/study.json``, ``BATCH_SIZE/TRIAL/metadata.json`` and
``BATCH_SIZE/TRIAL/measurements.csv`` below a folder of one data set, model and optimizer.
"""

from __future__ import annotations

import csv
import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import TrialCurve, TrialOutcome

STATUSES = {
    "COMPLETE": TrialOutcome.NOT_REACHED,
    "INCOMPLETE": TrialOutcome.INTERRUPTED,
    "INFEASIBLE": TrialOutcome.DIVERGED,
}
"""What a trial's status says, apart from any goal. (paper)"""


def read_batch_science(path: str | PathLike[str], *, trials: int | None = None) -> list[TrialCurve]:
    """Read a workload's folder, or that of one of its studies.

    Args:
        path: a folder with ``study.json``, or one whose sub-folders have it.
        trials: complete trials to read of each study, in the order of their numbers; the paper
            takes 100 of most. The other trials before the last of them are read too. Default:
            all.

    Returns:
        Each trial with its evaluations. A complete trial has outcome ``not_reached`` until a
        goal is given (:func:`noisescale.formats.goals.rows_at_goal`).

    Raises:
        InvalidInputError: a file is missing or cannot be read; it is named.

    Source: README of google-research/batch_science (Shallue et al. 2019).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidInputError(f"{folder}", "is no folder", "give a workload's folder")
    studies = [folder] if (folder / "study.json").is_file() else _below(folder, "study.json")
    if not studies:
        raise InvalidInputError(
            f"{folder}",
            "neither it nor a folder in it has a study.json",
            "give DATASET/MODEL/OPTIMIZER of the published archive",
        )
    return [curve for study in studies for curve in _study(study, trials)]


def _below(folder: Path, name: str) -> list[Path]:
    """Return sub-folders that have the file, by number where they are numbers."""
    found = [child for child in folder.iterdir() if (child / name).is_file()]
    return sorted(found, key=lambda p: (int(p.name) if p.name.isdigit() else math.inf, p.name))


def _study(folder: Path, trials: int | None) -> list[TrialCurve]:
    study = _json(folder / "study.json")
    words = {k: study[k] for k in ("optimizer",) if isinstance(study.get(k), str)}
    batch_size = _whole(study, "batch_size", folder / "study.json")
    curves: list[TrialCurve] = []
    complete = 0
    for trial in _below(folder, "metadata.json"):
        if trials is not None and complete >= trials:
            break
        curve = _trial(trial, batch_size, words)
        curves.append(curve)
        complete += curve.outcome is TrialOutcome.NOT_REACHED
    if not curves:
        raise InvalidInputError(
            f"{folder}", "no folder in it has a metadata.json", "unpack the archive again"
        )
    return curves


def _trial(folder: Path, batch_size: int, words: dict[str, str]) -> TrialCurve:
    place = folder / "metadata.json"
    data = _json(place)
    status = data.get("status")
    if status not in STATUSES:
        raise InvalidInputError(
            f"{place}: status {status!r}",
            f"one of {', '.join(STATUSES)} is required",
            "correct or remove the trial",
        )
    parameters = data.get("parameters")
    if not isinstance(parameters, dict):
        raise InvalidInputError(
            f"{place}", "an object 'parameters' is required", "correct or remove the trial"
        )
    values = {_name(key): _plain(value) for key, value in parameters.items()}
    steps, metrics = _measurements(folder / "measurements.csv")
    return TrialCurve(
        batch_size=batch_size,
        values=values | words,
        seed=f"trial {data.get('trial_id', folder.name)}",
        outcome=STATUSES[status],
        steps=_whole(data, "steps", place),
        evaluated_at=steps,
        metrics=metrics,
    )


def _name(key: str) -> str:
    """Call the rate as recipes do."""
    return "lr" if key == "learning_rate" else key


def _plain(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else str(value)


def _measurements(
    path: Path,
) -> tuple[tuple[int, ...], dict[str, tuple[float | None, ...]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(
            f"{path}", f"cannot be read ({error})", "unpack the archive again"
        ) from None
    names = [cell.strip() for cell in rows[0]] if rows else []
    if "step" not in names:
        raise InvalidInputError(
            f"{path}", "a column 'step' is required", "correct or remove the trial"
        )
    try:
        cells = sorted(
            (tuple(_number(cell) for cell in row) for row in rows[1:]),
            key=lambda row: row[names.index("step")],
        )
        columns = {name: [row[i] for row in cells] for i, name in enumerate(names)}
        steps = tuple(int(step) for step in columns.pop("step"))
    except (ValueError, IndexError):
        raise InvalidInputError(
            f"{path}", "rows of numbers as long as the first line are required", "correct it"
        ) from None
    return steps, {
        name: tuple(value if math.isfinite(value) else None for value in series)
        for name, series in columns.items()
    }


def _number(cell: str) -> float:
    return float(cell) if cell.strip() else math.nan


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}", f"is no JSON ({error})", "unpack the archive again"
        ) from None
    if not isinstance(data, dict):
        raise InvalidInputError(f"{path}", "a JSON object is required", "unpack the archive again")
    return data


def _whole(data: dict[str, Any], key: str, path: Path) -> int:
    value = data.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise InvalidInputError(
            f"{path}: {key} {value!r}", "a whole number is required", "correct or remove it"
        )
    return int(value)
