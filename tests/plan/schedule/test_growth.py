"""What every schedule must keep, whatever its kind: temperature, limits, length."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule import rates
from noisescale.plan.schedule.growth import grow
from noisescale.plan.schedule.sizes import Sizes
from noisescale.plan.schedule.warm_up import begin_small, ramp
from noisescale.records import BatchSchedule, RateSchedule

TOTAL = 20_000
RATES: dict[str, RateSchedule] = {
    "constant": rates.constant(0.1),
    "constant, warm-up": rates.constant(0.1, warmup=640, warmup_from=0.05),
    "step": rates.step(0.1, milestones=[8000, 12_000, 16_001], gamma=0.2),
    "step by tenths": rates.step(0.1, milestones=[8000, 12_000], gamma=0.1, warmup=1000),
    "step in the warm-up": rates.step(0.1, milestones=[500, 9000], warmup=1000),
    "cosine": rates.cosine(0.1, total=TOTAL, warmup=999),
    "cosine to a floor": rates.cosine(0.1, total=TOTAL, floor=0.1),
    "linear": rates.linear(0.1, total=TOTAL),
    "linear, short": rates.linear(0.1, total=TOTAL // 2, floor=0.02, warmup=100),
    "warm-up, stable, decay": rates.warmup_stable_decay(
        0.1, total=TOTAL, decay=4000, warmup=2000, warmup_from=0.1
    ),
    "wsd, cosine": rates.warmup_stable_decay(0.1, total=TOTAL, decay=9000, shape="cosine"),
    "list": rates.listed([(0, 0.05), (3000, 0.1), (9000, 0.03), (15_000, 0.06)]),
    "list with zeros": rates.listed([(0, 0.0), (3000, 0.1), (19_000, 0.0)]),
    "rising": rates.listed([(0, 0.05), (3000, 0.1)]),
}
LIMITS = {
    "free": Sizes(largest=2000),
    "multiples": Sizes(multiple_of=16, largest=1000),
    "powers": Sizes(multiple_of=32, powers=True, largest=1000),
    "no growth": Sizes(multiple_of=8, largest=39),
}


def steps_of(schedule: BatchSchedule) -> list[tuple[int, int, float]]:
    return [(p, b, lr) for p, b, lr in schedule.steps() if lr is not None]


def assert_contract(
    schedule: BatchSchedule, rate: RateSchedule, sizes: Sizes, *, reference: int, power: float
) -> None:
    """Positions ascend, sizes are allowed, the temperature is the original's, the length too."""
    steps = steps_of(schedule)
    position = 0
    for at, size, lr in steps:
        assert at == position
        assert size % sizes.multiple_of == 0
        assert size <= sizes.largest
        tau, original = lr / size**power, rate.at(at) / reference**power
        assert math.isclose(tau, original, rel_tol=1e-12, abs_tol=1e-300)
        position += size
    total = schedule.total
    assert total is not None
    assert total <= position < total + steps[-1][1]
    assert len(steps) == schedule.updates()


@pytest.mark.parametrize("coupling", ["linear", "square_root"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", RATES)
def test_every_growth_keeps_the_contract(name: str, limit: str, coupling: str) -> None:
    rate, sizes = RATES[name], LIMITS[limit]
    schedule = grow(rate, batch_size=32, coupling=coupling, total=TOTAL, sizes=sizes)
    power = 1.0 if coupling == "linear" else 0.5
    assert_contract(schedule, rate, sizes, reference=32, power=power)
    peaks = list(itertools.accumulate(map(rate.at, range(TOTAL)), max))
    for position, size, lr in steps_of(schedule):
        assert lr <= peaks[position] * (1 + 1e-8)  # never above what the original has reached
        assert size >= 32
    assert len(schedule.pieces) < 40


@pytest.mark.parametrize("coupling", ["linear", "square_root"])
@pytest.mark.parametrize("limit", ["free", "multiples", "powers"])
@pytest.mark.parametrize("name", RATES)
def test_sizes_are_those_of_a_loop_over_positions(name: str, limit: str, coupling: str) -> None:
    """The bisection against trying every position."""
    rate, sizes = RATES[name], LIMITS[limit]
    schedule = grow(rate, batch_size=32, coupling=coupling, total=TOTAL, sizes=sizes)
    exponent = 1 if coupling == "linear" else 2
    peak, falling_all_the_time = 0.0, {s.start for s in rate.segments if s.shape != "constant"}
    for position in range(TOTAL):
        lr = rate.at(position)
        peak = max(peak, lr)
        wanted = 32 * (peak / lr) ** exponent if lr else (math.inf if peak else 32)
        segment = [s for s in rate.segments if s.start <= position][-1]
        moving = segment.start in falling_all_the_time and position < (segment.stop or 0)
        if moving and not sizes.powers and wanted < sizes.top:
            wanted = 32 * 2.0 ** math.floor(math.log2(wanted / 32) + 1e-9)
        assert schedule.batch_size_at(position) == sizes.at_most(wanted), position


def test_smith_and_others_wide_residual_network() -> None:
    """Drops by 5 at epochs 60, 120, 160 of 200 from batch 128: about 29,000 updates for 78,000."""
    N = 50_000
    rate = rates.step(0.1, milestones=[60 * N, 120 * N, 160 * N], gamma=0.2)
    sizes = Sizes(largest=N // 10)
    schedule = grow(rate, batch_size=128, coupling="linear", total=200 * N, sizes=sizes)
    assert [piece.batch_size for piece in schedule.pieces] == [128, 640, 3200, 5000]
    assert schedule.updates() == pytest.approx(29_000, rel=0.01)
    assert [schedule.lr_at(e * N) for e in (0, 60, 120, 160)] == pytest.approx(
        [0.1, 0.1, 0.1, 0.1 / 3.2]
    )


def test_without_a_limit_a_tenfold_decay_is_a_tenfold_batch() -> None:
    rate = rates.step(0.1, milestones=[1000, 2000], gamma=0.1)
    linear = grow(rate, batch_size=7, coupling="linear")
    assert [piece.batch_size for piece in linear.pieces] == [7, 70, 700]
    root = grow(rate, batch_size=7, coupling="square_root")
    assert [piece.batch_size for piece in root.pieces] == [7, 700, 70_000]


def test_a_finer_ladder_keeps_the_rate_higher() -> None:
    def lowest(factor: float) -> float:
        schedule = grow(
            RATES["cosine to a floor"], batch_size=32, coupling="linear", total=TOTAL,
            sizes=Sizes(largest=5000), growth_factor=factor,
        )  # fmt: skip
        return min(lr for _, _, lr in steps_of(schedule))

    assert lowest(2.0) == pytest.approx(0.05, rel=0.01)
    assert lowest(1.1) > 0.088


def test_what_a_temperature_tolerates_limits_the_growth() -> None:
    rate = rates.step(0.1, milestones=[4000, 8000], gamma=0.25)
    schedule = grow(
        rate, batch_size=32, coupling="linear", total=TOTAL, tolerates=lambda tau: 64 / tau**0.5
    )
    assert [piece.batch_size for piece in schedule.pieces] == [32, 128, 256]
    assert schedule.lr_at(8000) == pytest.approx(0.1 / 16 * 256 / 32)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 64),
    multiple=st.integers(1, 8),
    factor=st.floats(1.05, 3),
    warmup=st.integers(0, 900),
    decay=st.integers(1, 3000),
    shape=st.sampled_from(["linear", "cosine"]),
    floor=st.floats(0, 1),
    largest=st.integers(1, 4000),
    coupling=st.sampled_from(["linear", "square_root"]),
)
def test_any_growth_keeps_the_contract(
    batch: int, multiple: int, factor: float, warmup: int, decay: int, shape: str,
    floor: float, largest: int, coupling: str,
) -> None:  # fmt: skip
    B = batch * multiple
    total = warmup + decay + 500
    rate = rates.warmup_stable_decay(
        0.3, total=total, decay=decay, floor=floor, shape=shape, warmup=warmup, warmup_from=0.1
    )
    sizes = Sizes(multiple_of=multiple, largest=max(largest, B))
    schedule = grow(
        rate, batch_size=B, coupling=coupling, total=total, sizes=sizes, growth_factor=factor
    )
    power = 1.0 if coupling == "linear" else 0.5
    assert_contract(schedule, rate, sizes, reference=B, power=power)
    starts = [piece.batch_size for piece in schedule.pieces]
    assert all(a < b for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("coupling", ["linear", "square_root"])
@pytest.mark.parametrize("increment", [None, 8])
@pytest.mark.parametrize("name", RATES)
def test_a_batch_warm_up_keeps_the_contract(
    name: str, increment: int | None, coupling: str
) -> None:
    rate, sizes = RATES[name], Sizes(multiple_of=8, largest=500)
    schedule = grow(rate, batch_size=32, coupling=coupling, total=TOTAL, sizes=sizes)
    small = ramp(start=8, end=32, length=2700, increment=increment, multiple_of=8)
    if schedule.batch_size_at(2700) > 32:
        with pytest.raises(InvalidInputError, match="has grown to"):
            begin_small(schedule, small)
        return
    begun = begin_small(schedule, small)
    assert_contract(begun, rate, sizes, reference=32, power=1 if coupling == "linear" else 0.5)
    assert begun.updates() > schedule.updates()
    for position in range(2700, TOTAL, 37):
        assert begun.batch_size_at(position) == schedule.batch_size_at(position)


def test_ramps() -> None:
    def shown(**options: int) -> list[tuple[int, int]]:
        return [(piece.start, piece.batch_size) for piece in ramp(**options)]

    assert shown(start=100, end=350, length=900) == [(0, 100), (450, 200), (900, 350)]
    assert shown(start=32, end=64, length=100) == [(0, 32), (100, 64)]
    assert shown(start=16, end=64, length=300, increment=16) == [
        (0, 16), (100, 32), (200, 48), (300, 64),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 64, "end": 64, "length": 9}, "from 64"),
        ({"start": 0, "end": 64, "length": 9}, "from 0"),
        ({"start": 16, "end": 64, "length": 1}, "too short for 2 sizes"),
        ({"start": 16, "end": 64, "length": -1}, "length of the batch warm-up -1"),
        ({"start": 16, "end": 64, "length": 99, "increment": 10}, "must divide 64 - 16 = 48"),
        ({"start": 16, "end": 64, "length": 99, "increment": 0}, "increment 0"),
        ({"start": 16, "end": 96, "length": 99, "multiple_of": 32}, "batch size 16"),
    ],
)
def test_bad_ramps_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        ramp(**options)


def test_a_ramp_into_a_growth_is_refused() -> None:
    schedule = grow(RATES["step"], batch_size=32, coupling="linear", total=TOTAL)
    with pytest.raises(InvalidInputError, match="has grown to 160 by its end at 9000"):
        begin_small(schedule, ramp(start=8, end=32, length=9000))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coupling": "none"}, "coupling 'none'"),
        ({"coupling": "sqrt"}, "coupling 'sqrt'"),
        ({"growth_factor": 1.0}, "growth_factor 1.0"),
        ({"growth_factor": math.nan}, "growth_factor nan"),
        ({"growth_factor": math.inf}, "growth_factor inf"),
        ({"sizes": Sizes(multiple_of=48)}, "the nearest is 48"),
        ({"sizes": Sizes(largest=16)}, "the nearest is 16"),
        ({"sizes": Sizes(powers=True, multiple_of=24)}, "batch_size 32"),
        ({}, "outgrow the whole training; give max_batch_size"),
        ({"total": None}, "outgrow the whole training; give max_batch_size"),
    ],
)
def test_bad_growth_is_refused(options: dict[str, object], words: str) -> None:
    given = {"batch_size": 32, "coupling": "linear", "total": TOTAL} | options
    with pytest.raises(InvalidInputError, match=words):
        grow(RATES["cosine"], **given)  # type: ignore[arg-type]


def test_a_trillion_tokens_are_planned_at_once() -> None:
    total = 15 * 10**12
    rate = rates.cosine(3e-4, total=total, floor=0.1, warmup=8 * 10**9)
    schedule = grow(
        rate, batch_size=4 * 2**20, coupling="square_root", total=total,
        sizes=Sizes(multiple_of=2**16, largest=2**26), growth_factor=1.05,
    )  # fmt: skip
    assert schedule.updates() < total // (4 * 2**20)
    assert schedule.position_after(schedule.updates()) >= total
