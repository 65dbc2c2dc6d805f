"""meter.check: right models agree, wrong rules and mixing losses are found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.example_rules import example_rule


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def model_with(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("source", ["auto", "microbatches"])
def test_a_sound_model_agrees(dtype, source):
    model = model_with(nn.LayerNorm(6), nn.Dropout(0.5)).to(dtype)
    x, y = batch_of()
    found = NoiseMeter(model, source=source).check((x.to(dtype), y), loss)
    assert found.agrees, found
    assert found.examples == 4
    assert found.wrong == ()
    assert list(found.errors) == [name for name, _ in model.named_parameters()]
    assert max(found.errors.values()) < (1e-9 if dtype == torch.float64 else 1e-4)
    assert "6 parameters agree" in found.detail


def test_a_summed_loss_agrees():
    def summed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model = model_with().double()
    x, y = batch_of()
    assert NoiseMeter(model, loss_reduction="sum").check((x.double(), y), summed).agrees
    assert not NoiseMeter(model).check((x.double(), y), summed).agrees


def test_a_wrong_rule_is_found():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.gain

    @example_rule(Gain)
    def gain(layer, x, g):
        # Right in the sum over the batch, wrong for every example.
        return {"gain": (x * g).mean(0, keepdim=True).expand_as(x)}

    found = NoiseMeter(model_with(Gain())).check(batch_of(), loss)
    assert not found.agrees
    assert found.wrong == ("1.gain",)
    assert "1.gain" in found.detail


def test_mixing_is_found():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    found = NoiseMeter(model_with(Centred())).check(batch_of(), loss)
    assert not found.agrees
    assert "0.weight" in found.wrong
    assert "mixes the examples" in found.detail


def test_batchnorm_is_refused_with_the_reason():
    found = NoiseMeter(model_with(nn.BatchNorm1d(6))).check(batch_of(), loss)
    assert not found.agrees
    assert found.examples == 0
    assert "BatchNorm" in found.detail


def test_it_leaves_no_trace():
    def trained(checking):
        model = model_with(nn.Dropout(0.3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer)
        torch.manual_seed(3)
        for _ in range(3):
            if checking:
                meter.check(same_batch(), loss)
            optimizer.zero_grad()
            loss(model, same_batch()).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], meter.history.trace_cov

    x, y = batch_of()

    def same_batch():
        return x, y

    (with_check, moments), (without, expected) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(with_check, without, strict=True))
    assert moments.tolist() == expected.tolist()


@pytest.mark.parametrize("examples", [1, 13])
def test_bad_numbers_of_examples(examples):
    with pytest.raises(InvalidInputError, match="2 to 12"):
        NoiseMeter(model_with()).check(batch_of(), loss, examples=examples)
