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
from noisescale.theory.per_example import PerExample

tables = st.one_of(
    st.none(),
    st.just({"kind": "constant"}),
    st.builds(lambda floor: {"kind": "cosine", "floor": floor}, st.floats(0, 1)),
    st.just({"kind": "cosine"}),
    st.builds(lambda floor: {"kind": "linear", "floor": floor}, st.floats(0, 1)),
    st.builds(
        lambda ends, gamma: {"kind": "step", "milestones": ends, "gamma": gamma},
        st.lists(st.integers(0, 60) | st.floats(0, 60), min_size=1, max_size=4),
        st.floats(0.0, 1.0),
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


def slow_factor(recipe: Recipe, step: int) -> float:
    """What the engine ran before it shared these schedules, written out."""
    warmup = recipe.warmup_steps or 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    table = recipe.schedule or {}
    if table["kind"] == "step":
        return float(table["gamma"] ** sum(step >= round(end) for end in table["milestones"]))
    length = max(1, (recipe.total_steps or 0) - warmup)
    wave = 1 + math.cos(math.pi * min(1.0, (step - warmup) / length))
    return float(table["floor"] + (1 - table["floor"]) * wave / 2)


@settings(deadline=None)
@given(
    table=st.builds(
        lambda kind, ends, share: {
            "step": {"kind": "step", "milestones": ends, "gamma": share},
            "cosine": {"kind": "cosine", "floor": share},
        }[kind],
        st.sampled_from(["step", "cosine"]),
        st.lists(st.integers(0, 60) | st.floats(0, 60), min_size=1, max_size=4),
        st.floats(0, 1),
    ),
    batch=st.integers(1, 1000),
    steps=st.integers(1, 60),
    warmup=st.none() | st.integers(1, 30),
)
def test_trainings_run_schedules_as_ever(
    table: dict[str, Any], batch: int, steps: int, warmup: int | None
) -> None:
    recipe = Recipe(
        lr=0.3, batch_size=batch, schedule=table, total_steps=steps, warmup_steps=warmup
    )
    for step in range(70):
        assert rate_factor(recipe, step) == pytest.approx(slow_factor(recipe, step), abs=1e-15)


@pytest.mark.parametrize(
    ("table", "factors"),
    [
        ({"kind": "linear", "floor": 0.5}, {0: 1.0, 50: 0.75, 100: 0.5, 200: 0.5}),
        ({"kind": "warmup_stable_decay", "decay_steps": 20}, {0: 1.0, 79: 1.0, 90: 0.5, 100: 0.0}),
        ({"kind": "list", "points": [[0, 1.0], [10, 0.3]]}, {0: 1.0, 9: 1.0, 10: 0.3, 99: 0.3}),
    ],
)
def test_trainings_run_every_kind(table: dict[str, Any], factors: dict[int, float]) -> None:
    recipe = Recipe(lr=0.2, batch_size=16, total_steps=100, schedule=table)
    assert {step: rate_factor(recipe, step) for step in factors} == pytest.approx(factors)


def test_a_changed_table_is_another_schedule() -> None:
    table: dict[str, Any] = {"kind": "step", "milestones": [5], "gamma": 0.5}
    recipe = Recipe(lr=0.2, batch_size=16, schedule=table)
    assert rate_factor(recipe, 5) == 0.5
    table["gamma"] = 0.25
    assert rate_factor(recipe, 5) == 0.25


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "step", "milestones": [100, 201], "gamma": 0.5},
        {"kind": "warmup_stable_decay", "decay_steps": 55},
        {"kind": "list", "points": [[0, 1.0], [101, 0.5], [102, 0.25]]},
    ],
    ids=lambda table: str(table["kind"]),
)
def test_recipes_restated_per_example_have_a_schedule(table: dict[str, Any]) -> None:
    old = Recipe(lr=0.1, batch_size=10, total_steps=300, schedule=table)
    new = PerExample.of(old).at(64)
    before, after = rate_schedule(old), rate_schedule(new)
    # Changes lie at the nearest whole step: away from them by a step nothing differs.
    sixty_four = [position for position in range(0, 1900, 64) if not 900 < position < 1100]
    ratios = [after.at(p) / new.lr - before.at(p) / old.lr for p in sixty_four]
    assert max(map(abs, ratios)) < 64 / 550


@settings(deadline=None)
@given(
    total=st.integers(40, 3000),
    warmup=st.integers(1, 1000),
    old=st.integers(1, 64),
    new=st.integers(1, 64),
)
def test_a_fall_that_begins_with_the_warm_ups_end_does_so_at_any_batch_size(
    total: int, warmup: int, old: int, new: int
) -> None:
    if warmup >= total - 3 or (total - warmup) * old < 4 * new:
        return
    table = {"kind": "warmup_stable_decay", "decay_steps": total - warmup}
    recipe = Recipe(lr=0.1, batch_size=old, total_steps=total, warmup_steps=warmup, schedule=table)
    schedule = rate_schedule(PerExample.of(recipe).at(new))
    assert schedule.segments[-1].shape == "linear"


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
    ({"schedule": {"kind": "step", "milestones": [math.nan]}}, "milestone nan"),
    ({"schedule": {"kind": "step", "milestones": ["5"]}}, "milestone '5'"),
    ({"schedule": {"kind": "step", "milestones": ["a"]}}, "milestone 'a'"),
    ({"schedule": {"kind": "step", "milestones": [-1]}}, "milestone -1"),
    ({"schedule": {"kind": "step", "milestones": [5], "gamma": -1}}, "gamma -1"),
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
