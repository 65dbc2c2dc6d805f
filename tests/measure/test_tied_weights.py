"""A parameter that is used more than once: its example gradient is the sum over the uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.measure.rules.parts import Outer, Rows, square_sum, sum_of
from per_example import assert_exact, cross_entropy, measured
from tied_models import Mixed, Repeated, TiedHead

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float64, torch.float32])


@FEW
@given(
    vocabulary=st.integers(2, 40),
    width=st.integers(1, 12),
    length=st.integers(1, 12),
    padding=st.sampled_from([None, 1]),
    twice=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_embedding_and_head(vocabulary, width, length, padding, twice, seed, dtype):
    torch.manual_seed(seed)
    ids = torch.randint(0, vocabulary, (4, length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model = TiedHead(vocabulary, width, padding, twice)
    assert_exact(model, batch, cross_entropy, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 4), (4,)),
        (lambda: nn.Linear(4, 4), (3, 4)),
        (lambda: nn.Linear(12, 12), (2, 12)),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 5, 4)),
        (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2), (4, 6)),
        (lambda: nn.ConvTranspose2d(2, 2, 3, padding=1), (2, 4, 4)),
        (lambda: nn.LayerNorm(4), (3, 4)),
        (lambda: nn.GroupNorm(2, 4), (4, 3)),
    ],
)
def test_the_same_module_several_times(make, shape, times, dtype):
    torch.manual_seed(0)
    layer = make()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert_exact(Repeated(layer, times), (torch.randn(5, *shape),), dtype=dtype)


@FEW
@given(
    kinds=st.lists(st.sampled_from(["linear", "again", "table"]), max_size=4),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_any_pattern_of_tying(kinds, length, seed, dtype):
    torch.manual_seed(seed)
    batch = torch.randn(4, length, 6), torch.randint(0, 6, (4, length))
    assert_exact(Mixed(kinds), batch, dtype=dtype)


def test_biases_and_norms_may_be_tied_across_kinds():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
            self.norm.bias = self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(torch.tanh(self.norm(self.a(x))))

    torch.manual_seed(0)
    assert_exact(Shared(), (torch.randn(5, 3, 4),))


def test_a_use_without_part_in_the_loss_adds_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            h = torch.tanh(self.a(x))
            self.b(h)
            return h

    torch.manual_seed(0)
    assert_exact(Idle(), (torch.randn(5, 4),))


def test_chunks_do_not_change_the_answer(monkeypatch):
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (7, 5))
    model = TiedHead(9, 4).double()
    whole = measured(model, cross_entropy, (ids, ids))[1]
    monkeypatch.setattr("noisescale.measure.rules.parts.CHUNK_ELEMENTS", 40)
    torch.testing.assert_close(
        measured(model, cross_entropy, (ids, ids))[1].weighted, whole.weighted
    )


def test_the_joint_form_is_the_square_of_the_sum():
    """Gram matrices with cross terms against the materialised gradients."""
    torch.manual_seed(0)
    shape = torch.Size([50, 40])
    outer = Outer(torch.randn(3, 2, 50).double(), torch.randn(3, 2, 40).double())
    rows = Rows(torch.randint(0, 50, (3, 4)), torch.randn(3, 4, 40).double(), 50)
    for parts in ([outer, rows], [rows, outer], [outer, rows, outer], [rows, rows]):
        truth = sum_of(parts, shape).square().sum()
        torch.testing.assert_close(square_sum(parts, shape), truth)
