"""The noise-driven size: what is wanted, what is held, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.noise_driven import CostOptimal, NoiseDriven, NormTest
from noisescale.plan.schedule.sizes import Sizes
from noisescale.records import NoiseScale, Outcome, ParametersSeen
from noisescale.theory.adaptive_batch import norm_test_passes


def measured(outcome: Outcome = Outcome.DETERMINED, **changes: Any) -> NoiseScale:
    values: dict[str, Any] = {
        "b_simple": 900.0, "low": 700.0, "high": 1100.0, "outcome": outcome, "grad_sq": 1.0,
        "trace_cov": 900.0, "steps": 9, "examples": 900, "source": "examples",
        "parameters_seen": ParametersSeen(seen=1, total=1),
    } | changes  # fmt: skip
    return NoiseScale(**values)


def driven(**changes: Any) -> NoiseDriven:
    options: dict[str, Any] = {"rule": CostOptimal(r=400), "batch_size": 64}
    return NoiseDriven(**(options | changes))


def settled(controller: NoiseDriven, noise: float, times: int = 40) -> int:
    for _ in range(times):
        controller.update(noise)
    return controller.batch_size


@settings(deadline=None)
@given(
    noise=st.floats(0.01, 1e7),
    first=st.integers(1, 50),
    multiple=st.integers(1, 16),
    powers=st.booleans(),
    hysteresis=st.floats(1.0, 3),
    max_factor=st.floats(1.0, 4),
)
def test_it_settles_within_the_hysteresis_of_what_is_wanted(
    noise: float, first: int, multiple: int, powers: bool, hysteresis: float, max_factor: float
) -> None:
    sizes = Sizes(multiple_of=multiple, powers=powers, largest=multiple * 256)
    controller = driven(
        batch_size=sizes.nearest(first * multiple), sizes=sizes, monotone=False,
        hysteresis=hysteresis, max_factor=max_factor,
    )  # fmt: skip
    size = settled(controller, noise, times=260)
    wanted = math.sqrt(400 * noise)
    reachable = min(max(wanted, sizes.bottom), sizes.top)
    within = hysteresis * (1 + 1e-9)
    assert (
        1 / within <= size / wanted <= within
        or size == sizes.nearest(reachable)
        # Between two sizes either may be the nearest, by rounding.
        or math.isclose(sizes.above(size) * size, wanted**2, rel_tol=1e-6)
    )
    assert settled(controller, noise, times=3) == size  # and stays there


@settings(deadline=None)
@given(noise=st.lists(st.floats(0.01, 1e7), max_size=30), monotone=st.booleans())
def test_every_change_is_allowed_and_bounded(noise: list[float], monotone: bool) -> None:
    sizes = Sizes(multiple_of=12, smallest=24, largest=5000)
    controller = driven(batch_size=120, sizes=sizes, monotone=monotone, max_factor=1.5)
    before = 120
    for value in noise:
        decision = controller.update(value)
        size = decision.batch_size
        assert size == controller.batch_size
        assert decision.changed is (size != before)
        assert size % 12 == 0
        assert 24 <= size <= 5000
        assert before / 1.5 - 12 <= size <= before * 1.5 + 12
        assert size >= before or not monotone
        before = size


def test_scatter_about_a_boundary_does_not_flip_the_size() -> None:
    controller = driven(batch_size=64, sizes=Sizes(powers=True), monotone=False)
    generator = np.random.default_rng(0)
    centre = (64 * 2**0.5) ** 2 / 400  # between 64 and 128
    sizes = [
        controller.update(centre * float(generator.lognormal(0, 0.15))).batch_size
        for _ in range(200)
    ]
    assert sum(a != b for a, b in itertools.pairwise(sizes)) <= 1


def test_one_size_at_least_may_be_taken() -> None:
    controller = driven(batch_size=64, sizes=Sizes(multiple_of=64), max_factor=1.2)
    assert controller.update(1e6).batch_size == 128


@pytest.mark.parametrize(
    "noise",
    [
        None,
        math.nan,
        math.inf,
        -5.0,
        0,
        measured(Outcome.LOWER_BOUND, b_simple=None, high=None),
        measured(Outcome.TOO_FEW_STEPS, b_simple=None, low=None, high=None),
        measured(Outcome.NOT_FINITE, b_simple=None, grad_sq=None, trace_cov=None),
        measured(Outcome.UNSUPPORTED, b_simple=None),
    ],
)
@pytest.mark.parametrize("rule", [CostOptimal(r=1e9), NormTest(theta=0.1)])
def test_what_is_not_determined_is_not_guessed(noise: Any, rule: Any) -> None:
    decision = driven(rule=rule).update(noise)
    assert (decision.batch_size, decision.changed, decision.wanted) == (64, False, None)
    assert decision.why.startswith("held: ")
    assert "\n" not in decision.why


def test_a_record_is_its_number() -> None:
    one, other = driven(), driven()
    assert one.update(measured()) == other.update(900.0)
    assert one.update(np.float64(900.0)) == other.update(900)


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("powers", [False, True])
def test_the_norm_test_grows_until_it_passes_and_never_shrinks(theta: float, powers: bool) -> None:
    controller = driven(
        rule=NormTest(theta=theta), batch_size=4, monotone=False, sizes=Sizes(powers=powers)
    )
    held = settled(controller, 100.0, times=3000)
    rest = 100 * (1 - theta**2) / theta**2
    assert held >= rest * (1 - 1e-6)
    assert held <= max(4, rest * (2 if powers else 1) + 1)
    mean = 1 + 100.0 / held
    assert norm_test_passes(
        trace_cov=100.0, mean_gradient_sq=mean * (1 + 1e-9), batch_size=held, theta=theta
    )
    assert settled(controller, 1.0) == held


def test_a_resumed_controller_goes_on() -> None:
    one = driven(sizes=Sizes(powers=True))
    one.update(1e5)
    other = driven(sizes=Sizes(powers=True))
    other.load_state_dict(one.state_dict())
    assert [one.update(x) for x in (1e5, 3e3)] == [other.update(x) for x in (1e5, 3e3)]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"batch_size": 64, "unit": "tokens"}, "a state in tokens"),
        ({}, "a state in None"),
        ({"unit": "examples"}, "batch_size None"),
        ({"unit": "examples", "batch_size": 65}, "give 64"),
        ({"unit": "examples", "batch_size": 64.0}, "batch_size 64.0"),
    ],
)
def test_foreign_states_are_refused(state: dict[str, Any], words: str) -> None:
    controller = driven(sizes=Sizes(powers=True))
    with pytest.raises(InvalidInputError, match=words):
        controller.load_state_dict(state)
    assert controller.batch_size == 64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CostOptimal(r=0), "r 0"),
        (lambda: CostOptimal(r=math.nan), "r nan"),
        (lambda: NormTest(theta=1.0), "from 1 on every batch passes"),
        (lambda: NormTest(theta=7), "from 1 on every batch passes"),
        (lambda: driven(batch_size=0), "batch_size 0"),
        (lambda: driven(batch_size=65, sizes=Sizes(multiple_of=8)), "give 64"),
        (lambda: driven(batch_size=True), "batch_size True"),
        (lambda: driven(hysteresis=0.5), "hysteresis 0.5"),
        (lambda: driven(max_factor=math.nan), "max_factor nan"),
        (lambda: driven(unit="token"), "did you mean tokens"),
        (lambda: driven().update("900"), "noise '900'"),
        (lambda: driven().update(True), "noise True"),
        (lambda: driven().update(measured(unit="tokens")), "a noise scale in tokens"),
    ],
)
def test_bad_input_is_refused_in_one_line(make: Any, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
