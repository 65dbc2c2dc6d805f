"""Transformers's configurations in the words of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from recipe_examples import TRANSFORMERS, notes, read


def test_transformers(tmp_path: Path) -> None:
    file = read(tmp_path, TRANSFORMERS, world_size=8)
    assert file.recipe == Recipe(
        optimizer="adamw",
        lr=2e-5,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        batch_size=16 * 2 * 8,
        total_steps=1000,
        warmup_steps=100,
        evaluate_every=50,
        schedule={"kind": "cosine"},
    )
    assert (file.micro_batch_size, file.accumulation, file.world_size) == (16, 2, 8)
    assert "adam_beta1 0.9" in notes(file)
    assert "adam_beta2" not in notes(file)
    assert "max_grad_norm 1.0" in notes(file)
    assert "num_train_epochs" not in notes(file)
    assert file.where("batch_size") == "per_device_train_batch_size, gradient_accumulation_steps"
    assert file.where("betas") == "adam_beta1, adam_beta2"


def test_transformers_without_a_world_size_says_so(tmp_path: Path) -> None:
    file = read(tmp_path, TRANSFORMERS)
    assert (file.recipe.batch_size, file.world_size) == (32, None)
    assert "1 is assumed" in notes(file)


def test_transformers_defaults(tmp_path: Path) -> None:
    file = read(tmp_path, {"output_dir": "x"}, world_size=1)
    assert file.recipe == Recipe(
        optimizer="adamw",
        lr=5e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        batch_size=8,
        schedule={"kind": "linear"},
    )
    assert "learning_rate 5e-05, per_device_train_batch_size 8" in notes(file)


def test_transformers_epochs_become_steps_with_the_data_set_size(tmp_path: Path) -> None:
    table = {"learning_rate": 1e-4, "num_train_epochs": 2, "warmup_ratio": 0.1, "max_steps": -1}
    file = read(tmp_path, table, world_size=1)
    assert (file.recipe.total_steps, file.recipe.warmup_steps) == (None, None)
    assert "epochs do not change with the batch size" in notes(file)
    file = read(tmp_path, table, world_size=1, dataset_size=1001)
    assert (file.recipe.total_steps, file.recipe.warmup_steps) == (2 * 126, 26)
    assert file.implied == {"total_steps", "warmup_steps"}


@pytest.mark.parametrize(
    ("values", "warmup", "implied"),
    [
        ({"warmup_ratio": 0.03}, 30, True),
        ({"warmup_steps": 0.05}, 50, True),
        ({"warmup_steps": 20, "warmup_ratio": 0.5}, 20, False),
        ({"warmup_steps": 0}, None, False),
        ({}, None, False),
    ],
)
def test_transformers_warm_up(
    tmp_path: Path, values: dict[str, Any], warmup: int | None, implied: bool
) -> None:
    file = read(tmp_path, {"learning_rate": 1e-4, "max_steps": 1000, **values}, world_size=1)
    assert file.recipe.warmup_steps == warmup
    assert ("warmup_steps" in file.implied) == implied


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 4}, "no key of Transformers, whose name for it is per_device"),
        ({"learning_rate": None, "lr": 0.1}, "lr 0.1: no key of Transformers"),
        ({"optim": "adafactor"}, "optim 'adafactor': an optimizer whose rule is known"),
        ({"optim": "galore_adamw"}, "optim 'galore_adamw'"),
        ({"optim": "sgd", "optim_args": "momentum=1.5"}, r"momentum '1.5': a number in \[0, 1\)"),
        ({"optim": "sgd", "optim_args": "momentum"}, "momentum '': a number"),
        ({"adafactor": True}, "adafactor True: Adafactor has no rule"),
        ({"learning_rate": "auto"}, "learning_rate 'auto': a positive number"),
        ({"per_device_train_batch_size": "auto"}, "'auto': a number is required"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0: a whole number"),
        ({"adam_beta1": 1.0}, r"adam_beta1 1.0: a number in \[0, 1\)"),
        ({"adam_beta2": -0.1}, "adam_beta2 -0.1"),
        ({"warmup_ratio": 1.5}, "a number of at most 1"),
        ({"warmup_steps": 10.5}, "warmup_steps 10.5: a whole number"),
        ({"max_steps": "many"}, "max_steps 'many'"),
        ({"lr_scheduler_type": 3}, "a text is required"),
    ],
)
def test_transformers_bad_values(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        read(tmp_path, {"learning_rate": 1e-4, "output_dir": "x", **values})
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size is on"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is on"),
        ({"optim": "sgd"}, "no momentum"),
        ({"optim": "adamw_bnb_8bit"}, "taken for AdamW"),
        ({"optim_args": "a=1"}, "optim_args 'a=1' is not read"),
        ({"deepspeed": "ds.json"}, "overrule these"),
        ({"save_steps": 500, "eval_steps": 250}, "save_steps 500 counts steps"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type polynomial: not read"),
        ({"learning_rate": "3e-4"}, "the text '3e-4' of learning_rate is read"),
    ],
)
def test_transformers_notes(tmp_path: Path, values: dict[str, Any], note: str) -> None:
    table = {"learning_rate": 1e-4, "output_dir": "x", **values}
    assert note in notes(read(tmp_path, table, world_size=4))


def test_transformers_split_batches_is_the_batch_of_all_devices(tmp_path: Path) -> None:
    table = {"per_device_train_batch_size": 32, "accelerator_config": {"split_batches": True}}
    assert read(tmp_path, table, world_size=4).recipe.batch_size == 32


def test_transformers_more_steps_than_can_be_counted(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"num_train_epochs 1e\+308: at most \d+ steps"):
        read(tmp_path, {"learning_rate": 0.1, "num_train_epochs": 1e308}, dataset_size=100_000)


def test_transformers_other_optimizers(tmp_path: Path) -> None:
    table = {"learning_rate": 0.1, "output_dir": "x", "optim_args": "momentum=0.9, nesterov=True"}
    file = read(tmp_path, {**table, "optim": "sgd"}, world_size=1)
    assert (file.recipe.momentum, file.recipe.nesterov, file.recipe.betas) == (0.9, True, None)
    assert "version 4 ignores it" in notes(file)
    assert "adam_beta1" not in notes(file)
    file = read(tmp_path, {**table, "optim": "rmsprop", "optim_args": "alpha=0.95"}, world_size=1)
    assert (file.recipe.optimizer, file.recipe.alpha, file.recipe.eps) == ("rmsprop", 0.95, None)
    file = read(tmp_path, {**table, "optim": "lion_8bit"}, world_size=1)
    assert (file.recipe.optimizer, file.recipe.betas) == ("lion", (0.9, 0.999))
    assert file.recipe.eps is None
