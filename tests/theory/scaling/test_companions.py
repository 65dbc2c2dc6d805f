"""What goes with the rate: values against their meaning, counts against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from any_recipe import SIZES, any_recipe
from noisescale.records import Change, Recipe
from noisescale.theory.per_example import PerExample
from noisescale.theory.scaling import RULES, Facts
from noisescale.theory.scaling.companions import clock_of, companions
from noisescale.theory.scaling.lengths import fewest_warmup_steps

FACTS = Facts(noise_scale=24.0)


def changes(
    rule: str, recipe: Recipe, batch_size: int, facts: Facts | None = None
) -> dict[str, Change]:
    scaled = RULES[rule].scale(recipe, batch_size, facts or FACTS)
    clock = clock_of(RULES[rule], recipe, scaled.recipe, facts or FACTS)
    return {row.name: row for row in companions(recipe, scaled.recipe, facts or FACTS, clock)}


@pytest.mark.parametrize(
    ("rule", "keys", "factor"),
    [
        # Coupled: as under linear scaling, and by the root where the rate goes by the root.
        ("linear", {}, 1),
        ("square-root", {}, 2),
        ("none", {}, 4),
        ("keep-momentum", {"momentum": 0.9}, 1),
        ("exact", {"momentum": 0.9, "dampening": 0.5}, 1),
        ("momentum-trade", {"momentum": 0.5}, 1),
        ("adam-rate-only", {"optimizer": "adam"}, 1),
        ("adam-sde", {"optimizer": "rmsprop"}, 1),
        ("square-root", {"optimizer": "lars"}, 1),
        # Decoupled: lr wd/B stays.
        ("adam-rate-only", {"optimizer": "adamw"}, 2),
        ("adam-half-life", {"optimizer": "adamw"}, 2),
        ("linear", {"optimizer": "adamw"}, 1),
        ("none", {"optimizer": "adamw"}, 4),
        ("adam-rate-only", {"optimizer": "lion"}, 2),
        ("square-root", {"optimizer": "lamb"}, 2),
    ],
)
def test_weight_decay_when_the_batch_is_four_times_as_large(rule, keys, factor):
    recipe = Recipe(lr=0.01, batch_size=8, weight_decay=0.1, **keys)
    found = changes(rule, recipe, 32)["weight_decay"]
    assert found.new == pytest.approx(0.1 * factor)
    assert found.rule == "weight-decay-timescale"


def test_weight_decay_takes_the_same_share_of_idle_weights_per_example():
    recipe = Recipe(optimizer="adamw", lr=0.01, batch_size=8, weight_decay=0.1)
    new = RULES["adam-rate-only"].scale(recipe, 64).recipe
    decay = changes("adam-rate-only", recipe, 64)["weight_decay"].new

    def left(lr: float, decay: float, steps: int) -> float:
        return (1 - lr * decay) ** steps

    assert left(new.lr, decay, 100) == pytest.approx(left(recipe.lr, 0.1, 800), rel=1e-2)


def test_weight_decay_beside_a_rate_at_the_end_of_the_floats():
    recipe = Recipe(optimizer="adamw", lr=1e-320, batch_size=16, weight_decay=0.1)
    found = changes("adam-rate-only", recipe, 2**40)["weight_decay"]
    assert found.new == pytest.approx(0.1 * 2**18, rel=1e-3)  # 1e-320 has 11 bits


def test_averages():
    recipe = Recipe(lr=0.1, batch_size=8, ema_decay=0.99, batchnorm_momentum=0.1)
    found = changes("linear", recipe, 32)
    assert found["ema_decay"].new == pytest.approx(0.99**4)
    assert found["batchnorm_momentum"].new == pytest.approx(1 - 0.9**4)
    none = changes("linear", recipe.with_changes(ema_decay=0.0, batchnorm_momentum=0.0), 32)
    assert none["ema_decay"].new == 0.0
    assert none["batchnorm_momentum"].new == 0.0


def test_an_average_of_moving_weights_follows_them_as_closely():
    """Weights that move 1 per example: the average trails by the same number of examples."""

    def trail(decay: float, batch_size: int) -> float:
        average = 0.0
        positions = np.arange(0, 4096, batch_size)
        for position in positions:
            average = decay * average + (1 - decay) * position
        return float(positions[-1] - average)

    found = changes("linear", Recipe(lr=0.1, batch_size=1, ema_decay=0.99), 8)
    # In whole steps an average trails by B rho/(1 - rho), which is B/2 less than in continuous
    # time: 8/2 against 1/2 of a hundred.
    assert trail(found["ema_decay"].new, 8) == pytest.approx(trail(0.99, 1), abs=4)


def test_clipping_needs_the_noise_scale():
    recipe = Recipe(lr=0.1, batch_size=8, clip_norm=2.0)
    kept = changes("linear", recipe, 24, Facts())["clip_norm"]
    assert kept.new == kept.old == 2.0
    assert "only with a noise scale" in kept.why
    # (1 + 24/24)/(1 + 24/8) = 1/2.
    assert changes("linear", recipe, 24)["clip_norm"].new == pytest.approx(2.0 / math.sqrt(2))


def test_clipping_cuts_as_many_steps():
    rng = np.random.default_rng(5)
    dimensions, batch_sizes = 200, (8, 32)
    recipe = Recipe(lr=0.1, batch_size=8, clip_norm=2.0)
    noise_scale = 24.0  # |G| = 1 and tr(Sigma) = 24
    new = changes("linear", recipe, 32)["clip_norm"].new
    norms = {}
    for size in batch_sizes:
        noise = rng.standard_normal((4000, dimensions)) * math.sqrt(noise_scale / dimensions / size)
        noise[:, 0] += 1.0
        norms[size] = np.sqrt((noise**2).sum(1)).mean()
    # The mean norm is below the root mean square by a share of at most 2/dimensions, and its
    # standard error is 0.1 %.
    assert norms[32] / norms[8] == pytest.approx(new / 2.0, rel=2 / dimensions + 0.004)


@pytest.mark.parametrize(
    ("keys", "fewest"),
    [
        ({}, 20),
        ({"momentum": 0.5}, 20),
        ({"momentum": 0.98}, 100),
        ({"optimizer": "adam"}, 2000),
        ({"optimizer": "adamw", "betas": (0.9, 0.99)}, 200),
        ({"optimizer": "lamb", "betas": (0.9, 0.99)}, 200),
        ({"optimizer": "rmsprop"}, 200),
        ({"optimizer": "lion", "betas": (0.9, 0.99)}, 20),
        ({"optimizer": "lars", "momentum": 0.98}, 100),
    ],
)
def test_fewest_steps_of_warm_up(keys, fewest):
    recipe = Recipe(lr=0.1, batch_size=8, **keys)
    assert fewest_warmup_steps(recipe) == pytest.approx(fewest)


@pytest.mark.parametrize(
    ("size", "total", "steps", "raised"),
    [
        (4, None, 200, False),  # downwards: in examples
        (32, None, 25, False),  # 25 steps are enough
        (64, None, 20, True),  # 12.5 are not
        (8192, None, 20, True),
        (64, 800, 12, False),  # 12.5 already are over a tenth of 100 steps
        (8192, 8000, 1, True),  # 0.8 of 7.8 steps, in place of 0.1
    ],
)
def test_warm_up_keeps_its_examples_but_not_too_few_steps(size, total, steps, raised):
    recipe = Recipe(lr=0.1, batch_size=8, warmup_steps=100, total_steps=total)
    found = changes("linear", recipe, size)["warmup_steps"]
    assert found.new == steps
    assert ("too few" in found.why) == raised


def test_a_short_warm_up_is_not_made_longer():
    recipe = Recipe(optimizer="adamw", lr=0.1, batch_size=8, warmup_steps=7)
    assert changes("adam-rate-only", recipe, 64)["warmup_steps"].new == 7
    assert changes("adam-rate-only", recipe, 4)["warmup_steps"].new == 14


def test_warm_up_in_examples_stays_in_examples():
    recipe = Recipe(lr=0.1, batch_size=8, warmup_examples=801)
    assert changes("linear", recipe, 16)["warmup_examples"].new == 801
    assert changes("linear", recipe, 64)["warmup_examples"].new == 20 * 64
    assert "warmup_steps" not in changes("linear", recipe, 64)


def test_lengths_schedules_and_cadence():
    recipe = Recipe(
        lr=0.1,
        batch_size=8,
        total_steps=1001,
        total_examples=8008,
        evaluate_every=10,
        schedule={"kind": "step", "milestones": [1, 333], "gamma": 0.5},
    )
    found = changes("linear", recipe, 24)
    assert found["total_steps"].new == 334
    assert found["total_examples"].new == 8008
    assert found["schedule"].new == {"kind": "step", "milestones": [1, 111], "gamma": 0.5}
    assert found["evaluate_every"].new == 3
    assert changes("linear", recipe, 8000)["evaluate_every"].new == 1
    assert changes("linear", recipe.with_changes(schedule={"kind": "cosine"}), 24)[
        "schedule"
    ].new == {"kind": "cosine"}


def test_adascales_clock_counts_gain():
    recipe = Recipe(
        lr=0.1, batch_size=8, total_steps=1000, warmup_steps=100, weight_decay=0.1, ema_decay=0.99
    )
    found = changes("adascale", recipe, 24)
    assert found["total_steps"].new == 500  # gain (1 + 24/8)/(1 + 24/24) = 2
    assert found["warmup_steps"].new == 50
    assert found["weight_decay"].new == pytest.approx(0.1)  # twice the rate, half the steps
    assert found["ema_decay"].new == pytest.approx(0.99**2)
    adam = recipe.with_changes(optimizer="adamw")
    assert changes("adascale", adam, 24)["weight_decay"].new == pytest.approx(0.1 * math.sqrt(2))


def test_absent_keys_stay_absent():
    assert changes("linear", Recipe(lr=0.1, batch_size=8), 64) == {}


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw", "lars", "lamb", "rmsprop"])
@settings(max_examples=20, deadline=None)
@given(data=st.data(), size=SIZES)
def test_by_the_exact_rule_values_are_those_of_the_recipe_per_example(kind, data, size):
    recipe = data.draw(any_recipe(kind))
    expected = PerExample.of(recipe, noise_scale=24.0).at(size)
    found = changes("exact", recipe, size)
    for name in ("weight_decay", "ema_decay", "batchnorm_momentum", "clip_norm"):
        if name in found:
            assert found[name].new == pytest.approx(getattr(expected, name), rel=1e-7), name
    for row in found.values():
        assert row.why
        assert "\n" not in row.why + row.validity + row.source
        assert row.status in ("paper", "measured", "assumed")


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_nothing_changes_at_the_same_batch_size(data):
    recipe = data.draw(any_recipe("adamw"))
    for row in companions(recipe, recipe, FACTS):
        if isinstance(row.old, float):
            assert row.new == pytest.approx(row.old, rel=1e-9), row.name
        else:
            assert row.new == row.old, row.name
