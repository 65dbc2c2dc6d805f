from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.formats.batch_science import read_batch_science
from noisescale.formats.goals import Goal, rows_at_goal
from noisescale.records import TrialCurve, TrialOutcome
from noisescale.theory.sweep_curve import sweep_curve

GOAL = "val/classification_error<0.1"


def write_trial(
    folder: Path,
    number: int,
    *,
    rate: float,
    errors: list[tuple[int, str]],
    status: str = "COMPLETE",
) -> None:
    """The layout that the README of the published archive describes."""
    trial = folder / str(number)
    trial.mkdir(parents=True)
    metadata = {
        "_internal_study_name": "study",
        "_internal_trial_id": number,
        "parameters": {"learning_rate": rate, "momentum": 0.9},
        "status": status,
        "steps": errors[-1][0],
        "trial_id": number,
    }
    (trial / "metadata.json").write_text(json.dumps(metadata))
    lines = ["step,train/cross_entropy_error,val/classification_error"]
    lines += [f"{step},1.0,{error}" for step, error in errors]
    (trial / "measurements.csv").write_text("\n".join(lines) + "\n")


def write_study(folder: Path, batch_size: int) -> Path:
    study = folder / str(batch_size)
    study.mkdir(parents=True)
    about = {"batch_size": batch_size, "optimizer": "momentum", "train_steps": 100}
    (study / "study.json").write_text(json.dumps(about))
    return study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    study = write_study(tmp_path / "mnist" / "net" / "momentum", 64)
    write_trial(study, 1, rate=0.1, errors=[(0, "0.9"), (50, "0.2"), (100, "0.05")])
    write_trial(study, 2, rate=0.2, errors=[(0, "0.9"), (50, "0.1"), (100, "0.3")])
    write_trial(study, 3, rate=9.0, errors=[(0, "0.9"), (50, "nan")], status="INFEASIBLE")
    write_trial(study, 10, rate=0.3, errors=[(0, "0.9"), (50, "")], status="INCOMPLETE")
    return study


def test_a_study(study: Path) -> None:
    curves = read_batch_science(study)
    assert [curve.seed for curve in curves] == ["trial 1", "trial 2", "trial 3", "trial 10"]
    first = curves[0]
    assert first.batch_size == 64
    assert first.values == {"lr": 0.1, "momentum": 0.9, "optimizer": "momentum"}
    assert first.evaluated_at == (0, 50, 100)
    assert first.metrics["val/classification_error"] == (0.9, 0.2, 0.05)
    assert curves[2].outcome is TrialOutcome.DIVERGED
    assert curves[2].metrics["val/classification_error"] == (0.9, None)
    assert curves[3].outcome is TrialOutcome.INTERRUPTED
    assert TrialCurve.from_json(first.to_json()) == first


def test_the_first_evaluation_strictly_beyond_the_threshold(study: Path) -> None:
    rows = rows_at_goal(read_batch_science(study), GOAL)
    assert [row.outcome.value for row in rows] == [
        "reached",
        "not_reached",  # 0.1 itself is not below 0.1
        "diverged",
        "interrupted",
    ]
    assert rows[0].steps == 100
    assert rows[1].steps == 100
    assert rows[1].closest == 0.1


def test_interpolated(study: Path) -> None:
    rows = rows_at_goal(read_batch_science(study), GOAL, interpolate=True)
    assert rows[0].steps == pytest.approx(50 + 50 * (0.2 - 0.1) / (0.2 - 0.05))


def test_budgets_by_steps_and_by_examples(study: Path) -> None:
    curves = read_batch_science(study)
    by_steps = rows_at_goal(curves, GOAL, max_steps=60)[0]
    by_examples = rows_at_goal(curves, GOAL, max_examples=60 * 64)[0]
    assert by_steps == by_examples
    assert (by_steps.outcome, by_steps.steps) == (TrialOutcome.NOT_REACHED, 60)
    assert by_steps.closest == 0.2


def test_trials_that_the_paper_takes(study: Path) -> None:
    assert len(read_batch_science(study, trials=1)) == 1
    assert len(read_batch_science(study, trials=2)) == 2


def test_a_workload_and_its_curve(tmp_path: Path) -> None:
    sizes = [8, 16, 32, 64, 128, 256]
    for size in sizes:
        study = write_study(tmp_path, size)
        best = 100 * (1 + 64 / size)
        for number, factor in enumerate((0.4, 0.7, 1.0, 1.4, 2.0)):
            steps = best * (factor + 1 / factor) / 2
            step = round(1000 * steps)
            write_trial(study, number, rate=0.1 * factor, errors=[(0, "0.9"), (step, "0.05")])
    curve = sweep_curve(rows_at_goal(read_batch_science(tmp_path), GOAL), target=GOAL)
    assert [point.batch_size for point in curve.batch_sizes] == sizes
    assert curve.tradeoff is not None
    assert curve.tradeoff.critical_batch.point == pytest.approx(64, rel=0.05)


def test_goal_above() -> None:
    goal = Goal.parse("val/average_precision>0.31")
    assert goal.passed(0.32)
    assert not goal.passed(0.31)
    assert not goal.passed(float("nan"))
    assert goal.best([0.1, float("nan"), 0.2]) == 0.2
    assert goal.best([]) is None


class TestBadInput:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="is no folder"):
            read_batch_science(tmp_path / "missing")

    def test_no_study(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"study\.json"):
            read_batch_science(tmp_path)

    def test_no_trials(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"metadata\.json"):
            read_batch_science(write_study(tmp_path, 8))

    def test_a_torn_file_is_named(self, study: Path) -> None:
        (study / "2" / "metadata.json").write_text('{"status": ')
        with pytest.raises(InvalidInputError, match=re.escape(str(Path("2") / "metadata.json"))):
            read_batch_science(study)

    def test_an_unknown_status(self, study: Path) -> None:
        (study / "2" / "metadata.json").write_text('{"status": "DONE"}')
        with pytest.raises(InvalidInputError, match="COMPLETE, INCOMPLETE, INFEASIBLE"):
            read_batch_science(study)

    @pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,x\n1\n", "step,x\n1,word\n"])
    def test_measurements(self, study: Path, text: str) -> None:
        (study / "1" / "measurements.csv").write_text(text)
        with pytest.raises(InvalidInputError, match=r"measurements\.csv"):
            read_batch_science(study)

    def test_an_unknown_quantity(self, study: Path) -> None:
        with pytest.raises(InvalidInputError, match="did you mean val/classification_error"):
            rows_at_goal(read_batch_science(study), "val/clasification_error<0.1")

    @pytest.mark.parametrize("goal", ["", "error", "error<", "error<x"])
    def test_no_goal(self, goal: str) -> None:
        with pytest.raises(InvalidInputError, match="NAME<VALUE"):
            Goal.parse(goal)
