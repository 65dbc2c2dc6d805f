"""Stability limits against the spectral radius of the exact recursion."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.recursion import sgd_recursion
from noisescale.theory.scaling.limits import (
    largest_batch_of,
    largest_batch_size,
    temperature_for_data,
)
from noisescale.theory.scaling.stability import (
    adam_largest_stable_rate,
    largest_stable_rate,
    noise_factor,
    rate_limit,
)
from noisescale.theory.temperature import rate_at_temperature

NEAR = 1e-6
MOMENTA = st.floats(0, 0.99)
CURVATURES = st.floats(1e-3, 1e3)


def assert_edge(limit: float, **setting) -> None:
    """A little below the limit the mean converges, a little above it diverges."""
    assert sgd_recursion(lr=limit * (1 - NEAR), **setting).radius < 1
    assert sgd_recursion(lr=limit * (1 + NEAR), **setting).radius > 1


@settings(deadline=None)
@given(h=CURVATURES, m=MOMENTA, d=st.floats(0, 0.99))
def test_heavy_ball_with_dampening(h, m, d):
    limit = largest_stable_rate(curvature=h, momentum=m, dampening=d)
    assert_edge(limit, curvature=h, momentum=m, dampening=d)


@settings(deadline=None)
@given(h=CURVATURES, m=MOMENTA)
def test_nesterov(h, m):
    limit = largest_stable_rate(curvature=h, momentum=m, nesterov=True)
    assert_edge(limit, curvature=h, momentum=m, nesterov=True)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize(("share", "grows"), [(0.95, False), (1.05, True)])
def test_adam_with_a_frozen_preconditioner(beta1, share, grows):
    h, size = 3.0, 0.2
    rate = share * adam_largest_stable_rate(curvature=h / size, beta1=beta1)
    w, average = 1.0, 0.0
    for _ in range(4000):
        average = beta1 * average + (1 - beta1) * h * w
        w -= rate * average / size
        if abs(w) > 1e6:
            break
    # 5 % below the limit the spectral radius is at most 0.99, 5 % above it at least 1.1.
    assert (abs(w) > 1) == grows


def test_published_figures():
    # Cohen et al. 2022: 38/lr for Adam at beta1 = 0.9.
    assert adam_largest_stable_rate(curvature=1.0, beta1=0.9) == pytest.approx(38)
    # Cohen et al. 2021: (2 + 2 m)/lr for heavy ball, (2 + 2 m)/((1 + 2 m) lr) for Nesterov.
    assert largest_stable_rate(curvature=1.0, momentum=0.9) == pytest.approx(3.8)
    assert largest_stable_rate(curvature=1.0, momentum=0.9, nesterov=True) == pytest.approx(
        3.8 / 2.8
    )


@pytest.mark.parametrize(
    ("keys", "limit"),
    [
        ({}, 2.0),
        ({"dampening": 0.5}, 2.0),
        ({"momentum": 0.5}, 3.0),
        ({"momentum": 0.5, "dampening": 0.5}, 6.0),
        ({"momentum": 0.5, "nesterov": True}, 1.5),
        ({"optimizer": "adam"}, 38.0),
        ({"optimizer": "adamw", "betas": (0.5, 0.9)}, 6.0),
        ({"optimizer": "rmsprop", "momentum": 0.5}, 3.0),
        ({"optimizer": "lars"}, None),
        ({"optimizer": "lamb"}, None),
        ({"optimizer": "lion"}, None),
    ],
)
def test_the_limit_of_a_recipe(keys, limit):
    found = rate_limit(Recipe(lr=0.1, batch_size=8, **keys), 1.0)
    assert found == (None if limit is None else pytest.approx(limit))


@settings(deadline=None)
@given(m=MOMENTA, nesterov=st.booleans(), h=CURVATURES, tau=st.floats(1e-4, 1))
def test_the_largest_batch_has_the_largest_stable_rate(m, nesterov, h, tau):
    largest = largest_batch_size(tau=tau, curvature=h, momentum=m, nesterov=nesterov)
    rate = rate_at_temperature(tau=tau, batch_size=largest, momentum=m)
    limit = largest_stable_rate(curvature=h, momentum=m, nesterov=nesterov)
    assert rate == pytest.approx(limit, rel=1e-12)
    # Lower temperatures tolerate larger batches, in proportion.
    cooler = largest_batch_size(tau=tau / 2, curvature=h, momentum=m, nesterov=nesterov)
    assert cooler == pytest.approx(2 * largest, rel=1e-12)


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.9}])
def test_the_largest_batch_of_a_recipe(keys):
    recipe = Recipe(lr=0.1, batch_size=8, **keys)
    found = largest_batch_of(recipe, 4.0)
    assert rate_limit(recipe, 4.0) == pytest.approx(0.1 * found / 8)
    with pytest.raises(InvalidInputError, match="sgd only"):
        largest_batch_of(Recipe(optimizer="adam", lr=0.1, batch_size=8), 4.0)


def test_the_temperature_goes_as_one_over_the_data():
    assert temperature_for_data(tau=0.3, old_size=100, new_size=400) == pytest.approx(0.075)
    with pytest.raises(InvalidInputError):
        temperature_for_data(tau=0.3, old_size=0, new_size=400)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e6), old=st.integers(1, 4096), new=st.integers(1, 4096))
def test_the_factor_of_the_noise_scale(scale, old, new):
    factor = noise_factor(noise_scale=scale, old=old, new=new)
    ends = sorted((1.0, new / old))
    assert ends[0] * (1 - 1e-12) <= factor <= ends[1] * (1 + 1e-12)
    back = noise_factor(noise_scale=scale, old=new, new=old)
    assert factor * back == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_curvatures_that_are_none_are_refused(bad):
    with pytest.raises(InvalidInputError, match="curvature"):
        largest_stable_rate(curvature=bad)
