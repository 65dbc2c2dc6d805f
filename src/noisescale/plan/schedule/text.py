"""Schedules written as "0:768 250B:1536", with the units of thresholds and sizes declared."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.sizes import require_multiple
from noisescale.records.rate_schedule import FARTHEST, require_unit
from noisescale.records.schedule import BatchPiece, BatchSchedule

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Powers of ten, as Megatron-LM means them (paper: its --step-batch-size-schedule)."""

_NUMBER = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][0-9]{1,2})?)([KMBTkmbt]?)")
_EXAMPLE = '"0:768 250B:1536"'


def parse_schedule(
    text: str,
    *,
    unit: str | None = None,
    threshold_unit: str | None = None,
    size_unit: str | None = None,
    sequence_length: int | None = None,
    multiple_of: int = 1,
) -> BatchSchedule:
    """Read "THRESHOLD:SIZE THRESHOLD:SIZE ...": from each threshold on, the batch has this size.

    Numbers may end in K, M, B or T. Nothing in the text says what they count, so that must be
    declared, and thresholds in tokens beside sizes in sequences need the length of a sequence.
    Then a threshold is rounded down to whole sequences, as Megatron-LM does.

    Args:
        text: pairs in ascending order with blanks or commas between, the first threshold 0.
        unit: what both count: ``examples``, ``sequences`` or ``tokens``.
        threshold_unit: what thresholds count, where it is not ``unit``.
        size_unit: what sizes count, where it is not ``unit``; the unit of the result.
        sequence_length: tokens per sequence (an example is one sequence).
        multiple_of: what sizes must divide by: micro-batch times replicas.

    Returns:
        The batch sizes, without rates.

    Raises:
        InvalidInputError: a unit is not declared or unknown, units are mixed without
            ``sequence_length``, a pair is none, thresholds do not ascend from 0, or a size is not
            positive or does not divide.

    Source: the syntax of Megatron-LM's --step-batch-size-schedule.

    >>> parse_schedule("0:768 250B:1536", unit="tokens").pieces[1]
    BatchPiece(start=250000000000, batch_size=1536)
    """
    thresholds = _declared("threshold", threshold_unit, unit)
    sizes = _declared("size", size_unit, unit)
    pieces = []
    for pair in _pairs(text):
        start, size = _read_pair(pair)
        require_multiple(size, multiple_of)
        start = restate(start, thresholds, sizes, sequence_length=sequence_length)
        pieces.append(BatchPiece(start=start, batch_size=size))
    return BatchSchedule(pieces=tuple(pieces), unit=sizes)


def spell_schedule(
    schedule: BatchSchedule,
    *,
    threshold_unit: str | None = None,
    sequence_length: int | None = None,
) -> str:
    """Write a schedule's batch sizes as :func:`parse_schedule` reads them, under the same units.

    Args:
        schedule: its pieces are written, its rates are not.
        threshold_unit: what thresholds shall count; the schedule's unit by default.
        sequence_length: tokens per sequence, where that is another one.

    Raises:
        InvalidInputError: the units need ``sequence_length``, or thresholds are no whole
            sequences.

    >>> spell_schedule(parse_schedule("0:768, 0.25T:1536", unit="tokens"))
    '0:768 250B:1536'
    """
    unit = threshold_unit or schedule.unit
    return " ".join(
        f"{spell_number(_exactly(piece.start, schedule.unit, unit, sequence_length))}"
        f":{piece.batch_size}"
        for piece in schedule.pieces
    )


def spell_number(number: int) -> str:
    """Write a whole number with the largest suffix that leaves it whole.

    >>> spell_number(250_000_000_000), spell_number(1536), spell_number(0)
    ('250B', '1536', '0')
    """
    for suffix, scale in reversed(SUFFIXES.items()):
        if number and number % scale == 0:
            return f"{number // scale}{suffix}"
    return str(number)


def read_number(text: str) -> int | None:
    """Read a whole number that may end in K, M, B or T; None where it is none.

    >>> read_number("1.5M"), read_number("2e6"), read_number("1.5"), read_number("-3")
    (1500000, 2000000, None, None)
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    # Decimal, since 0.0011B is 1099999.9999999998 in floating point.
    number = Decimal(found[1]) * SUFFIXES.get(found[2].upper(), 1)
    return int(number) if number == int(number) else None


def restate(value: int, old: str, new: str, *, sequence_length: int | None) -> int:
    """Restate a count in another unit, tokens rounded down to whole sequences.

    Args:
        value: the count in ``old``.
        old: its unit.
        new: the unit wanted; an example is one sequence.
        sequence_length: tokens per sequence.

    Raises:
        InvalidInputError: the length of a sequence is needed and not given.

    >>> restate(10_000, "tokens", "sequences", sequence_length=4096)
    2
    """
    if (old == "tokens") == (new == "tokens"):
        return value
    if sequence_length is None:
        raise InvalidInputError(
            f"units {old} and {new}", "mixed units need the length of a sequence",
            "give sequence_length or one unit for both",
        )  # fmt: skip
    return value * sequence_length if new == "tokens" else value // sequence_length


def in_unit(
    schedule: BatchSchedule, unit: str, *, sequence_length: int | None = None
) -> BatchSchedule:
    """Restate a schedule of batch sizes in another unit.

    Args:
        schedule: without rates, which belong to a unit of their own.
        unit: what positions and sizes shall count.
        sequence_length: tokens per sequence, where one of both is tokens.

    Raises:
        InvalidInputError: ``sequence_length`` is needed, or a size is no whole sequences.

    >>> in_unit(parse_schedule("0:8", unit="sequences"), "tokens", sequence_length=64).pieces
    (BatchPiece(start=0, batch_size=512),)
    """
    require_unit(unit)
    pieces = [
        BatchPiece(
            start=restate(piece.start, schedule.unit, unit, sequence_length=sequence_length),
            batch_size=_exactly(piece.batch_size, schedule.unit, unit, sequence_length),
        )
        for piece in schedule.pieces
    ]
    return BatchSchedule(pieces=tuple(pieces), unit=unit, total=None)


def _exactly(value: int, old: str, new: str, sequence_length: int | None) -> int:
    found = restate(value, old, new, sequence_length=sequence_length)
    if restate(found, new, old, sequence_length=sequence_length) != value:
        raise InvalidInputError(
            f"{value} {old}",
            f"no whole number of sequences of {sequence_length} tokens",
            f"change it or state all in {old}",
        )
    return found


def _declared(what: str, own: str | None, both: str | None) -> str:
    unit = own or both
    if unit is None:
        raise InvalidInputError(
            f"a schedule without the unit of its {what}s",
            "the text does not say what it counts",
            f"give unit, or threshold_unit and size_unit (--unit tokens, or --{what}-unit ...)",
        )
    require_unit(unit)
    return unit


def _pairs(text: Any) -> list[str]:
    pairs = text.replace(",", " ").split() if isinstance(text, str) else []
    if not pairs:
        raise InvalidInputError(
            f"schedule {text!r}",
            "pairs THRESHOLD:SIZE are required",
            f"write for example {_EXAMPLE}",
        )
    return pairs


def _read_pair(pair: str) -> tuple[int, int]:
    """Read the threshold and the size of one pair."""
    parts = pair.split(":")
    numbers = [read_number(part) for part in parts]
    if len(parts) != 2 or None in numbers:
        raise InvalidInputError(
            f"{pair!r}",
            "a pair THRESHOLD:SIZE of whole numbers is required (K, M, B, T may follow them)",
            f"write for example {_EXAMPLE}",
        )
    start, size = (number or 0 for number in numbers)
    if not 1 <= size <= FARTHEST or start > FARTHEST:
        raise InvalidInputError(
            f"{pair!r}",
            f"a size from 1 and a threshold from 0, both to {FARTHEST}, are required",
            f"write for example {_EXAMPLE}",
        )
    return start, size
