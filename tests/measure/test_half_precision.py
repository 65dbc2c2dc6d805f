"""Autocast, models in bfloat16, GradScaler: the fp32 numbers within the rounding of the passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale import NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms

HALF = [torch.bfloat16, torch.float16]

# A gradient of this model went through at most so many roundings, each of relative size eps / 2:
# per linear layer its weight, input, output, and the gradients of both (5 x 3), activations and
# their gradients (4), logits (1). A squared norm doubles the relative error of the norm.
ROUNDINGS = 20


def bound(dtype):
    return 2 * ROUNDINGS * torch.finfo(dtype).eps / 2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
    )


def batches(steps, n=16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(n, 16, generator=generator)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def norms_of(model, dtype=None, batch=None):
    """Sum of squared per-example norms and squared norm of the mean of one batch."""
    source = ExamplesSource(model, Inventory(model))
    source.open()
    batch = next(batches(1)) if batch is None else batch
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        value = loss(model, batch)
    value.backward()
    norms = source.close()
    source.detach()
    assert isinstance(norms, StepNorms)
    assert source.inventory.missing == {}
    assert norms.weighted.dtype == norms.mean.dtype == torch.float32
    return float(norms.weighted.sum()) * norms.weighted_factor, float(norms.mean.sum())


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    assert norms_of(make_model(), dtype) == pytest.approx(norms_of(make_model()), rel=bound(dtype))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_and_checkpointing(dtype, reentrant):
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            h = self.body[0](x)
            return self.body[4](checkpoint(self.body[1:4], h, use_reentrant=reentrant))

    expected = norms_of(make_model())
    assert norms_of(Saved(), dtype) == pytest.approx(expected, rel=bound(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_in_half_precision(dtype):
    x, y = next(batches(1))
    half = make_model().to(dtype)
    rounded = make_model()
    rounded.load_state_dict(half.state_dict())
    expected = norms_of(rounded, batch=(x.to(dtype).float(), y))
    assert norms_of(half, batch=(x.to(dtype), y)) == pytest.approx(expected, rel=bound(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_a_module_without_a_rule_in_half_precision(dtype):
    """Run again by example it computes in float32, its children and buffers too."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = make_model(), nn.Parameter(torch.linspace(0.5, 1.5, 16))
            self.register_buffer("shift", torch.full((16,), 0.25))

        def forward(self, x):
            return self.body(x * self.scale + self.shift)

    x, y = next(batches(1))
    half, rounded = Scaled().to(dtype), Scaled()
    rounded.load_state_dict(half.state_dict())
    expected = norms_of(rounded, batch=(x.to(dtype).float(), y))
    assert norms_of(half, batch=(x.to(dtype), y)) == pytest.approx(expected, rel=bound(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_squares_beyond_the_range_of_the_format(dtype):
    """Per-example squares of 1e-9 and 1e9 are no numbers of float16, sums of them are."""
    for scale in (1e-4, 1e4):
        model, x = nn.Linear(4, 1, bias=False), torch.ones(8, 4)
        source = ExamplesSource(model, Inventory(model))
        source.open()
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
        (out.float().mean() * 8 * scale).backward()
        norms = source.close()
        source.detach()
        expected = 8 * 4 * scale**2
        assert float(norms.weighted.sum()) == pytest.approx(expected, rel=bound(dtype))


def scaled_run(dtype, *, scaler, overflow=(), steps=8, clip=True):
    """A run that stays at its weights, so that steps of two runs compare."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    factor = scaler.get_scale if scaler else 1.0
    meter = NoiseMeter(model, optimizer, source="examples", loss_scale=factor)
    for i, batch in enumerate(batches(steps)):
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            value = loss(model, batch) * (torch.inf if i in overflow else 1.0)
        if scaler is None:
            value.backward()
            optimizer.step()
            continue
        scaler.scale(value).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
    meter.detach()
    return meter


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_grad_scaler_gives_the_noise_scale_of_the_plain_run(dtype, clip):
    """Its scale grows every 2 steps; 3 and 4 overflow, are skipped, and poison nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    found = scaled_run(dtype, scaler=scaler, overflow=(3, 4), clip=clip)
    plain = scaled_run(None, scaler=None)
    kept = [i for i in range(8) if i not in (3, 4)]
    assert found.steps == 6
    assert found.estimate().skipped_steps == 2
    trace, mean_sq = plain.history.trace_cov[kept], plain.history.grad_sq[kept]
    np.testing.assert_allclose(found.history.trace_cov, trace, rtol=2 * bound(dtype))
    # |G|^2 is the mean's squared norm less tr / B: its error is that of the two.
    scale = (mean_sq + 2 * trace / 16).max()
    np.testing.assert_allclose(
        found.history.grad_sq, mean_sq, rtol=0, atol=2 * bound(dtype) * scale
    )
    ratio = found.history.trace_cov.sum() / found.history.grad_sq.sum()
    assert ratio == pytest.approx(trace.sum() / mean_sq.sum(), rel=4 * bound(dtype))


def test_float32_under_the_scaler_is_exact():
    """Scales are powers of two: nothing but the order of rounding differs."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    found, plain = scaled_run(None, scaler=scaler), scaled_run(None, scaler=None)
    np.testing.assert_allclose(found.history.trace_cov, plain.history.trace_cov, rtol=1e-6)
    np.testing.assert_allclose(found.history.grad_sq, plain.history.grad_sq, rtol=1e-5)


def test_overflow_of_a_gradient_alone_is_skipped():
    """float16 overflows in the backward pass: the scaler halves its scale until it does not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    meter = scaled_run(torch.float16, scaler=scaler, steps=24)
    assert 0 < meter.steps < 24
    assert meter.estimate().skipped_steps == 24 - meter.steps
    assert np.isfinite(meter.history.trace_cov).all()
    plain = scaled_run(None, scaler=None, steps=24).history.trace_cov[-meter.steps :]
    np.testing.assert_allclose(
        meter.history.trace_cov, plain, rtol=2 * bound(torch.float16), atol=0
    )
