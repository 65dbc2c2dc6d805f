from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Outcome
from noisescale.run.store import TrialStore
from noisescale.run.tradeoff_file import read_tradeoff

# Bcrit 20, Smin 50.
EXACT = [(1, 1050), (10, 150), (20, 100), (100, 60), (1000, 51)]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(rows: list[tuple[int, int]], header: str = "batch_size,steps") -> str:
    return "\n".join([header, *(f"{size},{steps}" for size, steps in rows)]) + "\n"


def test_reads_and_fits(tmp_path: Path) -> None:
    fit = read_tradeoff(write(tmp_path, table(EXACT)), 0.9)
    assert fit.outcome is Outcome.DETERMINED
    assert fit.level == 0.9
    assert fit.target is None
    # The default likelihood assumes rounding of 1e-6; the data here are exact.
    assert fit.critical_batch.point == pytest.approx(20, rel=1e-5)
    assert fit.steps_min.point == pytest.approx(50, rel=1e-5)
    assert fit.fit.points == 5


def test_untidy_files_read_the_same(tmp_path: Path) -> None:
    tidy = read_tradeoff(write(tmp_path, table(EXACT)))
    rows = "\r\n , \r\n".join(f' {size} , "{steps}", 7, ' for size, steps in EXACT)
    untidy = f"\ufeff\r\n Batch_Size , steps, seed, note \r\n\r\n{rows}\r\n\r\n"
    assert read_tradeoff(write(tmp_path, untidy)) == tidy


def test_censored_rows_count_as_lower_bounds(tmp_path: Path) -> None:
    words = ("TRUE", "1", "false", "0", "", "False")
    rows = zip((1, 2, 10, 20, 100, 1000), (200, 200, 152, 99, 61, 51), words, strict=True)
    text = "batch_size,steps,censored\n" + "".join(f"{b},{s},{w}\n" for b, s, w in rows)
    fit = read_tradeoff(write(tmp_path, text))
    assert (fit.fit.points, fit.fit.censored) == (4, 2)
    assert fit.critical_batch.point == pytest.approx(20, rel=0.1)


def test_one_of_several_targets_is_selected(tmp_path: Path) -> None:
    lines = ["batch_size,steps,target"]
    lines += [f"{b},{s},validation_error<0.05" for b, s in EXACT]
    lines += [f"{b},{2 * s},validation_error<0.04" for b, s in EXACT]
    path = write(tmp_path, "\n".join(lines))
    with pytest.raises(InvalidInputError, match=r"error<0.04, validation_error<0.05.*target="):
        read_tradeoff(path)
    fit = read_tradeoff(path, target="validation_error<0.04")
    assert fit.target == "validation_error<0.04"
    assert fit.steps_min.point == pytest.approx(100, rel=1e-5)
    with pytest.raises(InvalidInputError, match=r"no row has it; did you mean validation_error"):
        read_tradeoff(path, target="validation_error<0.3")


def test_a_target_where_there_are_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="leave the target out: the file names none"):
        read_tradeoff(write(tmp_path, table(EXACT)), target="validation_error<0.3")


def test_the_only_target_is_kept(tmp_path: Path) -> None:
    lines = ["batch_size,steps,target", *(f"{b},{s},train_loss<1" for b, s in EXACT)]
    assert read_tradeoff(write(tmp_path, "\n".join(lines))).target == "train_loss<1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("batch_size,steps\n", "0 rows"),
        ("batch_size,steps\n8,100\n", "1 row:"),
        ("batch,steps\n8,100\n", "column batch_size: missing"),
        ("batch_size;steps\n8;100\n", "missing (the first line reads batch_size;steps)"),
        ("batch_size,steps,steps\n8,1,1\n", "column steps: given twice"),
        ("batch_size,steps\n8,100\n16,many\n", "row 3, column steps: 'many'"),
        ("batch_size,steps\n\n8,100\n0,50\n", "row 4, column batch_size: '0'"),
        ("batch_size,steps\n8,-100\n16,50\n", "row 2, column steps: '-100'"),
        ("batch_size,steps\n8,nan\n16,50\n", "row 2, column steps: 'nan'"),
        ("batch_size,steps\n8,9\n1e300,1e300\n", "row 3, column batch_size: '1e300'"),
        ("batch_size,steps\n8,inf\n16,50\n", "row 2, column steps: 'inf'"),
        ("batch_size,steps\n8,\n16,50\n", "row 2, column steps: ''"),
        ("batch_size,steps\n8\n16,50\n", "row 2: 2 cells are required, 1 are there"),
        ("batch_size,steps\n8,1,000\n16,50\n", "row 2: 2 cells are required, 3 are there"),
        ("batch_size,steps\n8,100\n8,90\n8,95\n", "all 3 values are 8"),
        ("batch_size,steps,censored\n8,100,maybe\n", "row 2, column censored: 'maybe'"),
        (b"\xff\xfeb\x00a\x00t\x00", "not UTF-8"),
        ('batch_size,steps\n8,"100\n', "is no CSV text"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_tradeoff(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        read_tradeoff(tmp_path / "absent.csv")
    with pytest.raises(InvalidInputError, match="this is no store"):
        read_tradeoff(str(tmp_path))
    with pytest.raises(InvalidInputError):
        read_tradeoff("a\0b")
    TrialStore.open(tmp_path / "new", workload="any-0123")
    with pytest.raises(InvalidInputError, match="holds no trial yet"):
        read_tradeoff(tmp_path / "new")


def test_level_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="level 95"):
        read_tradeoff(write(tmp_path, table(EXACT)), 95)


def test_two_rows_are_too_few_not_an_error(tmp_path: Path) -> None:
    fit = read_tradeoff(write(tmp_path, table(EXACT[:2])))
    assert fit.outcome is Outcome.TOO_FEW_STEPS
    assert np.isnan(fit.fit.rms_log_error)
