"""DeepSpeed's configurations in the words of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from recipe_examples import DEEPSPEED, changed, notes, read


def test_deepspeed(tmp_path: Path) -> None:
    file = read(tmp_path, DEEPSPEED)
    assert file.recipe == Recipe(
        optimizer="adamw",
        lr=5e-4,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        batch_size=64,
        total_steps=10_000,
        warmup_steps=10,
        schedule={"kind": "linear"},
    )
    assert (file.micro_batch_size, file.accumulation, file.world_size) == (4, 2, 8)
    assert file.notes == ()
    assert file.where("lr") == "optimizer.params.lr, scheduler.params.warmup_max_lr"


@pytest.mark.parametrize(
    ("total", "micro", "passes", "world", "expected"),
    [
        (64, None, None, None, (64, None, None, None)),
        (64, None, None, 8, (64, None, None, 8)),
        (64, 4, None, None, (64, 4, 16, None)),
        (64, 4, None, 8, (64, 4, 2, 8)),
        (64, None, 2, 8, (64, 4, 2, 8)),
        (None, 4, 2, 8, (64, 4, 2, 8)),
        (None, 4, None, 8, (32, 4, 1, 8)),
        (None, 4, 2, None, (8, 4, 2, None)),
        (64, 4, 2, None, (64, 4, 2, 8)),
        (64, 4, 2, 8, (64, 4, 2, 8)),
    ],
)
def test_deepspeed_parts_of_the_batch(
    tmp_path: Path, total: Any, micro: Any, passes: Any, world: Any, expected: Any
) -> None:
    table = changed(
        DEEPSPEED,
        train_batch_size=total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=passes,
    )
    file = read(tmp_path, table, world_size=world)
    split = (file.recipe.batch_size, file.micro_batch_size, file.accumulation, file.world_size)
    assert split == expected


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"train_batch_size": 60}, None, "must be a multiple of 8"),
        ({"train_batch_size": 63}, None, "train_batch_size 63 and train_micro_batch_size_per_gpu"),
        ({}, 4, "must be 4 x 2 x 4 devices = 32; correct one of them or the world size"),
        ({"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None}, 7, "of 7"),
        ({"train_batch_size": "auto"}, None, "'auto': Transformers fills it in"),
        ({"optimizer__params__lr": "auto"}, None, "optimizer.params.lr 'auto'"),
        ({"gradient_clipping": "auto"}, None, "gradient_clipping 'auto'.*TrainingArguments"),
        ({"optimizer__type": "OneBitAdam"}, None, "optimizer.type 'OneBitAdam'"),
        ({"optimizer": None}, None, "optimizer: missing"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, None, "a table is required"),
        ({"optimizer": "AdamW"}, None, "a table is required"),
        ({"optimizer__params__lr": 0.001}, None, "the scheduler sets the rate to warmup_max_lr"),
        ({"scheduler__params__warmup_max_lr": None}, None, "DeepSpeed's default 0.001"),
        ({"scheduler__type": "OneCycle"}, None, "use one of WarmupLR"),
        (
            {"train_batch_size": None, "train_micro_batch_size_per_gpu": None},
            None,
            "batch_size: missing; write train_batch_size into the file",
        ),
        ({"optimizer__params__lr": None, "scheduler": None}, None, "lr: missing"),
    ],
)
def test_deepspeed_contradictions(
    tmp_path: Path, values: dict[str, Any], world: int | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        read(tmp_path, changed(DEEPSPEED, **values), world_size=world, kind="deepspeed")
    assert str(caught.value).startswith(str(tmp_path))


def test_deepspeed_adam_is_adamw_unless_told_otherwise(tmp_path: Path) -> None:
    file = read(tmp_path, changed(DEEPSPEED, optimizer__type="Adam"))
    assert file.recipe.optimizer == "adamw"
    assert "adam_w_mode" in notes(file)
    table = changed(DEEPSPEED, optimizer__type="Adam", optimizer__params__adam_w_mode=False)
    assert read(tmp_path, table).recipe.optimizer == "adam"
    table = changed(DEEPSPEED, optimizer={"type": "SGD", "params": {"lr": 5e-4, "momentum": 0.9}})
    recipe = read(tmp_path, table).recipe
    lion = read(tmp_path, changed(DEEPSPEED, optimizer={"type": "Lion", "params": {"lr": 5e-4}}))
    assert (lion.recipe.optimizer, lion.recipe.betas) == ("lion", (0.9, 0.99))
    assert "betas (0.9, 0.99)" in notes(lion)
    assert (recipe.optimizer, recipe.momentum, recipe.betas) == ("sgd", 0.9, None)


def test_deepspeed_cosine_keeps_the_optimizers_rate(tmp_path: Path) -> None:
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 50}}
    file = read(tmp_path, changed(DEEPSPEED, scheduler=scheduler, optimizer__params__betas=None))
    assert (file.recipe.lr, file.recipe.warmup_steps) == (5e-4, 1000)
    assert "default warm-up of 1000" in notes(file)
    assert "betas (0.9, 0.999)" in notes(file)
    assert file.where("lr") == "optimizer.params.lr"
