"""Which sizes may be taken, against a list of all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.sizes import Ladder, Sizes


def all_of(sizes: Sizes) -> list[int]:
    """Every size allowed, by trying."""
    return [
        size
        for size in range(sizes.smallest, sizes.largest + 1)
        if size % sizes.multiple_of == 0
        and (not sizes.powers or math.log2(size // sizes.multiple_of).is_integer())
    ]


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    multiple = draw(st.integers(1, 12))
    smallest = draw(st.integers(1, 60))
    largest = smallest + draw(st.integers(2 * multiple, 200)) + smallest
    return Sizes(
        multiple_of=multiple, powers=draw(st.booleans()), smallest=smallest, largest=largest
    )


@settings(deadline=None)
@given(sizes=any_sizes(), wanted=st.one_of(st.integers(1, 500), st.floats(0.1, 500)))
def test_against_a_list(sizes: Sizes, wanted: float) -> None:
    allowed = all_of(sizes)
    assert (sizes.bottom, sizes.top) == (allowed[0], allowed[-1])
    if isinstance(wanted, float) and abs(wanted - round(wanted)) < 1e-6:
        wanted = round(wanted)  # a float this near to a whole number means it
    below = [size for size in allowed if size <= wanted]
    above = [size for size in allowed if size >= wanted]
    assert sizes.at_most(wanted) == (below[-1] if below else allowed[0])
    assert sizes.at_least(wanted) == (above[0] if above else allowed[-1])
    near = sizes.nearest(wanted)
    best = min(abs(math.log(size / wanted)) for size in allowed)
    assert near in allowed
    assert abs(math.log(near / wanted)) == pytest.approx(best, abs=1e-9)


@settings(deadline=None)
@given(sizes=any_sizes(), wanted=st.integers(1, 500))
def test_neighbours(sizes: Sizes, wanted: int) -> None:
    allowed = all_of(sizes)
    size = sizes.nearest(wanted)
    place = allowed.index(size)
    assert sizes.above(size) == allowed[min(place + 1, len(allowed) - 1)]
    assert sizes.below(size) == allowed[max(place - 1, 0)]


def test_rounding_of_floats_is_forgiven() -> None:
    assert Sizes().at_most(128 / 0.1) == 1280
    assert Sizes().at_most(16 * (1 / 0.2) ** 3) == 2000
    assert Sizes(multiple_of=640).at_most(639.9999999999999) == 640


def test_the_limit_is_never_passed() -> None:
    assert Sizes(largest=100).at_most(math.inf) == 100
    assert Sizes(multiple_of=48, largest=100).at_most(1e300) == 96
    assert Sizes(multiple_of=48, largest=200, powers=True).at_most(1e300) == 192


@settings(deadline=None)
@given(
    base=st.integers(1, 20),
    multiple=st.integers(1, 8),
    factor=st.floats(1.05, 4),
    wanted=st.lists(st.floats(1, 1e7), min_size=2, max_size=20),
)
def test_a_ladder_rises_and_stays_below_what_is_wanted(
    base: int, multiple: int, factor: float, wanted: list[float]
) -> None:
    start = base * multiple
    sizes = Sizes(multiple_of=multiple, largest=10**6)
    ladder = Ladder(base=start, factor=factor, sizes=sizes)
    rungs = [ladder.at_most(value) for value in sorted(wanted)]
    assert rungs == sorted(rungs)
    for rung, value in zip(rungs, sorted(wanted), strict=True):
        assert rung % multiple == 0
        assert start <= rung <= max(start, value * (1 + 1e-8))
        # Not less than a factor below, but for rounding down to a multiple.
        assert rung >= min(value, sizes.top) / factor - multiple or rung == start


@pytest.mark.parametrize(
    "options",
    [
        {"multiple_of": 0}, {"smallest": 0}, {"smallest": 9, "largest": 8},
        {"multiple_of": 48, "largest": 40}, {"smallest": 97, "largest": 143, "multiple_of": 48},
        {"powers": True, "multiple_of": 3, "smallest": 13, "largest": 23},
    ],
)  # fmt: skip
def test_no_size_at_all_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError):
        Sizes(**options)
