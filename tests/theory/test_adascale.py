"""AdaScale's gain: its ends, its identity, its reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.theory.adascale import gain, smoothing

positive = st.floats(1e-200, 1e200)
sizes = st.floats(1e-3, 1e6)


@given(trace=positive, square=positive, base=sizes, batch=sizes)
def test_it_lies_between_one_and_the_scale(trace, square, base, batch):
    found = gain(trace_cov=trace, grad_sq=square, base_batch_size=base, batch_size=batch)
    low, high = sorted((1.0, batch / base))
    assert low <= found <= high


@given(noise_scale=st.floats(1e-3, 1e9), base=sizes, batch=sizes)
def test_it_is_the_noise_aware_factor(noise_scale, base, batch):
    found = gain(trace_cov=noise_scale, grad_sq=1.0, base_batch_size=base, batch_size=batch)
    factor = (1 + noise_scale / base) / (1 + noise_scale / batch)
    assert found == pytest.approx(factor, rel=1e-12)


@given(a=sizes, b=sizes, c=sizes, noise_scale=st.floats(1e-3, 1e9))
def test_two_steps_of_scaling_are_one(a, b, c, noise_scale):
    def one(base, batch):
        return gain(trace_cov=noise_scale, grad_sq=1.0, base_batch_size=base, batch_size=batch)

    assert one(a, b) * one(b, c) == pytest.approx(one(a, c), rel=1e-9)


def test_the_ends():
    keys = {"base_batch_size": 8, "batch_size": 64}
    assert gain(trace_cov=0.0, grad_sq=1.0, **keys) == 1.0
    assert gain(trace_cov=1.0, grad_sq=0.0, **keys) == 8.0


@pytest.mark.parametrize("change", [
    {"trace_cov": -1.0}, {"grad_sq": -1.0}, {"trace_cov": 0.0, "grad_sq": 0.0},
    {"grad_sq": float("nan")}, {"trace_cov": float("inf")}, {"base_batch_size": 0},
    {"batch_size": -1}, {"batch_size": float("nan")},
], ids=str)  # fmt: skip
def test_values_out_of_range_are_refused(change):
    keys = {"trace_cov": 1.0, "grad_sq": 1.0, "base_batch_size": 8, "batch_size": 64}
    with pytest.raises(InvalidInputError):
        gain(**{**keys, **change})


def test_smoothing_has_a_memory_in_base_batches():
    assert smoothing(scale=1) == 0.999
    assert smoothing(scale=1000) == smoothing(scale=1e6) == 0.0
