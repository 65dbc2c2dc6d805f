from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import noisescale
from noisescale.cli import main

WORKLOADS = """
import torch
from torch import nn
from noisescale import Recipe, Workload

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

def make(**changes):
    options = dict(
        name="mine", model=lambda: nn.Linear(3, 1), train=X,
        loss=lambda m, b: (m(b)[:, 0] - b[:, 0]).square().mean(),
        recipe=Recipe(lr=0.1, batch_size=4),
    )
    return Workload(**{**options, **changes})

good = make()
def talks():
    print("hello from the user")
    return make()
def talks_by_every_road():
    import os, sys
    os.write(1, b"written ")
    os.system("echo from the shell")
    sys.__stdout__.write("original\\n")
    return make()
vector_loss = make(loss=lambda m, b: m(b)[:, 0])
no_parameters = make(model=nn.Identity, loss=lambda m, b: m(b).mean())
large_batch = make(recipe=Recipe(lr=0.1, batch_size=41))
nan_loss = make(loss=lambda m, b: m(b).mean() * float("nan"))
wrong = {"model": None}
def raises():
    raise KeyError("gone")
def interrupts():
    raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_workloads.py").write_text(WORKLOADS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NOISESCALE_DATA", raising=False)
    yield tmp_path
    sys.modules.pop("cli_workloads", None)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


BAD_INPUT = [
    (["measure", "digts"], "did you mean digits"),
    (["advise", "digts"], "did you mean digits"),
    (["measure", "missing.py:good"], "does not exist"),
    (["measure", "cli_workloads.py:god"], "did you mean good"),
    (["measure", "cli_workloads:god"], "did you mean good"),
    (["measure", "no_such_module:good"], "there is no module"),
    (["measure", "cli_workloads.py:wrong"], "got a dict without name, loss, train, recipe"),
    (["measure", "cli_workloads.py:raises"], "KeyError: 'gone'"),
    (["measure", "cli_workloads.py:vector_loss"], "a scalar is required"),
    (["measure", "cli_workloads.py:no_parameters"], "at least one trainable parameter"),
    (["measure", "cli_workloads.py:large_batch"], "choose at most 40"),
    (["advise", "cli_workloads.py:large_batch"], "choose at most 40"),
    (["measure", "cli_workloads.py:good", "--batch-size", "41"], "choose at most 40"),
    (["measure", "cli_workloads.py:good", "--batch-size", "0"], "--batch-size 0"),
    (["measure", "cli_workloads.py:good", "--batch-size", "-4"], "--batch-size -4"),
    (["measure", "cli_workloads.py:good", "--steps", "many"], "--steps many"),
    (["measure", "cli_workloads.py:good", "--steps", "1.5"], "--steps 1.5"),
    (["measure", "cli_workloads.py:good", "--steps", "0"], "--steps 0"),
    (["measure", "cli_workloads.py:good", "--seed", "-1"], "--seed -1"),
    (["measure", "cli_workloads.py:good", "--seed", "9" * 23], "below 9.22337e+18"),
    (["measure", "cli_workloads.py:good", "--seed", "9" * 400], "below 9.22337e+18"),
    (["measure", "cli_workloads.py:good", "--source", "exampels"], "did you mean examples"),
    (["measure", "cli_workloads.py:good", "--set", "momentun=1"], "did you mean momentum"),
    (["measure", "cli_workloads.py:good", "--set", "momentum=1"], "in [0, 1)"),
    (["measure", "cli_workloads.py:good", "--set", "lr"], "key=value"),
    (["measure", "mnist"], "--data DIR"),
    (["measure", "mnist", "--data", "nowhere"], "does not exist"),
    (["advise", "digits", "--report", "nowhere/report.html"], "report"),
    (["advise", "digits", "--report", "."], "report"),
    (["advise", "digits", "--seconds", "0"], "--seconds 0"),
    (["advise", "digits", "--seconds", "nan"], "--seconds nan"),
    (["advise", "digits", "--devices", "1,0"], "--devices 1,0"),
    (["advise", "digits", "--devices", "two"], "--devices two"),
    (["advise", "digits", "--max-waste", "1"], "--max-waste 1"),
    (["advise", "digits", "--store", "kept"], "add --calibrate"),
    (["advise", "digits", "--calibrate-seconds", "9"], "--calibrate-seconds 9"),
    (["advise", "digits", "--margin", "1"], "--margin 1"),
    (["advise", "digits", "--margin", "-1"], "give for example --margin 0.1"),
    (["advise", "digits", "--target", "error below 3"], "NAME<VALUE"),
    (["advise", "digits", "--target", "validation_eror<0.1"], "did you mean error"),
    (["split", "--global-batch-size", "512", "--replicas", "6"], "512"),
    (["split", "--global-batch-size", "none"], "--global-batch-size none"),
    (["split", "--global-batch-size", "8", "--unit", "apples"], "apples"),
    (["split"], ""),
    (["tradeoff", "missing.csv"], "missing.csv"),
    (["tradeoff"], "FILE.csv"),
    (["measure"], "WORKLOAD"),
    (["measur"], "did you mean measure"),
    (["measure", "digits", "--stepz", "3"], "--stepz"),
    (["measure", "digits", "--steps"], "--steps"),
    (["measure", "digits", "another"], "another"),
    (["--nothing"], "--nothing"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD_INPUT, ids=[" ".join(case[0]) or "-" for case in BAD_INPUT]
)
def test_bad_input_is_one_line_and_status_2(folder, capsys, arguments, words):
    before = sorted(folder.iterdir())
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("noisescale: error: ")
    assert words in lines[0]
    assert ": " in lines[0].removeprefix("noisescale: error: ")
    assert "; " in lines[0]
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "batch_size,steps\n",
        "batch_size,steps\n8,100\n",
        "batch_size,steps\n8,100\n16,fast\n",
        "batch_size,steps\n8,100\n8,90\n",
        "size,steps\n8,100\n16,60\n",
    ],
)
def test_a_bad_table_is_one_line_and_status_2(folder, capsys, content):
    (folder / "runs.csv").write_text(content)
    status, out, err = run(capsys, "tradeoff", "runs.csv")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("noisescale: error: ")


def test_split_prints_and_gives_json(capsys):
    status, out, _ = run(capsys, "split", "--global-batch-size", "512", "--replicas", "4")
    assert status == 0
    assert "512" in out
    _, out, _ = run(
        capsys,
        "split",
        "--global-batch-size",
        "512",
        "--replicas",
        "4",
        "--max-micro",
        "32",
        "--json",
    )
    assert json.loads(out) == {
        "global_batch_size": 512,
        "micro_batch_size": 32,
        "accumulation": 4,
        "replicas": 4,
        "unit": "examples",
    }


def test_tradeoff_json(folder, capsys):
    rows = [f"{size},{50 * (1 + 40 / size):.2f}" for size in (4, 8, 16, 32, 64, 128, 256)]
    (folder / "runs.csv").write_text("\n".join(["batch_size,steps", *rows]))
    status, out, err = run(capsys, "tradeoff", "runs.csv", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert {"steps_min", "examples_min", "critical_batch", "fit"} <= set(found)
    assert found["critical_batch"]["point"] == pytest.approx(40, rel=0.01)
    assert run(capsys, "tradeoff", "runs.csv")[0] == 0


NOISE_KEYS = {
    "b_simple", "low", "high", "level", "outcome", "detail", "grad_sq", "trace_cov", "steps",
    "examples", "unit", "source", "population", "parameters_seen",
}  # fmt: skip
ROW_KEYS = {"step", "examples", "loss", "grad_sq", "trace_cov", "b_simple", "low", "high"}


def test_json_stays_alone_on_standard_output_whatever_writes_there(folder):
    command = ["measure", "cli_workloads.py:talks_by_every_road", "--steps", "12", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "noisescale", *command, "--quiet"], cwd=folder,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert json.loads(done.stdout)["noise_scale"]["steps"] == 12
    assert {"written from the shell", "original"} <= set(done.stderr.splitlines())


def test_measure_json(folder, capsys):
    status, out, err = run(
        capsys, "measure", "cli_workloads.py:talks", "--steps", "40", "--json", "--quiet"
    )
    found = json.loads(out)
    assert (status, err) == (0, "hello from the user\n")
    assert set(found["noise_scale"]) >= NOISE_KEYS
    assert all(set(group) >= NOISE_KEYS for group in found["groups"].values())
    assert all(set(row) == ROW_KEYS for row in found["trajectory"])
    assert found["noise_scale"]["steps"] == 40


def test_measure_prints_a_table_and_lines_of_progress(folder, capsys):
    status, out, err = run(capsys, "measure", "cli_workloads.py:good", "--steps", "30")
    assert status == 0
    assert "oise scale" in out
    assert err.startswith("noisescale: measuring")


@pytest.mark.parametrize("options", [["--frozen"], ["--source", "microbatches", "--steps", "20"]])
def test_measure_the_other_ways(folder, capsys, options):
    status, out, _ = run(capsys, "measure", "cli_workloads.py:good", "--json", "--quiet", *options)
    assert status == 0
    assert json.loads(out)["noise_scale"]["outcome"]


def test_a_loss_that_is_not_finite_is_a_result(folder, capsys):
    status, out, _ = run(
        capsys, "measure", "cli_workloads.py:nan_loss", "--json", "--quiet", "--steps", "30"
    )
    found = json.loads(out)
    assert status == 0
    assert found["noise_scale"]["outcome"] == "not_finite"
    assert found["noise_scale"]["b_simple"] is None


def test_too_few_steps_are_a_result(folder, capsys):
    status, out, _ = run(
        capsys, "measure", "cli_workloads.py:good", "--json", "--quiet", "--steps", "2"
    )
    assert status == 0
    assert json.loads(out)["noise_scale"]["outcome"] == "too_few_steps"


def test_an_interruption_is_one_line_and_status_130(folder, capsys):
    status, out, err = run(capsys, "measure", "cli_workloads.py:interrupts")
    assert (status, out) == (130, "")
    assert err == "noisescale: interrupted\n"


@pytest.mark.slow
def test_advise_json_and_page(folder, capsys):
    status, out, err = run(
        capsys, "advise", "quadratic", "--seconds", "12", "--devices", "1,2", "--json", "--quiet",
        "--report", "page.html",
    )  # fmt: skip
    found = json.loads(out)
    assert (status, err) == (0, "")
    limits = found["limits"]
    assert set(limits["memory"]) >= {
        "micro_batch_size", "peak_bytes", "limit_bytes", "largest_tested",
    }  # fmt: skip
    assert set(limits["throughput_knee"]) >= {"micro_batch_size", "examples_per_second"}
    assert set(limits["critical_batch"]) >= {
        "point", "low", "high", "sampling_low", "sampling_high", "basis", "phase", "outcome",
    }  # fmt: skip
    assert set(found["rate_check"]) >= {"lr", "best_lr", "verdict"}
    row = {
        "global_batch_size", "micro_batch_size", "accumulation", "replicas", "steps_ratio",
        "examples_ratio", "seconds_per_step", "relative_time", "relative_time_low",
        "relative_time_high",
    }  # fmt: skip
    assert found["table"]
    assert all(set(entry) >= row for entry in found["table"])
    assert {entry["replicas"] for entry in found["table"]} == {1, 2}
    assert found["recommended"] is None or found["recommended"] in found["table"]
    assert found["reasons"]
    assert (folder / "page.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_help_lists_the_finished_commands_only(capsys):
    status, out, _ = run(capsys, "--help")
    listed = [
        line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()
    ]
    commands = ["advise", "measure", "split", "convert", "schedule"]
    commands += ["tradeoff", "sweep", "branch", "audit", "report"]
    assert (status, listed) == (0, commands)
    assert run(capsys)[:2] == (0, out)
    assert run(capsys, "--version")[:2] == (0, f"noisescale {noisescale.__version__}\n")


def test_the_installed_program_is_this_one():
    project = Path(__file__).parents[1] / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts == {"noisescale": "noisescale.cli:main"}


def in_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ("torch", "scipy", "numpy", "rich", "jinja2", "matplotlib")),
        (["advise", "--help"], ("torch", "scipy", "numpy", "rich")),
        (["split", "--global-batch-size", "8", "--json"], ("torch", "scipy", "rich")),
        (["measure", "digts"], ("sklearn",)),
    ],
)
def test_commands_import_only_what_they_need(arguments, absent):
    done = in_process(
        "import sys; from noisescale.cli import main; status = main("
        f"{arguments!r}); print([m for m in {absent!r} if m in sys.modules]); sys.exit(status)"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.returncode == (2 if "digts" in arguments else 0)


def test_the_module_runs_and_its_status_is_the_programs():
    done = subprocess.run(
        [sys.executable, "-m", "noisescale", "measure", "no_such_workload"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_is_no_failure():
    done = subprocess.run(
        f"{sys.executable} -m noisescale --help | head -1",
        shell=True, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
