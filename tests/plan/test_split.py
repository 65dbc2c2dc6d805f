from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.plan.split import split_batch
from noisescale.records import BatchSplit

sizes = st.integers(1, 64)


def parts(split: BatchSplit) -> tuple[int, int, int, int]:
    return (
        split.global_batch_size,
        split.micro_batch_size,
        split.accumulation,
        split.replicas,
    )


@settings(deadline=None)
@given(micro=sizes, passes=sizes, devices=sizes, missing=st.integers(0, 3))
def test_any_missing_one_is_inferred(micro: int, passes: int, devices: int, missing: int) -> None:
    names = ("global_batch_size", "micro_batch_size", "accumulation", "replicas")
    values = (micro * passes * devices, micro, passes, devices)
    some = {name: v for i, (name, v) in enumerate(zip(names, values, strict=True)) if i != missing}
    assert parts(split_batch(**some)) == values
    assert parts(split_batch(**dict(zip(names, values, strict=True)))) == values


@settings(deadline=None)
@given(total=st.integers(1, 5000), devices=st.integers(1, 12), limit=st.integers(1, 300))
def test_free_micro_is_the_largest_divisor_that_fits(total: int, devices: int, limit: int) -> None:
    try:
        split = split_batch(global_batch_size=total, replicas=devices, max_micro=limit)
    except InvalidInputError:
        assert total % devices
        return
    share = total // devices
    divisors = [d for d in range(1, share + 1) if share % d == 0 and d <= limit]
    assert parts(split) == (total, max(divisors), share // max(divisors), devices)


@settings(deadline=None)
@given(total=st.integers(1, 5000), devices=st.integers(2, 12), limit=st.integers(1, 300))
def test_the_named_splits_are_valid_and_nearest(total: int, devices: int, limit: int) -> None:
    if total % devices == 0:
        return
    with pytest.raises(InvalidInputError) as caught:
        split_batch(global_batch_size=total, replicas=devices, max_micro=limit)
    remedy = re.sub("^the nearest valid split(s are| is) ", "", caught.value.remedy)
    named = [part.split(" = ") for part in remedy.split(" (")[0].split(" or ")]
    for size, product in named:
        factors = [int(x) for x in product.split(" x ")]
        assert math.prod(factors) == int(size)
        assert factors[0] <= limit
        assert factors[2] == devices
    low = total // devices * devices
    assert [int(size) for size, _ in named] == [s for s in (low, low + devices) if s]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"global_batch_size": 512}, (512, 512, 1, 1)),
        ({"global_batch_size": 512, "max_micro": 32}, (512, 32, 16, 1)),
        ({"global_batch_size": 512, "max_micro": 100}, (512, 64, 8, 1)),
        ({"global_batch_size": 504, "replicas": 6, "max_micro": 32}, (504, 28, 3, 6)),
        ({"global_batch_size": 509, "max_micro": 32}, (509, 1, 509, 1)),
        ({"global_batch_size": 512, "micro_batch_size": 64}, (512, 64, 8, 1)),
        ({"global_batch_size": 512, "accumulation": 4}, (512, 128, 4, 1)),
        ({"micro_batch_size": 8}, (8, 8, 1, 1)),
        ({"micro_batch_size": 8, "replicas": 4}, (32, 8, 1, 4)),
    ],
)
def test_worked_cases(arguments: dict[str, int], expected: tuple[int, ...]) -> None:
    assert parts(split_batch(**arguments)) == expected


def test_the_largest_sizes_are_split_at_once() -> None:
    prime = 1_099_511_627_689  # the largest below 2^40: the longest search there is
    assert parts(split_batch(global_batch_size=prime, max_micro=prime - 1)) == (prime, 1, prime, 1)
    assert parts(split_batch(global_batch_size=2**40, max_micro=3 * 2**12)) == (
        2**40, 2**13, 2**27, 1,
    )  # fmt: skip


def test_unit_is_kept() -> None:
    assert split_batch(global_batch_size=4, unit="sequences").unit == "sequences"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"global_batch_size": 512, "replicas": 6, "max_micro": 21},
            ("does not divide by replicas 6", "510 = 17 x 5 x 6 or 516 = 2 x 43 x 6"),
        ),
        (
            {"global_batch_size": 500, "micro_batch_size": 8, "accumulation": 8},
            ("micro_batch_size 8 x accumulation 8", "448 = 8 x 8 x 7 or 512 = 8 x 8 x 8"),
        ),
        ({"global_batch_size": 4, "replicas": 6}, ("valid split is 6 = 1 x 1 x 6 (",)),
        (
            {"global_batch_size": 512, "micro_batch_size": 8, "accumulation": 8, "replicas": 4},
            ("contradicts micro_batch_size 8 x accumulation 8 x replicas 4 = 256",),
        ),
        (
            {"global_batch_size": 512, "micro_batch_size": 64, "max_micro": 32},
            ("micro_batch_size 64", "contradicts max_micro 32"),
        ),
        (
            {"global_batch_size": 512, "accumulation": 4, "max_micro": 32},
            ("micro-batches of 128", "at least 16"),
        ),
        ({}, ("no global_batch_size and no micro_batch_size",)),
        ({"accumulation": 4, "replicas": 2}, ("one of them is required",)),
        ({"global_batch_size": 0}, ("global_batch_size 0",)),
        ({"global_batch_size": -4}, ("global_batch_size -4",)),
        ({"global_batch_size": 8.0}, ("global_batch_size 8.0", "positive integer")),
        ({"global_batch_size": "8"}, ("global_batch_size '8'",)),
        ({"global_batch_size": 8, "replicas": True}, ("replicas True",)),
        ({"global_batch_size": 8, "max_micro": 0}, ("max_micro 0",)),
        ({"global_batch_size": 10**20 - 1, "max_micro": 32}, ("at most 1099511627776",)),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    arguments: dict[str, int], words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        split_batch(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_splits_that_break_the_limit_are_not_proposed() -> None:
    with pytest.raises(InvalidInputError, match=r"split is 128 = 32 x 4 x 1 \("):
        split_batch(global_batch_size=511, accumulation=4, max_micro=32)


def test_needs_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, noisescale.plan.split\n"
        "assert not {'torch', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
