"""The exact recursion against torch's loop written out, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.theory.quadratic import NoisyQuadratic
from noisescale.theory.recursion import sgd_recursion

SETTINGS = [
    {},
    {"momentum": 0.8},
    {"momentum": 0.8, "dampening": 0.8},
    {"momentum": 0.6, "dampening": 0.3},
    {"momentum": 0.8, "nesterov": True},
    {"dampening": 0.5},
]


def torch_loop(gradients, *, h, lr, momentum=0.0, dampening=0.0, nesterov=False, start=0.0):
    """SGD as torch.optim.SGD writes it, with its velocity at 0 before the first step."""
    w, v = start, 0.0 * start
    for noise in gradients:
        gradient = h * w + noise
        if momentum:
            v = momentum * v + (1 - dampening) * gradient
            gradient = gradient + momentum * v if nesterov else v
        w = w - lr * gradient
    return w


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_mean_is_the_loop_without_noise(setting):
    recursion = sgd_recursion(curvature=0.7, lr=0.4, **setting)
    looped = torch_loop(np.zeros(30), h=0.7, lr=0.4, start=1.5, **setting)
    assert recursion.mean(1.5, 30) == pytest.approx(looped, rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_variance_is_that_of_simulated_runs(setting):
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((150, 20_000)) * np.sqrt(2.0 / 4)
    ends = torch_loop(noise, h=0.7, lr=0.4, start=np.zeros(20_000), **setting)
    expected = sgd_recursion(curvature=0.7, lr=0.4, **setting).stationary_variance(
        noise=2.0, batch_size=4
    )
    # A variance from 20,000 independent runs has a standard error of sqrt(2/20000) = 1 %.
    assert ends.var() == pytest.approx(expected, rel=0.05)


@settings(deadline=None)
@given(m=st.floats(0, 0.99), share=st.floats(0.01, 0.99), h=st.floats(0.01, 100))
def test_heavy_ball_has_its_closed_form_at_any_rate(m, share, h):
    lr = share * 2 * (1 + m) / h
    world = NoisyQuadratic(np.array([h]), np.array([1.0]))
    closed = float(world.stationary_variance(lr=lr, batch_size=8, momentum=m)[0])
    found = sgd_recursion(curvature=h, lr=lr, momentum=m).stationary_variance(
        noise=1.0, batch_size=8
    )
    # Near either end of stability the system is ill-conditioned by 1/(1 - radius).
    assert found == pytest.approx(closed, rel=1e-8)


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidInputError, match="lower the rate"):
        sgd_recursion(curvature=1.0, lr=2.0).stationary_variance(noise=1.0, batch_size=1)
    with pytest.raises(InvalidInputError, match="nesterov"):
        sgd_recursion(curvature=1.0, lr=0.1, momentum=0.9, dampening=0.1, nesterov=True)
    with pytest.raises(InvalidInputError, match="momentum 1"):
        sgd_recursion(curvature=1.0, lr=0.1, momentum=1.0)
