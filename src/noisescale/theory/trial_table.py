"""Trials of one batch size as a table: hyper-parameter points by seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, TrialOutcome, TrialResult, TrialRow

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FAILED = (TrialOutcome.CRASHED, TrialOutcome.INTERRUPTED, TrialOutcome.INFEASIBLE_MEMORY)
"""Outcomes that say nothing about the steps to the target."""
COMPLEMENTS = ("momentum", "beta", "ema")
"""Averages: what counts is the logarithm of 1 - value (their length). (assumed)"""
REPEAT = "repeat "
"""Begins the names of repeats that share no seed with other points."""
NOT_TUNED = frozenset(
    {
        "batch_size",
        "unit",
        "sequence_length",
        "dataset_size",
        "total_steps",
        "total_examples",
        "evaluate_every",
    }
)
"""Keys of a recipe that a search does not choose."""


def trial_rows(
    results: Iterable[TrialResult], *, target: str, crossing: str = "first"
) -> list[TrialRow]:
    """Say of each trial when it passed one target.

    Args:
        results: trials of a sweep.
        target: as the trials' plans spell it.
        crossing: ``first`` passage, or ``sustained``.

    Returns:
        A row for each trial whose plan holds the target. A trial that passed it counts as
        reached however it ended later.

    Raises:
        InvalidInputError: the crossing is unknown.
    """
    if crossing not in ("first", "sustained"):
        raise InvalidInputError(
            f"crossing {crossing!r}", "first or sustained is required", "write first"
        )
    rows = []
    for result in results:
        for passed in result.crossings:
            if passed.target == target:
                at = passed.first if crossing == "first" else passed.sustained
                rows.append(_row(result, at, passed.closest))
    return rows


def _row(result: TrialResult, at: float | None, closest: float | None) -> TrialRow:
    outcome = result.outcome if at is None else TrialOutcome.REACHED
    if at is None and outcome is TrialOutcome.REACHED:
        # Stopped on the strength of first passages, too early to tell a sustained one.
        outcome = TrialOutcome.NOT_REACHED
    return TrialRow(
        batch_size=result.plan.recipe.batch_size,
        values=hyper_parameters(result.plan.recipe),
        seed=f"{result.plan.seed}/{result.plan.order_seed}",
        outcome=outcome,
        steps=float(result.steps) if at is None else at,
        closest=closest,
    )


def hyper_parameters(recipe: Recipe) -> dict[str, Any]:
    """Return the searched keys of a recipe: numbers by name, anything else as a word.

    >>> hyper_parameters(Recipe(optimizer="adam", lr=0.1, batch_size=8, betas=(0.9, 0.99)))
    {'optimizer': 'adam', 'lr': 0.1, 'beta1': 0.9, 'beta2': 0.99}
    """
    values: dict[str, Any] = {}
    for name in _TUNED:
        value = getattr(recipe, name)
        if value is None:
            continue
        if name == "betas":
            values["beta1"], values["beta2"] = value
        else:
            values[name] = float(value) if _is_number(value) else str(value)
    return values


_TUNED = tuple(key.name for key in fields(Recipe) if key.name not in NOT_TUNED)

Point = tuple[tuple[str, Any], ...]


def point_of(row: TrialRow) -> Point:
    """Return a name of the hyper-parameter point: equal for trials that differ in their seed."""
    return tuple(sorted(row.values.items()))


@dataclass(frozen=True, kw_only=True)
class TrialTable:
    """Trials of one batch size, in one family of words (the same optimizer and schedule).

    Attributes:
        points: hyper-parameter values of each row.
        names: searched hyper-parameters (those that vary), one per column of ``places``.
        places: shape (points, names), coordinates: the logarithm where that makes sense.
        seeds: name of each column.
        logs: shape (points, seeds), log steps where reached, log of the steps run where not
            reached, NaN where nothing was run.
        reached: shape (points, seeds).
        censored: shape (points, seeds), not reached.
        diverged: shape (points, seeds).
    """

    points: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    places: Array
    seeds: tuple[str, ...]
    logs: Array
    reached: Mask
    censored: Mask
    diverged: Mask

    @property
    def run(self) -> Array:
        """Trials of each point that say something, shape (points,)."""
        counts: Array = (self.reached | self.censored | self.diverged).sum(axis=1).astype(float)
        return counts


def tables(rows: Sequence[TrialRow]) -> list[TrialTable]:
    """Arrange the trials of one batch size, one table for each family of words.

    Trials that failed are left out. Where no two points share a seed, repeats are numbered.

    Raises:
        InvalidInputError: a trial reached the target at step 0 or earlier.
    """
    families: dict[Point, list[tuple[Point, TrialRow]]] = {}
    known: dict[Point, Point] = {}
    for row in rows:
        if row.outcome in FAILED:
            continue
        if not row.steps > 0 and row.outcome is TrialOutcome.REACHED:
            raise InvalidInputError(
                f"steps {row.steps:g} at batch size {row.batch_size}",
                "a target that is not passed before the first step is required",
                "choose a harder target",
            )
        point = point_of(row)
        words = known.get(point)
        if words is None:
            words = known[point] = tuple((k, v) for k, v in point if not _is_number(v))
        families.setdefault(words, []).append((point, row))
    return [_table(family) for family in families.values()]


def _table(named: Sequence[tuple[Point, TrialRow]]) -> TrialTable:
    keys, rows = [point for point, _ in named], [row for _, row in named]
    at = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    points = {at[key]: row.values for key, row in zip(keys, rows, strict=True)}
    seeds = _columns(rows, [at[key] for key in keys])
    column = {seed: index for index, seed in enumerate(dict.fromkeys(seeds))}
    shape = (len(at), len(column))
    logs, states = np.full(shape, np.nan), np.zeros((3, *shape), dtype=bool)
    state = {
        TrialOutcome.REACHED: 0,
        TrialOutcome.NOT_REACHED: 1,
        TrialOutcome.DIVERGED: 2,
    }
    for key, seed, row in zip(keys, seeds, rows, strict=True):
        i, j = at[key], column[seed]
        logs[i, j] = math.log(max(row.steps, 1e-9))
        states[:, i, j] = False
        states[state[row.outcome], i, j] = True
    ordered = tuple(points[index] for index in range(len(at)))
    names, places = coordinates(ordered)
    return TrialTable(
        points=ordered,
        names=names,
        places=places,
        seeds=tuple(column),
        logs=logs,
        reached=states[0],
        censored=states[1],
        diverged=states[2],
    )


def _columns(rows: Sequence[TrialRow], at: Sequence[int]) -> list[str]:
    """Return the seeds' names, or repeats' numbers where no two points share a seed."""
    users: dict[str, set[int]] = {}
    for row, index in zip(rows, at, strict=True):
        users.setdefault(row.seed, set()).add(index)
    if any(len(points) > 1 for points in users.values()) or len(set(at)) == 1:
        return [row.seed for row in rows]
    counts: dict[int, int] = {}
    numbers = []
    for index in at:
        counts[index] = counts.get(index, 0) + 1
        numbers.append(f"{REPEAT}{counts[index]}")
    return numbers


def coordinates(points: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], Array]:
    """Return the hyper-parameters that vary and their coordinates, shape (points, names).

    The logarithm of positive values, log(1 - value) of averages such as momentum, else the
    value over the largest.

    >>> coordinates([{"lr": 1.0, "momentum": 0.9}, {"lr": 2.0, "momentum": 0.9}])[0]
    ('lr',)
    """
    shared = [k for k in points[0] if all(_is_number(p.get(k)) for p in points)]
    columns = {k: np.array([float(p[k]) for p in points]) for k in shared}
    varying = {k: v for k, v in columns.items() if np.ptp(v) > 1e-12 * np.abs(v).max()}
    places = [_scaled(name, values) for name, values in varying.items()]
    stacked = np.stack(places, axis=1) if places else np.zeros((len(points), 0))
    return tuple(varying), stacked


def _scaled(name: str, values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        if any(word in name for word in COMPLEMENTS) and (values < 1).all():
            return -np.log1p(-values)
        scaled: Array = np.log(values) if (values > 0).all() else values / np.abs(values).max()
        return scaled


def unscaled(name: str, place: float, values: Array) -> float:
    """Turn a coordinate back into a value of the hyper-parameter."""
    if any(word in name for word in COMPLEMENTS) and (values < 1).all():
        return float(-np.expm1(-place))
    return float(np.exp(place)) if (values > 0).all() else float(place * np.abs(values).max())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
