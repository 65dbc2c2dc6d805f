"""The results of a sweep on disk: append-only, keyed, one driver at a time.

A store is a folder: ``study.json`` (what it is of), ``trials.jsonl`` (one result per line, only
ever appended to), ``curves.jsonl`` (optional) and ``driver.lock``. ``pandas.read_json(...,
lines=True)`` reads the lines; :meth:`TrialStore.to_csv` writes flat columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import noisescale
from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.store.lock import DriverLock
from noisescale.run.store.log import AppendLog, SkippedLine, read_lines
from noisescale.run.store.study import (
    LOCK,
    STUDY,
    Study,
    create_study,
    read_study,
    require_ours,
    require_same,
)
from noisescale.run.store.table import BatchSummary, TrialTable, summarise, write_csv

TRIALS, CURVES = "trials.jsonl", "curves.jsonl"

UNFINISHED = frozenset({TrialOutcome.INTERRUPTED, TrialOutcome.CRASHED})
"""Outcomes that a later result of the same trial replaces."""


class TrialStore:
    """Results of trials by the key of their plan; see :meth:`open`.

    Reading needs no lock. Writing happens within :meth:`lock`.

    Attributes:
        path: the folder.
        study: what it is of.
        skipped: lines that could not be read; show them.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path = path
        self.study = study
        self.skipped: list[SkippedLine] = []
        self._lines: dict[str, bytes] = {}
        self._outcomes: dict[str, TrialOutcome] = {}
        self._lock = DriverLock(path / LOCK)
        self._depth = 0
        self._trials: AppendLog | None = None
        self._curves: AppendLog | None = None
        self._load()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        workload: str | None = None,
        version: str | None = None,
        unit: str = "examples",
    ) -> Self:
        """Open a store, or make a new one.

        Args:
            path: its folder; made when it is absent and a workload is given.
            workload: name and fingerprint of the workload whose trials it holds; None reads
                whatever store is there and makes none.
            version: of the package that trains; that of this package by default.
            unit: what batch sizes count.

        Raises:
            InvalidInputError: no store is there, or it is of another workload, version or unit,
                or the folder holds something else, or it cannot be written.
        """
        folder = Path(path).expanduser()
        version = noisescale.__version__ if version is None else version
        if workload is not None:
            require_ours(folder)
            if not (folder / STUDY).exists():
                create_study(folder, workload=workload, version=version, unit=unit)
        study = read_study(folder)
        if workload is not None:
            require_same(folder, study, workload=workload, version=version, unit=unit)
        return cls(folder, study)

    @contextmanager
    def lock(self) -> Iterator[Self]:
        """Be the one driver of this store: only then may results be appended.

        May be entered again by its holder.

        Raises:
            InvalidInputError: another driver has it.
        """
        if self._depth == 0:
            self._lock.acquire()
        self._depth += 1
        try:
            if self._depth == 1:
                # Another driver may have written since this store was read.
                self._load()
                self._trials = AppendLog(self.path / TRIALS)
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._close()

    def append(self, *results: TrialResult) -> None:
        """Add results; they are on disk when this returns.

        A result of a trial that is already here and finished is ignored, so that none counts
        twice.

        Raises:
            InvalidInputError: the disk is full or fails; what was written before is kept.
            RuntimeError: not within :meth:`lock`.
        """
        if self._trials is None:
            raise RuntimeError("append within `with store.lock():`")
        fresh: dict[str, tuple[bytes, TrialOutcome]] = {}
        curves = b""
        for result in results:
            key = result.plan.key
            held = fresh[key][1] if key in fresh else self._outcomes.get(key)
            if _supersedes(result.outcome, held):
                fresh[key] = (_line(key, result), result.outcome)
                curves += _curve_line(key, result)
        if curves:
            # Before the result: a curve without its result is harmless, the reverse a loss.
            self._curve_log().append(curves)
        if fresh:
            self._trials.append(b"".join(line for line, _ in fresh.values()))
        for key, (line, outcome) in fresh.items():
            self._lines[key], self._outcomes[key] = line, outcome

    def missing(
        self,
        plans: Iterable[TrialPlan],
        *,
        again: Iterable[TrialOutcome] = (TrialOutcome.INTERRUPTED,),
    ) -> list[TrialPlan]:
        """Return the plans still to be run, each once, in the order given.

        Args:
            plans: all that is wanted; what is here already counts.
            again: outcomes whose trials are run again.
        """
        repeated = frozenset(again)
        wanted = {plan.key: plan for plan in plans}
        return [
            plan
            for key, plan in wanted.items()
            if key not in self._outcomes or self._outcomes[key] in repeated
        ]

    def keys(self) -> set[str]:
        """Return the keys of all trials that are here and were not interrupted."""
        return {k for k, o in self._outcomes.items() if o is not TrialOutcome.INTERRUPTED}

    def __len__(self) -> int:
        """Count the trials, each once."""
        return len(self._lines)

    def outcome(self, key: str) -> TrialOutcome | None:
        """Return how a trial ended; None if it is not here."""
        return self._outcomes.get(key)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each trial's result as a plain dictionary, with its key; fast."""
        for line in list(self._lines.values()):
            yield json.loads(line)

    def results(self, keys: Iterable[str] | None = None) -> Iterator[TrialResult]:
        """Yield results as records, without their curves; keys that are not here are passed over.

        Args:
            keys: which ones, in this order; all by default.
        """
        for _, result in self.items(keys):
            yield result

    def items(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, TrialResult]]:
        """Yield what :meth:`results` does, each with its key, which need not be hashed anew."""
        for key in list(self._lines) if keys is None else keys:
            if key in self._lines:
                row = json.loads(self._lines[key])
                del row["key"]
                yield key, TrialResult.from_dict(row)

    def curves(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each kept curve: the key and ``evaluated_at`` and ``values`` by quantity.

        The last one written counts where a trial was run again.
        """
        found: dict[str, bytes] = {}
        for _, line in read_lines(self.path / CURVES):
            row = _parsed(line)
            if row is not None and row.get("key") in self._lines:
                found[row["key"]] = line
        for key, line in found.items():
            row = json.loads(line)
            yield key, {"evaluated_at": row["evaluated_at"], "values": row["values"]}

    def table(self) -> TrialTable:
        """Return the results as NumPy columns: one row per trial and target."""
        return TrialTable.from_rows(self.rows())

    def summary(self) -> tuple[BatchSummary, ...]:
        """Return how the trials of each batch size did at each target."""
        return summarise(self.table())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per trial and target, in flat columns that pandas reads.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        write_csv(self.rows(), Path(path))

    def _load(self) -> None:
        self.skipped.clear()
        self._lines.clear()
        self._outcomes.clear()
        for number, line in read_lines(self.path / TRIALS):
            row = _parsed(line)
            problem = _not_whole(line) if row is None else _what_is_wrong(row)
            if row is None or problem is not None:
                self.skipped.append(SkippedLine(TRIALS, number, str(problem)))
                continue
            key, outcome = row["key"], TrialOutcome(row["outcome"])
            if _supersedes(outcome, self._outcomes.get(key)):
                self._lines[key], self._outcomes[key] = line, outcome

    def _curve_log(self) -> AppendLog:
        if self._curves is None:
            self._curves = AppendLog(self.path / CURVES)
        return self._curves

    def _close(self) -> None:
        for log in (self._trials, self._curves):
            if log is not None:
                log.close()
        self._trials = self._curves = None
        self._lock.release()


def _supersedes(new: TrialOutcome, old: TrialOutcome | None) -> bool:
    """Whether a result replaces the one that is here: the first finished one stays.

    >>> _supersedes(TrialOutcome.DIVERGED, TrialOutcome.CRASHED)
    True
    >>> _supersedes(TrialOutcome.REACHED, TrialOutcome.NOT_REACHED)
    False
    """
    if old is None:
        return True
    if old is TrialOutcome.CRASHED and new is TrialOutcome.INTERRUPTED:
        return False
    return old in UNFINISHED


def _line(key: str, result: TrialResult) -> bytes:
    """One result as one line; absent keys of its recipe stay absent, curves go elsewhere."""
    row = {"key": key, **result.to_dict()}
    recipe = row["plan"]["recipe"]
    row["plan"]["recipe"] = {name: value for name, value in recipe.items() if value is not None}
    del row["evaluated_at"], row["values"]
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _curve_line(key: str, result: TrialResult) -> bytes:
    if not result.evaluated_at:
        return b""
    plain = result.to_dict()
    row = {"key": key, "evaluated_at": plain["evaluated_at"], "values": plain["values"]}
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _not_whole(line: bytes) -> str:
    return "not a JSON object" if line.endswith(b"\n") else "torn, its writer was killed"


_OUTCOMES = frozenset(outcome.value for outcome in TrialOutcome)


def _what_is_wrong(row: dict[str, Any]) -> str | None:
    """Say what a line lacks that every result has; None when nothing."""
    if not isinstance(row.get("key"), str):
        return "no key"
    if row.get("outcome") not in _OUTCOMES:
        return f"no known outcome ({row.get('outcome')!r})"
    plan = row.get("plan")
    if not isinstance(plan, dict) or not isinstance(plan.get("recipe"), dict):
        return "no plan"
    if not isinstance(row.get("crossings"), list):
        return "no crossings"
    return None
