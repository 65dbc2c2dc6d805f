"""The command audit, on a file of the user's and on built-ins."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from noisescale.cli import main
from noisescale.records import Audit

WORKLOAD = """
import torch
from torch import nn
from torch.nn import functional as F
from noisescale import Recipe, Workload

g = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 3, generator=g), torch.randint(2, (64,), generator=g)

def summed():
    print("hello from the user")
    return Workload(
        name="summed", model=lambda: nn.Linear(3, 2), train=(X, Y),
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        recipe=Recipe(lr=0.05, batch_size=16, clip_norm=0.1, total_steps=10, warmup_steps=20),
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "audited.py").write_text(WORKLOAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    sys.modules.pop("audited", None)


def run(capsys, *arguments):
    status = main(["audit", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_audit_names_the_cause_and_the_remedy(folder, capsys):
    status, out, _ = run(capsys, "audited.py:summed", "--micro", "4", "--replicas", "1", "--quiet")
    assert status == 0
    words = " ".join(out.split())
    assert "Different. Accumulation changes the gradient" in words
    assert "Loss that depends on the batch size: 75.0 %, a gradient 0.250 times as large" in words
    assert "return the mean over the examples" in words.lower()
    assert "once, after accumulation" in words
    assert "Warning: the warm-up of 20 steps does not end before the training does" in words
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_one_object_that_reads_back(folder, capsys):
    status, out, _ = run(capsys, "audited.py:summed", "--replicas", "1", "--json")
    assert status == 0
    found = Audit.from_dict(json.loads(out))
    assert (found.verdict, [cause.kind for cause in found.causes]) == ("different", ["sum"])


@pytest.mark.parametrize("name", ["digits", "digits-cnn", "chars", "quadratic"])
def test_built_ins_are_the_same(name, capsys):
    status, out, _ = run(capsys, name, "--replicas", "1", "--batch-size", "16", "--json")
    assert status == 0
    found = Audit.from_dict(json.loads(out))
    assert (found.verdict, found.causes, found.warnings) == ("same", (), ())
    assert found.total.accumulated < 1e-5
    assert found.total.rng == 0


def test_a_recipe_key_and_a_seed_can_be_set(capsys):
    arguments = ("quadratic", "--replicas", "1", "--json")
    _, one, _ = run(capsys, *arguments)
    _, other, _ = run(capsys, *arguments, "--seed", "1", "--set", "clip_norm=0.5")
    one, other = (json.loads(text) for text in (one, other))
    assert one["total"] != other["total"]
    assert one["clipping"] is None
    assert other["clipping"]["clip_norm"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits", "--micro", "0"), "--micro 0"),
        (("digits", "--micro", "64"), "micro 64: it cannot be larger than the batch of 32"),
        (("digits", "--replicas", "5"), "take 4 or 8 replicas"),
        (("digits", "--batch-size", "100000"), "1437 training examples"),
        (("digts",), "did you mean digits"),
        (("digits", "--micros", "4"), "did you mean --micro?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert re.match(r"noisescale: error: ", err)


def test_help_needs_no_torch():
    code = (
        "import sys; from noisescale.cli import main; status = main(['audit', '--help']);"
        "print(status, 'torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines()[-1] == "0 False"
