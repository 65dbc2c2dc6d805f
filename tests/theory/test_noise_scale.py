"""Unbiased moments against exact enumeration and closed forms."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.theory.noise_scale import (
    biased_plug_in,
    many_size_moments,
    two_size_moments,
    unbiased_moments,
)

RNG = np.random.default_rng(7)
GRADIENTS = RNG.standard_normal((5, 3)) + np.array([1.0, 0.0, -0.5])
TRUE_MEAN = GRADIENTS.mean(0)
TRUE_SQ = float(TRUE_MEAN @ TRUE_MEAN)
TRUE_TRACE = float(((GRADIENTS - TRUE_MEAN) ** 2).sum(1).mean())


def moments_of(units: list[np.ndarray], population_size: int | None = None) -> tuple[float, float]:
    """From per-example gradients grouped into units."""
    means = [unit.mean(0) for unit in units]
    sizes = [len(unit) for unit in units]
    mean = np.concatenate(units).mean(0)
    g, s = unbiased_moments(
        units=len(units),
        examples=sum(sizes),
        weighted_sq=sum(size * float(m @ m) for size, m in zip(sizes, means, strict=True)),
        mean_sq=float(mean @ mean),
        population_size=population_size,
    )
    return float(g), float(s)


def split(batch: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(batch, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (2, 1), (2, 2)])
def test_infinite_population_by_enumeration(sizes: tuple[int, ...]) -> None:
    """Every sequence of draws with replacement, equally likely: exact expectations."""
    every = [
        moments_of(split(GRADIENTS[list(draw)], sizes))
        for draw in product(range(5), repeat=sum(sizes))
    ]
    g, s = np.mean(every, axis=0)
    assert g == pytest.approx(TRUE_SQ, rel=1e-12)
    assert s == pytest.approx(TRUE_TRACE, rel=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (2, 2), (1, 1, 1, 1, 1)])
def test_finite_population_by_enumeration(sizes: tuple[int, ...]) -> None:
    """Every ordered subset: |G|^2 of the population's own gradient, trace divided by N."""
    every = [
        moments_of(split(GRADIENTS[list(draw)], sizes), population_size=5)
        for draw in permutations(range(5), sum(sizes))
    ]
    g, s = np.mean(every, axis=0)
    assert g == pytest.approx(TRUE_SQ, rel=1e-12)
    assert s == pytest.approx(TRUE_TRACE, rel=1e-12)


def test_the_wrong_population_is_visible() -> None:
    """Treating draws without replacement as independent biases |G|^2: the test can fail."""
    every = [
        moments_of(split(GRADIENTS[list(draw)], (1, 1, 1))) for draw in combinations(range(5), 3)
    ]
    assert abs(np.mean(every, axis=0)[0] - TRUE_SQ) > 0.05


def test_unequal_units_by_enumeration() -> None:
    every = [
        moments_of(split(GRADIENTS[list(draw)], (3, 1))) for draw in product(range(5), repeat=4)
    ]
    assert np.mean(every, axis=0) == pytest.approx([TRUE_SQ, TRUE_TRACE], rel=1e-12)


@given(
    mean=st.lists(st.floats(-10, 10), min_size=1, max_size=4),
    small=st.integers(1, 8),
    factor=st.integers(2, 8),
)
def test_two_sizes_agree_with_units(mean: list[float], small: int, factor: int) -> None:
    """McCandlish's two sizes are k equal micro-batches against their mean."""
    micro = np.random.default_rng(len(mean)).standard_normal((factor, len(mean))) + mean
    big = micro.mean(0)
    small_sq, big_sq = float((micro**2).sum(1).mean()), float(big @ big)
    two = two_size_moments(
        small_size=small, small_sq=small_sq, big_size=small * factor, big_sq=big_sq
    )
    many = many_size_moments(sizes=[small, small * factor], squared_norms=[small_sq, big_sq])
    units = unbiased_moments(
        units=factor,
        examples=small * factor,
        weighted_sq=factor * small * small_sq,
        mean_sq=big_sq,
    )
    scale = max(1.0, small_sq) * small * factor
    for a, b, c in zip(two, many, units, strict=True):
        assert float(a) == pytest.approx(float(c), abs=1e-9 * scale)
        assert b == pytest.approx(float(c), abs=1e-9 * scale)


def test_bessel() -> None:
    """One example per unit gives the ordinary unbiased sample variance."""
    g, s = moments_of([row[None] for row in GRADIENTS])
    assert s == pytest.approx(GRADIENTS.var(0, ddof=1).sum())
    assert g == pytest.approx(TRUE_SQ - s / 5)


def test_published_simulation() -> None:
    """d=50, B_simple 25, sizes 8 and 32: ratio of means right, mean of ratios and plug-in not."""
    rng = np.random.default_rng(0)
    gradient = np.full(50, 0.2)  # |G|^2 = 2, tr = 50
    micro = gradient + rng.standard_normal((20000, 4, 50)) / np.sqrt(8)
    small, big = (micro**2).sum(-1).mean(1), (micro.mean(1) ** 2).sum(-1)
    g, s = two_size_moments(small_size=8, small_sq=small, big_size=32, big_sq=big)
    assert s.mean() / g.mean() == pytest.approx(25, rel=0.02)
    assert abs((s / g).mean() - 25) > 1
    assert (s / big).mean() < 20
    assert s.mean() / big.mean() == pytest.approx(
        biased_plug_in(b_simple=25, batch_size=32), rel=0.02
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"units": 1, "examples": 8}, "at least two gradients"),
        ({"units": 8, "examples": 8, "population_size": 7}, "without replacement"),
    ],
)
def test_border(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        unbiased_moments(weighted_sq=1.0, mean_sq=1.0, **arguments)
    with pytest.raises(InvalidInputError, match="in this order"):
        two_size_moments(small_size=8, small_sq=1, big_size=8, big_sq=1)
    with pytest.raises(InvalidInputError, match="second size"):
        many_size_moments(sizes=[8, 8], squared_norms=[1, 1])
