"""The advice end to end, on small real trainings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Advice, Outcome
from noisescale.run.advise import advise

SECONDS = 6.0


@pytest.fixture(scope="module")
def digits() -> Advice:
    return advise("digits", seconds=SECONDS, devices=(1, 2), overrides=["lr=0.5"])


def test_the_parts_fit_together(digits: Advice) -> None:
    critical = digits.limits.critical_batch
    assert critical.outcome is Outcome.DETERMINED
    assert critical.low < critical.sampling_low < critical.point
    assert critical.point < critical.sampling_high < critical.high
    assert critical.point == pytest.approx(critical.factor * digits.noise_scale.b_simple)
    assert critical.optimizer == "sgd"
    assert "validation_error<0.05" in critical.phase
    assert digits.recommended in digits.table
    assert digits.recommended.examples_ratio_high <= 1.5 * (1 + 1e-9)
    assert digits.recipe.dataset_size == 1437
    assert 32 in {row.global_batch_size for row in digits.table}
    assert digits.noise_scale.parameters_seen.complete


def test_only_sizes_that_ran_are_used(digits: Advice) -> None:
    ran = {point.micro_batch_size for point in digits.speed.points}
    assert {row.micro_batch_size for row in digits.table} <= ran
    assert digits.limits.memory.micro_batch_size in ran
    for row in digits.table:
        parts = row.micro_batch_size * row.accumulation * row.replicas
        assert parts == row.global_batch_size
        assert row.replicas in (1, 2)


def test_it_survives_json(digits: Advice) -> None:
    again = Advice.from_json(digits.to_json())
    assert again.recommended == digits.recommended
    assert again.limits == digits.limits
    assert again.table == digits.table


def test_a_rate_far_too_low_is_said_and_not_measured_at() -> None:
    # Time for the rate check on a machine that does other things too.
    found = advise("digits", seconds=4 * SECONDS, overrides=["lr=0.01"])
    check = found.rate_check
    assert check.verdict == "too_low"
    assert check.measured_lr > 3 * check.lr
    assert found.recipe.lr == check.measured_lr
    assert any("0.01" in warning for warning in found.warnings)


def test_the_kind_of_optimizer_chooses_the_factor() -> None:
    found = advise("digits", seconds=SECONDS, overrides=["lr=0.05", "momentum=0.9"])
    assert found.limits.critical_batch.optimizer == "momentum"


WORKLOAD = """
import torch
from torch import nn
from noisescale import Recipe, Workload

workload = Workload(
    name="linear", model=lambda: nn.Linear(3, 1), recipe=Recipe(lr=0.1, batch_size=8),
    train=torch.randn(64, 3, generator=torch.Generator().manual_seed(0)),
    loss=lambda m, b: (m(b)[:, 0] - b[:, 0]).square().mean(),
)
"""


@pytest.mark.parametrize(
    ("override", "target", "words"),
    [
        ("lr=1e6", None, "diverges, as does every other.*a smaller lr"),
        ("lr=0.1", "train_loss<50", "met before the first step.*deeper"),
        ("batch_size=1", None, "one example per step.*--set batch_size=32"),
    ],
)
def test_what_says_nothing_is_no_recommendation(
    tmp_path: Path, override: str, target: str | None, words: str
) -> None:
    (tmp_path / "linear.py").write_text(WORKLOAD)
    name = f"{tmp_path}/linear.py:workload"
    found = advise(name, seconds=2, target=target, overrides=[override])
    assert found.recommended is None
    assert re.search(words, found.reasons[0])
    assert found.limits.critical_batch.low is None
    if target is not None:
        assert any("met before the first step" in warning for warning in found.warnings)
        assert "met before the first step" in found.limits.critical_batch.phase


def test_the_recipes_own_batch_is_compared(digits: Advice) -> None:
    # 32 wastes more than 1.5 wherever the critical batch's low end is below 64: it is about 14.
    assert digits.recommended is not None
    assert digits.recommended.global_batch_size < 32
    assert any("recipe's own batch, 32 examples" in reason for reason in digits.reasons)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"workload": "digts"}, "did you mean digits"),
        ({"workload": "digits", "seconds": 0}, "positive"),
        ({"workload": "digits", "target": "error<1"}, "NAME<VALUE"),
        ({"workload": "digits", "target": "validation_accuracy>1"}, "accuracy"),
        ({"workload": "digits", "devices": (0,)}, "devices"),
        ({"workload": "digits", "devices": 4}, "devices 4: a sequence"),
        ({"workload": "digits", "devices": "12"}, "devices '12'"),
        ({"workload": "digits", "devices": ("2",)}, "devices"),
        ({"workload": "digits", "devices": (float("nan"),)}, "devices"),
        ({"workload": "digits", "max_waste": 1.0}, "max_waste"),
        ({"workload": "digits", "max_waste": "a"}, "max_waste 'a'"),
        ({"workload": "digits", "seconds": "x"}, "seconds 'x'"),
        ({"workload": "digits", "seconds": float("nan")}, "seconds nan"),
        ({"workload": "digits", "margin": "x"}, "margin 'x'"),
        ({"workload": "digits", "seed": 2**63}, "seed 9223372036854775808"),
        ({"workload": "digits", "overrides": ["batch_size=5000"]}, "5000"),
    ],
)
def test_bad_input(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        advise(**arguments)


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_optimizers_without_a_factor_are_refused_at_once(optimizer: str) -> None:
    with pytest.raises(InvalidInputError, match=f"optimizer '{optimizer}'.*not known"):
        advise("digits", overrides=[f"optimizer={optimizer}"])
