"""What is wrong elsewhere in conversions and schedules, each with a test that would catch it here.

In brackets where it was seen: a project's issue or change, or a formula that is often misquoted.
"""

from __future__ import annotations

import itertools
import json
import math

import pytest

from noisescale import InvalidInputError, Recipe, convert, plan_schedule
from noisescale.plan.schedule.noise_driven import CostOptimal, NormTest
from noisescale.run.convert_file import convert_file
from noisescale.theory.scaling import Facts, recommended

KINDS = {
    "adam": {"optimizer": "adam", "betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"optimizer": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop"},
    "lamb": {"optimizer": "lamb"},
    "lars": {"optimizer": "lars", "momentum": 0.9},
    "lion": {"optimizer": "lion"},
}
WHOLE = {
    "total_steps": 40_000,
    "warmup_steps": 4000,
    "evaluate_every": 400,
    "schedule": {"kind": "step", "milestones": [20_000, 30_000], "gamma": 0.1},
}


def written(folder, name="arguments.json", **values):
    path = folder / name
    path.write_text(json.dumps({"learning_rate": 1e-4, "max_steps": 1000, **values}))
    return path


@pytest.mark.parametrize(
    ("micro", "passes", "devices", "new_devices"), [(8, 1, 8, 1), (8, 4, 2, 8), (64, 1, 1, 8)]
)
def test_devices_counted_in_place_of_the_global_batch(
    tmp_path, micro, passes, devices, new_devices
):
    """Lightning's forum, thread 101; mmdetection PR #1038: 8 devices took 8 times the rate."""
    file = written(tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=passes)
    size = micro * passes * devices
    found = convert_file(file, batch_size=size, replicas=devices, new_replicas=new_devices)
    assert found.unchanged
    assert found.recipe.lr == 1e-4
    assert "the global batch is the same" in found.summary


def test_a_batch_of_all_devices_taken_for_one_of_each(tmp_path):
    """transformers PR #38633: with split_batches the value is the sum over the processes."""
    file = written(
        tmp_path, per_device_train_batch_size=32, accelerator_config={"split_batches": True}
    )
    assert convert_file(file, batch_size=32, replicas=4).unchanged


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("facts", [{}, {"noise_scale": 500.0}])
@pytest.mark.parametrize("size", [64, 1024, 8192])
def test_the_linear_rule_by_default_for_normalised_steps(name, facts, size):
    """CenterNet #476, detr #48: the linear rule is SGD's."""
    old = Recipe(lr=1e-3, batch_size=256, **KINDS[name])
    assert recommended(old, size, Facts(**facts)).name != "linear"
    root = math.sqrt(size / 256)
    ratio = convert(old, batch_size=size, **facts).recipe.lr / old.lr
    assert ratio <= max(1.0, root) * (1 + 1e-9)
    # Downwards LARS and LAMB lengthen their memory, which raises what a rate does.
    assert ratio >= min(1.0, root) * (1 - 1e-9) or name in ("lars", "lamb")


@pytest.mark.parametrize("kind", [{}, {"momentum": 0.9}, KINDS["adamw"]])
def test_extrapolation_without_end(kind):
    """marin PR #2447, nanochat PR #850: a rule used far beyond where it was checked."""
    old = Recipe(lr=0.01, batch_size=32, **kind)
    for size in (32 * 33, 32 * 10**6):
        assert any("more than the 32" in text for text in convert(old, batch_size=size).warnings)
    rates = [convert(old, batch_size=32 * 10**n, noise_scale=100.0).recipe.lr for n in (4, 6, 8)]
    assert rates[2] == pytest.approx(rates[0], rel=1e-2)  # it saturates at 1 + Bn/B
    assert convert(old, batch_size=32 * 1000).recipe.betas == old.betas


@pytest.mark.parametrize("factor", [0.25, 4])
def test_the_rate_converted_but_not_the_schedule(factor):
    """Detectron.pytorch #32; accelerate #662: warm-up, milestones and length still count steps."""
    old = Recipe(lr=0.1, momentum=0.9, batch_size=256, **WHOLE)
    new = convert(old, batch_size=int(256 * factor)).recipe
    assert new.total_steps == 40_000 / factor
    assert new.warmup_steps == 4000 / factor
    assert new.evaluate_every == 400 / factor
    assert new.schedule["milestones"] == [20_000 / factor, 30_000 / factor]


def test_a_warm_up_of_one_step():
    """Counted in examples alone, a warm-up ends before the optimizer's averages know anything."""
    new = convert(Recipe(lr=0.1, batch_size=16, **WHOLE), batch_size=16 * 1024).recipe
    assert new.warmup_steps >= 4


@pytest.mark.parametrize("rule", ["adam-rate-only", "adam-half-life", "linear", "none"])
def test_a_raised_rate_that_silently_raises_the_decay(rule):
    """apex #1849, schedule_free #47: AdamW's share per example is lr wd / B."""
    old = Recipe(lr=1e-3, batch_size=64, **KINDS["adamw"])
    new = convert(old, batch_size=1024, rule=rule).recipe
    per_example = [r.lr * r.weight_decay / r.batch_size for r in (old, new)]
    assert per_example[0] == pytest.approx(per_example[1], rel=1e-12)


@pytest.mark.parametrize(("size", "expected"), [(256, 0.99**4), (16, 0.99**0.25)])
def test_averages_of_the_weights_the_wrong_way_round(size, expected):
    """OneTrainer #556: rho^kappa; not rho^(1/kappa), not 1 - (1 - rho)/kappa."""
    old = Recipe(lr=0.1, batch_size=64, ema_decay=0.99)
    assert convert(old, batch_size=size).recipe.ema_decay == pytest.approx(expected, rel=1e-12)


def test_batch_norms_momentum_taken_for_what_is_kept():
    """torch's momentum is the weight of the new value: it grows with the batch."""
    old = Recipe(lr=0.1, batch_size=64, batchnorm_momentum=0.1)
    new = convert(old, batch_size=128).recipe
    assert new.batchnorm_momentum == pytest.approx(1 - 0.9**2, rel=1e-12)


def test_adams_eps_in_the_wrong_direction_and_betas_below_zero():
    """Malladi et al. 2022: eps falls as B grows; 1 - beta times kappa leaves [0, 1) at kappa 10."""
    old = Recipe(lr=1e-3, batch_size=64, **KINDS["adam"])
    new = convert(old, batch_size=256, rule="adam-sde").recipe
    assert new.eps == pytest.approx(old.eps / 2)
    assert new.betas == pytest.approx((0.6, 0.996))
    with pytest.raises(InvalidInputError, match="must be below 1"):
        convert(old, batch_size=640, rule="adam-sde")
    half_life = convert(old, batch_size=6400, rule="adam-half-life").recipe
    assert all(0 <= beta < 1 for beta in half_life.betas)


@pytest.mark.parametrize("key", ["scale_lr", "auto_scale_lr", "linear_scaling"])
def test_a_rate_scaled_twice(tmp_path, key):
    """mmdetection #3240, mmpretrain #1763: the script scales as well."""
    file = written(tmp_path, per_device_train_batch_size=8, **{key: True})
    with pytest.raises(InvalidInputError, match=f"{key} is true"):
        convert_file(file, batch_size=64, replicas=1)
    assert convert_file(file, batch_size=8, replicas=1).unchanged


def test_thresholds_whose_unit_depends_on_the_reader():
    """Megatron-LM PR #3779: tokens for one, samples for another."""
    recipe = Recipe(lr=0.1, batch_size=256, total_steps=1000)
    with pytest.raises(InvalidInputError, match="unit"):
        plan_schedule(recipe, text="0:256 64K:512")


def test_schedules_counted_token_by_token():
    """ModernBERT PR #205: a warm-up over 50 billion tokens that never finished."""
    recipe = Recipe(
        lr=3e-4, batch_size=2**20, unit="tokens", total_examples=10**15,
        schedule={"kind": "cosine"}, warmup_examples=50 * 10**9,
    )  # fmt: skip
    plan = plan_schedule(recipe, warmup_batch=(2**16, 50 * 10**9), coupling="none")
    assert plan.updates > 9 * 10**8
    assert plan.schedule.position_after(plan.updates) >= 10**15


@pytest.mark.parametrize(("micro", "replicas"), [(None, None), (32, 1), (8, 4), (4, 8), (16, 2)])
def test_steps_that_depend_on_the_devices(micro, replicas):
    """accelerate #963: schedulers that step once per process, thresholds met at another step."""
    recipe = Recipe(lr=0.1, batch_size=64, dataset_size=10_000, **WHOLE)
    plan = plan_schedule(
        recipe, grow=True, micro_batch_size=micro, replicas=replicas, multiple_of=32
    )
    one = plan_schedule(recipe, grow=True, multiple_of=32)
    assert plan.schedule == one.schedule


def test_a_batch_that_grows_while_the_rate_falls_as_well():
    """keras #10143: size and rate changed apart. lr/B must be the recipe's throughout."""
    recipe = Recipe(lr=0.1, batch_size=64, dataset_size=100_000, **WHOLE)
    plain, grown = plan_schedule(recipe).schedule, plan_schedule(recipe, grow=True).schedule
    assert len(grown.pieces) == 3
    for step in itertools.islice(grown.steps(), 0, None, 97):
        assert step.lr / step.batch_size == pytest.approx(plain.lr_at(step.position) / 64)


def test_the_noise_scale_itself_taken_for_the_best_batch():
    """McCandlish et al. 2018, app. D: its root, times that of the examples a step is worth."""
    assert CostOptimal(r=400).wanted(1600.0, 64) == pytest.approx(800)


def test_a_norm_test_that_always_passes():
    """E|g_B|^2 holds the noise too: with theta of 1 or more every batch passes."""
    with pytest.raises(InvalidInputError, match="below 1"):
        NormTest(theta=1.0)
    assert NormTest(theta=0.5).wanted(300.0, 900) == 900  # B >= Bn (1 - theta^2)/theta^2
    assert NormTest(theta=0.5).wanted(301.0, 900) > 900
