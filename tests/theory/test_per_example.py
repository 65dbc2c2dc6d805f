"""Recipes per example: exact algebra for every optimizer, and what the coordinates mean."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from any_recipe import KINDS, SIZES, any_recipe, assert_same
from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.averages import average_noise, decay_of_forgetting, forgetting
from noisescale.theory.clipping import clip_at, clip_per_example
from noisescale.theory.per_example import (
    SQUARE_ROOT,
    PerExample,
    rate_coordinate,
    rate_of,
    shrinkage_unit,
)

NOISE = st.none() | st.floats(1, 1e4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), b=SIZES, c=SIZES, noise=NOISE)
def test_a_to_b_to_c_is_a_to_c(kind, data, b, c, noise):
    recipe = data.draw(any_recipe(kind))
    halfway = PerExample.of(recipe, noise_scale=noise).at(b)
    direct = PerExample.of(recipe, noise_scale=noise).at(c)
    assert_same(PerExample.of(halfway, noise_scale=noise).at(c), direct)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), b=SIZES, noise=NOISE)
def test_there_and_back_changes_nothing_that_was_given(kind, data, b, noise):
    recipe = data.draw(any_recipe(kind))
    there = PerExample.of(recipe, noise_scale=noise).at(b)
    back = PerExample.of(there, noise_scale=noise).at(recipe.batch_size)
    examples = None if recipe.total_steps is None else recipe.total_steps * recipe.batch_size
    filled = {"betas": (0.9, 0.999)} if kind in ("adam", "adamw", "lamb") else {}
    filled |= {"alpha": 0.99} if kind == "rmsprop" else {}
    filled = {key: value for key, value in filled.items() if getattr(recipe, key) is None}
    expected = recipe.with_changes(total_steps=None, total_examples=examples, **filled)
    assert_same(back, expected)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_to_a_changes_nothing(kind, data):
    recipe = data.draw(any_recipe(kind))
    once = PerExample.of(recipe).at(recipe.batch_size)
    assert once.lr == pytest.approx(recipe.lr, rel=1e-11)
    assert_same(PerExample.of(once).at(recipe.batch_size), once)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), b=SIZES)
def test_the_rate_is_the_inverse_of_its_coordinate(kind, data, b):
    recipe = data.draw(any_recipe(kind)).with_changes(batch_size=b)
    assert rate_of(recipe, rate_coordinate(recipe)) == pytest.approx(recipe.lr, rel=1e-14)


@pytest.mark.parametrize(
    ("keys", "tau"),
    [
        ({}, 0.6 / 4),
        ({"dampening": 0.5}, 0.6 / 4),  # torch ignores it without momentum
        ({"momentum": 0.5}, 0.6 / 0.5 / 4),
        ({"momentum": 0.5, "nesterov": True}, 0.6 / 0.5 / 4),
        ({"momentum": 0.5, "dampening": 0.5}, 0.6 / 4),
        ({"optimizer": "adam", "momentum": 0.5}, 0.6 / 2),  # no key of Adam's
        ({"optimizer": "adamw"}, 0.6 / 2),
        ({"optimizer": "rmsprop"}, 0.6 / 2),
        ({"optimizer": "rmsprop", "momentum": 0.5}, 0.6 / 0.5 / 2),
        ({"optimizer": "lars", "momentum": 0.5}, 0.6 / 0.5 / 2),
        ({"optimizer": "lamb", "betas": (0.6, 0.9)}, 0.6 * 2 / 2),
        ({"optimizer": "lion"}, 0.6 / 2),
    ],
)
def test_rates_per_example(keys, tau):
    assert rate_coordinate(Recipe(lr=0.6, batch_size=4, **keys)) == pytest.approx(tau)


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        ({}, 0.6 / 4),
        ({"momentum": 0.5, "dampening": 0.5}, 0.6 / 4),
        ({"optimizer": "adam"}, 0.6 / 2),  # coupled: as the gradient, under the square root
        ({"optimizer": "adamw"}, 0.6 / 4),
        ({"optimizer": "lion"}, 0.6 / 4),
        ({"optimizer": "lars"}, 0.6 / 2),
        ({"optimizer": "lamb", "betas": (0.0, 0.9)}, 0.6 / 4),
    ],
)
def test_shares_of_the_weights_per_example(keys, taken):
    assert shrinkage_unit(Recipe(lr=0.6, batch_size=4, **keys)) == pytest.approx(taken)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [("sgd", 1), ("adam", 1), ("rmsprop", 1), ("lars", 1), ("adamw", 2), ("lion", 2), ("lamb", 2)],
)
def test_weight_decay_when_the_batch_is_four_times_as_large(optimizer, factor):
    recipe = Recipe(optimizer=optimizer, lr=0.01, batch_size=8, weight_decay=0.1, betas=(0.0, 0.9))
    found = PerExample.of(recipe).at(32)
    assert found.weight_decay == pytest.approx(0.1 * factor)
    assert found.lr == pytest.approx(0.01 * (2 if recipe.optimizer_kind in SQUARE_ROOT else 4))


def test_lambs_direction_is_divided_by_its_own_noise():
    # In pure noise |u| is sqrt((1 - beta1)/(1 + beta1)) of one gradient's size: checked on
    # averages of independent signs, which have size 1.
    beta = 0.8
    weights = [(1 - beta) * beta**age for age in range(200)]
    assert average_noise(beta=beta) == pytest.approx(math.hypot(*weights), rel=1e-12)


def test_lions_betas_are_kept_per_step():
    recipe = Recipe(optimizer="lion", lr=1e-4, batch_size=8, betas=(0.9, 0.99))
    assert PerExample.of(recipe).at(64).betas == (0.9, 0.99)


def test_batch_norm_and_clipping():
    recipe = Recipe(lr=0.1, batch_size=8, batchnorm_momentum=0.1, clip_norm=1.0)
    assert PerExample.of(recipe).at(16).batchnorm_momentum == pytest.approx(0.19)
    assert PerExample.of(recipe).at(16).clip_norm == 1.0
    # E|g_B|^2 = |G|^2 (1 + Bn/B): 1 + 24/8 = 4 against 1 + 24/24 = 2.
    found = PerExample.of(recipe, noise_scale=24.0).at(24)
    assert found.clip_norm == pytest.approx(math.sqrt(2 / 4))
    still = PerExample.of(recipe.with_changes(batchnorm_momentum=0.0)).at(16)
    assert still.batchnorm_momentum == 0.0


def test_lengths_are_exact_and_counts_of_a_schedule_may_have_fractions():
    recipe = Recipe(
        lr=0.1,
        batch_size=8,
        total_steps=1001,
        warmup_steps=3,
        schedule={"kind": "step", "milestones": [10, 20], "gamma": 0.5},
    )
    found = PerExample.of(recipe).at(48)
    assert (found.total_examples, found.total_steps) == (8008, None)
    assert (found.warmup_examples, found.warmup_steps) == (24, None)
    assert found.schedule == {"kind": "step", "milestones": [10 / 6, 20 / 6], "gamma": 0.5}
    assert PerExample.of(found).at(8).schedule == recipe.schedule


@pytest.mark.parametrize(
    ("schedule", "at_twice"),
    [
        ({"kind": "cosine", "floor": 0.1}, {"kind": "cosine", "floor": 0.1}),
        ({"kind": "warmup_stable_decay", "decay_steps": 100},
         {"kind": "warmup_stable_decay", "decay_steps": 50}),
        ({"kind": "list", "points": [[0, 1.0], [90, 0.1]]},
         {"kind": "list", "points": [[0, 1.0], [45, 0.1]]}),
    ],
)  # fmt: skip
def test_every_schedules_counts(schedule, at_twice):
    recipe = Recipe(lr=0.1, batch_size=8, schedule=schedule)
    assert PerExample.of(recipe).at(16).schedule == at_twice
    assert recipe.schedule == schedule


@pytest.mark.parametrize("decay", [1e-300, 1e-17, 0.5, 1 - 1e-12])
def test_forgetting_keeps_its_digits(decay):
    rate = forgetting(decay=decay, batch_size=7)
    back = decay_of_forgetting(rate=rate, batch_size=7)
    assert math.log(back) == pytest.approx(math.log(decay), rel=1e-4 if decay > 0.9 else 1e-13)


def test_decays_stay_inside_their_range():
    assert decay_of_forgetting(rate=math.inf, batch_size=3) == 0.0
    assert decay_of_forgetting(rate=1e-30, batch_size=1) < 1
    hot = Recipe(lr=0.1, batch_size=1, batchnorm_momentum=0.5, momentum=0.5, ema_decay=0.0)
    found = PerExample.of(hot).at(100_000)
    assert found.batchnorm_momentum is not None
    assert 0 < found.batchnorm_momentum < 1
    assert (found.momentum, found.ema_decay) == (0.0, 0.0)


@pytest.mark.parametrize(
    "keys",
    [
        {"momentum": 0.9, "dampening": 1.0},
        {"schedule": {"kind": "step", "milestones": ["ten"]}},
        {"schedule": {"kind": "step", "milestones": 10}},
        {"schedule": {"kind": "list", "points": [3]}},
        {"schedule": {"kind": "warmup_stable_decay", "decay_steps": -1}},
        {"schedule": {"kind": "step", "milestones": [math.nan]}},
    ],
)
def test_what_cannot_be_restated_is_refused(keys):
    with pytest.raises(InvalidInputError) as refusal:
        PerExample.of(Recipe(lr=0.1, batch_size=8, **keys)).at(16)
    assert "\n" not in str(refusal.value)


def test_a_share_below_every_number_is_refused():
    recipe = Recipe(optimizer="adamw", lr=1e-320, batch_size=64, weight_decay=0.1)
    with pytest.raises(InvalidInputError, match="too small for a number; give a larger rate"):
        PerExample.of(recipe).at(2**40)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_noise_scales_that_are_none_are_refused(bad):
    with pytest.raises(InvalidInputError):
        clip_per_example(clip_norm=1.0, batch_size=8, noise_scale=bad)
    with pytest.raises(InvalidInputError):
        clip_at(per_example=1.0, batch_size=8, noise_scale=bad)
    with pytest.raises(InvalidInputError):
        PerExample.of(Recipe(lr=0.1, batch_size=8, clip_norm=1.0), noise_scale=bad)
