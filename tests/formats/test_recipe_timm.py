"""timm's configurations in the words of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from recipe_examples import TIMM, notes, read


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
    assert "epochs 90, warmup_epochs 5" in notes(file)
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
    with pytest.raises(InvalidInputError, match=r"learning_rate 0\.1: no key of timm"):
        read(tmp_path, TIMM.replace("lr: 0.4", "learning_rate: 0.1"))


@pytest.mark.parametrize("key", ["epochs", "warmup_epochs"])
def test_timm_more_steps_than_can_be_counted(tmp_path: Path, key: str) -> None:
    text = TIMM.replace(f"\n{key}: ", f"\n{key}: 1.0e+308 # ")
    with pytest.raises(InvalidInputError, match=rf": {key} 1e\+308: at most \d+ steps"):
        read(tmp_path, text, dataset_size=100_000)


def test_timm_lion(tmp_path: Path) -> None:
    recipe = read(tmp_path, TIMM.replace("opt: momentum", "opt: lion")).recipe
    assert (recipe.optimizer, recipe.betas, recipe.eps) == ("lion", (0.9, 0.99), None)
