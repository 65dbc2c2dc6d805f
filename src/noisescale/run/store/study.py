"""What a store is of: its study.json, which refuses what does not belong in it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from noisescale.errors import InvalidInputError
from noisescale.records import Record
from noisescale.run.store.lock import DriverLock
from noisescale.run.store.log import cannot_write, sync_folder

FORMAT = 1
"""Raised whenever a store written before could be misread."""

STUDY, LOCK = "study.json", "driver.lock"


@dataclass(frozen=True, kw_only=True)
class Study(Record):
    """What a store is of.

    Attributes:
        workload: the workload's name and fingerprint, as its plans spell it.
        unit: what batch sizes count.
        noisescale: version of the package that trains the trials.
        format: of the files.
        created: when, in UTC.
    """

    workload: str
    unit: str
    noisescale: str
    format: int
    created: str


def require_ours(folder: Path) -> None:
    """Refuse a folder that holds something else, before anything is written there."""
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(
            f"store {str(folder)!r}", "a folder is required, this is a file", "give another path"
        )
    if not folder.exists() or (folder / STUDY).exists():
        return
    # A driver killed while it made the store leaves its lock, or half of study.json.
    foreign = [f.name for f in folder.iterdir() if f.name not in (LOCK, f".{STUDY}")]
    if foreign:
        raise InvalidInputError(
            f"store {str(folder)!r}",
            f"the folder is no store (it holds {sorted(foreign)[0]!r} and no {STUDY})",
            "give a new or an empty folder",
        )


def create_study(folder: Path, *, workload: str, version: str, unit: str) -> None:
    """Make the folder and its study.json, which appears whole or not at all."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    study = Study(workload=workload, unit=unit, noisescale=version, format=FORMAT, created=now)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    lock = DriverLock(folder / LOCK)
    lock.acquire()
    try:
        if not (folder / STUDY).exists():
            _write_whole(folder / STUDY, study.to_json(indent=2) + "\n")
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    finally:
        lock.release()


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def read_study(folder: Path) -> Study:
    """Read what a store is of.

    Raises:
        InvalidInputError: there is none, or it cannot be read, or its format is another.
    """
    where = f"store {str(folder)!r}"
    try:
        values = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidInputError(
            where, f"there is no {STUDY}: this is no store", "check the path"
        ) from None
    except OSError as problem:
        raise InvalidInputError(
            where, f"it cannot be read ({problem.strerror})", "check its permissions"
        ) from None
    except ValueError:
        raise InvalidInputError(
            where, f"its {STUDY} is not JSON", "restore the file, or give another folder"
        ) from None
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise InvalidInputError(
            where,
            f"its format is {version!r}, this version reads {FORMAT}",
            "use the version of noisescale that wrote it, or give another folder",
        )
    return Study.from_dict(values)


def require_same(folder: Path, study: Study, *, workload: str, version: str, unit: str) -> None:
    """Refuse to mix results that do not belong to one table."""
    compared: Sequence[tuple[str, str, str]] = (
        ("workload", study.workload, workload),
        ("unit", study.unit, unit),
        ("version of noisescale", study.noisescale, version),
    )
    for what, theirs, ours in compared:
        if theirs != ours:
            raise InvalidInputError(
                f"store {str(folder)!r}",
                f"its {what} is {theirs!r}, this one is {ours!r}",
                "give another folder: results of the two do not belong in one table",
            )
