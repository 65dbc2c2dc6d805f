"""What runs inside a Slurm job: a few trials, each result a file of its own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import TrialPlan, TrialResult
from noisescale.run.executors.executor import WorkerSpec
from noisescale.run.executors.local import LocalExecutor


def train_batch(
    spec: str, plans: Sequence[str], folder: str, path: Sequence[str], slots: int
) -> None:
    """Train plans in processes of this machine and leave their results in a folder.

    What another job has left there already is not trained again. Text in, files out: nothing
    depends on this job's own end being noticed.

    Args:
        spec: a :class:`WorkerSpec` as JSON.
        plans: each as JSON.
        folder: where ``KEY.json`` goes, which appears whole or not at all.
        path: the driver's import path.
        slots: trials at a time.
    """
    sys.path.extend(entry for entry in path if entry not in sys.path)
    wanted = [TrialPlan.from_json(text) for text in plans]
    left = [plan for plan in wanted if not (Path(folder) / f"{plan.key}.json").exists()]

    def keep(result: TrialResult) -> None:
        _write(Path(folder), result.plan.key, {"result": result.to_dict()})

    try:
        LocalExecutor(WorkerSpec.from_json(spec), slots=slots).run(left, on_result=keep)
    except InvalidInputError as problem:
        words = [problem.value, problem.requirement, problem.remedy]
        _write(Path(folder), left[0].key, {"refused": words})


def read_answers(folder: Path, keys: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the answers that have come for some keys, as :func:`train_batch` wrote them."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in sorted(names):
        key = name.removesuffix(".json")
        if key in keys and name.endswith(".json"):
            yield key, json.loads((folder / name).read_text(encoding="utf-8"))


def forget_answer(folder: Path, key: str) -> None:
    """Remove an answer that has been stored elsewhere."""
    with contextlib.suppress(FileNotFoundError):
        (folder / f"{key}.json").unlink()


def _write(folder: Path, key: str, answer: dict[str, Any]) -> None:
    draft = folder / f".{key}.{os.uname().nodename}.{os.getpid()}"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(answer, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / f"{key}.json")
