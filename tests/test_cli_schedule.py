"""``noisescale schedule`` from the outside: files, options, exit status, start-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from noisescale.cli import main
from noisescale.records import SchedulePlan

RECIPE = """
lr = 0.1
momentum = 0.9
batch_size = 128
dataset_size = 50_000
total_steps = 400
[schedule]
kind = "step"
milestones = [200, 300]
gamma = 0.2
"""
ALONE = ["--set", "lr=0.1", "--set", "batch_size=64", "--total", "64K"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "parts.json").write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 4,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answered(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> SchedulePlan:
    assert main(["schedule", *arguments, "--json"]) == 0
    return SchedulePlan.from_json(capsys.readouterr().out)


def test_a_file_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "recipe.toml", "--grow"]) == 0
    out = capsys.readouterr()
    assert "224 updates instead of 400: 44 % saved" in out.out
    assert out.err == ""


def test_json_is_the_whole_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = answered(["recipe.toml", "--grow", "--powers", "--max-batch-size", "2000"], capsys)
    assert [piece.batch_size for piece in plan.schedule.pieces] == [128, 512, 1024]
    assert plan.updates == plan.schedule.updates()
    assert (plan.limit, plan.recipe.momentum) == (1024, 0.9)


def test_options_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = answered([*ALONE, "--text", "0:64 32K:128", "--unit", "tokens"], capsys)
    assert plan.schedule.unit == plan.recipe.unit == "tokens"
    assert plan.updates == 500 + 250
    assert plan.rows[1].lr_first == 0.2


def test_a_batch_warm_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = answered([*ALONE, "--warmup-batch", "16:32K:16"], capsys)
    assert [piece.batch_size for piece in plan.schedule.pieces] == [16, 32, 48, 64]


def test_the_length_may_be_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = answered(["recipe.toml", "--total", "64K"], capsys)
    assert plan.original_updates == 500


def test_a_unit_without_a_text_is_that_of_the_length(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengthened = ["--total", "16K", "--unit", "tokens", "--sequence-length", "4"]
    plan = answered(["recipe.toml", *lengthened], capsys)
    assert (plan.schedule.total, plan.schedule.unit) == (4000, "examples")


def test_the_length_counts_what_thresholds_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = ["--threshold-unit", "tokens", "--size-unit", "sequences", "--sequence-length", "10"]
    plan = answered([*ALONE, "--text", "0:64 32K:128", *units], capsys)
    assert (plan.schedule.unit, plan.schedule.total) == ("sequences", 6400)
    assert plan.updates == 50 + 25
    assert main(["schedule", *ALONE, "--text", "0:64", *units[:4]]) == 2
    assert "mixed units need the length of a sequence" in capsys.readouterr().err


def test_micro_batches_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["parts.json", "--replicas", "2", "--set", "total_steps=100"]
    plan = answered([*options, "--warmup-batch", "16:1K"], capsys)
    assert [row.accumulation for row in plan.rows] == [1, 2, 4]
    assert main(["schedule", *options, "--warmup-batch", "8:1K"]) == 2
    assert "a multiple of 16 is required" in capsys.readouterr().err
    assert main(["schedule", "parts.json", "--set", "total_steps=100"]) == 2
    assert "give --replicas N" in capsys.readouterr().err


def test_the_figure_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["schedule", "recipe.toml", "--grow", "--out", "plan.svg"]) == 0
    assert "Figure: plan.svg" in capsys.readouterr().out
    assert (folder / "plan.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.toml"], "missing.toml"),
        ([], "no RECIPE and no lr"),
        (["--set", "lr=0.1"], "no RECIPE and no batch_size"),
        (["--set", "lr=0.1", "--set", "batch_size=8"], "a recipe without a length"),
        (["recipe.toml", "--text", "0:64 1K:128"], "--unit tokens"),
        (["recipe.toml", "--text", "0:64 1K:128", "--unit", "token"], "did you mean tokens"),
        (["recipe.toml", "--text", "0:64 1K:128", "--unit", "tokens"], "mixed units"),
        (["recipe.toml", "--text", "5:64", "--unit", "examples"], "begin at 5"),
        (["recipe.toml", "--grow", "--text", "0:64", "--unit", "examples"], "beside grow"),
        (["recipe.toml", "--warmup-batch", "64"], "SIZE:LENGTH"),
        (["recipe.toml", "--warmup-batch", "64:1.5"], "warmup_batch '1.5'"),
        (["recipe.toml", "--total", "much"], "total 'much'"),
        (["recipe.toml", "--max-batch-size", "0"], "--max-batch-size 0"),
        (["recipe.toml", "--growth-factor", "1"], "--growth-factor 1"),
        (["recipe.toml", "--critical-batch", "nan"], "--critical-batch nan"),
        (["recipe.toml", "--coupling", "sqrt"], "coupling 'sqrt'"),
        (["recipe.toml", "--out", "plan.pdf"], "ends in .png or .svg"),
        (["recipe.toml", "--set", "schedule=cosin"], "did you mean cosine"),
        (["recipe.toml", "--set", "momentum=1.0"], "momentum"),
        (["recipe.toml", "--grown"], "--grown"),
        (["recipe.toml", "--grow", "--unit", "tokens"], "unit tokens without a text"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("noisescale: error: ")
    assert words in out.err
    assert out.err.count("\n") == 1


def test_json_needs_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys\nfrom noisescale.cli import main\n"
        "assert main(['schedule', 'recipe.toml', '--grow', '--json']) == 0\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'numpy', 'rich', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)


def test_the_table_needs_neither_torch_nor_scipy(folder: Path) -> None:
    code = (
        "import sys\nfrom noisescale.cli import main\n"
        "assert main(['schedule', 'recipe.toml', '--grow']) == 0\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
