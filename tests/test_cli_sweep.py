"""The commands sweep, report and tradeoff on a store, with real trainings of a tiny model."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from noisescale.cli import main
from noisescale.cli.sweep_progress import drawn, showing_sweep, told
from noisescale.run.sweep.progress import BestSoFar, SweepProgress

WORKLOAD = """
import torch
from torch import nn
from noisescale import Recipe, Workload

g = torch.Generator().manual_seed(0)
X = torch.randn(64, 3, generator=g)
Y = X @ torch.tensor([[1.0], [2.0], [-1.0]]) + 0.1 * torch.randn(64, 1, generator=g)

def tiny():
    print("hello from the user")
    return Workload(
        name="tiny", model=lambda: nn.Linear(3, 1), train=(X, Y), evaluate=(X[:32], Y[:32]),
        loss=lambda m, b: (m(b[0]) - b[1]).square().mean(),
        recipe=Recipe(lr=0.05, batch_size=8),
    )

def interrupts():
    def model():
        raise KeyboardInterrupt
    made = tiny()
    return Workload(name="tiny", model=model, train=made.train, loss=made.loss,
                    recipe=made.recipe)
"""
GOAL = ("--target", "train_loss<0.3")
SMALL = (*GOAL, "--batch-sizes", "4:32", "--trials", "3", "--seeds", "2", "--max-steps", "300")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sweep_workloads.py").write_text(WORKLOAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NOISESCALE_DATA", raising=False)
    yield tmp_path
    sys.modules.pop("sweep_workloads", None)


def run(capsys, *arguments):
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_sweep_continue_report_and_tradeoff(folder, capsys):
    command = ("sweep", "sweep_workloads.py:tiny", *SMALL, "--store", "kept", "--json")
    status, out, err = run(capsys, *command)
    assert status == 0
    found = json.loads(out)
    assert {"batch_sizes", "tradeoff", "regimes", "curves", "settings"} <= set(found)
    assert [row["batch_size"] for row in found["batch_sizes"]] == [4, 8, 16, 32]
    row = found["batch_sizes"][0]
    assert {"batch_size", "steps", "low", "high", "outcome", "best"} <= set(row)
    assert row["steps"] > 0
    assert "hello" in err
    assert "noisescale: batch size" in err

    lines = (folder / "kept" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == found["trials"]
    status, out, _ = run(capsys, *command)
    assert status == 0
    again = json.loads(out)
    assert again["batch_sizes"] == found["batch_sizes"]
    assert (folder / "kept" / "trials.jsonl").read_text().splitlines() == lines

    status, out, _ = run(capsys, "report", "kept", "--json")
    assert status == 0
    assert json.loads(out)["batch_sizes"] == found["batch_sizes"]
    status, out, _ = run(capsys, "tradeoff", "kept", "--json")
    assert status == 0
    assert json.loads(out)["critical_batch"] == found["tradeoff"]["critical_batch"]

    pytest.importorskip("matplotlib")
    status, out, _ = run(capsys, "report", "kept", "--out", "page.html")
    assert status == 0
    assert "Report: page.html" in out
    assert "<svg" in (folder / "page.html").read_text()


def test_quiet_says_nothing_on_the_way(folder, capsys):
    status, out, err = run(capsys, "sweep", "sweep_workloads.py:tiny", *SMALL[:-2], "--quiet",
                           "--max-steps", "100", "--batch-sizes", "8,16")  # fmt: skip
    assert (status, err) == (0, "")
    assert "Goals, by first passage" in out


def test_lines_of_a_store_that_cannot_be_read_are_named(folder, capsys):
    run(capsys, "sweep", "sweep_workloads.py:tiny", *SMALL, "--store", "s", "--quiet")
    trials = folder / "s" / "trials.jsonl"
    count = len(trials.read_text().splitlines())
    trials.write_text(trials.read_text() + "rubbish\n")
    status, out, _ = run(capsys, "report", "s", "--json")
    found = json.loads(out)
    assert (status, found["trials"]) == (0, count)
    assert found["warnings"][0] == f"trials.jsonl, line {count + 1}: not a JSON object; left out"


def test_an_interruption_keeps_and_says_what_is_there(folder, capsys):
    status, _, err = run(capsys, "sweep", "sweep_workloads.py:interrupts", *GOAL, "--store", "s")
    assert status == 130
    assert err.splitlines()[-1] == "noisescale: interrupted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-sizes", "65"], "choose at most 64"),
        (["--batch-sizes", "a:b"], "2:1024"),
        (["--target", "validation_eror<1"], "no metric 'eror'"),
        (["--target", "train_loss<100"], "met before the first step"),
        (["--trials", "0"], "--trials 0"),
        (["--seeds", "none"], "--seeds none"),
        (["--search", "randm"], "grid or quasi-random"),
        (["--over", "rate"], "not a dimension"),
        (["--engine", "fast"], "fast"),
        (["--executor", "locl"], "did you mean local"),
        (["--report", "nowhere/page.html"], "report"),
        (["--store", "sweep_workloads.py"], "folder"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, words):
    target = [] if "--target" in arguments else list(GOAL)
    status, _, err = run(capsys, "sweep", "sweep_workloads.py:tiny", *target, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("noisescale: error: ")]
    assert (status, len(lines)) == (2, 1)
    assert words in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["report", "tradeoff"])
def test_what_is_no_store(folder, capsys, command):
    (folder / "empty").mkdir()
    for name in ("empty", "absent"):
        status, out, err = run(capsys, command, name)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert name in err


def test_a_store_exports_columns(folder, capsys):
    run(capsys, "sweep", "sweep_workloads.py:tiny", *SMALL, "--store", "kept", "--quiet", "--json")
    status, _, _ = run(capsys, "report", "kept", "--csv", "trials.csv")
    assert status == 0
    with open("trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["batch_size"] for row in rows} == {"4", "8", "16", "32"}


def news(share, size=8, steps=12.5, left=30.0):
    best = BestSoFar(steps=steps, lr=None if steps is None else 0.5, trials=3, planned=10)
    return SweepProgress(
        batch_size=size, target="train_loss<1", bests={size: best}, share=share, trials=3,
        seconds=1.0, seconds_left=left,
    )  # fmt: skip


def test_lines_in_a_log_are_few():
    stream = io.StringIO()
    with showing_sweep(stream, quiet=False) as tell:
        for share in (0.1, 0.11, 0.12):
            tell(news(share))
        tell(news(0.5, size=16))
        tell(news(1.0, size=16))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "best 12.5 steps at lr 0.5 (10%, about 30 s left)" in lines[0]
    assert "left" not in lines[-1]


def test_a_terminal_shows_a_table():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(drawn(news(0.4)), drawn(news(0.4, steps=None)))
    text = console.file.getvalue()
    assert "3 / 10" in text
    assert any(line.lstrip().startswith("batch size") for line in text.splitlines())
    assert "40%, about 30 s left" in text
    assert "best" not in told(news(0.4, steps=None))
