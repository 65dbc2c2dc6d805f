"""Our own recipe files, and telling whose keys a file has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError
from noisescale.formats.recipe_file import read_recipe
from noisescale.records import Recipe
from recipe_examples import DEEPSPEED, LIGHTNING, OWN, OWN_YAML, TIMM, TRANSFORMERS, written

BASE = {"lr": 0.1, "batch_size": 32}


def of(tmp_path: Path, **values: Any) -> Any:
    return read_recipe(written(tmp_path, "r.json", {**BASE, **values}))


def test_toml(tmp_path: Path) -> None:
    file = read_recipe(written(tmp_path, "r.toml", OWN))
    assert file.kind == "noisescale"
    assert file.recipe == Recipe(
        optimizer="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        batch_size=32,
        dataset_size=50_000,
        total_steps=10_000,
        warmup_steps=500,
        evaluate_every=100,
        schedule={"kind": "step", "milestones": [5000, 7500], "gamma": 0.1},
    )
    assert file.notes == ()
    assert file.already_scaled is None
    assert file.where("lr") == "lr"


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "r.yaml", OWN_YAML)).recipe
    assert recipe == Recipe(
        optimizer="adamw",
        lr=3e-4,
        betas=(0.9, 0.95),
        batch_size=32,
        total_examples=320_000,
        schedule={"kind": "cosine"},
    )
    table = {key: value for key, value in recipe.to_dict().items() if value is not None}
    assert read_recipe(written(tmp_path, "r.json", table)).recipe == recipe


def test_every_optimizer_takes_its_own_keys(tmp_path: Path) -> None:
    both = {"optimizer": "rmsprop", "alpha": 0.9, "momentum": 0.5, "eps": 1e-8}
    assert of(tmp_path, **both).recipe == Recipe(**BASE, **both)
    lion = of(tmp_path, optimizer="lion", betas=[0.9, 0.99]).recipe
    assert lion == Recipe(**BASE, optimizer="lion", betas=(0.9, 0.99))


def test_absent_keys_stay_absent(tmp_path: Path) -> None:
    recipe = of(tmp_path, momentum=None, warmup_steps=0).recipe
    assert recipe == Recipe(lr=0.1, batch_size=32)


def test_numbers_as_text_are_read_and_noted(tmp_path: Path) -> None:
    file = read_recipe(
        written(tmp_path, "r.yaml", 'lr: "3e-4"\nbatch_size: "64"\nbetas: ["0.9", 0.99]\n'
                                    "optimizer: adamw\nnesterov: no\n")
    )  # fmt: skip
    assert (file.recipe.lr, file.recipe.batch_size, file.recipe.betas) == (3e-4, 64, (0.9, 0.99))
    assert len(file.notes) == 3
    assert "the text '3e-4' of lr is read as the number 0.0003." in file.notes


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    recipe = of(tmp_path, total_examples=1e6, batch_size=64.0).recipe
    assert (recipe.total_examples, recipe.batch_size) == (1_000_000, 64)
    assert isinstance(recipe.total_examples, int)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": None}, "r.json: lr: missing; write lr into the file"),
        ({"batch_size": None}, "batch_size: missing"),
        ({"learnin_rate": 0.1}, "key 'learnin_rate': not a recipe key"),
        ({"momentun": 0.9}, r"key 'momentun': not a recipe key; did you mean momentum\?"),
        ({"learning_rate": 0.1}, r"'learning_rate': not a recipe key; did you mean lr\?"),
        ({"wd": 0.1}, r"did you mean weight_decay\?"),
        ({"lr": "fast"}, "lr 'fast': a positive number is required"),
        ({"lr": 0}, "lr 0: a positive number"),
        ({"lr": -1}, "lr -1: a positive number"),
        ({"lr": True}, "lr True: a positive number"),
        ({"lr": [0.1]}, "a positive number is required"),
        ({"lr": "nan"}, "lr 'nan': a positive number"),
        ({"lr": "1e999"}, "lr '1e999': a positive number"),
        ({"lr": int("9" * 400)}, "a positive number is required"),
        ({"lr": {"base": 1}}, "a positive number is required"),
        ({"batch_size": 0}, "batch_size 0: a whole number of at least 1"),
        ({"batch_size": 32.5}, "a whole number of at least 1"),
        ({"batch_size": "big"}, "a whole number of at least 1"),
        ({"momentum": 1.0}, r"momentum 1.0: a number in \[0, 1\)"),
        ({"momentum": -0.1}, "a number of at least 0"),
        ({"weight_decay": -1}, "a number of at least 0"),
        ({"optimizer": "sdg"}, "did you mean sgd"),
        ({"optimizer": 3}, "optimizer 3: a text is required"),
        ({"optimizer": "adamw", "betas": [0.9]}, "two numbers"),
        ({"optimizer": "adamw", "betas": [0.9, 1.0]}, "two numbers"),
        ({"optimizer": "adamw", "betas": "0.9,0.99"}, "two numbers"),
        ({"optimizer": "adamw", "momentum": 0.9}, "adamw has no momentum"),
        ({"betas": [0.9, 0.99]}, "sgd has no betas"),
        ({"alpha": 0.9}, "sgd has no alpha"),
        ({"optimizer": "rmsprop", "alpha": 1.0}, r"alpha 1.0: a number in \[0, 1\)"),
        ({"optimizer": "rmsprop", "nesterov": True}, "rmsprop has no nesterov"),
        ({"optimizer": "lion", "momentum": 0.9}, "lion has no momentum"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"nesterov": "perhaps", "momentum": 0.9}, "true or false"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "and no dampening"),
        ({"unit": "pixels"}, "not a unit"),
        ({"schedule": "cosine"}, 'write {kind = "cosine"}'),
        ({"schedule": {"milestones": [1]}}, "its kind is required"),
        ({"schedule": [1]}, "a table is required"),
        ({"total_steps": 10, "total_examples": 500}, "total_steps 10 and total_examples 500"),
        ({"warmup_steps": 10, "warmup_examples": 352}, "at batch size 32, 10 steps are 320"),
        ({"warmup_steps": 10, "total_steps": 5}, "the warm-up is longer than the training"),
        ({"dataset_size": 16}, "the batch is larger than the data"),
    ],
)
def test_bad_values_name_file_and_key(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        of(tmp_path, **values)
    assert str(caught.value).startswith(str(tmp_path / "r.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e400"])
def test_toml_knows_odd_floats(tmp_path: Path, word: str) -> None:
    with pytest.raises(InvalidInputError, match=r"lr .*: a positive number"):
        read_recipe(written(tmp_path, "r.toml", f"lr = {word}\nbatch_size = 2\n"))
    text = f'lr = 1\nbatch_size = 2\nschedule = {{kind = "step", list = [1, {word}]}}\n'
    with pytest.raises(InvalidInputError, match=r"schedule .*: finite numbers are required"):
        read_recipe(written(tmp_path, "r.toml", text))
    with pytest.raises(InvalidInputError, match=r"lr .*: a positive number"):
        read_recipe(written(tmp_path, "r.toml", "lr = 1979-05-27\nbatch_size = 2\n"))


def test_twins_that_agree_within_a_step_are_kept(tmp_path: Path) -> None:
    recipe = of(tmp_path, total_steps=10, total_examples=330).recipe
    assert (recipe.total_steps, recipe.total_examples) == (10, 330)


def test_what_is_given_beside_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "r.json", {"lr": 0.1})
    file = read_recipe(path, given={"batch_size": 64, "momentum": 0.9})
    assert file.recipe == Recipe(lr=0.1, batch_size=64, momentum=0.9)
    with pytest.raises(InvalidInputError, match="not a recipe key; did you mean momentum"):
        read_recipe(path, given={"batch_size": 64, "momentm": 0.9})
    with pytest.raises(InvalidInputError, match="momentum"):
        read_recipe(path, given={"batch_size": 64, "momentum": 2})
    assert read_recipe(path, given={"batch_size": 8}, dataset_size=100).recipe.dataset_size == 100
    sized = written(tmp_path, "s.json", {**BASE, "dataset_size": 99})
    with pytest.raises(InvalidInputError, match="dataset_size 100 was given"):
        read_recipe(sized, dataset_size=100)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8"])
def test_bad_arguments(tmp_path: Path, bad: Any) -> None:
    path = written(tmp_path, "r.json", BASE)
    with pytest.raises(InvalidInputError, match="world_size"):
        read_recipe(path, world_size=bad)
    with pytest.raises(InvalidInputError, match="dataset_size"):
        read_recipe(path, dataset_size=bad)
    with pytest.raises(InvalidInputError, match="did you mean deepspeed"):
        read_recipe(path, kind="deepsped")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.toml", OWN, "noisescale"),
        ("b.yaml", OWN_YAML, "noisescale"),
        ("c.yaml", TRANSFORMERS, "transformers"),
        ("d.json", {"learning_rate": 1e-4, "output_dir": "x"}, "transformers"),
        ("e.json", {"per_device_train_batch_size": 4, "train_batch_size": 4}, "transformers"),
        ("f.json", DEEPSPEED, "deepspeed"),
        ("g.yaml", LIGHTNING, "lightning"),
        ("h.yaml", TIMM, "timm"),
        ("i.json", {"lr": 1, "batch_size": 2, "clip_norm": 1.0}, "noisescale"),
    ],
)
def test_the_kind_is_told_by_the_keys(tmp_path: Path, name: str, content: Any, kind: str) -> None:
    assert read_recipe(written(tmp_path, name, content)).kind == kind


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"learning_rate": 0.1, "batch_size": 8}, r"'learning_rate': .* did you mean lr\?"),
        ({"hello": 1}, "no keys of a recipe that is known.*write at least lr and batch_size"),
        ({}, "no keys of a recipe"),
        ({"trainer": {"devices": 1}, "train_batch_size": 8}, r"deepspeed \(train_batch_size\) and"),
        ({"opt": "sgd", "zero_optimization": {}}, "deepspeed .* and timm"),
        (
            {"auto_scale_lr": {"enable": True, "base_batch_size": 256}, "optim_wrapper": {}},
            r"auto_scale_lr.enable is true: the rate is scaled",
        ),
    ],
)
def test_files_of_no_kind_or_of_two(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_recipe(written(tmp_path, "r.json", table))


def test_the_kind_can_be_forced(tmp_path: Path) -> None:
    path = written(tmp_path, "r.json", {"lr": 0.1, "batch_size": 8, "sched": "cosine"})
    assert read_recipe(path).kind == "timm"
    assert read_recipe(path, kind="timm").kind == "timm"
    with pytest.raises(InvalidInputError, match="key 'sched': not a recipe key"):
        read_recipe(path, kind="noisescale")


def test_random_recipes_come_back(tmp_path: Path) -> None:
    for number in range(20):
        recipe = Recipe(
            optimizer="lamb", lr=10.0**-number, batch_size=2**number, betas=(0.1, 0.5), eps=1e-300
        )
        table = {key: value for key, value in recipe.to_dict().items() if value is not None}
        (tmp_path / "r.json").write_text(json.dumps(table))
        assert read_recipe(tmp_path / "r.json").recipe == recipe
