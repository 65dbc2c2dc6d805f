"""Any CSV of trials: one row per trial, its columns named by the user or guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.formats.csv_lines import csv_lines
from noisescale.records import TrialOutcome, TrialRow

ROLES = {
    "batch_size": ("batch_size", "global_batch_size", "train_batch_size", "batch", "bs"),
    "passed": ("steps_to_target", "steps_to_result", "first", "sustained"),
    "steps": ("steps", "step", "num_steps", "iterations", "train_steps"),
    "seed": ("seed", "random_seed", "run", "replicate", "trial_id", "trial"),
    "outcome": ("outcome", "status"),
    "censored": ("censored",),
    "reached": ("reached", "success"),
    "target": ("target", "goal"),
    "closest": ("closest", "best_value"),
}
"""What the analysis needs, and the names by which files call it, the likeliest first."""

OUTCOMES = {
    "reached": TrialOutcome.REACHED,
    "success": TrialOutcome.REACHED,
    "not_reached": TrialOutcome.NOT_REACHED,
    "complete": TrialOutcome.NOT_REACHED,
    "completed": TrialOutcome.NOT_REACHED,
    "censored": TrialOutcome.NOT_REACHED,
    "diverged": TrialOutcome.DIVERGED,
    "infeasible": TrialOutcome.DIVERGED,
    "nan": TrialOutcome.DIVERGED,
    "infeasible_memory": TrialOutcome.INFEASIBLE_MEMORY,
    "oom": TrialOutcome.INFEASIBLE_MEMORY,
    "crashed": TrialOutcome.CRASHED,
    "failed": TrialOutcome.CRASHED,
    "interrupted": TrialOutcome.INTERRUPTED,
    "incomplete": TrialOutcome.INTERRUPTED,
}
NOT_TUNED = frozenset(
    {
        "key",
        "order_seed",
        "max_steps",
        "stopped_by",
        "seconds",
        "engine",
        "detail",
        "evaluate_share",
        "hold",
        "workload",
        "examples",
        "epochs",
        "unit",
        "dataset_size",
        "sequence_length",
        "total_steps",
        "total_examples",
        "date",
        "time",
        "evaluate_every",
    }
)
"""Columns that are taken for no hyper-parameter unless they are named as one."""
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "")


def read_trials(
    path: str | PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    hyper_parameters: Sequence[str] | None = None,
    target: str | None = None,
    crossing: str = "first",
) -> list[TrialRow]:
    """Read a CSV of trials.

    Needed: the batch size, and the steps to the target. ``passed`` holds those alone (empty
    where never, then ``steps`` says how long the trial ran); without it ``steps`` means steps
    to the target, or steps run where ``outcome``, ``censored`` or ``reached`` says so.

    Args:
        path: the file, comma-separated, UTF-8, names in the first line.
        columns: the file's name of ``batch_size``, ``passed``, ``steps``, ``seed``,
            ``outcome``, ``censored``, ``reached``, ``target`` or ``closest``, where it is not
            one of the usual (``ROLES``).
        hyper_parameters: the columns that were searched; default: all other columns that are
            not known to be something else.
        target: which goal's rows to read; needed where the file holds several.
        crossing: ``first`` or ``sustained``, where the file has columns of these names.

    Returns:
        One row per trial.

    Raises:
        InvalidInputError: the file cannot be read, a column is missing, a cell cannot be used
            (line and column are named), or there are several targets without a choice.
    """
    place = Path(path)
    names, lines = _lines(place)
    roles = _roles(names, dict(columns or {}), crossing, place)
    searched = _searched(names, roles, hyper_parameters, place)
    rows = [(number, dict(zip(names, cells, strict=True))) for number, cells in lines]
    rows = _of_target(rows, roles.get("target"), target, place)
    return [_row(cells, roles, searched, f"{place}: line {number}") for number, cells in rows]


_Line = tuple[int, dict[str, str]]


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    lines = csv_lines(path)
    if len(lines) < 2:
        raise InvalidInputError(
            f"{path}", "a line of names and one per trial are required", "give a CSV of trials"
        )
    names = lines[0][1]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInputError(f"{path}: column {twice}", "given twice", "rename one")
    for number, cells in lines[1:]:
        if len(cells) != len(names):
            raise InvalidInputError(
                f"{path}: line {number}",
                f"{len(names)} cells are required, {len(cells)} are there",
                "fill or remove the line",
            )
    return names, lines[1:]


def _roles(
    names: Sequence[str], columns: dict[str, str], crossing: str, path: Path
) -> dict[str, str]:
    for role, name in columns.items():
        if role not in ROLES:
            raise InvalidInputError(f"columns: {role!r}", "no such role", nearest(role, ROLES))
        if name not in names:
            raise InvalidInputError(f"{path}: column {name!r}", "missing", nearest(name, names))
    lower = {name.lower(): name for name in reversed(names)}
    other = {"first": "sustained", "sustained": "first"}.get(crossing, "")
    roles = dict(columns)
    for role, usual in ROLES.items():
        known = [lower[name] for name in usual if name in lower and name != other]
        free = [name for name in known if name not in roles.values()]
        if role not in roles and free:
            roles[role] = free[0]
    if "batch_size" not in roles or not {"steps", "passed"} & set(roles):
        missing = "steps" if "batch_size" in roles else "batch_size"
        raise InvalidInputError(
            f"{path}: column {missing}",
            f"missing (the first line reads {', '.join(names)})",
            f'name it, for example columns={{"{missing}": "{names[0]}"}}',
        )
    return roles


def _searched(
    names: Sequence[str], roles: Mapping[str, str], chosen: Sequence[str] | None, path: Path
) -> list[str]:
    if chosen is not None:
        for name in chosen:
            if name not in names:
                raise InvalidInputError(f"{path}: column {name!r}", "missing", nearest(name, names))
        return list(chosen)
    usual = {name for role in ROLES.values() for name in role}
    taken = set(roles.values()) | NOT_TUNED | usual
    return [name for name in names if name not in taken and name.lower() not in taken]


def _of_target(
    rows: list[_Line], column: str | None, target: str | None, path: Path
) -> list[_Line]:
    if column is None:
        if target is not None:
            raise InvalidInputError(
                f"{path}: target {target!r}", "the file names no targets", "leave it out"
            )
        return rows
    known = sorted({cells[column] for _, cells in rows})
    if target is None and len(known) > 1:
        raise InvalidInputError(
            f"{path}: targets {', '.join(known)}",
            "rows of one target are required",
            f"select one, for example target={known[-1]!r}",
        )
    chosen = known[0] if target is None else target
    if chosen not in known:
        raise InvalidInputError(
            f"{path}: target {chosen!r}", "no line has it", nearest(chosen, known)
        )
    return [(number, cells) for number, cells in rows if cells[column] == chosen]


def _row(
    cells: Mapping[str, str], roles: Mapping[str, str], searched: Sequence[str], place: str
) -> TrialRow:
    outcome, steps = _outcome(cells, roles, place)
    closest = cells.get(roles.get("closest", ""), "")
    return TrialRow(
        batch_size=round(_positive(cells, roles["batch_size"], place)),
        values={_name(name): _plain(cells[name]) for name in searched if cells[name]},
        seed=cells.get(roles.get("seed", ""), "") or place,
        outcome=outcome,
        steps=steps,
        closest=_plain(closest) if isinstance(_plain(closest), float) else None,
    )


def _outcome(
    cells: Mapping[str, str], roles: Mapping[str, str], place: str
) -> tuple[TrialOutcome, float]:
    said = _said(cells, roles, place)
    if cells.get(roles.get("passed", "")):
        return TrialOutcome.REACHED, _positive(cells, roles["passed"], place)
    if "passed" in roles and said in (None, TrialOutcome.REACHED):
        said = TrialOutcome.NOT_REACHED
    outcome = TrialOutcome.REACHED if said is None else said
    if outcome not in (TrialOutcome.REACHED, TrialOutcome.NOT_REACHED):
        return outcome, _optional(cells.get(roles.get("steps", ""), ""))
    if "steps" not in roles:
        raise InvalidInputError(
            f"{place}, column {roles['passed']}: empty",
            "a column with the steps that were run is required where the target was not reached",
            'add it and name it columns={"steps": ...}',
        )
    return outcome, _positive(cells, roles["steps"], place)


def _said(cells: Mapping[str, str], roles: Mapping[str, str], place: str) -> TrialOutcome | None:
    """Return what the file says of the outcome; None where it says nothing."""
    if word := cells.get(roles.get("outcome", ""), "").lower().replace(" ", "_"):
        if word not in OUTCOMES:
            raise InvalidInputError(
                f"{place}, column {roles['outcome']}: {word!r}",
                "no outcome that is known",
                nearest(word, OUTCOMES),
            )
        return OUTCOMES[word]
    for role, if_true, if_false in (
        ("censored", TrialOutcome.NOT_REACHED, TrialOutcome.REACHED),
        ("reached", TrialOutcome.REACHED, TrialOutcome.NOT_REACHED),
    ):
        if role in roles:
            return if_true if _truth(cells, roles[role], place) else if_false
    return None


def _truth(cells: Mapping[str, str], column: str, place: str) -> bool:
    text = cells[column].lower()
    if text not in _TRUE + _FALSE:
        raise InvalidInputError(
            f"{place}, column {column}: {text!r}", "true or false is required", "correct it"
        )
    return text in _TRUE


def _positive(cells: Mapping[str, str], column: str, place: str) -> float:
    value = _optional(cells[column])
    if not 0 < value < math.inf:
        raise InvalidInputError(
            f"{place}, column {column}: {cells[column]!r}",
            "a positive number is required",
            "correct or remove the line",
        )
    return value


def _optional(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _plain(text: str) -> Any:
    value = _optional(text)
    return value if math.isfinite(value) else text


def _name(column: str) -> str:
    """Call the rate as recipes do."""
    return "lr" if column.lower() in ("lr", "learning_rate", "eta", "rate") else column
