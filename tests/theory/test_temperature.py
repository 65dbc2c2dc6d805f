from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory import temperature as per
from noisescale.theory.per_example import PerExample

rates = st.floats(1e-6, 1e3)
sizes = st.integers(1, 2**20)
momenta = st.floats(0, 0.9999)
decays = st.floats(1e-3, 0.9999)


@given(lr=rates, batch_size=sizes, momentum=momenta)
def test_temperature_and_rate_are_inverse(lr, batch_size, momentum):
    tau = per.temperature(lr=lr, batch_size=batch_size, momentum=momentum)
    back = per.rate_at_temperature(tau=tau, batch_size=batch_size, momentum=momentum)
    assert back == pytest.approx(lr, rel=1e-12)


@given(decay=decays, batch_size=sizes)
def test_decays_and_half_lives_are_inverse(decay, batch_size):
    mu = per.decay_per_example(decay=decay, batch_size=batch_size)
    assert per.decay_per_step(mu=mu, batch_size=batch_size) == pytest.approx(decay, rel=1e-9)
    life = per.half_life(decay=decay, batch_size=batch_size)
    back = per.decay_of_half_life(examples=life, batch_size=batch_size)
    assert back == pytest.approx(decay, rel=1e-12)
    # the two say the same: half is left after the half-life
    assert (1 - mu) ** life == pytest.approx(0.5, rel=1e-6)


@given(lr=rates, wd=st.floats(1e-8, 1.0), eps=st.floats(1e-12, 1e-2), batch_size=sizes)
def test_adams_quantities_are_inverse(lr, wd, eps, batch_size):
    tau = per.adam_temperature(lr=lr, batch_size=batch_size)
    assert per.adam_rate(tau=tau, batch_size=batch_size) == pytest.approx(lr, rel=1e-12)
    each = per.adam_eps_per_example(eps=eps, batch_size=batch_size)
    assert per.adam_eps(per_example=each, batch_size=batch_size) == pytest.approx(eps, rel=1e-12)
    share = per.shrinkage_per_example(lr=lr, weight_decay=wd, batch_size=batch_size)
    back = per.weight_decay_of_shrinkage(shrinkage=share, lr=lr, batch_size=batch_size)
    assert back == pytest.approx(wd, rel=1e-12)


def test_the_temperature_is_the_displacement_of_one_gradient():
    lr, momentum, batch_size = 0.3, 0.8, 7
    moved, velocity = 0.0, 0.0
    for step in range(200):
        velocity = momentum * velocity + (1.0 / batch_size if step == 0 else 0.0)
        moved += lr * velocity
    assert moved == pytest.approx(
        per.temperature(lr=lr, batch_size=batch_size, momentum=momentum), rel=1e-12
    )


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.5, False), (0.8, 0.0, True), (0.8, 0.8, False), (0.8, 0.3, False)],
)
def test_nesterov_and_dampening_move_as_the_temperature_says(momentum, dampening, nesterov):
    lr, batch_size, moved, velocity = 0.3, 7, 0.0, 0.0
    for step in range(300):
        gradient = 1.0 / batch_size if step == 1 else 0.0  # torch does not dampen the very first
        if momentum:
            velocity = momentum * velocity + (1 - dampening) * gradient
            gradient = gradient + momentum * velocity if nesterov else velocity
        moved += lr * gradient
    tau = per.temperature(lr=lr, batch_size=batch_size, momentum=momentum, dampening=dampening)
    assert moved == pytest.approx(tau, rel=1e-12)
    back = per.rate_at_temperature(
        tau=tau, batch_size=batch_size, momentum=momentum, dampening=dampening
    )
    assert back == pytest.approx(lr, rel=1e-14)


@given(lr=rates, wd=st.floats(1e-8, 1.0), batch_size=sizes, m=momenta, d=st.floats(0, 0.99))
def test_shares_of_the_weights_are_inverse(lr, wd, batch_size, m, d):
    keys = {"lr": lr, "batch_size": batch_size, "momentum": m, "dampening": d}
    share = per.shrinkage_per_example(weight_decay=wd, **keys)
    assert per.weight_decay_of_shrinkage(shrinkage=share, **keys) == pytest.approx(wd, rel=1e-12)


def test_small_decay_limit_of_the_rate():
    tau, mu, batch_size = 0.2, 1e-6, 4
    m = per.decay_per_step(mu=mu, batch_size=batch_size)
    lr = per.rate_at_temperature(tau=tau, batch_size=batch_size, momentum=m)
    assert lr == pytest.approx(tau * mu * batch_size**2, rel=1e-5)


RECIPES = [
    Recipe(lr=0.1, batch_size=32, total_steps=1000),
    Recipe(lr=0.1, batch_size=32, momentum=0.9, weight_decay=1e-4, warmup_examples=640),
    Recipe(
        optimizer="adamw",
        lr=1e-3,
        batch_size=16,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.1,
        ema_decay=0.999,
        schedule={"kind": "cosine"},
        total_examples=10_000,
    ),
]
CLOSE = ("lr", "momentum", "betas", "eps", "weight_decay", "ema_decay")


def assert_same(one: Recipe, other: Recipe, rel: float = 1e-9) -> None:
    for name in CLOSE:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a == pytest.approx(b, rel=rel), name
    assert one.batch_size == other.batch_size
    assert one.total_examples == other.total_examples
    assert one.warmup_examples == other.warmup_examples


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.optimizer_kind)
@given(b=st.integers(1, 256), c=st.integers(1, 256))
def test_a_to_b_to_c_is_a_to_c(recipe, b, c):
    direct = PerExample.of(recipe).at(c)
    assert_same(PerExample.of(PerExample.of(recipe).at(b)).at(c), direct, rel=1e-6)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.optimizer_kind)
def test_a_to_a_changes_nothing(recipe):
    once = PerExample.of(recipe).at(recipe.batch_size)
    twice = PerExample.of(once).at(recipe.batch_size)
    assert_same(once, twice)
    for name in CLOSE:
        if getattr(recipe, name) is not None:
            assert getattr(once, name) == pytest.approx(getattr(recipe, name), rel=1e-12)
    if recipe.total_steps:
        assert once.total_examples == recipe.total_steps * recipe.batch_size


def test_milestones_are_kept_in_examples():
    recipe = Recipe(lr=1.0, batch_size=8, schedule={"kind": "step", "milestones": [10, 20]})
    found = PerExample.of(recipe).at(16)
    assert found.schedule == {"kind": "step", "milestones": [5, 10]}
    assert found.lr == 2.0


@pytest.mark.parametrize(
    ("function", "given_"),
    [
        (per.temperature, {"lr": 0.0, "batch_size": 1}),
        (per.temperature, {"lr": 0.1, "batch_size": 0}),
        (per.temperature, {"lr": 0.1, "batch_size": 1, "momentum": 1.0}),
        (per.temperature, {"lr": 0.1, "batch_size": 1, "momentum": 0.9, "dampening": 1.0}),
        (per.displacement, {"dampening": -0.1}),
        (per.rate_at_temperature, {"tau": math.inf, "batch_size": 1}),
        (per.decay_per_step, {"mu": 0.0, "batch_size": 1}),
        (per.half_life, {"decay": 0.0, "batch_size": 1}),
        (per.decay_of_half_life, {"examples": -1.0, "batch_size": 1}),
    ],
)
def test_values_out_of_range_are_refused(function, given_):
    with pytest.raises(InvalidInputError):
        function(**given_)
