"""Each known defect of noise-scale estimators, written out, and the test that it fails.

Every test states one property, shows that ours has it, and that the defective variant, built
here on purpose, does not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale import NoiseMeter, Outcome
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory
from noisescale.measure.microbatches import MicrobatchSource
from noisescale.measure.squares import squared_norm
from noisescale.theory.noise_scale import unbiased_moments
from reference import flat, per_example_gradients

DIMENSIONS = 20


def draws(noise_scale: float, batches=400, size=16, seed=0) -> torch.Tensor:
    """Per-example gradients with |G|^2 = 1 and tr(Sigma) = noise_scale: (batches, size, d)."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.ones(DIMENSIONS).double() / DIMENSIONS**0.5
    noise = torch.randn(batches, size, DIMENSIONS, generator=generator).double()
    return gradient + noise * (noise_scale / DIMENSIONS) ** 0.5


class Mean(nn.Module):
    """Its gradient for one example is that example: gradients can be dictated."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(DIMENSIONS, 1, bias=False).double()

    def forward(self, x):
        return self.layer(x)


def ours(rows: torch.Tensor, *, source="examples", pieces=1, **options) -> NoiseMeter:
    """Feed (batches, size, d) gradients to the meter at weights that do not move."""
    model = Mean()
    meter = NoiseMeter(model, source=source, **options)
    for batch in rows:
        model.zero_grad()
        for part in batch.chunk(pieces):
            (model(part).mean() / pieces).backward()
        meter.close_step()
    return meter


def reads(grad_sq, trace, truth: float) -> bool:
    """Whether the ratio of the means agrees with the truth, within 4 standard errors.

    The contrast trace - truth * grad_sq has mean 0 exactly where the ratio of the means is
    right; its standard error comes from the steps, which are independent.
    """
    contrast = np.asarray(trace) - truth * np.asarray(grad_sq)
    return abs(contrast.mean()) < 4 * contrast.std(ddof=1) / len(contrast) ** 0.5


def meter_reads(meter: NoiseMeter, truth: float) -> bool:
    return reads(meter.history.grad_sq, meter.history.trace_cov, truth)


@pytest.mark.parametrize("truth", [1.0, 10.0, 100.0])
def test_missing_factor_b(truth):
    """tr(Sigma) of the micro-batch mean for that of an example: off by the micro-batch size."""
    rows = draws(truth)
    means = rows.reshape(400, 4, 4, DIMENSIONS).mean(2)
    trace = means.var(1, correction=1).sum(1)
    grad_sq = means.mean(1).square().sum(1) - trace / 4
    assert not reads(grad_sq, trace, truth)
    assert reads(grad_sq, 4 * trace, truth)
    assert meter_reads(ours(rows, source="microbatches", pieces=4), truth)


@pytest.mark.parametrize("truth", [10.0, 100.0])
def test_plug_in_that_saturates_at_the_batch_size(truth):
    rows = draws(truth)
    trace, mean_sq = rows.var(1, correction=1).sum(1), rows.mean(1).square().sum(1)
    assert trace.mean() / mean_sq.mean() < 16
    assert not reads(mean_sq, trace, truth)
    assert meter_reads(ours(rows), truth)


def test_variance_of_scalar_norms():
    """It cannot tell a noise scale of 10 from one of 100."""
    readings = []
    for truth in (10.0, 100.0):
        rows = draws(truth)
        spread, mean_sq = rows.norm(dim=2).var(1), rows.mean(1).square().sum(1)
        readings.append(float(spread.mean() / mean_sq.mean()))
        assert not reads(mean_sq, spread, truth)
        assert meter_reads(ours(rows), truth)
    assert readings[1] / readings[0] < 5


def test_small_and_big_batch_at_different_weights():
    """|g|^2 of the small batches before the weights moved, of the big one after."""
    model = Mean()
    rows = draws(10.0, batches=300)
    decay = torch.linspace(2.0, 0.0, 301).double()
    meter = NoiseMeter(model, source="microbatches")
    small, big = [], []
    for i, batch in enumerate(rows):
        # Gradients of a training that converges: the true one shrinks from step to step.
        drift = (decay[i] - 1) * torch.ones(DIMENSIONS).double() / DIMENSIONS**0.5
        model.zero_grad()
        for part in (batch + drift).chunk(4):
            (model(part).mean() / 4).backward()
        meter.close_step()
        small.append(float((batch + drift)[:4].mean(0).square().sum()))
        later = (decay[min(i + 60, 300)] - 1) * torch.ones(DIMENSIONS).double() / DIMENSIONS**0.5
        big.append(float((batch + later).mean(0).square().sum()))
    truth = float(decay[:300].square().mean())
    defective = (16 * np.mean(big) - 4 * np.mean(small)) / 12
    found = meter.history.grad_sq
    error = found.std() / 300**0.5
    assert abs(defective - truth) > 4 * error
    assert abs(found.mean() - truth) < 4 * error


def test_only_the_last_batch_used_as_the_small_one():
    """Unbiased, but much noisier than all micro-batches together."""
    rows = draws(10.0, batches=400)
    last = rows[:, -4:].mean(1).square().sum(1)
    big = rows.mean(1).square().sum(1)
    defective = ((last - big) / (1 / 4 - 1 / 16)).numpy()
    found = ours(rows, source="microbatches", pieces=4).history.trace_cov
    textbook = 4 * rows.reshape(400, 4, 4, DIMENSIONS).mean(2).var(1, correction=1).sum(1).numpy()
    np.testing.assert_allclose(found, textbook, rtol=1e-9)
    assert np.std(defective) > 1.5 * np.std(found)
    assert not np.allclose(defective, textbook, rtol=0.1)


def test_clamping_before_averaging():
    rows = draws(100.0, size=8)
    history = ours(rows).history
    assert (history.grad_sq < 0).mean() > 0.2
    assert not reads(np.maximum(history.grad_sq, 1e-8), history.trace_cov, 100.0)
    assert reads(history.grad_sq, history.trace_cov, 100.0)


def test_a_hopeless_case_has_no_absurd_number():
    """|G|^2 = 0: clamped to 1e-8 it reads as a noise scale of a billion."""
    rows = draws(100.0, batches=60, size=8) - torch.ones(DIMENSIONS).double() / DIMENSIONS**0.5
    found = ours(rows).estimate()
    clamped = found.trace_cov / max(min(found.grad_sq, 0.0), 1e-8)
    assert clamped > 1e9
    assert found.outcome in (Outcome.LOWER_BOUND, Outcome.TOO_FEW_STEPS)
    assert found.b_simple is None
    assert found.high is None


def measured(model, loss, batch):
    """(sum of squared per-example norms by the source, by the slow loop)."""
    source = ExamplesSource(model, Inventory(model))
    source.open()
    loss(model, batch).backward()
    norms = source.close()
    rows = flat(per_example_gradients(model, loss, batch))
    return float(norms.weighted.sum()) * norms.weighted_factor, float(rows.square().sum())


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3, bias=False).double()

    def forward(self, x):
        return torch.tanh(self.layer(x)).mean(1)


def test_squares_before_the_sum_over_time():
    torch.manual_seed(0)
    # Positions that resemble each other: their gradients add up rather than cancel.
    batch = 1 + 0.3 * torch.randn(6, 5, 4).double(), torch.randn(6, 3).double()

    def loss(model, batch):
        return (model(batch[0]) * batch[1]).sum(1).mean()

    model = Sequence()
    found, truth = measured(model, loss, batch)
    y = torch.tanh(model.layer(batch[0])).detach()
    g = (1 - y.square()) * batch[1].unsqueeze(1) / 5
    defective = float((g.square().sum(2) * batch[0].square().sum(2)).sum())
    assert found == pytest.approx(truth, rel=1e-9)
    assert defective != pytest.approx(truth, rel=0.1)


def test_mean_over_features():
    rows = draws(10.0, batches=20)
    found = float(ours(rows).history.trace_cov.mean())
    truth = float(rows.var(1, correction=1).sum(1).mean())
    defective = float(rows.var(1, correction=1).mean(1).mean())
    assert found == pytest.approx(truth, rel=1e-9)
    assert defective != pytest.approx(truth, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_accumulation(dtype):
    gradient = torch.full((20_000,), 0.01).to(dtype)
    truth = float(gradient.double().square().sum())
    defective = gradient.new_zeros(())
    for part in gradient.square().split(10):
        defective = defective + part.sum()
    found = squared_norm(gradient)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(truth, rel=1e-6)
    assert float(defective) != pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("size", [100, 4096, 20_000, 65_537, 3_000_000])
@pytest.mark.parametrize("equal", [False, True], ids=["normal", "equal"])
def test_long_sums_stay_exact_in_float32(size, equal):
    """Equal numbers are the worst case of a running sum: every rounding has the same sign."""
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0))
    gradient = torch.full_like(gradient, 0.1) if equal else gradient
    truth = float(gradient.double().square().sum())
    assert float(squared_norm(gradient)) == pytest.approx(truth, rel=2e-6)


@pytest.mark.parametrize("source", ["examples", "microbatches"])
def test_loss_scaled_against_unscaled(source):
    """A dynamic scale: squares of scaled gradients beside an unscaled mean gradient."""
    rows = draws(10.0, batches=60)
    plain = ours(rows, source=source, pieces=4).history
    scale = {"now": 1.0}
    model = Mean()
    meter = NoiseMeter(model, source=source, loss_scale=lambda: scale["now"])
    defective = []
    for i, batch in enumerate(rows):
        scale["now"] = 2.0 ** (i % 5)
        model.zero_grad()
        for part in batch.chunk(4):
            (model(part).mean() / 4 * scale["now"]).backward()
        squares = (batch * scale["now"]).square().sum()
        _, trace = unbiased_moments(
            units=16,
            examples=16,
            weighted_sq=float(squares),
            mean_sq=float(batch.mean(0).square().sum()),
        )
        defective.append(float(trace))
        meter.close_step()
    np.testing.assert_allclose(meter.history.grad_sq, plain.grad_sq, rtol=1e-9)
    np.testing.assert_allclose(meter.history.trace_cov, plain.trace_cov, rtol=1e-9)
    assert not reads(plain.grad_sq, defective, 10.0)


def test_one_inf_step_poisons_nothing():
    rows = draws(10.0, batches=40)
    rows[7, 3, 0] = torch.inf
    meter = ours(rows)
    average = 0.0
    for batch in rows:
        average = 0.9 * average + 0.1 * float(batch.mean(0).square().sum())
    assert not np.isfinite(average)
    found = meter.estimate()
    assert np.isfinite(found.grad_sq)
    assert (found.steps, found.skipped_steps) == (39, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(5, 4).double()
        self.out = nn.Linear(4, 5, bias=False).double()
        self.out.weight = self.emb.weight

    def forward(self, ids):
        return self.out(self.emb(ids))


def ids_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def test_tied_weights_are_not_the_sum_of_their_uses():
    """Exact under examples and under micro-batches of one."""
    model = Tied()
    batch = torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6, 3))
    truth = float(flat(per_example_gradients(model, ids_loss, batch)).square().sum())
    untied = Tied()
    untied.out.weight = nn.Parameter(untied.out.weight.detach().clone())
    defective, _ = measured(untied, ids_loss, batch)
    assert defective != pytest.approx(truth, rel=0.01)

    found, _ = measured(model, ids_loss, batch)
    assert found == pytest.approx(truth, rel=1e-9)
    model.zero_grad()

    source = MicrobatchSource(model, Inventory(model))
    source.open()
    for pair in zip(*batch, strict=True):
        (ids_loss(model, tuple(t.unsqueeze(0) for t in pair)) / 6).backward()
    norms = source.close()
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(truth, rel=1e-9)


def test_layers_without_a_rule_are_not_skipped_in_silence():
    class Gate(nn.PReLU):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return super().forward(self.drop(x))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate = nn.Linear(4, 4).double(), Gate().double()

        def forward(self, x):
            return self.gate(self.first(x))

    model = Gated()
    meter = NoiseMeter(model, source="examples")
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(6, 4).double()).square().mean().backward()
        meter.close_step()
    seen = meter.estimate().parameters_seen
    assert seen.missing == ("gate.weight",)
    assert (seen.seen, seen.total) == (20, 21)
    # |mean gradient|^2 covers the same parameters: the defective one takes it over all.
    row = meter.history
    expected = sum(p.grad.square().sum() for p in model.first.parameters())
    whole = expected + model.gate.weight.grad.square().sum()
    mean_sq = row.grad_sq[-1] + row.trace_cov[-1] / 6
    assert mean_sq == pytest.approx(float(expected), rel=1e-9)
    assert mean_sq != pytest.approx(float(whole), rel=1e-3)


def test_gradients_read_after_clipping():
    rows = draws(10.0, batches=40)
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = NoiseMeter(model, optimizer, source="examples")
    defective = []
    for batch in rows:
        optimizer.zero_grad()
        model(batch).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        defective.append(float(model.layer.weight.grad.square().sum()))
        optimizer.step()
    plain = ours(rows).history
    np.testing.assert_allclose(meter.history.grad_sq, plain.grad_sq, rtol=1e-9)
    assert np.mean(defective) < 0.02 * rows.mean(1).square().sum(1).mean()


def test_accumulated_gradient_taken_for_one_micro_batch():
    """p.grad after the j-th backward pass is a sum of j micro-batches, not the j-th."""
    rows = draws(10.0, batches=400)
    model = Mean()
    defective = []
    for batch in rows:
        model.zero_grad()
        squares = []
        for part in batch.chunk(4):
            (model(part).mean() / 4).backward()
            squares.append(float(model.layer.weight.grad.square().sum()) * 16)
        mean_sq = float(model.layer.weight.grad.square().sum())
        defective.append(
            unbiased_moments(units=4, examples=16, weighted_sq=4 * sum(squares), mean_sq=mean_sq)
        )
    assert not reads(*np.transpose(defective), 10.0)
    assert meter_reads(ours(rows, source="microbatches", pieces=4), 10.0)


def test_mean_of_ratios():
    rows = draws(25.0, size=32)
    meter = ours(rows)
    history = meter.history
    found = meter.estimate()
    assert meter_reads(meter, 25.0)
    assert found.b_simple == pytest.approx(history.trace_cov.mean() / history.grad_sq.mean())
    defective = float((history.trace_cov / history.grad_sq).mean())
    assert not reads(history.grad_sq, history.trace_cov, defective)


def test_memory_in_steps_while_the_batch_size_changes():
    """30 small batches at noise 40, 30 big ones at noise 10: an example has one vote each.

    The mean over steps gives the small batches' few examples half the weight.
    """
    small, big = draws(40.0, batches=30, size=4), draws(10.0, batches=30, size=60, seed=1)
    model = Mean()
    meter = NoiseMeter(model, source="examples")
    for batch in (*small, *big):
        model.zero_grad()
        model(batch).mean().backward()
        meter.close_step()
    history = meter.history
    examples = np.array([4] * 30 + [60] * 30)
    truth = (4 * 40.0 + 60 * 10.0) / 64
    assert history.examples.tolist() == examples.tolist()
    error = (history.trace_cov * examples).std() / examples.mean() / 60**0.5
    assert abs(meter.estimate().trace_cov - truth) < 4 * error
    assert abs(history.trace_cov.mean() - truth) > 4 * error
    assert meter.estimate().examples == 30 * 64
