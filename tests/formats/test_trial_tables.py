from __future__ import annotations

from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.formats.trial_tables import read_trials
from noisescale.records import TrialOutcome


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "trials.csv"


def test_guessed_columns(table: Path) -> None:
    table.write_text(
        "batch_size,learning_rate,schedule,seed,steps,outcome,seconds\n"
        "8,0.1,constant,0,120,reached,3\n"
        "8,0.2,cosine,1,500,not_reached,9\n"
        "8,9,constant,1,,diverged,1\n"
        "8,0.1,constant,2,,oom,1\n"
    )
    rows = read_trials(table)
    assert rows[0].values == {"lr": 0.1, "schedule": "constant"}
    assert rows[0].seed == "0"
    assert (rows[0].outcome, rows[0].steps) == (TrialOutcome.REACHED, 120)
    assert (rows[1].outcome, rows[1].steps) == (TrialOutcome.NOT_REACHED, 500)
    assert [row.outcome.value for row in rows[2:]] == ["diverged", "infeasible_memory"]


def test_named_columns(table: Path) -> None:
    table.write_text("B,S,r,eta,note\n8,100,a,0.1,x\n")
    rows = read_trials(
        table,
        columns={"batch_size": "B", "steps": "S", "seed": "r"},
        hyper_parameters=["eta"],
    )
    assert rows[0].values == {"lr": 0.1}
    assert (rows[0].batch_size, rows[0].steps, rows[0].seed) == (8, 100, "a")


def test_columns_of_a_store(table: Path) -> None:
    table.write_text(
        "batch_size,lr,momentum,seed,target,first,sustained,closest,outcome,steps\n"
        "8,0.1,0.9,0,a<1,80,,0.5,reached,100\n"
        "8,0.1,0.9,0,b<1,,,1.5,not_reached,100\n"
    )
    first = read_trials(table, target="a<1")
    assert [(r.outcome.value, r.steps) for r in first] == [("reached", 80)]
    assert first[0].values == {"lr": 0.1, "momentum": 0.9}
    late = read_trials(table, target="a<1", crossing="sustained")
    assert [(r.outcome.value, r.steps) for r in late] == [("not_reached", 100)]
    never = read_trials(table, target="b<1")
    assert [(r.outcome.value, r.steps, r.closest) for r in never] == [("not_reached", 100, 1.5)]


@pytest.mark.parametrize(("column", "yes", "no"), [("censored", "1", ""), ("reached", "no", "yes")])
def test_true_and_false(table: Path, column: str, yes: str, no: str) -> None:
    table.write_text(f"batch_size,steps,lr,{column}\n8,100,1,{yes}\n8,50,2,{no}\n")
    assert [r.outcome.value for r in read_trials(table)] == ["not_reached", "reached"]


def test_rows_without_a_seed_are_repeats_of_their_own(table: Path) -> None:
    table.write_text("batch_size,steps,lr\n8,100,1\n8,50,1\n")
    one, two = read_trials(table)
    assert one.seed != two.seed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "a line of names"),
        ("batch_size,steps\n", "a line of names"),
        ("size,steps\n8,1\n", "column batch_size: missing"),
        ("batch_size,lr\n8,1\n", "column steps: missing"),
        ("batch_size,steps,steps\n8,1,1\n", "given twice"),
        ("batch_size,steps\n8\n", "line 2: 2 cells are required, 1"),
        ("batch_size,steps\n8,many\n", "line 2, column steps: 'many'"),
        ("batch_size,steps\n8,0\n", "line 2, column steps: '0'"),
        ("batch_size,steps\n-8,1\n", "column batch_size: '-8'"),
        ("batch_size,steps,outcome\n8,1,reachd\n", "did you mean reached"),
        ("batch_size,steps,censored\n8,1,maybe\n", "true or false"),
        ("batch_size,steps,target\n8,1,a\n8,1,b\n", "rows of one target"),
        ("batch_size,steps_to_target\n8,\n", "steps that were run"),
    ],
)
def test_bad_tables(table: Path, text: str, match: str) -> None:
    table.write_text(text)
    with pytest.raises(InvalidInputError, match=match):
        read_trials(table)


def test_bad_choices(table: Path) -> None:
    table.write_text("batch_size,steps,lr,target\n8,1,1,a\n")
    with pytest.raises(InvalidInputError, match="no such role"):
        read_trials(table, columns={"batch": "batch_size"})
    with pytest.raises(InvalidInputError, match="'Steps': missing; did you mean steps"):
        read_trials(table, columns={"steps": "Steps"})
    with pytest.raises(InvalidInputError, match="'rate': missing"):
        read_trials(table, hyper_parameters=["rate"])
    with pytest.raises(InvalidInputError, match="no line has it"):
        read_trials(table, target="b")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_trials(table.with_name("missing.csv"))
    table.write_bytes(b"batch_size,steps\n8,\xff\n")
    with pytest.raises(InvalidInputError, match="is no CSV text"):
        read_trials(table)
    table.write_text("batch_size,steps\n8,1\n")
    with pytest.raises(InvalidInputError, match="names no targets"):
        read_trials(table, target="b")
