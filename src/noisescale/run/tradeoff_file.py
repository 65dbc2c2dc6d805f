"""The function behind ``noisescale tradeoff``: a CSV of batch sizes and steps to a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from noisescale.errors import InvalidInputError, nearest
from noisescale.formats.csv_lines import csv_lines
from noisescale.records import Tradeoff
from noisescale.theory.runs_checked import LARGEST
from noisescale.theory.tradeoff import fit_tradeoff

_REQUIRED = ("batch_size", "steps")
_WORDS = {"true": True, "1": True, "false": False, "0": False, "": False}


def read_tradeoff(
    path: str | PathLike[str],
    level: float = 0.95,
    *,
    target: str | None = None,
    unit: str = "examples",
) -> Tradeoff:
    """Fit the steps law to a CSV file, or to the store of a sweep.

    Columns ``batch_size`` and ``steps``; optionally ``censored`` (true/false/1/0: the target
    was not reached within ``steps``), ``target`` (the goal's name) and others such as ``seed``,
    which are not read. A byte-order mark, spaces and blank lines do no harm. A folder is taken
    for a store: each batch size is tuned over its trials first.

    Args:
        path: the file, comma-separated, UTF-8; or a store's folder.
        level: confidence level of each interval, between 0 and 1.
        target: which goal's rows to fit; needed where the file holds several.
        unit: what batch sizes count.

    Returns:
        The fit of :func:`noisescale.fit_tradeoff`.

    Raises:
        InvalidInputError: the file cannot be read, holds fewer than two rows, lacks a column,
            holds a value that cannot be used (row and column are named), holds several
            targets without a choice, or all batch sizes are equal.
    """
    if Path(path).is_dir():
        return _of_store(Path(path), level=level, target=target)
    runs = [_run(row) for row in _rows(Path(path))]
    runs, chosen = _of_target(runs, target, str(path))
    if len(runs) < 2:
        raise InvalidInputError(
            f"{path}: {len(runs)} row{'s' * (len(runs) != 1)}",
            "runs at two or more batch sizes are required",
            "add runs at other batch sizes",
        )
    return fit_tradeoff(
        batch_size=[run.batch_size for run in runs],
        steps=[run.steps for run in runs],
        censored=[run.censored for run in runs],
        level=level,
        target=chosen,
        unit=unit,
    )


def _of_store(path: Path, *, level: float, target: str | None) -> Tradeoff:
    """Tune each batch size of a store, and fit the law to that."""
    from noisescale.run.store import TrialStore
    from noisescale.theory.sweep_curve import sweep_curve
    from noisescale.theory.trial_table import trial_rows

    store = TrialStore.open(path)
    found = list(store.results())
    names = sorted({name for result in found for name in result.plan.targets})
    if target is None and len(names) > 1:
        raise _several(str(path), names)
    if not names:
        raise InvalidInputError(
            f"store {str(path)!r}", "it holds no trial yet", "run noisescale sweep with it first"
        )
    if target is not None and target not in names:
        raise InvalidInputError(
            f"{path}: target {target!r}", "no trial has it", nearest(target, names)
        )
    rows = trial_rows(found, target=target or names[0])
    curve = sweep_curve(rows, target=target or names[0], level=level, unit=store.study.unit)
    if curve.tradeoff is None:
        raise InvalidInputError(
            f"{path}: {curve.detail or 'one batch size'}",
            "tuned steps at two or more batch sizes are required",
            "run noisescale sweep at other batch sizes",
        )
    return curve.tradeoff


def _several(path: str, names: Sequence[str]) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: targets {', '.join(names)}",
        "rows of one target are required",
        f"select one, for example target={names[-1]!r}",
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of the file: its cells by column name, and where it stands."""

    place: str
    cells: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Run:
    batch_size: float
    steps: float
    censored: bool
    target: str | None


def _rows(path: Path) -> list[_Row]:
    lines = csv_lines(path)
    if not lines:
        raise InvalidInputError(
            f"{path}", "is empty", "give a CSV file with columns batch_size and steps"
        )
    names = _header(lines[0][1], path)
    return [_row(number, cells, names, path) for number, cells in lines[1:]]


def _header(cells: Sequence[str], path: Path) -> list[str]:
    names = [cell.lower() for cell in cells]
    for required in _REQUIRED:
        if names.count(required) != 1:
            problem = "missing" if required not in names else "given twice"
            raise InvalidInputError(
                f"{path}: column {required}",
                f"{problem} (the first line reads {', '.join(cells)})",
                "name the comma-separated columns batch_size, steps",
            )
    return names


def _row(number: int, cells: Sequence[str], names: Sequence[str], path: Path) -> _Row:
    if len(cells) != len(names):
        raise InvalidInputError(
            f"{path}: row {number}",
            f"{len(names)} cells are required, {len(cells)} are there",
            "fill or remove the row",
        )
    return _Row(place=f"{path}: row {number}", cells=dict(zip(names, cells, strict=True)))


def _run(row: _Row) -> _Run:
    return _Run(
        batch_size=_number(row, "batch_size"),
        steps=_number(row, "steps"),
        censored=_truth(row, "censored"),
        target=row.cells.get("target") or None,
    )


def _number(row: _Row, column: str) -> float:
    text = row.cells[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 / LARGEST <= value <= LARGEST:
        raise InvalidInputError(
            f"{row.place}, column {column}: {text!r}",
            f"a positive number of at most {LARGEST:g} is required",
            "correct or remove the row",
        )
    return value


def _truth(row: _Row, column: str) -> bool:
    text = row.cells.get(column, "")
    if text.lower() not in _WORDS:
        raise InvalidInputError(
            f"{row.place}, column {column}: {text!r}",
            "true, false, 1 or 0 is required",
            "correct or remove the row",
        )
    return _WORDS[text.lower()]


def _of_target(
    runs: Sequence[_Run], target: str | None, path: str
) -> tuple[list[_Run], str | None]:
    """Keep the rows of one target; rows without a name form a target of their own."""
    names = sorted({run.target or "(none)" for run in runs})
    if target is None:
        if len(names) > 1:
            raise _several(path, names)
        return list(runs), runs[0].target if runs else None
    kept = [run for run in runs if run.target == target]
    if not kept:
        named = {run.target for run in runs if run.target}
        remedy = nearest(target, named) if named else "leave the target out: the file names none"
        raise InvalidInputError(f"{path}: target {target!r}", "no row has it", remedy)
    return kept, target
