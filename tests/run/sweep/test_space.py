from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale import InvalidInputError, Recipe
from noisescale.run.sweep.space import Dimension, extrapolated, point_of, recipe_at
from noisescale.theory.scaling.companions import weight_decay
from noisescale.theory.scaling.rule import Facts

SGD = Recipe(lr=0.1, batch_size=32, momentum=0.9, weight_decay=1e-3, total_steps=500)
ADAM = Recipe(optimizer="adamw", lr=1e-3, batch_size=16, betas=(0.9, 0.99), weight_decay=0.1)
NAMES = {
    "sgd": ("lr", "momentum", "weight_decay", "total_examples"),
    "adamw": ("lr", "beta1", "beta2", "weight_decay"),
    "adam": ("lr", "weight_decay"),
}
DAMPED = SGD.with_changes(dampening=0.5)
COUPLED = ADAM.with_changes(optimizer="adam", betas=None)


@pytest.mark.parametrize(
    "recipe", [SGD, ADAM, DAMPED, COUPLED], ids=["sgd", "adamw", "damped", "coupled"]
)
@given(batch_size=st.integers(1, 512))
def test_a_point_and_its_recipe_are_inverse(recipe, batch_size):
    names = NAMES[recipe.optimizer]
    point = point_of(recipe, names)
    there = recipe_at(recipe, point, batch_size)
    assert there.batch_size == batch_size
    # A momentum that has vanished within a step has no half-life left to read.
    kept = [n for n in names if not n.startswith(("momentum", "beta")) or batch_size < 64]
    back = point_of(there, kept)
    for name in kept:
        assert back[name] == pytest.approx(point[name], rel=1e-3), name


def test_one_point_is_the_same_temperature_at_every_batch_size():
    point = point_of(SGD, ("lr",))
    rates = [recipe_at(SGD, point, size).lr for size in (8, 32, 128)]
    assert rates == [0.025, 0.1, 0.4]
    assert recipe_at(SGD, point, 8).momentum == 0.9
    adam = [recipe_at(ADAM, point_of(ADAM, ("lr",)), size).lr for size in (4, 16, 64)]
    assert adam == [0.0005, 0.001, 0.002]


@pytest.mark.parametrize("recipe", [SGD, ADAM, DAMPED, COUPLED])
def test_the_decay_of_a_point_is_that_of_a_conversion(recipe):
    names = ("lr", "weight_decay")
    there = recipe_at(recipe, point_of(recipe, names), 4 * recipe.batch_size)
    (change,) = weight_decay(recipe, there, Facts())
    assert there.weight_decay == pytest.approx(change.new, rel=1e-5)


def test_lengths_stay_in_examples():
    recipe = SGD.with_changes(warmup_steps=10)
    there = recipe_at(recipe, point_of(recipe, ("lr",)), 64)
    assert (there.total_steps, there.total_examples) == (None, 16_000)
    assert (there.warmup_steps, there.warmup_examples) == (None, 320)


def test_searching_the_length_makes_a_schedule():
    there = recipe_at(SGD, {**point_of(SGD, ("lr",)), "total_examples": 3000.0}, 8)
    assert there.schedule == {"kind": "cosine"}
    assert there.total_examples == 3000


@pytest.mark.parametrize("text", ["lr=0.01:1", "momentum=0.5:0.99", "weight-decay", "lr"])
def test_dimensions_are_read(text):
    side = Dimension.parse(text, SGD)
    assert side.low < side.high
    assert side.at(0.0) == pytest.approx(side.low)
    assert side.share(side.at(0.3)) == pytest.approx(0.3)


def test_bounds_are_values_at_the_recipes_batch_size():
    side = Dimension.parse("lr=0.01:1", SGD)
    low, high = (recipe_at(SGD, {"lr": end}, 32).lr for end in (side.low, side.high))
    assert (low, high) == (0.01, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate", "not a dimension"),
        ("momentun=0.1:0.9", "did you mean momentum"),
        ("lr=1:0.1", "ascending"),
        ("lr=a:b", "two positive numbers"),
        ("lr=0:1", "two positive numbers"),
        ("beta1", "the recipe has no beta1"),
        ("momentum=0.5:1.5", "[0, 1)"),
    ],
)
def test_wrong_dimensions_are_refused(text, words):
    with pytest.raises(InvalidInputError, match=None) as problem:
        Dimension.parse(text, SGD)
    assert words in str(problem.value)


def test_the_centre_follows_the_sizes_tuned_already():
    # the coordinate falls like B^-0.5 between the nearest two
    found = extrapolated({8: 0.04, 32: 0.02}, 128, square_root=False)
    assert found == pytest.approx(0.01)
    # a rate that would fall with the batch size is held, one that outgrows it too
    assert extrapolated({8: 1.0, 16: 0.1}, 32, square_root=False) == pytest.approx(0.05)
    assert extrapolated({8: 1.0, 16: 2.0}, 32, square_root=False) == pytest.approx(2.0)
    assert extrapolated({16: 1.0}, 16, square_root=False) == 1.0
    assert extrapolated({16: 1.0}, 256, square_root=True) == 1.0
    assert extrapolated({16: 1.0}, 256, square_root=False) == pytest.approx(0.5)
    assert math.isfinite(extrapolated({1: 1.0, 2: 1.0}, 10**6, square_root=False))
