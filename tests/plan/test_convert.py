from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale import InvalidInputError, NoiseScale, Outcome, Recipe
from noisescale.plan.convert import LARGEST_CHECKED, convert
from noisescale.plan.schedule.of_recipe import rate_schedule
from noisescale.records import Conversion
from noisescale.theory.scaling import RULES, rules_for

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "dampening": {"optimizer": "sgd", "momentum": 0.9, "dampening": 0.5},
    "adam": {"optimizer": "adam", "betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"optimizer": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.1},
    "bare adamw": {"optimizer": "adamw"},
    "lars": {"optimizer": "lars", "momentum": 0.9},
    "lamb": {"optimizer": "lamb", "betas": (0.9, 0.999)},
    "rmsprop": {"optimizer": "rmsprop", "alpha": 0.99},
    "lion": {"optimizer": "lion", "betas": (0.9, 0.99)},
}
WHOLE = {
    "dataset_size": 50_000, "total_steps": 9000, "warmup_steps": 500, "evaluate_every": 200,
    "ema_decay": 0.999, "clip_norm": 1.0, "batchnorm_momentum": 0.1, "weight_decay": 1e-4,
    "schedule": {"kind": "step", "milestones": [3000, 6000], "gamma": 0.1},
}  # fmt: skip
AVERAGES = ("momentum", "betas", "alpha", "ema_decay", "batchnorm_momentum", "dampening")


def recipe(name: str = "momentum", **changes) -> Recipe:
    return Recipe(**{"lr": 0.1, "batch_size": 256, **OPTIMIZERS[name], **changes})


def by_name(conversion: Conversion) -> dict:
    return {c.name: c for c in (*conversion.changes, *conversion.kept)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_batch_is_the_same_recipe(name):
    old = recipe(name, **WHOLE)
    found = convert(old, batch_size=256, noise_scale=100.0, rule=None)
    assert found.unchanged
    assert found.recipe == old
    assert found.summary == "Nothing changes: the global batch is the same (256 examples)"
    assert found.changes == found.kept == found.alternatives == ()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [8, 1024, 8192])
@pytest.mark.parametrize("facts", [{}, {"noise_scale": 300.0, "curvature": 5.0}])
def test_changes_make_the_recipe_and_say_why(name, size, facts):
    old = recipe(name, **WHOLE)
    found = convert(old, batch_size=size, **facts)
    changed = {c.name: c.new for c in found.changes}
    assert old.with_changes(**changed) == found.recipe
    assert {c.name: c.old for c in found.changes} == {key: getattr(old, key) for key in changed}
    for row in (*found.changes, *found.kept):
        assert all((row.rule, row.source, row.validity, row.why, row.status))
        assert row.why[0] != " "
        assert "\n" not in row.why
    assert all(row.old != row.new for row in found.changes)
    assert all(row.old == row.new for row in found.kept)
    assert Conversion.from_json(found.to_json()) == found
    assert found.recommended in RULES
    assert found.rule in RULES


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_is_an_answer_or_an_alternative(name):
    old = recipe(name)
    kind = old.optimizer_kind
    for size in (32, 1024):
        found = convert(old, batch_size=size, noise_scale=300.0)
        said = [one.rule for one in found.alternatives]
        assert found.rule not in said
        assert len(said) == len(set(said))
        assert set(said) <= {rule.name for rule in rules_for(kind)}
        for one in found.alternatives:
            if one.values:
                other = convert(old, batch_size=size, noise_scale=300.0, rule=one.rule)
                assert other.recipe == found.recipe.with_changes(**one.values)
                assert other.recommended == found.rule
                assert other.alternatives[0].rule == found.rule


def test_up_with_momentum_the_rate_is_scaled_and_the_exact_rule_is_beside_it():
    found = convert(recipe(), batch_size=1024)
    assert (found.rule, found.recipe.lr, found.recipe.momentum) == ("keep-momentum", 0.4, 0.9)
    exact = next(one for one in found.alternatives if one.rule == "exact")
    m = 0.9**4
    assert exact.values["momentum"] == pytest.approx(m)
    # Displacement per example lr / ((1 - m) B) stays.
    assert exact.values["lr"] == pytest.approx(0.1 / 0.1 * (1 - m) * 4)


def test_down_with_momentum_the_rate_is_scaled_and_the_exact_rule_keeps_the_memory():
    found = convert(recipe(), batch_size=64)
    assert (found.rule, found.recipe.lr, found.recipe.momentum) == ("keep-momentum", 0.025, 0.9)
    exact = convert(recipe(), batch_size=64, rule="exact").recipe
    assert exact.momentum == pytest.approx(0.9**0.25)
    assert exact.lr / (1 - exact.momentum) / 64 == pytest.approx(0.1 / 0.1 / 256)


def test_far_up_with_momentum_the_rate_follows_the_square_root():
    near, far = (convert(recipe(), batch_size=256 * factor) for factor in (8, 16))
    assert (near.rule, near.recipe.lr) == ("keep-momentum", pytest.approx(0.8))
    assert (far.rule, far.recipe.lr) == ("square-root", pytest.approx(0.4))


def test_plain_sgd_grows_by_momentum_and_shrinks_in_proportion():
    up, down = (convert(recipe("sgd"), batch_size=size) for size in (1024, 64))
    assert (up.rule, up.recipe.lr) == ("momentum-trade", 0.1)
    assert up.recipe.momentum == pytest.approx(0.75)
    assert (down.rule, down.recipe.lr) == ("linear", 0.025)


def test_a_noise_scale_makes_the_noise_aware_rule_the_recommended_one():
    found = convert(recipe("sgd"), batch_size=1024, noise_scale=512.0, curvature=1.0)
    assert found.rule == found.recommended == "noise-aware"
    assert 0.1 < found.recipe.lr < 0.4
    capped = convert(recipe("sgd"), batch_size=1024, noise_scale=512.0, curvature=15.0)
    assert 0.1 <= capped.recipe.lr <= found.recipe.lr
    linear = next(one for one in found.alternatives if one.rule == "linear")
    assert linear.values["lr"] == 0.4


def test_what_a_rule_needs_is_said():
    found = convert(recipe("sgd"), batch_size=1024)
    wanting = {one.rule: one.needs for one in found.alternatives if one.needs}
    assert wanting["noise-aware"] == ("noise_scale",)
    assert all(one.values == {} for one in found.alternatives if one.needs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("facts", [{}, {"noise_scale": 300.0}])
@pytest.mark.parametrize("size", [64, 1024])
def test_rules_are_told_in_the_words_of_the_optimizer_at_hand(name, facts, size):
    found = convert(recipe(name, **WHOLE), batch_size=size, **facts)
    sgd = found.original.optimizer == "sgd"
    texts = [found.source, found.assumption, found.validity, found.preserves]
    texts += [t for one in found.alternatives for t in (one.source, one.validity, one.preserves)]
    for text in texts:
        assert "SGD:" not in text
        assert "normalised" not in text
        assert "for LAMB" not in text or name == "lars"
        assert "1/2 for Adam" not in text
        assert not (sgd and "betas" in text)
        assert sgd or "our SGD conversions" not in text


@pytest.mark.parametrize("name", ["lars", "lamb", "rmsprop", "lion"])
@pytest.mark.parametrize("facts", [{}, {"noise_scale": 300.0}])
@pytest.mark.parametrize("size", [64, 1024])
def test_what_was_not_measured_does_not_say_so(name, facts, size):
    found = convert(recipe(name), batch_size=size, **facts)
    assert found.status in ("paper", "assumed")
    assert {one.status for one in found.alternatives} <= {"paper", "assumed"}


def test_a_batch_above_the_noise_scale_needs_more_examples():
    found = convert(recipe(), batch_size=1200, noise_scale=300.0)
    assert any("4 times the noise scale" in text for text in found.warnings)
    # E/Emin = 1 + B/Bn: 5 over 1 + 256/300
    assert any("about 2.7 times the examples" in text for text in found.warnings)
    for size, scale in ((290, 300.0), (64, 10.0)):
        warnings = convert(recipe(), batch_size=size, noise_scale=scale).warnings
        assert not any("times the noise scale" in text for text in warnings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_curvature_that_is_not_used_is_said(name):
    found = convert(recipe(name), batch_size=1024, noise_scale=1e4, curvature=1.0)
    unused = any("the curvature is not used" in text for text in found.warnings)
    assert unused == (found.original.optimizer != "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_noise_scale_that_sets_no_rate_is_said(name):
    found = convert(recipe(name), batch_size=1024, noise_scale=1e4)
    said = any("the noise scale does not set the rate" in text for text in found.warnings)
    assert said == (found.rule != "noise-aware")


@settings(deadline=None)
@given(
    total=st.integers(1, 3000),
    warmup=st.none() | st.integers(1, 1000),
    decay=st.integers(1, 3000),
    old=st.integers(1, 300),
    new=st.integers(1, 5000),
    in_examples=st.booleans(),
    name=st.sampled_from(["sgd", "adamw"]),
)
def test_a_schedule_that_fitted_fits_where_it_can(
    total, warmup, decay, old, new, in_examples, name
):
    schedule = {"kind": "warmup_stable_decay", "decay_steps": decay}
    counts = {"total_steps": total, "warmup_steps": warmup}
    if in_examples:
        counts = {"total_examples": total * old}
        counts |= {"warmup_examples": warmup * old} if warmup else {}
    before = recipe(name, batch_size=old, schedule=schedule, **counts)
    if (warmup or 0) + decay > total:
        return
    after = convert(before, batch_size=new).recipe
    steps = (after.total_examples or 0) // new if in_examples else after.total_steps

    if steps > 1:
        rate_schedule(after)


def test_defaults_that_would_have_to_change_are_said():
    bare = recipe("bare adamw")
    assert any("becomes 0.5 times the old" in t for t in convert(bare, batch_size=1024).warnings)
    # By the linear rule lr/B stays, and with it the share.
    linear = convert(bare, batch_size=1024, rule="linear")
    told = convert(recipe("adamw"), batch_size=1024)
    for found in (linear, told):
        assert not any("default" in text for text in found.warnings)
    lars = recipe("lars", momentum=None)
    assert any("0.9" in text for text in convert(lars, batch_size=1024).warnings)


def test_a_warm_up_cites_what_it_follows():
    old = recipe(total_steps=90_000, warmup_steps=500)
    plain = by_name(convert(old, batch_size=512))["warmup_steps"]
    assert plain.source == "Goyal et al. 2017 (arXiv:1706.02677), sec. 2.2"
    raised = by_name(convert(old, batch_size=16_384))["warmup_steps"]
    assert "the same examples would be 7.812 of the old 500 steps, too few" in raised.why
    assert "fewest steps" in raised.source


def test_beyond_what_was_checked_is_a_warning():
    near = convert(recipe("sgd"), batch_size=256 * LARGEST_CHECKED)
    far = convert(recipe("sgd"), batch_size=256 * LARGEST_CHECKED + 1)
    assert not any("more than" in text for text in near.warnings)
    assert any("more than the 32" in text for text in far.warnings)
    assert any("more than the 32" in t for t in convert(recipe("sgd"), batch_size=7).warnings)


def test_the_sde_rule_beyond_its_range_is_refused_by_name_only():
    with pytest.raises(InvalidInputError, match=r"kappa \(1 - beta1\) = 1.6 must be below 1"):
        convert(recipe("adam"), batch_size=256 * 16, rule="adam-sde")
    with pytest.raises(InvalidInputError, match=r"kappa \(1 - beta1\) = 1 must"):
        convert(recipe("adam"), batch_size=256 * 10, rule="adam-sde")
    found = convert(recipe("adam"), batch_size=256 * 16)
    sde = next(one for one in found.alternatives if one.rule == "adam-sde")
    assert sde.values == {}
    assert "no answer here" in sde.when
    assert convert(recipe("adam"), batch_size=256 * 9, rule="adam-sde").recipe.betas[
        0
    ] == pytest.approx(0.1)


def test_an_eps_that_would_underflow_is_refused():
    tiny = recipe("adam", eps=2e-38)
    with pytest.raises(InvalidInputError, match=r"eps .*underflow in float32"):
        convert(tiny, batch_size=256 * 8, rule="adam-sde")
    assert convert(tiny, batch_size=256 * 8, rule="adam-rate-only").recipe.eps == 2e-38
    half = convert(recipe("adam"), batch_size=64, rule="adam-sde")
    assert half.recipe.eps == pytest.approx(2e-8)


def test_an_eps_that_float16_loses_is_warned_of():
    found = convert(recipe("adam", eps=1e-7), batch_size=1024, rule="adam-sde")
    assert found.recipe.eps == pytest.approx(5e-8)
    assert any("float16" in text for text in found.warnings)
    usual = convert(recipe("adam"), batch_size=1024, rule="adam-sde")  # 1e-8 is lost before too
    assert not any("float16" in text for text in usual.warnings)


def test_a_raised_rate_without_warm_up_is_warned_of():
    def warned(**keys) -> bool:
        found = convert(recipe("sgd", **keys), batch_size=1024, rule="linear")
        return any("no warm-up" in text for text in found.warnings)

    assert warned(total_steps=9000)
    assert not warned(total_steps=9000, warmup_steps=100)
    assert not warned()  # a group of an optimizer, whose warm-up is in its scheduler


UNITS = [
    ({"unit": "sequences", "sequence_length": 128}, 8192 * 128, "tokens", 8192),
    ({"unit": "tokens", "sequence_length": 128}, 8, "sequences", 1024),
    ({"unit": "tokens"}, 1024, "tokens", 1024),
    ({"unit": "sequences"}, 512, "examples", 512),
    ({}, 512, None, 512),
]


@pytest.mark.parametrize(("keys", "size", "unit", "expected"), UNITS)
def test_batch_sizes_in_another_unit(keys, size, unit, expected):
    found = convert(recipe("sgd", **keys), batch_size=size, unit=unit)
    assert found.new_batch_size == found.recipe.batch_size == expected
    assert found.unit == keys.get("unit", "examples")


def noise(**changes) -> NoiseScale:
    values = {field.name: None for field in dataclasses.fields(NoiseScale)}
    return NoiseScale(**(values | {"outcome": Outcome.DETERMINED, "unit": "examples"} | changes))


def test_a_measured_noise_scale_brings_its_unit():
    old = recipe("sgd", unit="sequences", sequence_length=128)
    in_tokens = convert(old, batch_size=1024, noise_scale=noise(b_simple=64e3, unit="tokens"))
    assert in_tokens.recipe == convert(old, batch_size=1024, noise_scale=500.0).recipe
    with pytest.raises(InvalidInputError, match="lower_bound"):
        convert(old, batch_size=1024, noise_scale=noise(outcome=Outcome.LOWER_BOUND))


BAD = [
    ({}, {"batch_size": 0}, "batch_size 0: a whole number"),
    ({}, {"batch_size": 1.5}, "batch_size 1.5"),
    ({}, {"batch_size": True}, "batch_size True"),
    ({}, {"batch_size": "many"}, "batch_size 'many'"),
    ({}, {"batch_size": 2**60}, "from 1 to"),
    ({}, {"batch_size": 64, "unit": "token"}, "did you mean tokens"),
    ({}, {"batch_size": 64, "unit": "tokens"}, "sequence_length: it is missing"),
    ({"unit": "sequences", "sequence_length": 128}, {"batch_size": 1000, "unit": "tokens"},
     "give 896 or 1024"),
    ({"unit": "sequences", "sequence_length": 128}, {"batch_size": 100, "unit": "tokens"},
     "give 128"),
    ({"dataset_size": 500}, {"batch_size": 501}, "the data has 500 examples"),
    ({"dataset_size": 500, "unit": "tokens", "sequence_length": 2}, {"batch_size": 1001},
     "the data has 1000 tokens"),
    ({"dataset_size": 100}, {"batch_size": 8}, "batch_size 256 and dataset_size 100"),
    ({"total_steps": 10, "total_examples": 99}, {"batch_size": 8},
     "total_steps 10 and total_examples 99: they contradict"),
    ({"warmup_steps": 10, "warmup_examples": 2304}, {"batch_size": 8}, "warmup_examples 2304"),
    ({"betas": (0.9, 0.99)}, {"batch_size": 8}, "optimizer sgd and betas"),
    ({"eps": 1e-8}, {"batch_size": 8}, "optimizer sgd and eps 1e-08"),
    ({"optimizer": "adam"}, {"batch_size": 8}, "optimizer adam and momentum 0.9"),
    ({"optimizer": "adam", "momentum": None, "nesterov": True}, {"batch_size": 8}, "nesterov true"),
    ({"nesterov": True, "dampening": 0.1}, {"batch_size": 8}, "nesterov and dampening"),
    ({"nesterov": True, "momentum": None}, {"batch_size": 8}, "nesterov and momentum"),
    ({}, {"batch_size": 8, "rule": "liner"}, "did you mean linear"),
    ({}, {"batch_size": 8, "rule": "adam-sde"}, "choose from"),
    ({}, {"batch_size": 8, "rule": "noise-aware"}, "--noise-scale"),
    ({}, {"batch_size": 256, "rule": "liner"}, "did you mean linear"),
    ({}, {"batch_size": 8, "noise_scale": -1.0}, "noise_scale -1"),
    ({}, {"batch_size": 8, "noise_scale": math.inf}, "noise_scale inf"),
    ({}, {"batch_size": 8, "curvature": 0.0}, "curvature 0"),
    ({"lr": 1e308}, {"batch_size": 2**20}, "lr inf"),
    ({"total_steps": 10**308}, {"batch_size": 8}, "total_steps: at most"),
    ({"evaluate_every": 10**308}, {"batch_size": 8}, "evaluate_every: at most"),
    ({"warmup_steps": 10**308}, {"batch_size": 8}, "warmup_steps: at most"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "options", "words"), BAD)
def test_bad_input(keys, options, words):
    with pytest.raises(InvalidInputError) as caught:
        convert(recipe(**keys), where="my.toml", **options)
    assert words in str(caught.value)


def test_contradictions_name_the_file():
    with pytest.raises(InvalidInputError, match=r"^my\.toml: total_steps 10 and"):
        convert(recipe(total_steps=10, total_examples=99), batch_size=8, where="my.toml")


SIZES = st.integers(32, 2048)
"""Within a factor of 64: beyond it 1 - (1 - p)^kappa comes so near to 1 that digits are lost."""


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    a=SIZES, b=SIZES, c=SIZES,
    rule=st.sampled_from(sorted(RULES)),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_rules_that_claim_it_compose(name, a, b, c, rule):
    """From A to B to C is from A to C, of all keys but whole numbers of steps."""
    old = recipe(name, batch_size=a, ema_decay=0.99, weight_decay=0.01, batchnorm_momentum=0.1)
    if old.optimizer_kind not in RULES[rule].optimizers or not RULES[rule].exact:
        return
    facts = {"rule": rule, "noise_scale": 300.0}
    try:
        there = convert(old, batch_size=b, **facts).recipe
        two = convert(there, batch_size=c, **facts).recipe
        one = convert(old, batch_size=c, **facts).recipe
    except InvalidInputError:  # the rule has no answer at one of the sizes
        return
    for key in ("lr", "weight_decay", "eps", *AVERAGES):
        pair = getattr(two, key), getattr(one, key)
        if key == "betas":  # unset is torch's default
            pair = tuple((0.9, 0.999) if value is None else value for value in pair)
        found, expected = (0.0 if value is None else value for value in pair)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), key


def test_neither_torch_nor_scipy_is_imported():
    code = (
        "import sys\nfrom noisescale import Recipe\nfrom noisescale.plan.convert import convert\n"
        "convert(Recipe(lr=0.1, momentum=0.9, batch_size=8), batch_size=64)\n"
        "print([m for m in ('torch', 'scipy', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
