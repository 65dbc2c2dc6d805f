"""Configurations that scale the rate themselves are found, and only those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noisescale.formats.already_scaled import already_scaled
from noisescale.formats.recipe_file import read_recipe
from recipe_examples import DEEPSPEED, LIGHTNING, OWN, TRANSFORMERS, written

SCALED: list[tuple[dict[str, Any], str]] = [
    ({"auto_scale_lr": {"enable": True, "base_batch_size": 16}}, "auto_scale_lr.enable is true"),
    ({"auto_scale_lr": {"base_batch_size": 16}}, "auto_scale_lr is true"),
    ({"auto_scale_lr": True}, "auto_scale_lr is true"),
    ({"base_batch_size": 256}, "base_batch_size is 256"),
    ({"train": {"scale_lr": True}}, "train.scale_lr is true"),
    ({"scale_lr": "true"}, "scale_lr is true"),
    ({"optim": {"base_lr": 0.004, "scaling_rule": "sqrt_wrt_1024"}}, "scaling_rule is sqrt_wrt"),
    ({"lr_scale": True}, "lr_scale is true"),
    ({"linear_scaling": 1}, "linear_scaling is 1"),
    ({"SOLVER": {"REFERENCE_WORLD_SIZE": 8}}, "SOLVER.REFERENCE_WORLD_SIZE is 8"),
    ({"lr": "${eval:'1e-4 * ${trainer.devices}'}"}, "the rate is computed"),
    ({"optimizer": {"learning_rate": "0.1 * world_size / 8"}}, "optimizer.learning_rate is 0.1 *"),
    ({"base_lr": "${mul:0.1,${n_gpus}}"}, "base_lr is"),
    (
        {"dynamic_batching": {"enabled": True, "lr_scaling_method": "linear"}},
        "dynamic_batching.lr_scaling_method is linear",
    ),
    ({"stages": [{"scale_lr": True}]}, "stages.0.scale_lr is true"),
    ({"batch": 16, "lr0": 0.01, "nbs": 64}, "nbs is 64: passes are accumulated up to"),
]
NOT_SCALED: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"auto_scale_lr": {"enable": False, "base_batch_size": 16}},
    {"auto_scale_lr": False, "scale_lr": None, "linear_scaling": 0, "scaling_rule": "none"},
    {"scale_lr": "no"},
    {"reference_world_size": 0},
    {"dynamic_batching": {"enabled": False, "lr_scaling_method": "linear"}},
    {"lr": "0.1"},
    {"lr": "${base.lr}"},
    {"lr_scheduler_type": "linear", "model": {"scaling": 2, "attention_scaling": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 2}},
    {"run_dir": "runs/lr*/batch_size"},
    {"lr_scale": 0.5},
    {"nbs": 0},
    {"nbs": None},
    {1: {2: [3, {4: 5}]}},
]


@pytest.mark.parametrize(("data", "said"), SCALED)
def test_found(data: dict[str, Any], said: str) -> None:
    sentence = already_scaled(data)
    assert sentence is not None
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("data", NOT_SCALED)
def test_not_found(data: dict[str, Any]) -> None:
    assert already_scaled(data) is None


def test_files_of_every_kind_say_it(tmp_path: Path) -> None:
    own = written(tmp_path, "r.toml", "base_batch_size = 256\n" + OWN)
    assert "base_batch_size is 256" in str(read_recipe(own).already_scaled)
    hf = written(tmp_path, "t.yaml", TRANSFORMERS + "scale_lr: true\n")
    assert "scale_lr is true" in str(read_recipe(hf).already_scaled)
    table = {**DEEPSPEED, "scaling_rule": "linear"}
    assert read_recipe(written(tmp_path, "d.json", table)).already_scaled is not None
    pl = written(tmp_path, "l.yaml", LIGHTNING.replace("width: 64", "scale_lr: true"))
    assert "model.init_args.scale_lr is true" in str(read_recipe(pl).already_scaled)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch: 16\nlr0: 0.01\nmomentum: 0.937\nnbs: 64\n", "nbs is 64"),
        (
            "optim_wrapper: {optimizer: {type: SGD, lr: 0.02}}\n"
            "auto_scale_lr: {enable: true, base_batch_size: 16}\n",
            "auto_scale_lr.enable is true",
        ),
        ("SOLVER: {BASE_LR: 0.02, IMS_PER_BATCH: 16, REFERENCE_WORLD_SIZE: 8}\n", "SOLVER.REF"),
        (
            "train: {batch_size_per_gpu: 64}\noptim: {base_lr: 0.1, scaling_rule: linear}\n",
            "optim.s",
        ),
    ],
    ids=["ultralytics", "mmengine", "detectron2", "dinov2"],
)
def test_files_of_no_kind_of_ours_say_it_too(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read_recipe(written(tmp_path, "config.yaml", text))
    assert "change the batch size there and let it scale" in str(caught.value)


def test_a_rate_that_is_computed_from_the_devices_is_no_number_but_says_why(
    tmp_path: Path,
) -> None:
    text = LIGHTNING.replace("lr: 0.1", "lr: 0.1 * ${trainer.devices}")
    with pytest.raises(ValueError, match="computed from the batch size or devices"):
        read_recipe(written(tmp_path, "l.yaml", text))
