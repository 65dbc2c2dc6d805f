from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from noisescale import InvalidInputError, Recipe, Workload
from noisescale.cli import main
from noisescale.records import BranchResult
from noisescale.report.branch_terminal import render_branch
from noisescale.run.branch.checkpoint import load_weights
from noisescale.run.branch.driver import branch

G = torch.Generator().manual_seed(0)
X = torch.randn(256, 4, generator=G)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + torch.randn(256, 1, generator=G)


def workload(**changes):
    options = {
        "name": "regression",
        "model": lambda: nn.Linear(4, 1),
        "loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        "train": (X, Y),
        "evaluate": (X[:64], Y[:64]),
        "recipe": Recipe(lr=0.02, batch_size=4),
    }
    return Workload(**{**options, **changes})


def test_a_batch_beyond_stability_is_beyond_and_small_ones_are_within():
    # Hessian about 2: the linear rule passes stability, lr 1, at k = 32 (lr 0.64) to 64
    found = branch(workload(), at=(0, 64), examples=512, seeds=2, tolerance=0.2)
    assert [point.step for point in found.points] == [0, 64]
    for point in found.points:
        first = point.rows[0]
        assert (first.factor, first.excess, first.verdict) == (1, 0.0, "within")
        assert point.rows[1].verdict == "within"
        assert [row.steps * row.batch_size for row in point.rows] == [512] * len(point.rows)
        assert [row.lr for row in point.rows] == pytest.approx(
            [0.02 * r.factor for r in point.rows]
        )
        assert point.critical_batch.low >= 8
    assert found.points[1].loss < found.points[0].loss


def test_equal_calls_are_equal_and_leave_the_random_state():
    state = torch.get_rng_state()
    one, two = (branch(workload(), factors=(1, 2), seeds=2) for _ in range(2))
    assert one.points == two.points
    assert torch.equal(torch.get_rng_state(), state)
    assert BranchResult.from_json(one.to_json()) == one


def test_adams_rate_goes_with_the_square_root():
    recipe = Recipe(optimizer="adam", lr=0.01, batch_size=4)
    found = branch(workload(recipe=recipe), factors=(1, 4), seeds=2)
    assert found.rule == "square_root"
    assert [row.lr for row in found.points[0].rows] == [0.01, 0.02]
    linear = branch(workload(recipe=recipe), factors=(1, 4), seeds=2, rule="linear")
    assert linear.points[0].rows[1].lr == 0.04


def test_a_diverged_branch_ends_the_search():
    recipe = Recipe(lr=0.2, batch_size=4)
    found = branch(workload(recipe=recipe), factors=(1, 16, 32), examples=2048, seeds=2)
    rows = found.points[0].rows
    assert rows[-1].verdict == "diverged"
    assert rows[-1].loss is None
    assert len(rows) == 2
    assert found.points[0].critical_batch.high == 64


def test_a_checkpoint_is_where_the_training_was(tmp_path):
    made = workload()
    torch.manual_seed(3)
    model = made.model()
    torch.save({"model": model.state_dict(), "step": 7}, tmp_path / "ckpt.pt")
    found = branch(made, checkpoint=tmp_path / "ckpt.pt", factors=(1, 2), seeds=2)
    point = found.points[0]
    assert (point.step, point.examples) == (None, None)
    with torch.no_grad():
        index = torch.randperm(256, generator=torch.Generator().manual_seed(0))
        expected = float(made.loss(model, (X[index], Y[index])))
    assert point.loss == pytest.approx(expected, rel=1e-5)


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("sprung", "w"))


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "evil.pt")
    with pytest.raises(InvalidInputError, match="weights-only"):
        load_weights(nn.Linear(4, 1), "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_checkpoints_that_do_not_fit(tmp_path):
    torch.save(nn.Linear(3, 1).state_dict(), tmp_path / "other.pt")
    torch.save({"step": 3}, tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (
        ("other.pt", "size mismatch"),
        ("none.pt", "state dict"),
        ("text.pt", "state dict"),
        ("absent.pt", "no such file"),
    ):
        with pytest.raises(InvalidInputError) as problem:
            load_weights(nn.Linear(4, 1), tmp_path / name)
        assert words in str(problem.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factors": (1, 65)}, "batch size 260"),
        ({"factors": (1, 8), "examples": 16}, "no step"),
        ({"examples": 3}, "no step of the recipe's batch size 4"),
        ({"checkpoint": "any.pt", "at": (3,)}, "a checkpoint is one point"),
        ({"seeds": 1}, "at least 2"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"level": 1.0}, "level"),
        ({"rule": "cubic"}, "rule 'cubic'"),
        ({"quantity": "error"}, "quantity 'error'"),
        ({"at": (-1,)}, "at [-1]"),
        ({"seed": -1}, "seed"),
        ({"overrides": {"lr": 50.0}}, "diverge"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InvalidInputError) as problem:
        branch(workload(), **options)
    assert words in str(problem.value)


def test_the_terminal_shows_each_point():
    found = branch(workload(), at=(0, 8), factors=(1, 2), seeds=2)
    console = Console(file=io.StringIO(), width=100)
    render_branch(found, console)
    text = console.file.getvalue()
    assert text.count("Critical batch at step") == 2
    assert "start" in text


def test_the_command(capsys):
    arguments = ["branch", "quadratic", "--factors", "1,2", "--examples", "512", "--seeds", "2"]
    assert main([*arguments, "--at", "0,4", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["step"] for point in found["points"]] == [0, 4]
    assert found["basis"] == "branch"
    assert main([*arguments, "--at", "-1"]) == 2
    assert main(["branch", "quadratic", "--checkpoint", "absent.pt"]) == 2
    err = capsys.readouterr().err
    assert "--at -1" in err
    assert "absent.pt" in err
