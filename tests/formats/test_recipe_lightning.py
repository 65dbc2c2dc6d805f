"""Lightning's configurations in the words of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from recipe_examples import LIGHTNING, notes, read


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
    for part in ("optimizer's defaults", "max_epochs 3", "val_check_interval", "lr_scheduler",
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lion_pytorch.Lion", Recipe(optimizer="lion", lr=0.1, batch_size=4, betas=(0.9, 0.99))),
        ("torch.optim.RMSprop", Recipe(optimizer="rmsprop", lr=0.1, batch_size=4)),
    ],
)
def test_lightning_other_optimizers(tmp_path: Path, name: str, expected: Recipe) -> None:
    text = "trainer: {devices: 1}\ndata: {batch_size: 4}\n"
    text += f"optimizer: {{class_path: {name}, init_args: {{lr: 0.1}}}}\n"
    assert read(tmp_path, text).recipe == expected
