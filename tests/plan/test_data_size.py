from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from noisescale import InvalidInputError, Recipe
from noisescale.plan.convert import convert
from noisescale.records import Conversion
from noisescale.theory.per_example import rate_coordinate
from noisescale.theory.scaling.data_size import DATA_RULES, KINDS, epochs

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "dampening": {"optimizer": "sgd", "momentum": 0.9, "dampening": 0.5},
    "adam": {"optimizer": "adam", "betas": (0.9, 0.999)},
    "adamw": {"optimizer": "adamw", "betas": (0.9, 0.95)},
    "rmsprop": {"optimizer": "rmsprop", "alpha": 0.99},
}
WHOLE = {
    "total_steps": 9000, "warmup_steps": 500, "evaluate_every": 200, "ema_decay": 0.999,
    "clip_norm": 1.0, "batchnorm_momentum": 0.1, "weight_decay": 0.01,
    "schedule": {"kind": "step", "milestones": [3000, 6000], "gamma": 0.1},
}  # fmt: skip
RULES = pytest.mark.parametrize("rule", DATA_RULES)
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def recipe(name: str = "momentum", **changes) -> Recipe:
    start = {"lr": 0.1, "batch_size": 256, "dataset_size": 50_000}
    return Recipe(**{**start, **OPTIMIZERS[name], **changes})


def share_per_epoch(of: Recipe) -> float:
    return of.weight_decay * of.lr * of.dataset_size / of.batch_size


@EVERY
@RULES
def test_twice_the_data(name, rule):
    old = recipe(name, **WHOLE)
    found = convert(old, new_dataset_size=100_000, data_rule=rule)
    new = found.recipe
    factor = {"keep-rate": 1.0, "long-run": 0.5}[rule]
    assert new.lr == pytest.approx(0.1 * factor, rel=1e-15)
    assert rate_coordinate(new) == pytest.approx(factor * rate_coordinate(old), rel=1e-12)
    assert new.weight_decay == pytest.approx(0.01 * 0.5 / factor, rel=1e-15)
    assert share_per_epoch(new) == pytest.approx(share_per_epoch(old), rel=1e-12)
    assert (new.total_steps, new.evaluate_every) == (18_000, 400)
    assert new.schedule == {"kind": "step", "milestones": [6000, 12_000], "gamma": 0.1}
    assert epochs(new) == epochs(old)
    kept = ("batch_size", "warmup_steps", "ema_decay", "clip_norm", "batchnorm_momentum",
            "momentum", "betas", "alpha", "dampening", "nesterov", "optimizer")  # fmt: skip
    assert {key: getattr(new, key) for key in kept} == {key: getattr(old, key) for key in kept}


@EVERY
@RULES
@pytest.mark.parametrize("size", [256, 64, 1024])
@pytest.mark.parametrize("data", [12_500, 400_000])
def test_changes_make_the_recipe_and_say_why(name, rule, size, data):
    old = recipe(name, **WHOLE)
    found = convert(old, batch_size=size, new_dataset_size=data, data_rule=rule)
    changed = {row.name: row.new for row in found.changes}
    assert old.with_changes(**changed) == found.recipe
    assert {row.name: row.old for row in found.changes} == {k: getattr(old, k) for k in changed}
    for row in (*found.changes, *found.kept):
        assert all((row.rule, row.source, row.validity, row.why, row.status))
    names = [row.name for row in (*found.changes, *found.kept)]
    assert len(names) == len(set(names))
    assert found.original == old
    assert not found.unchanged
    assert Conversion.from_json(found.to_json()) == found
    assert (found.data.old_dataset_size, found.data.new_dataset_size) == (50_000, data)
    assert found.data.rule == rule
    (other,) = found.data.alternatives
    asked = convert(old, batch_size=size, new_dataset_size=data, data_rule=other.rule)
    assert asked.recipe == found.recipe.with_changes(**other.values)
    assert (found.rule is None) == (size == 256)


@EVERY
def test_the_recommended_rule_comes_first_and_the_other_beside_it(name):
    found = convert(recipe(name), new_dataset_size=100_000)
    assert found.data.rule == found.data.recommended == "keep-rate"
    (other,) = found.data.alternatives
    assert (other.rule, other.values) == ("long-run", {"lr": 0.05})
    assert "late in training" in other.validity
    # Smith and Le studied SGD.
    assert other.status == ("paper" if recipe(name).optimizer == "sgd" else "assumed")


@EVERY
@RULES
def test_batch_and_data_each_do_what_they_do_alone(name, rule):
    old = recipe(name, **WHOLE)
    both = convert(old, batch_size=1024, new_dataset_size=100_000, data_rule=rule).recipe
    data = convert(old, new_dataset_size=100_000, data_rule=rule).recipe
    assert convert(data, batch_size=1024).recipe == both
    batch = convert(old, batch_size=1024).recipe
    turned = convert(batch, new_dataset_size=100_000, data_rule=rule).recipe
    for key in ("lr", "weight_decay", "momentum", "ema_decay", "batchnorm_momentum"):
        one, other = getattr(both, key), getattr(turned, key)
        assert (one is None and other is None) or one == pytest.approx(other, rel=1e-12)
    assert both.total_steps == turned.total_steps == 4500


@given(
    name=st.sampled_from(list(OPTIMIZERS)),
    rule=st.sampled_from(list(DATA_RULES)),
    sizes=st.tuples(*[st.integers(256, 10**9)] * 3),
)
@example(name="sgd", rule="keep-rate", sizes=(344, 254460, 7209173))  # beyond 2^53 steps
def test_by_way_of_another_size_is_the_same(name, rule, sizes):
    start, between, end = sizes
    old = recipe(name, dataset_size=start, weight_decay=0.1, total_steps=10**12)
    straight = convert(old, new_dataset_size=end, data_rule=rule).recipe
    first = convert(old, new_dataset_size=between, data_rule=rule).recipe
    there = convert(first, new_dataset_size=end, data_rule=rule).recipe
    assert there.dataset_size == straight.dataset_size == end
    assert math.isclose(there.lr, straight.lr, rel_tol=1e-14)
    assert math.isclose(there.weight_decay, straight.weight_decay, rel_tol=1e-11)
    # Each count is rounded to a whole step, the first rounding stretched by what follows.
    room = 0.5 * end / between + 1.5
    assert abs(there.total_steps - straight.total_steps) <= room


@EVERY
@RULES
def test_data_of_the_same_size_change_nothing(name, rule):
    old = recipe(name, **WHOLE)
    found = convert(old, new_dataset_size=50_000, data_rule=rule)
    assert found.unchanged
    assert found.recipe == old
    assert found.data is None
    grown = convert(old, batch_size=1024, new_dataset_size=50_000, data_rule=rule)
    assert grown == convert(old, batch_size=1024)


def test_numbers_of_numpy_are_numbers():
    assert convert(recipe(), new_dataset_size=np.int64(100_000)).recipe.dataset_size == 100_000


@given(
    total=st.integers(1, 3000),
    warmup=st.integers(1, 1000),
    decay=st.integers(1, 3000),
    data=st.integers(32, 10**7),
    in_examples=st.booleans(),
)
def test_a_warm_up_and_a_fall_that_fitted_fit_where_they_can(
    total, warmup, decay, data, in_examples
):
    assume(warmup + decay <= total)
    lengths = {"total_steps": total, "warmup_steps": warmup}
    if in_examples:
        lengths = {"total_examples": total * 32, "warmup_examples": warmup * 32}
    schedule = {"kind": "warmup_stable_decay", "decay_steps": decay}
    old = recipe(batch_size=32, schedule=schedule, **lengths)
    new = convert(old, new_dataset_size=data).recipe
    if in_examples:
        steps, warm = new.total_examples / 32, new.warmup_examples / 32
    else:
        steps, warm = new.total_steps, new.warmup_steps
    assert warm <= warmup
    if data >= 50_000:
        assert warm == warmup
    if steps > 2:
        # In whole steps each of the three may be half a step off.
        assert warm + new.schedule["decay_steps"] <= steps + 1.5


def test_less_data_shorten_a_warm_up_to_no_less_than_its_share():
    def warm(data: int, warmup: int) -> int:
        old = recipe(total_steps=9000, warmup_steps=warmup)
        return convert(old, new_dataset_size=data).recipe.warmup_steps

    assert warm(25_000, 400) == 400  # below a tenth of 4,500
    assert warm(10_000, 400) == 180  # a tenth of 1,800, more than its share of 80
    assert warm(10_000, 4500) == 900  # half of the training, as before


def test_lengths_in_examples_and_tokens():
    old = Recipe(
        optimizer="adamw", lr=1e-3, batch_size=2**19, unit="tokens", sequence_length=1024,
        dataset_size=10**6, total_examples=2**31, warmup_examples=2**25,
    )  # fmt: skip
    found = convert(old, new_dataset_size=3 * 10**6)
    assert found.recipe.total_examples == 3 * 2**31
    assert found.recipe.warmup_examples == 2**25
    assert epochs(old) == pytest.approx(2**21 / 10**6)
    assert any("total_examples 2,147,483,648" in note for note in found.notes)
    assert epochs(recipe()) is None


def test_a_batch_that_only_the_new_data_fill():
    old = recipe(dataset_size=1000)
    assert convert(old, batch_size=4096, new_dataset_size=8000).recipe.batch_size == 4096
    with pytest.raises(InvalidInputError, match="batch_size 256: the data has 200 examples"):
        convert(old, new_dataset_size=200)
    assert convert(old, batch_size=128, new_dataset_size=200).recipe.dataset_size == 200


def test_a_factor_beyond_what_was_measured_is_a_warning():
    for data, far in ((400_000, False), (400_001, True), (6250, False), (6249, True)):
        warnings = convert(recipe(), new_dataset_size=data).warnings
        assert any("more than the 8" in text for text in warnings) == far


BAD = [
    ({}, {}, "neither batch_size nor new_dataset_size"),
    ({}, {"new_dataset_size": 0}, "new_dataset_size 0: a whole number from 1"),
    ({}, {"new_dataset_size": True}, "new_dataset_size True"),
    ({}, {"new_dataset_size": 1e5}, "new_dataset_size 100000.0"),
    ({}, {"new_dataset_size": 2**64}, "a whole number from 1"),
    ({"dataset_size": None}, {"new_dataset_size": 10_000}, "--dataset-size N"),
    ({}, {"new_dataset_size": 10_000, "data_rule": "long"}, "long-run"),
    ({}, {"batch_size": 64, "data_rule": "long-run"}, "new data-set size is required"),
    ({"optimizer": "lamb", "momentum": None}, {"new_dataset_size": 10_000}, "with lamb"),
    ({"optimizer": "lars"}, {"new_dataset_size": 10_000}, "sgd, adam, adamw and rmsprop only"),
    ({"optimizer": "lion", "momentum": None}, {"new_dataset_size": 10_000}, "with lion"),
]


@pytest.mark.parametrize(("keys", "options", "words"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line(keys, options, words):
    with pytest.raises(InvalidInputError) as caught:
        convert(recipe(**keys), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_the_kinds_are_those_of_the_optimizers_here():
    assert {recipe(name).optimizer_kind for name in OPTIMIZERS} == set(KINDS)
