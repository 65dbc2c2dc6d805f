"""The critical batch: nested bands, closed forms, outcomes."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.critical import FACTORS, OptimizerFactor, critical_batch, withheld
from noisescale.records import NoiseScale, Outcome, ParametersSeen

SEEN = ParametersSeen(seen=10, total=10)


def noise(
    outcome: Outcome, b_simple: float | None, low: float | None, high: float | None
) -> NoiseScale:
    return NoiseScale(
        b_simple=b_simple,
        low=low,
        high=high,
        outcome=outcome,
        grad_sq=1.0,
        trace_cov=b_simple,
        steps=100,
        examples=3200,
        source="examples",
        parameters_seen=SEEN,
    )


def test_a_hand_worked_case() -> None:
    factor = OptimizerFactor(point=2.0, low=1.0, high=4.0, source="test")
    found = critical_batch(
        noise=noise(Outcome.DETERMINED, 100.0, 50.0, 200.0),
        optimizer="sgd",
        phase="whole run",
        factor=factor,
    )
    assert found.point == 200.0
    assert (found.sampling_low, found.sampling_high) == (100.0, 400.0)
    # Two independent factors of 2 make a factor of 2^sqrt(2).
    assert found.low == pytest.approx(200 / 2 ** math.sqrt(2))
    assert found.high == pytest.approx(200 * 2 ** math.sqrt(2))
    assert found.basis == "noise_scale"


@given(
    point=st.floats(0.1, 1e6),
    down=st.floats(1.0, 100.0),
    up=st.floats(1.0, 100.0),
    optimizer=st.sampled_from(sorted(FACTORS)),
)
def test_bands_are_nested(point: float, down: float, up: float, optimizer: str) -> None:
    found = critical_batch(
        noise=noise(Outcome.DETERMINED, point, point / down, point * up),
        optimizer=optimizer,
        phase="",
    )
    assert found.low <= found.sampling_low * (1 + 1e-12)
    assert found.sampling_low <= found.point * (1 + 1e-12)
    assert found.point <= found.sampling_high * (1 + 1e-12)
    assert found.sampling_high <= found.high * (1 + 1e-12)


def test_an_exact_census_still_carries_the_model_error() -> None:
    found = critical_batch(
        noise=noise(Outcome.DETERMINED, 100.0, 100.0, 100.0), optimizer="sgd", phase=""
    )
    factor = FACTORS["sgd"]
    assert found.low == pytest.approx(100 * factor.low)
    assert found.high == pytest.approx(100 * factor.high)


def test_a_lower_bound_has_a_low_end_only() -> None:
    found = critical_batch(
        noise=noise(Outcome.LOWER_BOUND, None, 40.0, None), optimizer="momentum", phase=""
    )
    assert found.point is None
    assert found.high is None
    assert found.low == pytest.approx(40 * FACTORS["momentum"].low)
    assert found.outcome is Outcome.LOWER_BOUND


def test_nothing_known_gives_nothing() -> None:
    found = critical_batch(
        noise=noise(Outcome.TOO_FEW_STEPS, None, None, None), optimizer="adam", phase=""
    )
    assert (found.point, found.low, found.high) == (None, None, None)


def test_the_wider_band_is_at_most_a_factor_of_five() -> None:
    for factor in FACTORS.values():
        assert factor.low < factor.point < factor.high
        assert factor.high / factor.low <= 5


def test_unknown_optimizer_names_the_known() -> None:
    with pytest.raises(InvalidInputError, match="sgd"):
        critical_batch(noise=noise(Outcome.DETERMINED, 1.0, 1.0, 1.0), optimizer="sgdd", phase="")


def test_what_is_withheld_keeps_its_outcome_unless_it_claims_numbers() -> None:
    known = critical_batch(
        noise=noise(Outcome.DETERMINED, 9.0, 7.0, 12.0), optimizer="sgd", phase="all"
    )
    hidden = withheld(known, why="every rate diverged")
    assert (hidden.point, hidden.low, hidden.high) == (None, None, None)
    assert (hidden.sampling_low, hidden.sampling_high) == (None, None)
    assert (hidden.outcome, hidden.detail) == (Outcome.UNSUPPORTED, "every rate diverged")
    few = dataclasses.replace(known, outcome=Outcome.TOO_FEW_STEPS)
    assert withheld(few, why="").outcome is Outcome.TOO_FEW_STEPS
