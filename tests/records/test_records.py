"""Records: JSON both ways, bad values refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.records import (
    NoiseScale,
    Outcome,
    ParametersSeen,
    Recipe,
    Target,
    TrajectoryRow,
    TrialPlan,
)
from noisescale.workload import Workload, data_size

NOISE = NoiseScale(
    b_simple=None,
    low=12.5,
    high=None,
    outcome=Outcome.LOWER_BOUND,
    grad_sq=-0.25,
    trace_cov=3.0,
    steps=20,
    examples=640,
    source="examples",
    parameters_seen=ParametersSeen(seen=3, total=5, missing=("head.weight",)),
)


def test_json_both_ways() -> None:
    assert NoiseScale.from_json(NOISE.to_json()) == NOISE
    assert json.loads(NOISE.to_json())["outcome"] == "lower_bound"


def test_not_finite_becomes_null() -> None:
    row = TrajectoryRow(
        step=1, examples=8, loss=math.nan, grad_sq=math.inf, trace_cov=1.0,
        b_simple=None, low=None, high=None,
    )  # fmt: skip
    assert row.to_dict()["loss"] is None
    assert row.to_dict()["grad_sq"] is None


def test_unknown_and_missing_keys_are_named() -> None:
    values = NOISE.to_dict()
    with pytest.raises(InvalidInputError, match="'colour'"):
        NoiseScale.from_dict(values | {"colour": 1})
    del values["outcome"]
    with pytest.raises(InvalidInputError, match="'outcome'"):
        NoiseScale.from_dict(values)


@given(
    lr=st.floats(1e-9, 1e3),
    batch_size=st.integers(1, 10**6),
    momentum=st.none() | st.floats(0, 0.999),
    betas=st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_recipes_survive_json(
    lr: float, batch_size: int, momentum: float | None, betas: tuple[float, float] | None
) -> None:
    recipe = Recipe(lr=lr, batch_size=batch_size, momentum=momentum, betas=betas)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"momentum": 1.0}, "momentum"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"optimizer": "sgdd"}, "did you mean sgd"),
        ({"optimizer": "lars", "trust_coefficient": 0.0}, "trust_coefficient"),
        ({"unit": "tokns"}, "did you mean tokens"),
        ({"momentun": 0.9}, "did you mean momentum"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        Recipe(lr=0.1, batch_size=32).with_changes(**changes)


def test_the_kind_of_optimizer() -> None:
    recipe = Recipe(lr=0.1, batch_size=32)
    assert recipe.optimizer_kind == "sgd"
    assert recipe.with_changes(momentum=0.9).optimizer_kind == "momentum"
    assert recipe.with_changes(optimizer="adamw").optimizer_kind == "adam"
    assert recipe.with_changes(optimizer="lars", momentum=0.9).optimizer_kind == "lars"


@given(value=st.floats(-1e6, 1e6), sign=st.sampled_from("<>"))
def test_targets_survive_text(value: float, sign: str) -> None:
    target = Target(split="train", metric="loss", comparison=sign, value=value)
    again = Target.parse(f"train_loss{sign}{value!r}")
    assert again == target
    assert not target.reached(math.nan)


@pytest.mark.parametrize("text", ["", "loss<1", "train_loss=1", "test_loss<1", "train_loss<x"])
def test_bad_targets_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="validation_error"):
        Target.parse(text)


def test_workload_border() -> None:
    good = {"name": "w", "model": list, "loss": max, "train": [1, 2, 3]}
    recipe = Recipe(lr=0.1, batch_size=2)
    assert Workload(**good, recipe=recipe).train_size == 3
    with pytest.raises(InvalidInputError, match="Recipe is required"):
        Workload(**good, recipe=None)
    with pytest.raises(InvalidInputError, match="callable"):
        Workload(**(good | {"loss": 3}), recipe=recipe)
    with pytest.raises(InvalidInputError, match="at least 2"):
        Workload(**(good | {"train": [1]}), recipe=recipe)
    with pytest.raises(InvalidInputError, match="map-style"):
        data_size(3)


def test_a_trial_keeps_its_name_when_recipes_gain_keys():
    recipe = Recipe(lr=0.1, batch_size=32, momentum=0.9)
    plan = TrialPlan(
        workload="digits-0",
        recipe=recipe,
        seed=1,
        order_seed=2,
        targets=("validation_error<0.05",),
        max_steps=100,
    )
    # Worked out when the name was fixed: stores on disk rely on it.
    assert plan.key == "4866d2eb2b579809"
    assert dataclasses.replace(plan, seed=2).key != plan.key
    assert TrialPlan.from_json(plan.to_json()).key == plan.key
