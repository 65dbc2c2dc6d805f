"""The text form: both ways, units declared, and every way to get it wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.text import (
    in_unit,
    parse_schedule,
    read_number,
    spell_number,
    spell_schedule,
)
from noisescale.records import BatchPiece, BatchSchedule

units = st.sampled_from(["examples", "sequences", "tokens"])


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    scale = draw(st.sampled_from([1, 10**3, 10**6, 10**9, 25 * 10**10]))
    starts = sorted(draw(st.sets(st.integers(1, 9000), max_size=6)))
    sizes = draw(st.lists(st.integers(1, 10**7), min_size=7, max_size=7))
    pieces = [
        BatchPiece(start=start * scale, batch_size=size)
        for start, size in zip([0, *starts], sizes, strict=False)
    ]
    return BatchSchedule(pieces=tuple(pieces), unit=draw(units))


@settings(deadline=None)
@given(schedule=schedules())
def test_what_is_written_is_read_again(schedule: BatchSchedule) -> None:
    text = spell_schedule(schedule)
    again = parse_schedule(text, unit=schedule.unit)
    assert again == schedule
    assert spell_schedule(again) == text


@settings(deadline=None)
@given(schedule=schedules(), length=st.integers(1, 8192))
def test_other_units_are_read_again_too(schedule: BatchSchedule, length: int) -> None:
    if schedule.unit == "tokens" or schedule.pieces[-1].start * length > 2**53:
        return
    text = spell_schedule(schedule, threshold_unit="tokens", sequence_length=length)
    again = parse_schedule(
        text, threshold_unit="tokens", size_unit=schedule.unit, sequence_length=length
    )
    assert again == schedule


@settings(deadline=None)
@given(number=st.integers(0, 2**53))
def test_numbers_are_exact(number: int) -> None:
    assert read_number(spell_number(number)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.0011B", 1_100_000), ("1.1B", 1_100_000_000), ("2t", 2 * 10**12), ("1e3", 1000),
        ("007", 7), ("1.50K", 1500), ("1.0", 1), ("", None), ("K", None), ("1.0005K", None),
        ("1_000", None), ("١", None), ("-1", None), ("+1", None), ("nan", None), ("inf", None),
        ("1e999", None), ("9" * 40, None), ("0x10", None), ("1 K", None),
    ],
)  # fmt: skip
def test_how_numbers_are_read(text: str, number: int | None) -> None:
    assert read_number(text) == number


def test_megatrons_example() -> None:
    text = "0:768 250B:1536 500B:3072 750B:6144"
    schedule = parse_schedule(
        text, threshold_unit="tokens", size_unit="sequences", sequence_length=8192
    )
    assert [piece.start for piece in schedule.pieces] == [
        0, 250 * 10**9 // 8192, 500 * 10**9 // 8192, 750 * 10**9 // 8192,
    ]  # fmt: skip
    assert schedule.unit == "sequences"
    assert spell_schedule(parse_schedule(text, unit="tokens")) == text


def test_blanks_and_commas_separate() -> None:
    expected = parse_schedule("0:8 5K:16", unit="examples")
    for text in ("0:8,5K:16", " 0:8 ,\n 5000:16 ", "0:8, 5k:16,"):
        assert parse_schedule(text, unit="examples") == expected


def test_an_example_is_a_sequence() -> None:
    schedule = parse_schedule("0:8 64:16", threshold_unit="examples", size_unit="sequences")
    assert schedule.pieces[1].start == 64


def test_restated_in_another_unit() -> None:
    schedule = parse_schedule("0:2 10:4", unit="sequences")
    tokens = in_unit(schedule, "tokens", sequence_length=100)
    assert tokens.pieces[1] == BatchPiece(start=1000, batch_size=400)
    assert in_unit(tokens, "examples", sequence_length=100).pieces == schedule.pieces


BAD: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("0:768 250B:1536", {}, ("without the unit of its thresholds", "--unit tokens")),
    ("0:768", {"threshold_unit": "tokens"}, ("without the unit of its sizes",)),
    ("0:768", {"size_unit": "tokens"}, ("without the unit of its thresholds",)),
    ("0:768", {"unit": "token"}, ("unit 'token'", "did you mean tokens")),
    (
        "0:768 1M:800",
        {"threshold_unit": "tokens", "size_unit": "sequences"},
        ("mixed units need the length of a sequence",),
    ),
    ("250B:1536", {"unit": "tokens"}, ("begin at 250000000000", "from 0 on")),
    ("0:8 10:16 10:32", {"unit": "tokens"}, ("at 10 and then 10",)),
    ("0:8 20:16 10:32", {"unit": "tokens"}, ("at 20 and then 10", "ascending")),
    (
        "0:8 10:16 19:32",
        {"threshold_unit": "tokens", "size_unit": "sequences", "sequence_length": 20},
        ("at 0 and then 0",),
    ),
    ("0:0", {"unit": "tokens"}, ("'0:0'", "a size from 1")),
    ("0:-8", {"unit": "tokens"}, ("'0:-8'", "THRESHOLD:SIZE")),
    ("0:8.5", {"unit": "tokens"}, ("'0:8.5'", "whole numbers")),
    ("0:8 ten:16", {"unit": "tokens"}, ("'ten:16'",)),
    ("0:8 10", {"unit": "tokens"}, ("'10'", "THRESHOLD:SIZE")),
    ("0:8:9", {"unit": "tokens"}, ("'0:8:9'",)),
    ("0 : 8", {"unit": "tokens"}, ("'0'",)),
    ("", {"unit": "tokens"}, ("schedule ''", "pairs THRESHOLD:SIZE")),
    (" , ", {"unit": "tokens"}, ("pairs THRESHOLD:SIZE",)),
    ("0:8 9e99:16", {"unit": "tokens"}, ("'9e99:16'", "both to")),
    ("0:768 1M:1000", {"unit": "tokens", "multiple_of": 48}, ("1000", "960 and 1008")),
    ("0:8", {"unit": "tokens", "multiple_of": 48}, ("multiple of 48", "nearest: 48")),
]


@pytest.mark.parametrize(("text", "options", "words"), BAD)
def test_bad_input_is_one_line_that_names_it(
    text: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_schedule(text, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, 5, ["0:8"]])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(InvalidInputError, match="pairs THRESHOLD:SIZE"):
        parse_schedule(text, unit="tokens")


def test_what_is_no_whole_sequence_is_refused() -> None:
    schedule = parse_schedule("0:1000 5000:2000", unit="tokens")
    with pytest.raises(InvalidInputError, match="1000 tokens: no whole number of sequences"):
        in_unit(schedule, "sequences", sequence_length=64)
    with pytest.raises(InvalidInputError, match="5000 tokens: no whole"):
        spell_schedule(schedule, threshold_unit="sequences", sequence_length=64)
    with pytest.raises(InvalidInputError, match="did you mean tokens"):
        in_unit(schedule, "token")
