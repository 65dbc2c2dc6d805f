"""Plans: their rows, what they save, what they warn of, what they refuse."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.plan import plan_schedule
from noisescale.records import Recipe, SchedulePlan
from noisescale.theory.per_example import rate_coordinate

STEP = {"kind": "step", "milestones": [200, 300], "gamma": 0.2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
    "adamw": {"optimizer": "adamw", "betas": (0.9, 0.99), "weight_decay": 0.1},
    "lamb": {"optimizer": "lamb", "weight_decay": 0.1},
}
SCHEDULES: list[dict[str, Any] | None] = [
    None,
    STEP,
    {"kind": "cosine"},
    {"kind": "linear", "floor": 0.05},
    {"kind": "warmup_stable_decay", "decay_steps": 100},
    {"kind": "list", "points": [[0, 1], [150, 0.5], [250, 0.05]]},
]
WISHES: list[dict[str, Any]] = [
    {},
    {"grow": True},
    {"grow": True, "powers": True},
    {"grow": True, "micro_batch_size": 4, "replicas": 4, "growth_factor": 1.3},
    {"grow": True, "critical_batch": 700.0},
    {"grow": True, "max_batch_size": 2048, "warmup_batch": (16, 3000)},
    {"warmup_batch": (16, 6400, 16)},
    {"text": "0:16 5K:64 20K:320", "unit": "examples"},
]


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "lr": 0.1, "batch_size": 64, "total_steps": 400, "dataset_size": 10_000, "schedule": STEP,
    }  # fmt: skip
    return Recipe(**(values | changes))


def assert_consistent(plan: SchedulePlan) -> None:
    rows, schedule = plan.rows, plan.schedule
    assert rows[0].start == 0
    assert [row.stop for row in rows[:-1]] == [row.start for row in rows[1:]]
    assert plan.updates == sum(row.updates for row in rows) == len(list(schedule.steps()))
    assert plan.original_updates == math.ceil((schedule.total or 0) / plan.recipe.batch_size)
    assert plan.updates_saved == pytest.approx(1 - plan.updates / plan.original_updates)
    steps = iter(schedule.steps())
    for row in rows:
        own = list(itertools.islice(steps, row.updates))
        assert {size for _, size, _ in own} == {row.batch_size}
        assert own[0].position == row.start
        assert own[-1].position + row.batch_size == row.stop
        assert (own[0].lr, own[-1].lr) == (row.lr_first, row.lr_last)
        low, high = sorted((row.lr_first, row.lr_last))
        slack = 1e-12 * high
        assert all(low - slack <= (step.lr or 0) <= high + slack for step in own)


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("table", SCHEDULES, ids=lambda t: t["kind"] if t else "none")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_plan_is_consistent_and_keeps_the_temperature(
    optimizer: str, table: dict[str, Any] | None, wish: dict[str, Any]
) -> None:
    made = recipe(schedule=table, **OPTIMIZERS[optimizer])
    plan = plan_schedule(made, **wish)
    assert_consistent(plan)
    original = plan_schedule(made).schedule
    for row in plan.rows:
        lr = original.lr_at(row.start)
        assert lr is not None
        tau = rate_coordinate(made.with_changes(lr=lr)) if lr else 0.0
        assert row.temperature_first == pytest.approx(tau, rel=1e-12)
    assert SchedulePlan.from_json(plan.to_json()) == plan


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 40),
    total=st.integers(500, 9000),
    ends=st.lists(st.integers(1, 200), max_size=3),
    gamma=st.floats(0.05, 0.9),
    largest=st.integers(40, 3000),
)
def test_any_step_schedule(
    batch: int, total: int, ends: list[int], gamma: float, largest: int
) -> None:
    table = {"kind": "step", "milestones": ends, "gamma": gamma} if ends else None
    made = Recipe(lr=0.1, batch_size=batch, total_examples=total, schedule=table)
    plan = plan_schedule(made, grow=True, max_batch_size=largest)
    assert_consistent(plan)
    assert plan.updates <= plan.original_updates


def test_passes_of_the_accumulation() -> None:
    plan = plan_schedule(recipe(), grow=True, micro_batch_size=8, replicas=4)
    assert [row.accumulation for row in plan.rows] == [
        row.batch_size // 32 for row in plan.rows
    ]  # fmt: skip
    assert plan_schedule(recipe()).rows[0].accumulation is None


@pytest.mark.parametrize(
    ("options", "limit", "source"),
    [
        ({}, 1000, "a tenth of the data"),
        ({"max_batch_size": 4000}, 4000, "the largest batch size given"),
        ({"critical_batch": 300.7}, 300, "the critical batch"),
        ({"critical_batch": 5e4}, 1000, "a tenth of the data"),
        ({"critical_batch": 5e3, "max_batch_size": 6000}, 5000, "the critical batch"),
        ({"critical_batch": 10.0}, 64, "the critical batch"),
    ],
)
def test_what_limits_the_growth(options: dict[str, Any], limit: int, source: str) -> None:
    plan = plan_schedule(recipe(), grow=True, **options)
    assert plan.limit == limit
    assert plan.limit_source.startswith(source)
    assert max(row.batch_size for row in plan.rows) <= limit


def test_a_limit_is_one_of_the_sizes() -> None:
    made = recipe(schedule={"kind": "cosine"})
    for options, limit, words in (
        ({"multiple_of": 64}, 960, "1,000, in multiples of 64"),
        ({"powers": True}, 512, "1,000, in doublings of 64"),
    ):
        plan = plan_schedule(made, grow=True, **options)  # type: ignore[arg-type]
        assert plan.limit == limit == max(row.batch_size for row in plan.rows)
        assert words in plan.limit_source
        assert any(f"reaches {limit}" in text for text in plan.warnings)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_curvature_caps_the_rate_of_the_growth(momentum: float | None) -> None:
    stable = 2 * (1 + (momentum or 0))
    made = recipe(momentum=momentum, dataset_size=None)
    calm = plan_schedule(made, grow=True, curvature=stable / 0.1001)
    assert calm == plan_schedule(made, grow=True)
    steep = plan_schedule(made, grow=True, curvature=stable / 0.03)
    assert [row.batch_size for row in steep.rows] == [64, 96, 480]
    assert [row.lr_first for row in steep.rows] == pytest.approx([0.1, 0.03, 0.03])
    assert steep.warnings[-1] == (
        f"the rate is above the 0.03 that a curvature of {stable / 0.03:g} tolerates from"
        " 0 to 12,800 examples"
    )
    assert_consistent(steep)


def test_a_list_that_leaves_stability_is_said() -> None:
    plan = plan_schedule(
        recipe(schedule=None), text="0:64 10K:640", unit="examples", curvature=2 / 0.5
    )
    assert "tolerates from 10,048 to" in plan.warnings[-1]


def test_data_in_tokens() -> None:
    made = recipe(
        unit="tokens", batch_size=64 * 128, sequence_length=128, dataset_size=10_000,
    )  # fmt: skip
    assert plan_schedule(made, grow=True).limit == 128_000
    unknown = made.with_changes(sequence_length=None)
    assert plan_schedule(unknown, grow=True).limit is None
    assert any("sets no limit" in text for text in plan_schedule(unknown, grow=True).warnings)
    assert plan_schedule(unknown, grow=True, sequence_length=128).limit == 128_000


def test_megatrons_text_beside_a_recipe_in_tokens() -> None:
    made = Recipe(
        optimizer="adamw", lr=3e-4, batch_size=768 * 4096, unit="tokens", sequence_length=4096,
        total_examples=10**12,
    )  # fmt: skip
    plan = plan_schedule(
        made, text="0:768 250B:1536 500B:3072", threshold_unit="tokens", size_unit="sequences"
    )
    assert [row.batch_size for row in plan.rows] == [768 * 4096, 1536 * 4096, 3072 * 4096]
    assert plan.rows[2].lr_first == pytest.approx(6e-4)
    assert plan.schedule.unit == "tokens"
    assert plan.updates_saved == pytest.approx(1 - (0.25 + 0.25 / 2 + 0.5 / 4), abs=1e-4)


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (recipe(schedule={"kind": "cosine"}), {"grow": True}, "from there the rate decays"),
        (recipe(dataset_size=500), {"grow": True}, "the batch does not grow"),
        (recipe(schedule=None), {"grow": True}, "the recipe's rate never falls"),
        (recipe(optimizer="adamw"), {"grow": True}, "while noise dominates"),
        (recipe(optimizer="adamw"), {"grow": True}, "betas count steps"),
        (recipe(ema_decay=0.99), {"grow": True}, "ema_decay counts steps"),
        (
            recipe(optimizer="adamw", weight_decay=0.1),
            {"grow": True, "max_batch_size": 1024},
            "at batch 1,024 0.25 times that at batch 64",
        ),
        (
            recipe(momentum=0.99),
            {"grow": True, "max_batch_size": 6400},
            "only 4 steps at batch 1,600: fewer than the 100",
        ),
        (
            recipe(),
            {"text": "0:64 10:32 20:64", "unit": "examples"},
            "leaps over them: 32 from 10 on",
        ),
        (recipe(), {"text": "0:64 10K:128", "unit": "examples", "coupling": "none"}, "changes"),
        (
            recipe(),
            {"text": "0:64 10K:160", "unit": "examples"},
            "goes up to 0.25, 2.5 times the recipe's highest",
        ),
        (
            recipe(optimizer="adamw"),
            {"text": "0:64 10K:128", "unit": "examples", "coupling": "linear"},
            "does not keep the temperature of adamw",
        ),
        (
            recipe(momentum=0.9),
            {"text": "0:64 10K:128", "unit": "examples", "coupling": "square_root"},
            "is not the recipe's at other batch sizes",
        ),
    ],
)
def test_what_a_reader_must_know(made: Recipe, options: dict[str, Any], words: str) -> None:
    assert any(words in text for text in plan_schedule(made, **options).warnings)


@pytest.mark.parametrize(
    ("optimizer", "coupling", "kept", "source"),
    [
        ("sgd", "auto", "lr / ((1 - m) B)", "1711.00489"),
        ("sgd", "square_root", "lr / sqrt(B)", "1705.08741"),
        ("adamw", "auto", "lr / sqrt(B)", "2205.10287"),
        ("adamw", "linear", "lr / B", "1706.02677"),
        ("adamw", "none", "is the recipe's whatever", "none"),
    ],
)
def test_what_is_kept_is_what_is_said(
    optimizer: str, coupling: str, kept: str, source: str
) -> None:
    made = recipe(optimizer=optimizer, schedule=None)
    plan = plan_schedule(made, text="0:64 10K:256", unit="examples", coupling=coupling)
    assert kept in plan.rule
    assert source in plan.source
    power = {"lr / sqrt(B)": 0.5, "is the recipe's whatever": 0.0}.get(kept, 1.0)
    assert plan.rows[1].lr_first == pytest.approx(0.1 * 4**power)


@pytest.mark.parametrize("wish", [{}, {"text": "0:64", "unit": "examples"}])
def test_a_plan_without_a_change_warns_of_nothing(wish: dict[str, Any]) -> None:
    made = recipe(**OPTIMIZERS["adamw"])
    assert plan_schedule(made, **wish).warnings == ()


@pytest.mark.parametrize("lr", [5e-324, 1e-300, 1e300])
def test_rates_at_the_ends_of_the_floats(lr: float) -> None:
    made = recipe(lr=lr, weight_decay=0.1, optimizer="adamw")
    plan = plan_schedule(made, grow=True)
    assert SchedulePlan.from_json(plan.to_json()) == plan


def test_a_last_step_far_beyond_the_end_is_said() -> None:
    # 25,600 examples: the rate falls a hundredfold at 25,024, and the next step is of 6,400.
    table = {"kind": "step", "milestones": [391], "gamma": 0.01}
    found = plan_schedule(recipe(momentum=None, schedule=table), grow=True).warnings
    assert not any("the last step" in text for text in found)
    unlimited = recipe(momentum=None, schedule=table, dataset_size=None)
    plan = plan_schedule(unlimited, grow=True, max_batch_size=6400)
    last = plan.rows[-1]
    assert (last.batch_size, last.stop) == (6400, 31_424)
    assert any("5,824 more than the training's 25,600" in text for text in plan.warnings)


def test_few_steps_of_adam_are_said() -> None:
    table = {"kind": "step", "milestones": [395], "gamma": 0.5}
    found = plan_schedule(recipe(optimizer="adamw", momentum=None, schedule=table), grow=True)
    assert any("fewer than the 10 over which beta1" in text for text in found.warnings)


def test_sgd_keeps_its_weight_decay_per_example() -> None:
    made = recipe(momentum=0.5, weight_decay=1e-3)
    assert plan_schedule(made, grow=True).warnings == ()


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"total_steps": None}, {"grow": True}, "a recipe without a length"),
    ({}, {"text": "0:64 1K:128"}, "without the unit of its thresholds"),
    ({}, {"text": "0:64 1K:128", "unit": "tokens"}, "mixed units need the length of a sequence"),
    ({}, {"grow": True, "unit": "tokens"}, "unit tokens without a text"),
    ({}, {"size_unit": "examples"}, "size_unit examples without a text"),
    ({}, {"text": "0:64", "unit": "examples", "grow": True}, "beside grow"),
    ({}, {"text": "0:64", "unit": "examples", "warmup_batch": (8, 99)}, "beside warmup_batch"),
    ({}, {"text": "0:64 1K:20000", "unit": "examples"}, "larger than the data"),
    ({}, {"text": "0:64 1K:100", "unit": "examples", "replicas": 8}, "96 and 104"),
    ({}, {"grow": True, "max_batch_size": 32}, "max_batch_size 32: is below"),
    ({}, {"grow": True, "max_batch_size": 20_000}, "larger than the data"),
    ({}, {"max_batch_size": 640}, "add grow"),
    ({}, {"critical_batch": 640.0}, "add grow"),
    ({}, {"powers": True}, "add grow"),
    ({}, {"grow": True, "critical_batch": -1.0}, "critical_batch -1"),
    ({}, {"grow": True, "critical_batch": math.nan}, "critical_batch nan"),
    ({}, {"grow": True, "curvature": 0.0}, "curvature 0"),
    ({"optimizer": "adamw"}, {"grow": True, "curvature": 1.0}, "leave out the curvature"),
    ({}, {"grow": True, "growth_factor": 1.0}, "growth_factor 1.0"),
    ({}, {"grow": True, "coupling": "none"}, "coupling 'none'"),
    ({}, {"coupling": "sqrt"}, "coupling 'sqrt'"),
    ({}, {"micro_batch_size": 48}, "48 and 96"),
    ({}, {"micro_batch_size": 0}, "micro_batch_size 0"),
    ({}, {"replicas": 2.0}, "replicas 2.0"),
    ({}, {"multiple_of": -8}, "multiple_of -8"),
    ({}, {"dataset_size": 5}, "contradicts the recipe's dataset_size 10000"),
    ({"dataset_size": None}, {"dataset_size": 32}, "larger than the data"),
    ({}, {"warmup_batch": (8,)}, "a first size and a length"),
    ({}, {"warmup_batch": (8, 99, 1, 1)}, "a first size and a length"),
    ({}, {"warmup_batch": (0, 99)}, "first size of the batch warm-up 0"),
    ({}, {"warmup_batch": (64, 99)}, "a batch warm-up from 64"),
    ({}, {"warmup_batch": (8, 99), "micro_batch_size": 16}, "batch size 8"),
    ({}, {"warmup_batch": (8, 20_000), "grow": True}, "has grown to 1000"),
    ({}, {"warmup_batch": (8, 25_600)}, "is longer than the training of 25600 examples"),
    ({"schedule": {"kind": "cosin"}}, {}, "did you mean cosine"),
    ({"dataset_size": None, "schedule": {"kind": "cosine"}}, {"grow": True}, "falls to nothing"),
]


@pytest.mark.parametrize(("keys", "options", "words"), BAD)
def test_bad_input_is_one_line_that_names_it(
    keys: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan_schedule(recipe(**keys), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_needs_nothing_heavy() -> None:
    code = (
        "import sys, noisescale.plan.schedule.plan, noisescale.plan.schedule.noise_driven\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'numpy', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
