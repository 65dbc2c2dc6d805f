"""Rate schedules: the engine's meaning, and each kind by its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule import rates
from noisescale.plan.schedule.of_recipe import length, rate_schedule
from noisescale.records import Recipe
from noisescale.run.rates import rate_factor

tables = st.one_of(
    st.none(),
    st.just({"kind": "constant"}),
    st.builds(lambda floor: {"kind": "cosine", "floor": floor}, st.floats(0, 1)),
    st.just({"kind": "cosine"}),
    st.builds(
        lambda ends, gamma: {"kind": "step", "milestones": ends, "gamma": gamma},
        st.lists(st.integers(0, 60), min_size=1, max_size=4),
        st.floats(0.05, 1.0),
    ),
)


@settings(deadline=None)
@given(
    table=tables,
    batch=st.integers(1, 40),
    steps=st.integers(1, 60),
    warmup=st.one_of(st.none(), st.integers(1, 30)),
    in_examples=st.booleans(),
    extra=st.integers(0, 39),
)
def test_a_recipe_means_what_the_engine_runs(
    table: dict[str, Any] | None,
    batch: int,
    steps: int,
    warmup: int | None,
    in_examples: bool,
    extra: int,
) -> None:
    lengths: dict[str, Any] = {"total_steps": steps, "warmup_steps": warmup}
    if in_examples:
        rest = extra % batch
        lengths = {"total_examples": steps * batch + rest}
        if warmup is not None:
            lengths["warmup_examples"] = warmup * batch + rest // 2
    recipe = Recipe(lr=0.3, batch_size=batch, schedule=table, **lengths)
    schedule = rate_schedule(recipe)
    for step in range(70):
        expected = recipe.lr * rate_factor(recipe, step)
        assert schedule.at(step * batch) == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_linear_falls_to_its_floor() -> None:
    recipe = Recipe(
        lr=1.0, batch_size=4, total_steps=110, warmup_steps=10,
        schedule={"kind": "linear", "floor": 0.1},
    )  # fmt: skip
    schedule = rate_schedule(recipe)
    for step in range(10, 130):
        done = min(1.0, (step - 10) / 100)
        assert schedule.at(4 * step) == pytest.approx(1 - 0.9 * done)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_warm_up_stable_decay(shape: str) -> None:
    table = {"kind": "warmup_stable_decay", "decay_steps": 20, "floor": 0.2, "shape": shape}
    recipe = Recipe(lr=0.5, batch_size=8, total_steps=100, warmup_steps=9, schedule=table)
    schedule = rate_schedule(recipe)
    for step in range(105):
        if step < 9:
            expected = (step + 1) / 10
        else:
            done = min(1.0, max(0.0, (step - 80) / 20))
            kept = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
            expected = 0.2 + 0.8 * kept
        assert schedule.at(8 * step) == pytest.approx(0.5 * expected)


def test_a_list_holds_each_factor() -> None:
    table = {"kind": "list", "points": [[0, 1], [10, 2.0], [30, 0.25]]}
    schedule = rate_schedule(Recipe(lr=0.4, batch_size=16, schedule=table))
    assert [schedule.at(16 * step) for step in (0, 9, 10, 29, 30, 99)] == [
        0.4, 0.4, 0.8, 0.8, 0.1, 0.1,
    ]  # fmt: skip


def test_the_unit_is_the_recipes() -> None:
    assert rate_schedule(Recipe(lr=1.0, batch_size=2, unit="tokens")).unit == "tokens"
    assert length(Recipe(lr=1.0, batch_size=2)) is None
    assert length(Recipe(lr=1.0, batch_size=2, total_examples=7)) == 7


def test_long_step_schedules_are_looked_up_at_once() -> None:
    schedule = rates.step(1.0, milestones=range(1, 20_001), gamma=0.9999)
    assert schedule.at(10_000) == pytest.approx(0.9999**10_000)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"schedule": {"kind": "cosin"}}, "did you mean cosine"),
    ({"schedule": {}, "total_steps": 3}, ""),
    ({"schedule": {"kind": "cosine"}}, "give total_steps"),
    ({"schedule": {"kind": "linear"}}, "give total_steps"),
    ({"schedule": {"kind": "step"}}, "milestones in steps are required"),
    ({"schedule": {"kind": "step", "milestones": 5}}, "milestones in steps are required"),
    ({"schedule": {"kind": "step", "milestones": [1.5]}}, "milestone 1.5"),
    ({"schedule": {"kind": "step", "milestones": ["a"]}}, "milestone 'a'"),
    ({"schedule": {"kind": "step", "milestones": [-1]}}, "milestone -1"),
    ({"schedule": {"kind": "step", "milestones": [5], "gamma": 0}}, "gamma 0"),
    ({"schedule": {"kind": "step", "milestones": [5], "gamma": "x"}}, "gamma 'x'"),
    ({"schedule": {"kind": "step", "milestone": [5]}}, "did you mean milestones"),
    ({"schedule": {"kind": "constant", "floor": 0.1}}, "schedule key 'floor'"),
    ({"schedule": {"kind": "cosine", "floor": -1}, "total_steps": 9}, "floor -1"),
    ({"schedule": {"kind": "warmup_stable_decay"}, "total_steps": 9}, "give decay_steps"),
    (
        {"schedule": {"kind": "warmup_stable_decay", "decay_steps": 10}, "total_steps": 9},
        "must fit into the total",
    ),
    (
        {
            "schedule": {"kind": "warmup_stable_decay", "decay_steps": 3, "shape": "cube"},
            "total_steps": 9,
        },
        "shape 'cube'",
    ),
    ({"schedule": {"kind": "list"}}, "points, pairs of a step and a factor"),
    ({"schedule": {"kind": "list", "points": [3]}}, "points, pairs"),
    ({"schedule": {"kind": "list", "points": [[1, 1.0]]}}, "begin at 8"),
    ({"schedule": {"kind": "list", "points": [[0, -1.0]]}}, "rate -"),
    ({"schedule": {"kind": "list", "points": [[0, 1.0]]}, "warmup_steps": 5}, "warm-up beside"),
]


@pytest.mark.parametrize(("keys", "words"), BAD)
def test_bad_recipes_are_refused_in_one_line(keys: dict[str, Any], words: str) -> None:
    recipe = Recipe(lr=0.1, batch_size=8, **keys)
    if not words:
        assert rate_schedule(recipe).at(0) == 0.1
        return
    with pytest.raises(InvalidInputError) as caught:
        rate_schedule(recipe)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rates.constant(0.1, warmup=-1), "warmup -1"),
        (lambda: rates.constant(0.1, warmup=5, warmup_from=2), "warmup_from 2"),
        (lambda: rates.cosine(0.1, total=5, warmup=5), "total 5"),
        (lambda: rates.linear(0.1, total=0), "total 0"),
        (lambda: rates.listed([(0, 0.1), (0, 0.2)]), "at 0 and then 0"),
        (lambda: rates.listed([]), "no segments"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        make()
