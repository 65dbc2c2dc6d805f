"""Batch and rate schedules as records: look-ups, steps and counts against plain loops."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.records import BatchPiece, BatchSchedule, RateSchedule, RateSegment

FALL = RateSchedule(
    segments=(
        RateSegment(start=0, stop=100, shape="linear", first=0.0, last=0.4),
        RateSegment(start=100, first=0.4),
        RateSegment(start=300, stop=700, shape="cosine", first=0.4, last=0.1),
    )
)


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    gaps = draw(st.lists(st.integers(1, 300), max_size=6))
    starts = [0]
    for gap in gaps:
        starts.append(starts[-1] + gap)
    sizes = draw(st.lists(st.integers(1, 90), min_size=len(starts), max_size=len(starts)))
    pieces = [BatchPiece(start=a, batch_size=b) for a, b in zip(starts, sizes, strict=True)]
    return BatchSchedule(pieces=tuple(pieces))


def slow_steps(schedule: BatchSchedule, total: int) -> list[tuple[int, int]]:
    position, found = 0, []
    while position < total:
        size = [p.batch_size for p in schedule.pieces if p.start <= position][-1]
        found.append((position, size))
        position += size
    return found


@settings(deadline=None)
@given(schedule=schedules(), total=st.integers(0, 3000), cut=st.floats(0, 1))
def test_steps_and_counts_are_those_of_a_plain_loop(
    schedule: BatchSchedule, total: int, cut: float
) -> None:
    slow = slow_steps(schedule, total)
    assert [step[:2] for step in schedule.steps(total=total)] == slow
    assert schedule.updates(total) == len(slow)
    done = int(cut * len(slow))
    position = slow[done][0] if done < len(slow) else sum(slow[-1]) if slow else 0
    assert schedule.position_after(done) == position
    resumed = [step[:2] for step in schedule.steps(start=position, total=total)]
    assert resumed == slow[done:]


@settings(deadline=None)
@given(schedule=schedules(), total=st.integers(1, 3000))
def test_runs_follow_on_each_other_and_end_within_one_batch(
    schedule: BatchSchedule, total: int
) -> None:
    runs = schedule.runs(total)
    assert [run.position for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert total <= runs[-1].stop < total + runs[-1].batch_size
    starts = {piece.start: piece.batch_size for piece in schedule.pieces}
    for run in runs:
        assert run.batch_size == starts[max(s for s in starts if s <= run.position)]


def test_lookups_of_a_long_schedule_count_in_whole_numbers() -> None:
    schedule = BatchSchedule(
        pieces=(
            BatchPiece(start=0, batch_size=3),
            BatchPiece(start=10**15 + 1, batch_size=7),
        ),
        unit="tokens",
    )
    updates = schedule.updates(2 * 10**15)
    first = -(-(10**15 + 1) // 3)
    assert updates == first + -(-(2 * 10**15 - 3 * first) // 7)
    assert schedule.position_after(first + 1) == 3 * first + 7


@pytest.mark.parametrize(
    ("position", "lr"),
    [(0, 0.0), (50, 0.2), (100, 0.4), (299, 0.4), (500, 0.25), (700, 0.1), (10**9, 0.1)],
)
def test_rates_by_position(position: int, lr: float) -> None:
    assert FALL.at(position) == pytest.approx(lr, rel=1e-15, abs=1e-15)


def coupled(coupling: str) -> BatchSchedule:
    pieces = (BatchPiece(start=0, batch_size=8), BatchPiece(start=100, batch_size=32))
    return BatchSchedule(pieces=pieces, rate=FALL, reference_batch_size=8, coupling=coupling)


@pytest.mark.parametrize(("coupling", "factor"), [("linear", 4), ("square_root", 2), ("none", 1)])
def test_the_rate_follows_the_batch_size(coupling: str, factor: float) -> None:
    assert coupled(coupling).lr_at(200) == pytest.approx(0.4 * factor)
    assert coupled(coupling).lr_at(50) == pytest.approx(0.2)


def test_steps_carry_the_rate_at_their_start() -> None:
    schedule = coupled("linear")
    for position, size, lr in schedule.steps(total=800):
        assert size == schedule.batch_size_at(position)
        assert lr == schedule.lr_at(position)
    assert all(step.lr is None for step in BatchSchedule(pieces=schedule.pieces).steps(total=99))


def test_without_a_total_steps_go_on_and_counts_are_refused() -> None:
    schedule = coupled("none")
    endless = schedule.steps()
    assert [next(endless).position for _ in range(15)][-1] == 13 * 8 + 32
    with pytest.raises(InvalidInputError, match="without a total"):
        schedule.updates()


def test_json_both_ways() -> None:
    schedule = coupled("square_root")
    assert BatchSchedule.from_json(schedule.to_json()) == schedule
    assert json.loads(schedule.to_json())["pieces"][1] == {"start": 100, "batch_size": 32}
    schedule.batch_size_at(3)  # fills the cache of starts
    assert BatchSchedule.from_dict(schedule.to_dict()) == schedule


BAD: list[tuple[Any, str]] = [
    (lambda: BatchSchedule(pieces=()), "no pieces"),
    (lambda: BatchSchedule(pieces=(BatchPiece(start=5, batch_size=1),)), "begin at 5"),
    (
        lambda: BatchSchedule(
            pieces=tuple(BatchPiece(start=s, batch_size=1) for s in (0, 9, 9)),
        ),
        "at 9 and then 9",
    ),
    (lambda: BatchPiece(start=0, batch_size=0), "batch_size 0"),
    (lambda: BatchPiece(start=0, batch_size=True), "batch_size True"),
    (lambda: BatchPiece(start=0, batch_size=2.0), "batch_size 2.0"),  # type: ignore[arg-type]
    (lambda: BatchPiece(start=-1, batch_size=2), "start -1"),
    (lambda: BatchPiece(start=2**60, batch_size=2), "whole number from 0 to"),
    (lambda: BatchSchedule(pieces=FIRST, unit="token"), "did you mean tokens"),
    (lambda: BatchSchedule(pieces=FIRST, coupling="sqrt"), "coupling 'sqrt'"),
    (lambda: BatchSchedule(pieces=FIRST, rate=FALL, coupling="linear"), "reference_batch_size"),
    (lambda: BatchSchedule(pieces=FIRST, rate=FALL, unit="tokens"), "a rate by examples"),
    (lambda: BatchSchedule(pieces=FIRST, total=-3), "total -3"),
    (lambda: RateSegment(start=0, first=-1.0), "first rate -1.0"),
    (lambda: RateSegment(start=0, first=math.nan), "first rate nan"),
    (lambda: RateSegment(start=0, first="0.1"), "first rate '0.1'"),  # type: ignore[arg-type]
    (lambda: RateSegment(start=0, first=0.1, shape="cosin"), "did you mean cosine"),
    (lambda: RateSegment(start=0, first=0.1, shape="linear"), "stop after its start"),
    (lambda: RateSegment(start=9, stop=9, last=0.0, first=0.1, shape="linear"), "stop after"),
    (lambda: RateSchedule(segments=()), "no segments"),
    (lambda: FALL.at(-1), "position -1"),
    (lambda: FALL.at(math.nan), "position nan"),
    (lambda: BatchSchedule(pieces=FIRST).batch_size_at(-1), "position -1"),
    (lambda: BatchSchedule(pieces=FIRST).position_after(-1), "updates -1"),
    (lambda: list(BatchSchedule(pieces=FIRST).steps(start=-1, total=3)), "start -1"),
]
FIRST = (BatchPiece(start=0, batch_size=8),)


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_input_is_one_line_that_names_it(make: Any, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"pieces": 3}',
        '{"pieces": null}',
        '{"pieces": [3]}',
        '{"pieces": {"a": 1}}',
        '{"pieces": [{"start": null, "batch_size": 8}]}',
        '{"pieces": [{"start": 0, "batch_size": "8"}]}',
        '{"pieces": [{"start": 0, "batch_size": 8}], "total": "x"}',
        '{"pieces": [{"start": 0, "batch_size": 8}], "rate": {"segments": [{"start": 0, "first":'
        " null}]}}",
        '{"pieces": [{"start": 0, "batch_size": 8}], "rate": {"segments": [{"start": 0, "first":'
        ' "a"}]}}',
        '{"pieces": [{"start": 0, "batch_size": 8}], "reference_batch_size": "a", "coupling":'
        ' "linear", "rate": {"segments": [{"start": 0, "first": 0.1}]}}',
    ],
)
def test_malformed_json_is_refused_in_one_line(text):
    with pytest.raises(InvalidInputError) as caught:
        BatchSchedule.from_json(text)
    assert "\n" not in str(caught.value)
