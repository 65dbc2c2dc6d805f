"""What every rule must be, and what each one says."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from any_recipe import SIZES, any_recipe
from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory import adascale
from noisescale.theory.scaling import (
    RULES,
    Facts,
    Rule,
    named,
    recommended,
    rules_for,
    scale_or_fall_back,
    why_recommended,
)
from noisescale.theory.scaling.companions import clock_of
from noisescale.theory.scaling.rate_noise import rate_cap
from noisescale.theory.scaling.registry import SYNONYMS

KINDS = ("sgd", "momentum", "nesterov", "adam", "adamw", "lars", "lamb", "rmsprop", "lion")
ALLOWED = {"batch_size", "lr", "momentum", "dampening", "betas", "alpha", "eps"}
MEASURED = Facts(noise_scale=40.0)
SGD = Recipe(lr=0.1, batch_size=32)
HEAVY = Recipe(lr=0.1, batch_size=32, momentum=0.9)
ADAM = Recipe(optimizer="adamw", lr=1e-3, batch_size=16, betas=(0.9, 0.99), eps=1e-8)
LAMB = Recipe(optimizer="lamb", lr=0.01, batch_size=32)


def kind_of(drawn: str) -> str:
    return {"nesterov": "momentum", "adamw": "adam"}.get(drawn, drawn)


PAIRS = [
    pytest.param(rule, kind, id=f"{rule.name}-{kind}")
    for rule in RULES.values()
    for kind in KINDS
    if kind_of(kind) in rule.optimizers
]
EXACT = [pair for pair in PAIRS if pair.values[0].exact]  # type: ignore[attr-defined]


def answer(rule: Rule, recipe: Recipe, batch_size: int) -> Recipe:
    """Scale, or leave the case where the rule has no answer."""
    try:
        return rule.scale(recipe, batch_size, MEASURED).recipe
    except InvalidInputError:
        assert rule.name in ("adam-sde", "momentum-trade")
        assume(False)
        raise


def assert_alike(one: Recipe, other: Recipe) -> None:
    """Compare rates as ratios, and averages by what they keep and by what they forget."""
    for key in ("lr", "eps"):
        if getattr(one, key) is not None:
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-7, abs=0), key
    defaults = {"momentum": 0.0, "dampening": 0.0, "betas": (0.9, 0.999), "alpha": 0.99}
    for key, default in defaults.items():
        pair = [getattr(recipe, key) for recipe in (one, other)]
        filled = [default if value is None else value for value in pair]
        kept = [value if isinstance(value, tuple) else (value,) for value in filled]
        assert kept[0] == pytest.approx(kept[1], rel=0, abs=1e-9), key
        lost = [[1 - value for value in values] for values in kept]
        assert lost[0] == pytest.approx(lost[1], rel=1e-6, abs=0), key
    assert one.batch_size == other.batch_size


@pytest.mark.parametrize(("rule", "kind"), EXACT)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), b=SIZES, c=SIZES)
def test_rules_that_claim_it_are_exact(rule, kind, data, b, c):
    recipe = data.draw(any_recipe(kind))
    halfway = answer(rule, recipe, b)
    assume(kind_of(kind) in rule.optimizers and halfway.optimizer_kind in rule.optimizers)
    direct = answer(rule, recipe, c)
    assert_alike(answer(rule, halfway, c), direct)


@pytest.mark.parametrize(("rule", "kind"), PAIRS)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), b=SIZES)
def test_every_rule_changes_the_optimizers_keys_only_and_says_why(rule, kind, data, b):
    recipe = data.draw(any_recipe(kind))
    same = rule.scale(recipe, recipe.batch_size, MEASURED)
    assert same.recipe == recipe
    assert same.factor == 1.0
    assume(b != recipe.batch_size)
    found = answer(rule, recipe, b)
    changed = {
        field.name
        for field in dataclasses.fields(Recipe)
        if getattr(found, field.name) != getattr(recipe, field.name)
    }
    assert changed <= ALLOWED
    scaled = rule.scale(recipe, b, MEASURED)
    assert scaled.factor == found.lr / recipe.lr
    assert any(digit in scaled.why for digit in "0123456789")
    assert "\n" not in scaled.why


def test_the_registry_is_whole():
    fields = {field.name for field in dataclasses.fields(Facts)}
    for name, rule in RULES.items():
        assert name == rule.name
        assert rule.status in ("paper", "measured", "assumed")
        assert set(rule.needs) <= fields
        for text in (rule.source, rule.assumption, rule.validity, rule.preserves):
            assert text
            assert "\n" not in text
    kinds = {kind for rule in RULES.values() for kind in rule.optimizers}
    assert kinds == {kind_of(kind) for kind in KINDS}
    for kind in kinds:
        assert {"none"} < {rule.name for rule in rules_for(kind)}


@pytest.mark.parametrize(("pair", "same"), SYNONYMS.items())
@settings(max_examples=10, deadline=None)
@given(data=st.data(), b=SIZES)
def test_synonyms_say_the_same(pair, same, data, b):
    name, kind = pair
    recipe = data.draw(any_recipe(kind))
    assert_alike(answer(RULES[name], recipe, b), answer(RULES[same], recipe, b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facts", [Facts(), MEASURED, Facts(noise_scale=40.0, curvature=9.0)])
@settings(max_examples=10, deadline=None)
@given(data=st.data(), b=SIZES)
def test_there_is_a_recommended_rule_and_it_answers(kind, facts, data, b):
    recipe = data.draw(any_recipe(kind))
    rule = recommended(recipe, b, facts)
    assert math.isfinite(rule.scale(recipe, b, facts).recipe.lr)
    assert why_recommended(recipe, b, facts)
    if b == recipe.batch_size:
        assert rule.name == "none"


@pytest.mark.parametrize(
    ("rule", "recipe", "size", "expected"),
    [
        ("none", SGD, 128, {"lr": 0.1}),
        ("linear", SGD, 128, {"lr": 0.4}),
        ("linear", SGD, 8, {"lr": 0.025}),
        ("square-root", SGD, 128, {"lr": 0.2}),
        ("keep-momentum", HEAVY, 128, {"lr": 0.4, "momentum": 0.9}),
        ("exact", HEAVY, 64, {"lr": 0.1 * 2 * 0.19 / 0.1, "momentum": 0.81}),
        ("exact", HEAVY.with_changes(dampening=0.9), 64,
         {"lr": 0.1 * 2, "momentum": 0.81, "dampening": 0.81}),
        ("momentum-trade", HEAVY, 64, {"lr": 0.1, "momentum": 0.95}),
        ("momentum-trade", SGD.with_changes(dampening=0.5), 64,
         {"lr": 0.1, "momentum": 0.5, "dampening": 0.0}),
        ("adam-sde", ADAM, 64, {"lr": 2e-3, "betas": (0.6, 0.96), "eps": 5e-9}),
        ("adam-sde", ADAM, 4, {"lr": 5e-4, "betas": (0.975, 0.9975), "eps": 2e-8}),
        ("adam-half-life", ADAM, 64, {"lr": 2e-3, "betas": (0.9**4, 0.99**4), "eps": 5e-9}),
        ("adam-rate-only", ADAM, 64, {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8}),
        ("adam-sde", Recipe(optimizer="rmsprop", lr=0.1, batch_size=8, momentum=0.9), 32,
         {"lr": 0.8, "alpha": 0.96, "momentum": 0.6}),
        ("square-root", Recipe(optimizer="lamb", lr=0.1, batch_size=8), 32, {"lr": 0.2}),
        # (1 + 40/32)/(1 + 40/8) = 0.375, and its root for Adam.
        ("adascale", SGD, 8, {"lr": 0.0375}),
        ("adascale", ADAM, 8, {"lr": 1e-3 * math.sqrt(3.5 / 6)}),
        # Heights 2/(sqrt(40/16) + sqrt(16/40)) and, as far above 40 as 16 is below, the same.
        ("surge", ADAM, 100, {"lr": 1e-3}),
    ],
)  # fmt: skip
def test_what_rules_say(rule, recipe, size, expected):
    found = named(rule, recipe.optimizer_kind).scale(recipe, size, MEASURED).recipe
    for key, value in expected.items():
        assert getattr(found, key) == pytest.approx(value), key


def test_nothing_kept_is_no_average():
    plain = ADAM.with_changes(betas=(0.0, 0.99))
    for rule in ("adam-sde", "adam-half-life"):
        for size in (8, 64):
            found = RULES[rule].scale(plain, size).recipe.betas
            assert found is not None
            assert found[0] == 0.0


@settings(deadline=None)
@given(noise=st.floats(0.1, 1e5), curvature=st.floats(0.1, 1e3), size=st.integers(1, 4096))
@pytest.mark.parametrize("recipe", [SGD, HEAVY], ids=["sgd", "momentum"])
def test_the_cap_lowers_only_rates_that_were_raised(recipe, noise, curvature, size):
    rule = RULES["noise-aware"]
    free = rule.scale(recipe, size, Facts(noise_scale=noise)).recipe.lr
    found = rule.scale(recipe, size, Facts(noise_scale=noise, curvature=curvature))
    cap = rate_cap(recipe, curvature)
    assert cap is not None
    if free <= recipe.lr:
        assert found.recipe.lr == free
    else:
        assert found.recipe.lr == pytest.approx(min(free, max(cap, recipe.lr)))
    assert (free > max(cap, recipe.lr) * 1.0001) <= ("stability limit" in found.why)


def test_an_old_rate_beyond_stability_is_said():
    found = RULES["noise-aware"].scale(SGD, 128, Facts(noise_scale=40.0, curvature=1000.0))
    assert found.recipe.lr == SGD.lr
    assert any("old rate 0.1" in warning for warning in found.warnings)


@pytest.mark.parametrize("recipe", [SGD, HEAVY], ids=["sgd", "momentum"])
def test_adascale_is_the_gain_and_its_clock_adds_up(recipe):
    facts = Facts(noise_scale=40.0)
    new = RULES["adascale"].scale(recipe, 256, facts)
    gain = adascale.gain(trace_cov=40.0, grad_sq=1.0, base_batch_size=32, batch_size=256)
    assert new.factor == pytest.approx(gain)
    clock = clock_of(RULES["adascale"], recipe, new.recipe, facts)
    assert clock == pytest.approx(gain)
    assert clock_of(RULES["linear"], recipe, new.recipe, facts) == 8
    adam = RULES["adascale"].scale(ADAM, 128, facts)
    ticks = clock_of(RULES["adascale"], ADAM, adam.recipe, facts)
    assert ticks == pytest.approx(adam.factor**2)
    assert f"counts for {ticks:.4g} of the" in adam.why


def test_surge_peaks_at_the_noise_scale():
    facts = Facts(noise_scale=64.0)
    start = ADAM.with_changes(batch_size=1)
    rates = [RULES["surge"].scale(start, size, facts).recipe.lr for size in (4, 16, 64, 256)]
    assert rates[0] < rates[1] < rates[2] > rates[3]
    assert rates[3] == pytest.approx(rates[1])
    small = [RULES["surge"].scale(start, size, Facts(noise_scale=1e9)).recipe.lr for size in (2, 8)]
    assert small[1] / small[0] == pytest.approx(2, rel=1e-6)


def test_adam_sde_refuses_by_name_and_falls_back_otherwise():
    with pytest.raises(InvalidInputError, match=r"kappa \(1 - beta1\) = 1 .*adam-half-life"):
        RULES["adam-sde"].scale(ADAM.with_changes(betas=(0.875, 0.99)), 128)
    rule, found = scale_or_fall_back("adam-sde", ADAM, 256)
    assert rule.name == "adam-half-life"
    assert found.recipe.betas == pytest.approx((0.9**16, 0.99**16))
    assert "half-life form is used" in found.warnings[0]
    rule, found = scale_or_fall_back("adam-sde", ADAM, 64)
    assert rule.name == "adam-sde"
    assert found.warnings == ()


def test_a_long_memory_is_warned_of():
    short = RULES["momentum-trade"].scale(HEAVY.with_changes(total_examples=10**6), 128)
    assert short.warnings == ()
    # 128/(1 - 0.975) = 5,120 examples of 10,000.
    long = RULES["momentum-trade"].scale(HEAVY.with_changes(total_examples=10**4), 128)
    assert "5120 examples of 10,000" in long.warnings[0]


REFUSED: list[tuple[str, Recipe, Any, Facts, str]] = [
    ("noise-aware", SGD, 64, Facts(), "needs the noise scale; give --noise-scale"),
    ("linear", SGD, 0, Facts(), "at least 1"),
    ("linear", SGD, 64.0, Facts(), "whole number"),
    ("linear", SGD, True, Facts(), "whole number"),
    ("linear", SGD.with_changes(dataset_size=100), 101, Facts(), "the data has 100 examples"),
    ("adam-sde", SGD, 64, Facts(), "it is for adam, rmsprop"),
    ("momentum-trade", HEAVY, 3, Facts(), "at least 1 - m = 0.1"),
    ("momentum-trade", HEAVY.with_changes(momentum=0.5, nesterov=True), 16, Facts(), "need some"),
    ("exact", HEAVY.with_changes(dampening=1.0), 64, Facts(), "dampening 1"),
    ("adam-half-life", ADAM.with_changes(eps=1.5e-38), 64, Facts(), "underflow in float32"),
    ("adam-sde", ADAM.with_changes(eps=1.5e-38), 64, Facts(), "keeps it (adam-rate-only)"),
    ("exact", LAMB.with_changes(eps=1.5e-38), 64, Facts(), "keeps it (square-root)"),
]


@pytest.mark.parametrize(("rule", "recipe", "size", "facts", "text"), REFUSED)
def test_what_cannot_be_scaled_is_refused_in_one_line(rule, recipe, size, facts, text):
    with pytest.raises(InvalidInputError) as refusal:
        RULES[rule].scale(recipe, size, facts)
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_names_of_rules():
    assert named("linear", "momentum").name == "linear"
    with pytest.raises(InvalidInputError, match="did you mean linear"):
        named("liner", "sgd")
    with pytest.raises(InvalidInputError, match="choose from"):
        named("adam-sde", "sgd")


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan, True, "9"])
@pytest.mark.parametrize("name", ["noise_scale", "curvature"])
def test_facts_that_are_none_are_refused(name, bad):
    with pytest.raises(InvalidInputError, match=name):
        Facts(**{name: bad})
