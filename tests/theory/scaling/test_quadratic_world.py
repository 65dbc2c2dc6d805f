"""The rules on the noisy quadratic: what they preserve to first order, and by how much they miss.

At one temperature tau and batch size B, with A = tau B h, a heavy ball forgets per example at
the rate tau h (1 + A (1 + m)/(2 (1 - m)) + ...) and spreads by tau c/(2 h) (1 + A (1 - m)/(2 (1 +
m)) + ...): first orders agree at all B, second orders differ as written.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from noisescale.records import Recipe
from noisescale.theory.quadratic import NoisyQuadratic
from noisescale.theory.recursion import Recursion, sgd_recursion
from noisescale.theory.scaling import RULES, Facts

H, C = 1.3, 0.7
KINDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]
SIZES = (8, 16, 64)


def recursion_of(recipe: Recipe) -> Recursion:
    return sgd_recursion(
        curvature=H,
        lr=recipe.lr,
        momentum=recipe.momentum or 0.0,
        dampening=recipe.dampening or 0.0,
        nesterov=bool(recipe.nesterov),
    )


def drift(recipe: Recipe) -> float:
    """Logarithm by which the mean falls, per example."""
    return recursion_of(recipe).drift() / recipe.batch_size


def variance(recipe: Recipe) -> float:
    return recursion_of(recipe).stationary_variance(noise=C, batch_size=recipe.batch_size)


def at_temperature(tau: float, batch_size: int, keys: dict) -> Recipe:
    m, d = keys.get("momentum", 0.0), keys.get("dampening", 0.0)
    return Recipe(lr=tau * batch_size * (1 - m) / (1 - d), batch_size=batch_size, **keys)


@pytest.mark.parametrize("keys", KINDS, ids=str)
@pytest.mark.parametrize("rule", ["exact", "linear"])
def test_drift_and_spread_agree_to_first_order(rule, keys):
    for batch_size in SIZES:
        misses = []
        for tau in (4e-5, 2e-5, 1e-5):
            old = at_temperature(tau, 32, keys)
            new = RULES[rule].scale(old, batch_size).recipe
            misses.append((drift(new) / drift(old) - 1, variance(new) / variance(old) - 1))
        for miss in zip(*misses, strict=True):
            # First order in tau: a miss that halves with tau, up to a share of tau h B/(1 - m).
            A = 4e-5 * H * 64 / 0.1
            assert abs(miss[0]) <= A
            for larger, smaller in itertools.pairwise(miss):
                assert larger / smaller == pytest.approx(2, rel=2 * A)


@pytest.mark.parametrize("m", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", SIZES)
@pytest.mark.parametrize("rule", ["exact", "linear"])
def test_the_second_order_has_the_predicted_sign_and_size(rule, batch_size, m):
    tau = 1e-6
    old = Recipe(lr=tau * 32 * (1 - m), batch_size=32, momentum=m)
    new = RULES[rule].scale(old, batch_size).recipe
    assert new.momentum == (pytest.approx(m ** (batch_size / 32)) if rule == "exact" else m)

    def second(recipe: Recipe) -> tuple[float, float]:
        m, A = recipe.momentum or 0.0, tau * recipe.batch_size * H
        return A * (1 + m) / (1 - m) / 2, A * (1 - m) / (1 + m) / 2

    predicted = np.subtract(second(new), second(old))
    found = np.array([drift(new) - drift(old), variance(new) - variance(old)])
    found /= [tau * H, tau * C / (2 * H)]
    # What is left is of third order, A^2 with factors of at most ((1 + m)/(1 - m))^2.
    third = (tau * 64 * H * (1 + m) / (1 - m)) ** 2 * 2
    rounding = 1e-9  # of the two drifts, which agree to 6 digits, divided by tau h B
    assert found == pytest.approx(predicted, abs=third + rounding)
    if batch_size != 32 and (rule == "linear" or not m):
        assert np.all(np.sign(found) == np.sign(batch_size - 32))


@pytest.mark.parametrize("m", [0.0, 0.9])
def test_momentum_at_a_finite_rate_has_its_closed_form(m):
    world = NoisyQuadratic(np.array([H]), np.array([C]))
    for batch_size in SIZES:
        old = Recipe(lr=0.3 * 2 * (1 + m) / H, batch_size=32, momentum=m)
        new = RULES["keep-momentum" if m else "linear"].scale(old, batch_size).recipe
        if new.lr * H >= 2 * (1 + m):
            continue
        closed = world.stationary_variance(lr=new.lr, batch_size=batch_size, momentum=m)
        assert variance(new) == pytest.approx(float(closed[0]), rel=1e-10)


def test_exact_upwards_leaves_stability_where_its_validity_says():
    old = Recipe(lr=0.1 * 2 * 1.9 / H, batch_size=32, momentum=0.9)
    exact = RULES["exact"].scale(old, 32 * 16, Facts(curvature=H))
    kept = RULES["keep-momentum"].scale(old, 32 * 8)
    assert recursion_of(exact.recipe).radius > 1
    assert any("stability limit" in warning for warning in exact.warnings)
    assert recursion_of(kept.recipe).radius < 1


def test_momentum_trade_keeps_the_spread_to_first_order():
    for old in (at_temperature(1e-5, 32, {"momentum": 0.5}), at_temperature(1e-5, 32, {})):
        new = RULES["momentum-trade"].scale(old, 256).recipe
        assert new.lr == old.lr
        assert variance(new) / variance(old) == pytest.approx(1, abs=1e-5 * H * 256)
        assert drift(new) / drift(old) == pytest.approx(1, abs=1e-5 * H * 256 * 2 / 0.0625)


def test_the_square_root_keeps_the_covariance_of_a_step():
    old = Recipe(lr=0.1, batch_size=32)
    new = RULES["square-root"].scale(old, 128).recipe
    assert new.lr**2 * C / new.batch_size == pytest.approx(old.lr**2 * C / old.batch_size)


def frozen_adam(recipe: Recipe, spread: float) -> Recursion:
    """Adam where noise dominates: its second moment is spread^2/B and does not move."""
    size = spread / math.sqrt(recipe.batch_size) + (recipe.eps or 0.0)
    beta1 = (recipe.betas or (0.9, 0.999))[0]
    return sgd_recursion(curvature=H / size, lr=recipe.lr, momentum=beta1, dampening=beta1)


@pytest.mark.parametrize("rule", ["adam-sde", "adam-half-life", "adam-rate-only"])
def test_adam_on_frozen_second_moments(rule):
    spread = math.sqrt(C)
    old = Recipe(optimizer="adam", lr=1e-6, batch_size=32, betas=(0.9, 0.999))

    def figures(recipe: Recipe) -> tuple[float, float]:
        recursion = frozen_adam(recipe, spread)
        size = spread / math.sqrt(recipe.batch_size) + (recipe.eps or 0.0)
        # Noise enters divided by the size, as the gradient does.
        noise = C / size**2
        return (
            recursion.drift() / recipe.batch_size,
            recursion.stationary_variance(noise=noise, batch_size=recipe.batch_size),
        )

    def second_order(recipe: Recipe) -> float:
        beta1 = (recipe.betas or (0.9, 0.999))[0]
        A = recipe.lr * H * math.sqrt(recipe.batch_size) / spread
        return A * (1 + beta1) / (1 - beta1) / 2

    for batch_size in (8, 128):
        new = RULES[rule].scale(old, batch_size).recipe
        miss = max(second_order(old), second_order(new))
        assert figures(new) == pytest.approx(figures(old), rel=1.1 * miss)
        assert miss < 1e-3


def test_adams_eps_follows_where_it_matters():
    spread, eps = 1.0, 1.0 / math.sqrt(32)  # eps as large as sqrt(v) at batch 32
    old = Recipe(optimizer="adam", lr=1e-6, batch_size=32, betas=(0.9, 0.999), eps=eps)
    moved = {
        rule: frozen_adam(RULES[rule].scale(old, 128).recipe, spread).drift() / 128
        for rule in ("adam-sde", "adam-half-life", "adam-rate-only")
    }
    before = frozen_adam(old, spread).drift() / 32
    assert moved["adam-sde"] == pytest.approx(before, rel=1e-3)
    assert moved["adam-half-life"] == pytest.approx(before, rel=1e-3)
    # Kept, eps is 2 of 3 parts of the denominator in place of 2 of 4.
    assert moved["adam-rate-only"] == pytest.approx(before * 2 / 3, rel=1e-3)


@pytest.mark.parametrize("rule", ["adam-sde", "adam-half-life"])
def test_adams_walk_in_pure_noise_does_not_depend_on_the_batch(rule):
    old = Recipe(optimizer="adam", lr=1e-3, batch_size=4, betas=(0.9, 0.998), eps=1e-8)
    new = RULES[rule].scale(old, 16).recipe
    walks = {recipe.batch_size: walk(recipe, examples=3200) for recipe in (old, new)}
    first, second = (ends.var() for ends in walks.values())
    # 20,000 walks: a variance's standard error is 1 %, four of the difference's are allowed; the
    # ends of a walk lose up to the memory, 40 examples in 3,200; 1 - beta2' = 0.008 in v.
    assert second / first == pytest.approx(1, abs=4 * math.sqrt(2) * 0.01 + 0.02 + 0.008)
    linear = walk(old.with_changes(batch_size=16, lr=4e-3), examples=3200).var()
    assert linear / first > 3


def walk(recipe: Recipe, *, examples: int) -> np.ndarray:
    """Adam's weights after some examples of pure noise, its second moments settled at first."""
    rng = np.random.default_rng(11)
    (beta1, beta2), eps = recipe.betas or (0.9, 0.999), recipe.eps or 0.0
    weights, mean = np.zeros(20_000), np.zeros(20_000)
    square = np.full(20_000, 1 / recipe.batch_size)
    for _ in range(examples // recipe.batch_size):
        gradient = rng.standard_normal(20_000) / math.sqrt(recipe.batch_size)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        weights -= recipe.lr * mean / (np.sqrt(square) + eps)
    return weights
