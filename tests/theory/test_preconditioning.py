"""Second moments at another batch size, against the expectation written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisescale import InvalidInputError
from noisescale.theory.preconditioning import restating_share


@given(
    grad=st.floats(-3, 3),
    variance=st.floats(0, 9),
    batch_size=st.integers(2, 1000),
    new=st.integers(1, 1000),
)
def test_expectations_are_restated_exactly(grad, variance, batch_size, new):
    v, s = grad**2 + variance / batch_size, grad**2 + variance
    share = restating_share(batch_size=batch_size, new_batch_size=new)
    restated = (1 - share) * v + share * s
    assert restated == pytest.approx(grad**2 + variance / new, rel=1e-9, abs=1e-9)
    if new > batch_size:
        assert restated >= v * batch_size / new - 1e-9
    else:
        assert 0 <= share <= 1


@pytest.mark.parametrize(("batch_size", "new"), [(1, 4), (4, 0.5)])
def test_what_cannot_be_restated(batch_size, new):
    with pytest.raises(InvalidInputError, match="more than one example"):
        restating_share(batch_size=batch_size, new_batch_size=new)
