"""Mode ``sketch``: unbiased, with the variance that the formula says, new signs every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.rules.parts import Outer, sum_of
from noisescale.measure.rules.windows import Windows
from noisescale.measure.sketched import Sketched

DRAWS = 4000


def variance(gradients):
    """2 (|M M^T|^2 - sum_a (M M^T)_aa^2), summed over examples: (n, o, i)."""
    gram = torch.bmm(gradients, gradients.mT)
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    return float(2 * (gram.square().sum() - diagonal.square().sum()))


def parts():
    torch.manual_seed(0)
    low_rank = Outer(
        torch.randn(3, 6, 1).double() * torch.randn(3, 1, 9).double(), torch.randn(3, 6, 7).double()
    )
    full = Outer(torch.randn(3, 20, 9).double(), torch.randn(3, 20, 9).double())
    blocks = Outer(torch.randn(6, 20, 8).double(), torch.randn(6, 20, 9).double(), groups=2)
    grid, signal = torch.randn(3, 8, 4, 4).double(), torch.randn(3, 5, 6, 6).double()
    ones = (1, 1)
    shifted = Windows(grid, signal, (3, 3), ones, ones, (0, 0))
    grid, signal = torch.randn(3, 16, 3, 5).double(), torch.randn(3, 4, 5, 4).double()
    padded = Windows(grid, signal, (3, 2), ones, (2, 1), (1, 1), groups=2)
    grid, signal = torch.randn(3, 8, 3, 2).double(), torch.randn(3, 5, 6, 4).double()
    strided = Windows(grid, signal, (3, 2), (2, 2), ones, (1, 0))
    return {
        "low rank": (low_rank, torch.Size([9, 7])),
        "full rank": (full, torch.Size([9, 9])),
        "groups": (blocks, torch.Size([16, 9])),
        "convolution": (shifted, torch.Size([8, 5, 3, 3])),
        "padding": (padded, torch.Size([16, 2, 3, 2])),
        "stride": (strided, torch.Size([8, 5, 3, 2])),
    }


@pytest.mark.parametrize(
    "name", ["low rank", "full rank", "groups", "convolution", "padding", "stride"]
)
def test_unbiased_with_the_stated_variance(name):
    part, shape = parts()[name]
    gradients = sum_of([part], shape)
    if part.groups == 2:
        gradients = gradients.reshape(6, 8, *gradients.shape[2:])
    gradients = gradients.flatten(2)
    metric = Sketched(seed=1)
    drawn = torch.stack([metric.square_sum(0, [part], shape) for _ in range(DRAWS)])
    truth, spread = float(gradients.square().sum()), variance(gradients)
    assert float(drawn.mean()) == pytest.approx(truth, abs=4 * (spread / DRAWS) ** 0.5)
    # The sample variance of 4,000 draws of a distribution with kurtosis below 12 is within
    # 4 sqrt(11 / 4000) = 21 %.
    assert float(drawn.var()) == pytest.approx(spread, rel=0.21)


def test_two_uses_of_a_weight_are_summed_exactly():
    part, shape = parts()["full rank"]
    truth = (2 * sum_of([part], shape)).square().sum()
    torch.testing.assert_close(Sketched().square_sum(0, [part, part], shape), truth)


def model_and_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    return model, torch.randn(8, 24, 12)


def measured(meter, model, x, steps):
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
        meter.close_step()
    return meter.history.trace_cov


def test_signs_are_new_at_every_step_and_repeat_with_the_meter():
    model, x = model_and_batch()
    first = measured(NoiseMeter(model, mode="sketch"), model, x, 5)
    assert len(set(first.tolist())) == 5
    again = measured(NoiseMeter(model, mode="sketch"), model, x, 5)
    assert first.tolist() == again.tolist()
    exact = measured(NoiseMeter(model), model, x, 2)
    assert first.mean() == pytest.approx(exact[0], rel=0.5)


def test_a_resumed_meter_draws_the_signs_that_come_next():
    model, x = model_and_batch()
    whole = measured(NoiseMeter(model, mode="sketch"), model, x, 6)
    meter = NoiseMeter(model, mode="sketch")
    measured(meter, model, x, 3)
    state = meter.state_dict()
    meter.detach()
    resumed = NoiseMeter(model, mode="sketch")
    resumed.load_state_dict(state)
    assert measured(resumed, model, x, 3).tolist() == whole.tolist()


def test_the_user_s_random_state_is_left_alone():
    model, x = model_and_batch()
    meter = NoiseMeter(model, mode="sketch")
    before = torch.get_rng_state()
    measured(meter, model, x, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_record_says_that_norms_are_sketched():
    model, x = model_and_batch()
    meter = NoiseMeter(model, mode="sketch")
    measured(meter, model, x, 12)
    assert "sketched" in meter.estimate().detail


@pytest.mark.parametrize(
    "options", [{"source": "microbatches"}, {"preconditioner": "adam"}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("mode", ["fused", "sketch"])
def test_modes_that_do_not_go_together(options, mode):
    model = nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match=f"mode '{mode}' with"):
        NoiseMeter(model, torch.optim.Adam(model.parameters()), mode=mode, **options)
