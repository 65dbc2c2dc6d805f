from __future__ import annotations

import sys

import pytest
import torch

from noisescale.errors import InvalidInputError
from noisescale.run.overrides import parse_overrides, recipe_changes
from noisescale.run.resolve import resolve_workload

GOOD = """
import torch
from noisescale import Recipe, Workload

def make():
    x = torch.randn(20, 3)
    return Workload(name="mine", model=lambda: torch.nn.Linear(3, 1), train=(x, x[:, 0]),
                    loss=lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean(),
                    recipe=Recipe(lr=0.1, batch_size=4))

workload = make()
listed = [1, 2]
parts = {"name": "mine", "model": None, "loss": None}

def needs(argument):
    return workload

def broken():
    return 1 / 0

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "train_mine.py"
    path.write_text(GOOD)
    known = set(sys.modules)
    yield path
    for name in set(sys.modules) - known:
        if "mine" in name:
            del sys.modules[name]


def message(spec, **options):
    with pytest.raises(InvalidInputError) as caught:
        resolve_workload(spec, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("attribute", ["workload", "make"])
def test_a_workload_or_a_function_in_a_file(file, attribute):
    assert resolve_workload(f"{file}:{attribute}").name == "mine"


def test_a_module_beside_the_current_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert resolve_workload("train_mine:make").train_size == 20


def test_a_file_may_import_its_neighbour(file):
    (file.parent / "beside_mine.py").write_text("from train_mine import workload\n")
    assert resolve_workload(f"{file.parent / 'beside_mine.py'}:workload").name == "mine"


def test_a_workload_passes_through_and_takes_overrides(file):
    workload = resolve_workload(f"{file}:workload")
    assert resolve_workload(workload) is workload
    changed = resolve_workload(workload, overrides=["lr=0.2", "momentum=0.9"])
    assert (changed.recipe.lr, changed.recipe.momentum) == (0.2, 0.9)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("wrkload", "did you mean workload"),
        ("listed", "got a list"),
        ("parts", "got a dict without train, recipe"),
        ("needs", "without arguments"),
        ("broken", "ZeroDivisionError: division by zero"),
        ("leaves", "exit(3)"),
        ("torch", "got a module"),
        ("", "both sides of the colon"),
    ],
)
def test_what_a_file_can_get_wrong(file, attribute, words):
    assert words in message(f"{file}:{attribute}")


def test_an_exception_names_the_users_line(file):
    assert f"{file}, line 19" in message(f"{file}:broken")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import torch\nx = (", "SyntaxError"),
        ("\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import not_there_at_all", "No module named 'not_there_at_all'"),
        ("from noisescale import Recipe\nRecipe(lr=-1, batch_size=2)", "lr -1"),
    ],
)
def test_what_running_a_file_can_raise(file, content, words):
    file.write_text(content)
    assert words in message(f"{file}:workload")


def test_unknown_names():
    assert "did you mean digits" in message("digts")
    assert "there is no module 'no_such_module'" in message("no_such_module:thing")
    assert "does not exist" in message("no/such/file.py:thing")
    assert "train.py:NAME" in message("train.py")


def test_a_misspelt_file_names_its_neighbours(file):
    assert "did you mean train_mine.py" in message(f"{file.parent / 'train_mien.py'}:workload")


def test_data_folder_comes_from_the_argument_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("NOISESCALE_DATA", raising=False)
    assert "a data folder is required" in message("mnist")
    assert str(tmp_path) in message("mnist", data=tmp_path)
    monkeypatch.setenv("NOISESCALE_DATA", str(tmp_path / "other"))
    assert "other" in message("mnist")


def test_options_of_a_built_in_are_not_recipe_keys(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("xyz " * 400)
    workload = resolve_workload("chars", overrides=[f"text={text}", "lr=0.01"])
    assert workload.recipe.lr == 0.01
    assert int(torch.stack([part.max() for part in workload.train]).max()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("momentum", "key=value"),
        ("=3", "key=value"),
        ("momentun=0.9", "did you mean momentum"),
        ("momentum=high", "a number is required"),
        ("batch_size=3.5", "a whole number"),
        ("batch_size=0", "at least 1"),
        ("betas=0.9", "two numbers"),
        ("nesterov=maybe", "true or false"),
        ("lr=none", "a number is required"),
        ("optimizer=adamm", "did you mean adam"),
        ("schedule=step,milestones:x", "kind:"),
    ],
)
def test_bad_overrides(text, words):
    assert words in message("digits", overrides=[text])


def test_overrides_have_the_types_of_their_keys():
    texts = ["betas=0.9,0.99", "total-steps=100", "nesterov=yes", "weight_decay=none"]
    assert recipe_changes(parse_overrides(texts)) == {
        "betas": (0.9, 0.99),
        "total_steps": 100,
        "nesterov": True,
        "weight_decay": None,
    }
    table = recipe_changes({"schedule": "step,milestones:10/20,gamma:0.5"})["schedule"]
    assert table == {"kind": "step", "milestones": [10, 20], "gamma": 0.5}
