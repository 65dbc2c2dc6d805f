from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.choose import (
    MAX_ROWS,
    Choice,
    choose,
    memory_limit,
    seconds_per_step,
    throughput_knee,
)
from noisescale.records import (
    AdviceRow,
    CriticalBatch,
    Outcome,
    SpeedCurve,
    SpeedFailure,
    SpeedPoint,
)


def curve(
    seconds: dict[int, float], *, failed: tuple[int, ...] = (), data: float = 0
) -> SpeedCurve:
    """A scan with the given seconds per step; memory 100 bytes per example."""
    points = tuple(
        SpeedPoint(
            micro_batch_size=size,
            seconds_per_step=second,
            seconds_low=second,
            seconds_high=second,
            data_seconds=data * second,
            compute_seconds=(1 - data) * second,
            examples_per_second=size / second,
            peak_bytes=100 * size,
            repeats=5,
        )
        for size, second in sorted(seconds.items())
    )
    return SpeedCurve(
        points=points,
        failures=tuple(SpeedFailure(micro_batch_size=f, reason="out of memory") for f in failed),
        limit_bytes=10_000,
        baseline_bytes=1,
        margin=0.1,
        device="cpu",
        stopped="does not fit",
    )


def critical(
    point: float | None = 100.0,
    low: float | None = 50.0,
    high: float | None = 200.0,
    outcome: Outcome = Outcome.DETERMINED,
    detail: str = "",
) -> CriticalBatch:
    return CriticalBatch(
        point=point,
        low=low,
        high=high,
        sampling_low=low,
        sampling_high=high,
        basis="noise_scale",
        phase="up to the goal",
        outcome=outcome,
        detail=detail,
        optimizer="sgd",
        factor=1.0,
        factor_low=0.5,
        factor_high=2.0,
        factor_source="test",
    )


def affine(*sizes: int, fixed: float = 1e-3, each: float = 1e-5) -> SpeedCurve:
    """Seconds per step = fixed + each x size."""
    return curve({size: fixed + each * size for size in sizes})


def row_of(choice: Choice, size: int) -> AdviceRow:
    return next(row for row in choice.table if row.global_batch_size == size)


class TestLimits:
    def test_memory_is_the_largest_that_ran_and_fits(self) -> None:
        limit = memory_limit(curve({8: 1.0, 32: 2.0}, failed=(64, 48)))
        assert (limit.micro_batch_size, limit.peak_bytes) == (32, 3200)
        assert (limit.limit_bytes, limit.largest_tested) == (10_000, 64)

    def test_memory_when_nothing_fits(self) -> None:
        limit = memory_limit(curve({}, failed=(1,)))
        assert (limit.micro_batch_size, limit.peak_bytes, limit.largest_tested) == (None, None, 1)

    def test_knee_is_the_smallest_with_90_percent(self) -> None:
        # Throughputs 50, 100, 91, 89: the first at 90 % of 100 is size 2.
        knee = throughput_knee(curve({1: 1 / 50, 2: 2 / 91, 4: 4 / 100, 8: 8 / 89}))
        assert knee is not None
        assert knee.micro_batch_size == 2
        assert knee.examples_per_second == pytest.approx(91)
        assert not knee.data_bound

    def test_knee_tells_when_the_loader_is_the_limit(self) -> None:
        knee = throughput_knee(curve({4: 1.0}, data=0.6))
        assert knee is not None
        assert knee.data_bound

    def test_no_knee_when_nothing_ran(self) -> None:
        assert throughput_knee(curve({}, failed=(1,))) is None

    def test_seconds_come_from_measurements_only(self) -> None:
        scan = curve({8: 0.5, 16: 0.75})
        assert seconds_per_step(scan, 16, 1) == 0.75
        assert seconds_per_step(scan, 8, 3) == 1.5
        with pytest.raises(InvalidInputError, match=r"12.*\[8, 16\]"):
            seconds_per_step(scan, 12, 1)


class TestTable:
    def test_a_row_by_hand(self) -> None:
        # Bcrit 100 (50 to 200) at B = 25: S/Smin = 1 + 100/25 = 5 (3 to 9), E/Emin = 1 + 25/100
        # = 1.25 (1.125 to 1.5). B = 25 takes 1 s, 50 takes 1.5 s: times 5 x 1 and 3 x 1.5 = 4.5.
        choice = choose(
            speed=curve({25: 1.0, 50: 1.5}), critical=critical(), dataset_size=60, include=(50,)
        )
        first, last = row_of(choice, 25), row_of(choice, 50)
        assert (first.steps_ratio, first.steps_ratio_low, first.steps_ratio_high) == (5, 3, 9)
        assert first.examples_ratio == 1.25
        assert (first.examples_ratio_low, first.examples_ratio_high) == (1.125, 1.5)
        assert first.relative_time == pytest.approx(5 / 4.5)
        assert first.relative_time_low == pytest.approx(3 / 4.5)
        assert first.relative_time_high == pytest.approx(9 / 4.5)
        assert last.relative_time == 1
        assert first.allowed
        assert not last.allowed  # 1 + 50/50 = 2
        assert choice.recommended == first

    def test_rows_are_round_numbers_up_to_the_data(self) -> None:
        choice = choose(
            speed=affine(*(2**n for n in range(8))), critical=critical(), dataset_size=1437
        )
        sizes = [row.global_batch_size for row in choice.table]
        assert sizes == sorted(set(sizes))
        assert len(sizes) <= MAX_ROWS
        assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 96, 48} <= set(sizes)
        assert all(row.micro_batch_size <= 128 for row in choice.table)
        assert row_of(choice, 1024).accumulation == 8

    def test_many_doublings_stay_readable(self) -> None:
        choice = choose(speed=affine(1, 64), critical=critical(), dataset_size=50_000_000)
        assert 12 <= len(choice.table) <= MAX_ROWS
        assert choice.recommended is not None

    def test_sizes_that_are_no_powers_of_two(self) -> None:
        choice = choose(speed=affine(10, 50, 250), critical=critical(), dataset_size=5000)
        assert all(row.global_batch_size % 10 == 0 for row in choice.table)
        assert choice.table[0].global_batch_size == 10

    def test_replicas_share_the_batch_at_the_same_time_per_pass(self) -> None:
        choice = choose(
            speed=affine(16, 32, 64), critical=critical(), devices=(1, 4), dataset_size=300
        )
        row = row_of(choice, 64)
        assert (row.micro_batch_size, row.accumulation, row.replicas) == (16, 1, 4)
        assert row.seconds_per_step == pytest.approx(1e-3 + 16e-5)
        assert choice.table[0].replicas == 1

    def test_equally_fast_splits_take_the_fewest_devices(self) -> None:
        choice = choose(
            speed=curve({8: 1.0, 16: 1.0}), critical=critical(), devices=(1, 2), dataset_size=16
        )
        assert row_of(choice, 16).replicas == 1

    def test_included_sizes_get_a_row_where_they_can_be_made(self) -> None:
        choice = choose(
            speed=affine(8), critical=critical(), dataset_size=500, include=(40, 41, 504)
        )
        sizes = {row.global_batch_size for row in choice.table}
        assert 40 in sizes
        assert not {41, 504} & sizes

    def test_json_both_ways(self) -> None:
        choice = choose(speed=affine(1, 8), critical=critical(), dataset_size=64)
        assert Choice.from_json(choice.to_json()) == choice


class TestRecommendation:
    def test_exactly_the_largest_waste_is_allowed(self) -> None:
        choice = choose(
            speed=affine(10, 20), critical=critical(low=50.0), max_waste=1.4, dataset_size=20
        )
        assert row_of(choice, 20).allowed

    def test_ties_take_the_smallest(self) -> None:
        # Times 1 + 100/16 = 7.25 and (1 + 100/24) x 1.38 = 7.13: 1.7 % apart.
        speed = curve({16: 1.0, 24: 1.38})
        tied = choose(speed=speed, critical=critical(), dataset_size=24)
        assert tied.recommended == row_of(tied, 16)
        assert tied.reasons[0].startswith("Global batch 16 examples is the smallest within 5 %")
        strict = choose(speed=speed, critical=critical(), dataset_size=24, tie=0.0)
        assert strict.recommended == row_of(strict, 24)
        assert "least time" in strict.reasons[0]

    def test_lower_bound_is_judged_at_its_low_end(self) -> None:
        bound = critical(point=None, low=64.0, high=None, outcome=Outcome.LOWER_BOUND)
        choice = choose(speed=affine(1, 8, 32, 64), critical=bound, dataset_size=512)
        row = choice.recommended
        assert row is not None
        assert row.global_batch_size == 32
        assert row.relative_time is None
        assert row.steps_ratio is None
        assert row.steps_ratio_high is None
        assert row.examples_ratio_low is None
        assert row.examples_ratio_high == 1.5
        assert min(r.relative_time_low or 0 for r in choice.table) == 1
        assert any("judged there" in reason for reason in choice.reasons)

    @pytest.mark.parametrize(
        ("low", "outcome"),
        [
            (None, Outcome.TOO_FEW_STEPS),
            (None, Outcome.NOT_FINITE),
            (None, Outcome.UNSUPPORTED),
            (0.0, Outcome.LOWER_BOUND),
        ],
    )
    def test_without_a_lower_end_nothing_is_recommended(
        self, low: float | None, outcome: Outcome
    ) -> None:
        unknown = critical(point=None, low=low, high=None, outcome=outcome, detail="3 steps")
        choice = choose(speed=affine(1, 8), critical=unknown, dataset_size=64)
        assert choice.recommended is None
        assert choice.table
        words = outcome.value.replace("_", " ")
        assert f"({words}: 3 steps)" in choice.reasons[0]
        assert all(row.relative_time_low is None and not row.allowed for row in choice.table)

    def test_no_row_within_the_waste_names_what_it_would_take(self) -> None:
        choice = choose(speed=affine(64), critical=critical(low=50.0), dataset_size=512)
        assert choice.recommended is None
        assert "64 examples, may take 2.28 times the fewest" in choice.reasons[0]

    @pytest.mark.parametrize(("sizes", "data"), [((), 64), ((128,), 64)])
    def test_no_size_that_fits(self, sizes: tuple[int, ...], data: int) -> None:
        choice = choose(speed=affine(*sizes), critical=critical(), dataset_size=data)
        assert choice.recommended is None
        assert choice.table == ()
        assert "no micro-batch size that ran" in choice.reasons[0]

    def test_reasons_name_limits_and_what_is_not_counted(self) -> None:
        choice = choose(
            speed=curve({4: 1.0, 8: 1.1}, failed=(16,), data=0.6),
            critical=critical(low=100.0),
            devices=(2,),
            dataset_size=4096,
        )
        text = " ".join(choice.reasons)
        assert choice.recommended is not None
        for words in (
            "fits is 8 examples (16 does not fit)",
            "From micro-batch 8 on throughput",
            "waiting for data",
            "upper estimate",
            "communication",
            "band 100 to 200",
        ):
            assert words in text

    def test_the_faster_row_that_wastes_too_much_is_named(self) -> None:
        choice = choose(
            speed=curve({2**n: 1.0 for n in range(10)}), critical=critical(), dataset_size=512
        )
        assert choice.recommended is not None
        assert choice.recommended.global_batch_size == 16
        assert any(
            reason.startswith("Global batch 512 would need 0.16 of that time")
            for reason in choice.reasons
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": ()}, "devices"),
        ({"devices": (1, 0)}, "devices"),
        ({"max_waste": 1.0}, "max_waste 1"),
        ({"max_waste": float("nan")}, "max_waste nan"),
        ({"dataset_size": 0}, "dataset_size 0"),
        ({"tie": -0.1}, "tie -0.1"),
        ({"unit": "tokens"}, "speed counted in examples"),
        (
            {"critical": dataclasses.replace(critical(), unit="tokens")},
            "critical batch counted in tokens",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "speed": affine(1, 8),
        "critical": critical(),
        "dataset_size": 64,
    }
    with pytest.raises(InvalidInputError, match=words):
        choose(**(arguments | change))


scans = st.dictionaries(st.integers(1, 300), st.floats(1e-4, 1.0), min_size=1, max_size=8).map(
    curve
)
bands = st.tuples(
    st.floats(1.0, 1e4), st.floats(1.0, 5.0), st.floats(1.0, 5.0), st.sampled_from("dlu")
).map(
    lambda t: {
        "d": critical(t[0], t[0] / t[1], t[0] * t[2]),
        "l": critical(None, t[0], None, Outcome.LOWER_BOUND),
        "u": critical(None, None, None, Outcome.TOO_FEW_STEPS),
    }[t[3]]
)
device_sets = st.lists(st.integers(1, 8), min_size=1, max_size=3)


@settings(deadline=None)
@given(
    speed=scans,
    band=bands,
    devices=device_sets,
    waste=st.floats(1.01, 4.0),
    more=st.floats(1.0, 3.0),
    data=st.integers(1, 20_000),
)
def test_properties(
    speed: SpeedCurve,
    band: CriticalBatch,
    devices: list[int],
    waste: float,
    more: float,
    data: int,
) -> None:
    choice = choose(speed=speed, critical=band, devices=devices, max_waste=waste, dataset_size=data)
    tested = {point.micro_batch_size: point.seconds_per_step for point in speed.points}
    for row in choice.table:
        micro, passes, count = row.micro_batch_size, row.accumulation, row.replicas
        assert row.global_batch_size == micro * passes * count <= data
        assert count in devices
        assert row.seconds_per_step == passes * tested[micro]
        # The slow obvious search finds no faster split of the same batch.
        assert row.seconds_per_step == min(
            row.global_batch_size // (m * c) * s
            for m, s in tested.items()
            for c in devices
            if row.global_batch_size % (m * c) == 0
        )
    assert len(choice.table) <= MAX_ROWS
    assert choice.reasons
    assert choice.reasons[0].startswith("Nothing") == (choice.recommended is None)
    if choice.recommended is None:
        assert not any(row.allowed for row in choice.table)
        return
    assert choice.recommended in choice.table
    assert band.low is not None
    assert 1 + choice.recommended.global_batch_size / band.low <= waste * (1 + 1e-9)
    # More waste allowed: never a smaller batch.
    looser = choose(
        speed=speed, critical=band, devices=devices, max_waste=waste * more, dataset_size=data
    )
    assert looser.recommended is not None
    assert looser.recommended.global_batch_size >= choice.recommended.global_batch_size


def test_a_curve_without_points_recommends_nothing() -> None:
    empty = SpeedCurve(
        points=(),
        failures=(),
        limit_bytes=1,
        baseline_bytes=1,
        margin=0.1,
        device="cpu",
        stopped="does not fit",
    )
    found = choose(speed=empty, critical=critical(), dataset_size=1437)
    assert found.table == ()
    assert found.recommended is None
    assert "no micro-batch size that ran" in found.reasons[0]


def test_the_recipes_own_batch_is_compared_with_the_recommended() -> None:
    speed = affine(1, 2, 4, 8, 16, 32, 64)
    found = choose(speed=speed, critical=critical(), dataset_size=1437, own=8)
    assert found.recommended is not None
    assert found.recommended.global_batch_size != 8
    own = row_of(found, 8)
    times = (own.relative_time or 0) / (found.recommended.relative_time or 1)
    said = [reason for reason in found.reasons if "recipe's own batch, 8 examples" in reason]
    assert len(said) == 1
    assert f"{times:.3g} times as long" in said[0]
    # E/Emin at the lower end of the band: 1 + 8/50.
    assert "at most 1.16 times the fewest examples" in said[0]
    same = found.recommended.global_batch_size
    again = choose(speed=speed, critical=critical(), dataset_size=1437, own=same)
    assert not any("recipe's own" in reason for reason in again.reasons)


def test_an_obstacle_is_the_first_reason_whatever_the_numbers() -> None:
    why = "every rate diverged; choose a smaller lr"
    found = choose(speed=affine(8), critical=critical(), dataset_size=64, obstacle=why)
    assert found.recommended is None
    assert found.reasons[0] == f"Nothing is recommended: {why}."


def test_more_steps_are_proposed_only_where_they_help() -> None:
    none = {"point": None, "low": None, "high": None, "detail": "no spread; use 2"}
    few, cannot = (
        choose(speed=affine(8), critical=critical(**none, outcome=outcome), dataset_size=64)
        for outcome in (Outcome.TOO_FEW_STEPS, Outcome.UNSUPPORTED)
    )
    assert few.reasons[0].endswith("(too few steps: no spread; use 2); measure more steps.")
    assert cannot.reasons[0].endswith("(unsupported: no spread; use 2).")
