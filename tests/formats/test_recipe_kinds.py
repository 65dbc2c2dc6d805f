"""Configurations of Transformers, DeepSpeed, Lightning and timm in the words of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError
from noisescale.formats.recipe_file import RecipeFile, read_recipe
from noisescale.records import Recipe
from recipe_examples import DEEPSPEED, LIGHTNING, TIMM, TRANSFORMERS, changed, written


def read(folder: Path, content: Any, **options: Any) -> RecipeFile:
    name = "c.yaml" if isinstance(content, str) else "c.json"
    return read_recipe(written(folder, name, content), **options)


def notes(file: RecipeFile) -> str:
    return "\n".join(file.notes)


# Transformers


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
        ({"optim": "adafactor"}, "optim 'adafactor': an optimizer whose rule is known"),
        ({"optim": "lion_8bit"}, "optim 'lion_8bit'"),
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
        ({"learning_rate": "3e-4"}, "the text '3e-4' is read as the number"),
    ],
)
def test_transformers_notes(tmp_path: Path, values: dict[str, Any], note: str) -> None:
    table = {"learning_rate": 1e-4, "output_dir": "x", **values}
    assert note in notes(read(tmp_path, table, world_size=4))


def test_transformers_split_batches_is_the_batch_of_all_devices(tmp_path: Path) -> None:
    table = {"per_device_train_batch_size": 32, "accelerator_config": {"split_batches": True}}
    assert read(tmp_path, table, world_size=4).recipe.batch_size == 32


# DeepSpeed


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
    assert (recipe.optimizer, recipe.momentum, recipe.betas) == ("sgd", 0.9, None)


def test_deepspeed_cosine_keeps_the_optimizers_rate(tmp_path: Path) -> None:
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 50}}
    file = read(tmp_path, changed(DEEPSPEED, scheduler=scheduler, optimizer__params__betas=None))
    assert (file.recipe.lr, file.recipe.warmup_steps) == (5e-4, 1000)
    assert "default warm-up of 1000" in notes(file)
    assert "betas [0.9, 0.999]" in notes(file)
    assert file.where("lr") == "optimizer.params.lr"


# Lightning


def test_lightning(tmp_path: Path) -> None:
    file = read(tmp_path, LIGHTNING)
    assert file.recipe == Recipe(
        optimizer="sgd",
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        clip_norm=0.5,
        ema_decay=0.995,
        batch_size=8 * 4 * 2 * 2,
        total_steps=2000,
    )
    assert (file.micro_batch_size, file.accumulation, file.world_size) == (8, 2, 8)
    assert file.where("ema_decay") == "trainer.callbacks.1.init_args.decay"
    assert file.where("batch_size") == (
        "data.init_args.batch_size, trainer.accumulate_grad_batches"
    )


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("4", 4), ("[0, 2, 3]", 3), ("'0,1'", 2), ("auto", None), ("-1", None), ("'2'", 2)],
)
def test_lightning_devices(tmp_path: Path, devices: str, expected: int | None) -> None:
    text = LIGHTNING.replace("devices: 4 ", f"devices: {devices} ").replace("num_nodes: 2", "")
    file = read(tmp_path, text)
    assert file.world_size == expected
    assert file.recipe.batch_size == 16 * (expected or 1)
    assert ("1 is assumed" in notes(file)) == (expected is None)
    if expected is None:
        assert read(tmp_path, text, world_size=6).recipe.batch_size == 96


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("torch.optim.SGD", "bitsandbytes.optim.AdamW8bit", "an optimizer whose rule is known"),
        ("torch.optim.SGD", "torch.optim.Adagrad", "optimizer.class_path 'torch.optim.Adagrad'"),
        ("    width: 64", "    lr: 0.2", "they disagree on the rate; remove one"),
        (
            "batch_size: 8 ",
            "batch_size: 8\n    train: {batch_size: 9} ",
            "disagree on the batch size",
        ),
        ("batch_size: 8 ", "size: 8 ", "batch_size: missing; write data.init_args.batch_size"),
        ("    lr: 0.1\n", "", "lr: missing; write optimizer.init_args.lr into the file"),
        ("    width: 64", "    lr: [1]", "they disagree on the rate"),
        ("devices: 4 ", "devices: some ", "trainer.devices 'some': a whole number"),
        ("devices: 4 ", "devices: 0 ", "trainer.devices 0: a whole number"),
    ],
)
def test_lightning_bad_values(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in LIGHTNING
    with pytest.raises(InvalidInputError, match=message):
        read(tmp_path, LIGHTNING.replace(old, new))


def test_lightning_world_size_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="8 devices train, but world size 4 was given"):
        read(tmp_path, LIGHTNING, world_size=4)
    assert read(tmp_path, LIGHTNING, world_size=8).world_size == 8


def test_lightning_adam_with_torchs_defaults_and_epochs(tmp_path: Path) -> None:
    text = (
        "trainer: {max_epochs: 3, devices: 1, val_check_interval: 100,"
        " gradient_clip_val: 1.0, gradient_clip_algorithm: value,"
        " callbacks: [{class_path: BatchSizeFinder}]}\n"
        "optimizer: {class_path: AdamW, init_args: {lr: 0.001}}\n"
        "lr_scheduler: {class_path: StepLR, init_args: {step_size: 5}}\n"
        "data: {batch_size: 100}\n"
    )
    file = read(tmp_path, text)
    assert file.recipe == Recipe(
        optimizer="adamw", lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, batch_size=100
    )
    for part in ("torch's defaults", "max_epochs 3", "val_check_interval", "lr_scheduler",
                 "BatchSizeFinder", "clipping by value"):  # fmt: skip
        assert part in notes(file)
    sized = read(tmp_path, text, dataset_size=950)
    assert sized.recipe.total_steps == 30
    assert sized.implied == {"total_steps"}


def test_lightning_with_the_optimizer_in_the_model(tmp_path: Path) -> None:
    text = (
        "trainer: {devices: 1}\nmodel:\n  init_args:\n    learning_rate: 0.1\n    batch_size: 4\n"
    )
    with pytest.raises(InvalidInputError, match="optimizer: missing"):
        read(tmp_path, text)
    recipe = read(tmp_path, text, given={"optimizer": "sgd"}).recipe
    assert recipe == Recipe(optimizer="sgd", lr=0.1, batch_size=4)
    inside = text + "    optimizer:\n      class_path: torch.optim.Adam\n"
    assert read(tmp_path, inside).recipe.optimizer == "adam"


# timm


def test_timm(tmp_path: Path) -> None:
    file = read(tmp_path, TIMM)
    assert file.recipe == Recipe(
        optimizer="sgd",
        lr=0.4,
        momentum=0.9,
        weight_decay=2e-5,
        ema_decay=0.9998,
        batch_size=1024,
        schedule={"kind": "cosine"},
    )
    assert file.already_scaled is None
    assert "does not use lr_base" in notes(file)
    assert "epochs 90 and warmup_epochs 5" in notes(file)
    sized = read(tmp_path, TIMM, dataset_size=102_400)
    assert (sized.recipe.total_steps, sized.recipe.warmup_steps) == (9000, 500)


@pytest.mark.parametrize(
    ("opt", "scale", "lr", "word"),
    [
        ("sgd", "''", 0.4, "linear"),
        ("sgd", "sqrt", 0.2, "square-root"),
        ("adamw", "''", 0.2, "square-root"),
        ("adamw", "linear", 0.4, "linear"),
        ("lamb", "''", 0.2, "square-root"),
    ],
)
def test_timm_scales_lr_base_itself(
    tmp_path: Path, opt: str, scale: str, lr: float, word: str
) -> None:
    text = TIMM.replace("lr: 0.4", "lr: null").replace("opt: momentum", f"opt: {opt}")
    text = text.replace("lr_base_scale: ''", f"lr_base_scale: {scale}")
    file = read(tmp_path, text)
    assert file.recipe.lr == pytest.approx(lr)
    assert file.already_scaled is not None
    assert "lr_base is 0.1 for lr_base_size 256" in file.already_scaled
    assert word in file.already_scaled
    assert "lr" in file.implied


def test_timm_plain_sgd_has_nesterovs_momentum(tmp_path: Path) -> None:
    file = read(tmp_path, TIMM.replace("opt: momentum", "opt: sgd"))
    assert file.recipe.nesterov is True
    assert "Nesterov" in notes(file)
    few = read(tmp_path, {"sched": "step", "lr": 0.1}, world_size=1)
    assert few.recipe == Recipe(
        optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-5, batch_size=128
    )
    assert "opt sgd, batch_size 128, weight_decay 2e-05, momentum 0.9" in notes(few)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opt: momentum", "opt: adahessian", "opt 'adahessian': an optimizer whose rule"),
        ("opt: momentum", "opt: adamww", "did you mean adamw"),
        ("lr: 0.4", "lr: -0.4", "lr -0.4: a number of at least 0"),
        ("lr: 0.4", "lr:", "lr_base_scale 'cubic': linear or sqrt"),
        ("world_size: 8", "world_size: none", "world_size 'none': a whole number"),
        ("bn_momentum: null", "bn_momentum: 1.5", r"bn_momentum 1.5: a number in \[0, 1\)"),
    ],
)
def test_timm_bad_values(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = TIMM.replace("lr_base_scale: ''", "lr_base_scale: cubic")
    assert old in text
    with pytest.raises(InvalidInputError, match=message):
        read(tmp_path, text.replace(old, new))
    with pytest.raises(InvalidInputError, match="world_size 8: world size 2 was given"):
        read(tmp_path, TIMM, world_size=2)


def test_lightning_batch_sizes_are_found_where_the_data_keep_them(tmp_path: Path) -> None:
    text = (
        "trainer: {devices: 1}\nmodel: {lr: 0.1, batch_size: 3}\n"
        "optimizer: {class_path: SGD}\n"
        "data: {val_batch_size: 9, val: {batch_size: 7}, loader: {batch_size: 4}}\n"
    )
    file = read(tmp_path, text)
    assert (file.recipe.batch_size, file.recipe.lr) == (4, 0.1)
    assert file.where("batch_size") == "data.loader.batch_size, trainer.accumulate_grad_batches"


def test_lightning_by_hydra(tmp_path: Path) -> None:
    text = (
        "trainer: {_target_: lightning.pytorch.trainer.Trainer, devices: 2}\n"
        "data: {_target_: my.Data, batch_size: 128}\n"
        "model:\n  optimizer:\n    _target_: torch.optim.Adam\n    _partial_: true\n"
        "    lr: 0.001\n    weight_decay: 0.0\n"
    )
    file = read(tmp_path, text)
    assert (file.recipe.optimizer, file.recipe.lr, file.recipe.batch_size) == ("adam", 1e-3, 256)
    assert "data.batch_size 128 is taken for the examples of one device" in notes(file)
    with pytest.raises(InvalidInputError, match=r"model\.optimizer\._target_ 'my\.Adam'"):
        read(tmp_path, text.replace("torch.optim", "my"))
