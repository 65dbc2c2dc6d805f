from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.records import Advice, NoiseScale, Outcome, ParametersSeen, Recipe
from noisescale.report import wording


@given(st.floats(min_value=1e-12, max_value=1e15))
def test_number_keeps_three_significant_digits(value: float) -> None:
    written = float(wording.number(value).replace(",", ""))
    # Half a unit of the third digit, and a hair for the decimal rounding of binary numbers.
    assert abs(written - value) <= 0.5000001 * 10 ** (math.floor(math.log10(value)) - 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0004, "-0.000400"), (999.6, "1,000"), (math.inf, "not finite")],
)
def test_number_at_its_borders(value: float, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.99951, "1,000 ms"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3600.0, "1 h 0 min")],
)
def test_duration_at_its_borders(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_an_open_end_is_said_and_never_a_number() -> None:
    assert wording.interval(None, 7.0, "examples") == "at most 7.00 examples"
    assert wording.ratio_interval(2.0, None) == "at least 2.00"


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_has_words(outcome: Outcome) -> None:
    noise = NoiseScale(
        b_simple=None,
        low=None,
        high=None,
        outcome=outcome,
        grad_sq=None,
        trace_cov=None,
        steps=0,
        examples=0,
        source="examples",
        parameters_seen=ParametersSeen(seen=1, total=2, missing=("bias",)),
        skipped_steps=1,
    )
    assert wording.noise_scale(noise) == f"not determined: {wording.outcome(outcome)}"
    assert "1 of 2 parameters (without bias)" in wording.rests_on(noise)
    assert "1 step left out as not finite" in wording.rests_on(noise)
    other = dataclasses.replace(noise, preconditioner="adam")
    assert "adam norm" in wording.rests_on(other)
    assert "norm" not in wording.rests_on(noise)


def test_headline_names_every_factor_or_the_reason(advices: dict[str, Advice]) -> None:
    assert wording.headline(advices["many_rows"]) == (
        "Use a global batch of 128 examples = micro-batch 16 × accumulation 1 × 8 devices"
    )
    assert wording.headline(advices["lower_bound"]).startswith(
        "No recommendation. Nothing is recommended: the critical batch has no lower end"
    )
    bare = dataclasses.replace(advices["lower_bound"], reasons=())
    assert "cannot be told from 0" in wording.headline(bare)


def test_a_rate_that_was_moved_says_what_the_given_one_would_have_read(
    advices: dict[str, Advice],
) -> None:
    check = advices["rate_too_low"].rate_check
    assert wording.rate_verdict(check) == "lr 0.02 is too low (best tried: 0.5)"
    assert "at lr 0.02 it would have read 11.7 examples" in wording.rate_consequence(
        check, "examples"
    )


def test_a_recipe_line_names_what_decides_the_step() -> None:
    recipe = Recipe(optimizer="lars", lr=2.0, batch_size=512, momentum=0.9, trust_coefficient=0.01)
    assert wording.recipe_line(recipe) == (
        "lars with momentum 0.9, lr 2, trust coefficient 0.01, global batch 512 examples"
    )
