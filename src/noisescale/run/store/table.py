"""Results of trials as columns: NumPy for summaries, CSV for other programs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, Record


@dataclass(frozen=True)
class TrialTable:
    """One row per trial and target; all columns have the same length.

    Attributes:
        key: the trial's key.
        batch_size: global batch size, in the store's unit.
        lr: learning rate.
        seed: of the weights.
        outcome: of the trial, as :class:`~noisescale.records.TrialOutcome` spells it.
        steps: optimizer steps that the trial did.
        seconds: wall time of the trial.
        target: the goal.
        first: steps at the first passage; NaN if never.
        sustained: steps at the sustained crossing; NaN if none is known.
        closest: best value of the goal's quantity; NaN if none was finite.
    """

    key: NDArray[np.str_]
    batch_size: NDArray[np.int64]
    lr: NDArray[np.float64]
    seed: NDArray[np.int64]
    outcome: NDArray[np.str_]
    steps: NDArray[np.int64]
    seconds: NDArray[np.float64]
    target: NDArray[np.str_]
    first: NDArray[np.float64]
    sustained: NDArray[np.float64]
    closest: NDArray[np.float64]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Build the columns from results as plain dictionaries."""
        found = list(_cells(rows))
        columns = list(zip(*found, strict=True)) or [()] * len(_TYPES)
        return cls(
            *(np.array(column, dtype=kind) for column, kind in zip(columns, _TYPES, strict=True))
        )


_TYPES: tuple[type, ...] = (str, np.int64, float, np.int64, str, np.int64, float, str) + (
    float,
) * 3


def _cells(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        plan = row["plan"]
        recipe = plan["recipe"]
        trial = (
            row["key"],
            recipe["batch_size"],
            recipe["lr"],
            plan["seed"],
            row["outcome"],
            row["steps"],
            row["seconds"],
        )
        for crossing in row["crossings"]:
            yield (
                *trial,
                crossing["target"],
                crossing["first"],
                crossing["sustained"],
                crossing["closest"],
            )


@dataclass(frozen=True, kw_only=True)
class BatchSummary(Record):
    """How the trials of one batch size did at one target.

    Attributes:
        batch_size: global batch size.
        target: the goal.
        trials: how many there are.
        passed: how many passed the goal.
        sustained: how many passed it for good, as far as is known.
        fewest_steps: steps of the fastest first passage; None if none passed. The least of
            many draws: biased low, not an estimate of a tuned run's steps.
        outcomes: by outcome, how many trials ended so.
        closest_low: least of the trials' closest values; None if none was finite.
        closest_high: largest of them; the best one where the goal is a lower bound.
    """

    batch_size: int
    target: str
    trials: int
    passed: int
    sustained: int
    fewest_steps: float | None
    outcomes: dict[str, int]
    closest_low: float | None
    closest_high: float | None


def summarise(table: TrialTable) -> tuple[BatchSummary, ...]:
    """Return one summary per batch size and target, in increasing batch size."""
    targets, which = np.unique(table.target, return_inverse=True)
    sizes, size_of = np.unique(table.batch_size, return_inverse=True)
    group = size_of * max(len(targets), 1) + which
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return tuple(
        _summary(table, rows) for rows in np.split(order, starts[1:]) if len(sizes) and len(rows)
    )


def _summary(table: TrialTable, rows: NDArray[np.intp]) -> BatchSummary:
    first, closest = table.first[rows], table.closest[rows]
    passed = ~np.isnan(first)
    known = closest[~np.isnan(closest)]
    names, counts = np.unique(table.outcome[rows], return_counts=True)
    return BatchSummary(
        batch_size=int(table.batch_size[rows[0]]),
        target=str(table.target[rows[0]]),
        trials=len(rows),
        passed=int(passed.sum()),
        sustained=int((~np.isnan(table.sustained[rows])).sum()),
        fewest_steps=float(first[passed].min()) if passed.any() else None,
        outcomes={str(name): int(count) for name, count in zip(names, counts, strict=True)},
        closest_low=float(known.min()) if known.size else None,
        closest_high=float(known.max()) if known.size else None,
    )


_RECIPE = tuple(field.name for field in dataclasses.fields(Recipe) if field.name != "betas")
_FIRST = ("batch_size", "optimizer", "lr", "momentum")
_COLUMNS = (
    *_FIRST,
    "beta1",
    "beta2",
    *(name for name in _RECIPE if name not in _FIRST),
    "seed",
    "order_seed",
    "max_steps",
    "target",
    "first",
    "sustained",
    "closest",
    "outcome",
    "stopped_by",
    "steps",
    "seconds",
    "engine",
    "detail",
    "workload",
    "key",
)


def write_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one row per trial and target; the file appears whole or not at all.

    Raises:
        InvalidInputError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerows(_flat(row))
        os.replace(draft, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise InvalidInputError(
            f"table {str(path)!r}",
            f"it could not be written ({problem.strerror})",
            "give a path in a folder that exists and has room",
        ) from None


def _flat(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    plan = row["plan"]
    recipe = plan["recipe"]
    flat = {**recipe, **plan, **row}
    flat["beta1"], flat["beta2"] = recipe.get("betas") or (None, None)
    if recipe.get("schedule") is not None:
        flat["schedule"] = json.dumps(recipe["schedule"])
    for crossing in row["crossings"]:
        yield {**flat, **crossing}
