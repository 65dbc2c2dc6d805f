"""The meter in plain loops: five lines, cadence, scaling, clipping, bad steps, resuming."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import noisescale
from noisescale import InvalidInputError, NoiseMeter, Outcome
from noisescale.measure.step_log import StepLog
from reference import flat, per_example_gradients, sample_moments


def make_model(dtype=torch.float64, norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(steps=12, n=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(n, 6, generator=generator).to(dtype)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model, meter, optimizer, *, steps=12, pieces=1, factor=1.0, clip=None, batches=None):
    for x, y in batches or data(steps):
        optimizer.zero_grad()
        for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (loss(model, part) * factor / pieces).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return meter


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def metered(source="examples", *, lr=0.05, model=None, **options):
    model = make_model() if model is None else model
    optimizer = sgd(model, lr)
    run = {k: options.pop(k) for k in ("steps", "pieces", "factor", "clip") if k in options}
    return train(model, NoiseMeter(model, optimizer, source=source, **options), optimizer, **run)


def ratio(meter) -> float:
    history = meter.history
    return float(history.trace_cov.mean() / history.grad_sq.mean())


def test_five_lines_in_a_plain_loop():
    from noisescale import NoiseMeter

    model = make_model(torch.float32)
    optimizer = sgd(model)
    meter = NoiseMeter(model, optimizer)
    for x, y in data(30, dtype=torch.float32):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = meter.estimate()
    assert found.outcome == Outcome.DETERMINED
    assert found.low < found.b_simple < found.high
    assert (found.steps, found.examples, found.source) == (30, 480, "examples")
    assert found.parameters_seen.complete
    assert noisescale.NoiseScale.from_json(found.to_json()) == found


def test_history_is_the_textbook_at_the_weights_of_each_step():
    model = make_model()
    optimizer = sgd(model, 0.3)
    meter = NoiseMeter(model, optimizer)
    truth = []
    for batch in data(5):
        truth.append(sample_moments(flat(per_example_gradients(model, loss, batch))))
        train(model, meter, optimizer, batches=[batch])
    found = np.stack([meter.history.grad_sq, meter.history.trace_cov], axis=1)
    np.testing.assert_allclose(found, truth, rtol=1e-9)
    assert meter.history.step.tolist() == [0, 1, 2, 3, 4]
    assert meter.history.examples.tolist() == [16] * 5


def test_estimate_is_the_theory_s_answer_to_the_history():
    from noisescale.theory.interval import estimate_moving

    meter = metered(steps=20)
    h = meter.history
    expected = estimate_moving(grad_sq=h.grad_sq, trace_cov=h.trace_cov, examples=h.examples)
    found = meter.estimate()
    for name in ("b_simple", "low", "high", "outcome", "grad_sq", "trace_cov"):
        assert getattr(found, name) == getattr(expected, name)
    window = meter.estimate(first=3, last=15)
    assert window.steps == 12
    assert window.grad_sq == pytest.approx(h.grad_sq[3:15].mean())
    assert meter.estimate(first=-5).steps == 5


@pytest.mark.parametrize("source", ["examples", "microbatches"])
@pytest.mark.parametrize(
    "change",
    [
        {"clip": 1e-3},
        {"factor": 1024.0, "loss_scale": 1024.0},
        {"factor": 512.0, "loss_scale": lambda: 512.0},
        {"factor": 16 / 4, "loss_reduction": "sum"},
    ],
    ids=["clipping", "loss scale", "loss scale by callable", "sum"],
)
def test_the_answer_does_not_move(source, change):
    """At fixed weights: clipping, loss scale, and the sum (here 16 times the mean)."""
    plain = metered(source, lr=0.0, pieces=4)
    other = dict(change)
    if other.get("loss_reduction"):
        # mean over 4 examples, divided by 4 pieces, times 16 = the plain sum of losses.
        other["factor"] = 16.0
    changed = metered(source, lr=0.0, pieces=4, **other)
    for field in ("grad_sq", "trace_cov"):
        np.testing.assert_allclose(
            getattr(changed.history, field), getattr(plain.history, field), rtol=1e-9
        )


def test_examples_see_accumulation_as_one_step():
    whole, parts = metered(lr=0.0), metered(lr=0.0, pieces=4)
    np.testing.assert_allclose(parts.history.trace_cov, whole.history.trace_cov, rtol=1e-9)
    np.testing.assert_allclose(parts.history.grad_sq, whole.history.grad_sq, rtol=1e-9)
    assert parts.estimate().examples == whole.estimate().examples


def test_cadence_measures_every_kth_step_without_hooks_between():
    model = make_model()
    optimizer = sgd(model)
    meter = NoiseMeter(model, optimizer, every=3)

    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
        ) + sum(
            len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
            for p in model.parameters()
        )

    installed = []
    for batch in data(7):
        installed.append(hooks() > 0)
        train(model, meter, optimizer, batches=[batch])
    assert installed == [True, False, False, True, False, False, True]
    assert meter.history.step.tolist() == [0, 3, 6]
    every = metered(steps=7).history
    np.testing.assert_allclose(meter.history.grad_sq, every.grad_sq[::3], rtol=1e-12)


def test_one_backward_per_step_is_unsupported_and_names_the_remedy():
    found = metered("microbatches").estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert (found.b_simple, found.low, found.steps) == (None, None, 0)
    for remedy in ("accumulate", "split_pass", "source='examples'"):
        assert remedy in found.detail


@pytest.mark.parametrize("source", ["examples", "microbatches"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_steps_are_skipped_and_do_not_poison(source, bad):
    model = make_model()
    optimizer = sgd(model, 0.0)
    meter = NoiseMeter(model, optimizer, source=source)
    for i, batch in enumerate(data(12)):
        factor = bad if i in (0, 5) else 1.0
        # No step is taken on the bad gradient: lr 0 times NaN is NaN.
        kept = [p.detach().clone() for p in model.parameters()]
        train(model, meter, optimizer, batches=[batch], factor=factor, pieces=2)
        with torch.no_grad():
            for p, k in zip(model.parameters(), kept, strict=True):
                p.copy_(k)
    clean = metered(source, lr=0.0, pieces=2).history
    kept_rows = [i for i in range(12) if i not in (0, 5)]
    assert meter.history.step.tolist() == kept_rows
    np.testing.assert_allclose(meter.history.grad_sq, clean.grad_sq[kept_rows], rtol=1e-9)
    found = meter.estimate()
    assert (found.steps, found.skipped_steps) == (10, 2)


def test_only_bad_steps_is_not_finite():
    found = metered(steps=3, factor=float("nan")).estimate()
    assert found.outcome == Outcome.NOT_FINITE
    assert (found.skipped_steps, found.steps, found.b_simple) == (3, 0, None)


def test_an_abandoned_step_is_discarded():
    """GradScaler found inf: no optimizer.step(), gradients set to None, on to the next batch."""
    for source in ("examples", "microbatches"):
        model = make_model()
        optimizer = sgd(model, 0.0)
        meter = NoiseMeter(model, optimizer, source=source)
        batches = list(data(4))
        for x, y in (b for i, b in enumerate(batches) if i == 1):
            for part in zip(x.chunk(2), y.chunk(2), strict=True):
                loss(model, part).backward()
        train(model, meter, optimizer, batches=[batches[0], *batches[2:]], pieces=2)
        assert meter.steps == 3
        assert meter.estimate().skipped_steps == 1
        expected = metered(source, lr=0.0, pieces=2, steps=4).history.grad_sq[[0, 2, 3]]
        np.testing.assert_allclose(meter.history.grad_sq, expected, rtol=1e-9)


@pytest.mark.parametrize("source", ["examples", "microbatches"])
def test_a_real_grad_scaler(source):
    """Its scale is asked for at each step; its skipped step is skipped here too."""

    def run(enabled, steps):
        model = make_model(torch.float32)
        optimizer = sgd(model, 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=enabled)
        meter = NoiseMeter(model, optimizer, source=source, loss_scale=scaler.get_scale)
        for i, (x, y) in enumerate(data(8, dtype=torch.float32)):
            if i not in steps:
                continue
            optimizer.zero_grad()
            for part in zip(x.chunk(2), y.chunk(2), strict=True):
                factor = torch.inf if i == 3 else 1.0
                scaler.scale(loss(model, part) / 2 * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        return meter

    scaled = run(True, range(8))
    plain = run(False, [0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_allclose(scaled.history.grad_sq, plain.history.grad_sq, rtol=1e-4)
    np.testing.assert_allclose(scaled.history.trace_cov, plain.history.trace_cov, rtol=1e-4)
    assert (scaled.steps, scaled.estimate().skipped_steps) == (7, 1)


def test_nothing_measured_yet():
    model = make_model()
    found = NoiseMeter(model, sgd(model)).estimate()
    assert found.outcome == Outcome.TOO_FEW_STEPS
    assert found.grad_sq is None


def test_groups():
    meter = metered(steps=12)
    groups = meter.estimate_groups()
    assert list(groups) == ["0", "2"]
    whole = meter.estimate()
    assert sum(g.grad_sq for g in groups.values()) == pytest.approx(whole.grad_sq)
    assert sum(g.trace_cov for g in groups.values()) == pytest.approx(whole.trace_cov)
    assert groups["0"].parameters_seen.total == 6 * 8 + 8
    named = metered(steps=3, groups={"0.weight": "in", "2.weight": "out"}).estimate_groups()
    assert list(named) == ["in", "other", "out"]
    by_kind = metered(steps=3, groups=lambda n: n.rsplit(".")[-1]).estimate_groups()
    assert list(by_kind) == ["weight", "bias"]


def test_parameters_left_out_are_named_and_group_sums_stay_consistent():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = make_model(), nn.Parameter(torch.ones(3).double())
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return self.body(x) * self.drop(self.scale).cumsum(0)

    meter = metered(model=Scaled())
    found = meter.estimate()
    assert found.parameters_seen.missing == ("scale",)
    assert "scale (Scaled has no rule, and random numbers" in found.detail
    assert list(meter.estimate_groups()) == ["body.0", "body.2"]
    auto = metered("auto", model=Scaled(), pieces=2)
    assert auto.source == "microbatches"
    assert auto.estimate().parameters_seen.complete


def test_auto_changes_over_when_the_first_step_shows_a_gap():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.b(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))

    meter = metered("auto", model=Functional(), pieces=2, steps=5)
    assert meter.source == "microbatches"
    assert meter.steps == 4
    fixed = metered("examples", model=Functional(), steps=5)
    assert fixed.estimate().parameters_seen.missing == ("a.weight", "a.bias")


def test_a_gap_found_later_starts_the_log_again():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            h = torch.tanh(self.a(x))
            return self.b(h + self.a(h[:1]) if self.calls > 4 else h)

    meter = metered("examples", model=Sometimes(), steps=12)
    found = meter.estimate()
    assert found.steps == 8
    assert found.parameters_seen.missing == ("a.weight", "a.bias")
    assert "started again" in found.detail


def test_batchnorm_examples_refuse_and_microbatches_say_their_unit():
    found = metered("examples", model=make_model(norm=True)).estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert "BatchNorm '1'" in found.detail
    auto = metered("auto", model=make_model(norm=True), pieces=2, steps=12)
    assert auto.source == "microbatches"
    assert "the unit is the normalised micro-batch of 8" in auto.estimate().detail


@pytest.mark.parametrize("norm", [False, True])
def test_split_pass_leaves_everything_alone(norm):
    def run(split):
        model = make_model(norm=norm)
        model.append(nn.Dropout(0.3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        meter = NoiseMeter(model, optimizer, source="microbatches", every=2)
        done = []
        for batch in data(12):
            optimizer.zero_grad()
            loss(model, batch).backward()
            if split:
                grads = [p.grad for p in model.parameters()]
                done.append(meter.split_pass(loss, batch, micro_batch_size=4))
                assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            optimizer.step()
        return meter, model, done, torch.rand(2)

    meter, model, done, after = run(True)
    _, plain, _, plain_after = run(False)
    assert done == [True, False] * 6
    assert torch.equal(after, plain_after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    found = meter.estimate()
    assert (found.steps, found.examples) == (6, 96)
    assert "24 extra passes over 96 examples" in found.detail
    assert ("normalised micro-batch of 4" in found.detail) == norm


def test_split_pass_equals_accumulation():
    accumulated = metered("microbatches", lr=0.0, pieces=4)
    model = make_model()
    optimizer = sgd(model, 0.0)
    meter = NoiseMeter(model, optimizer, source="microbatches")
    for batch in data(12):
        train(model, meter, optimizer, batches=[])
        optimizer.zero_grad()
        meter.split_pass(loss, batch, micro_batch_size=4)
        loss(model, batch).backward()
        optimizer.step()
    np.testing.assert_allclose(meter.history.grad_sq, accumulated.history.grad_sq, rtol=1e-9)
    np.testing.assert_allclose(meter.history.trace_cov, accumulated.history.trace_cov, rtol=1e-9)


def test_split_pass_that_does_not_split_is_unsupported():
    model = make_model()
    meter = NoiseMeter(model, source="microbatches")
    assert not meter.split_pass(loss, next(iter(data(1))), micro_batch_size=16)
    meter.close_step()
    found = meter.estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert "micro_batch_size 16" in found.detail


def test_closing_by_hand():
    model = make_model()
    meter = NoiseMeter(model, source="examples")
    for batch in data(3):
        model.zero_grad()
        loss(model, batch).backward()
        meter.close_step()
    assert meter.steps == 3
    with pytest.raises(InvalidInputError, match="close_step"):
        NoiseMeter(model, sgd(model)).close_step()


def test_state_dict_resumes_exactly():
    whole = metered(steps=12, every=2, clip=1.0)
    model = make_model()
    optimizer = sgd(model)
    batches = list(data(12))
    first = NoiseMeter(model, optimizer, every=2)
    train(model, first, optimizer, batches=batches[:5], clip=1.0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.detach()
    file.seek(0)
    second = NoiseMeter(model, optimizer, every=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(model, second, optimizer, batches=batches[5:], clip=1.0)
    assert second.estimate() == whole.estimate()
    assert second.history.step.tolist() == whole.history.step.tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("change", [{"source": "microbatches"}, {"every": 2}, {"groups": str}])
def test_state_of_another_meter_is_refused(change):
    model = make_model()
    state = NoiseMeter(model, source="examples").state_dict()
    other = NoiseMeter(model, **{"source": "examples", **change})
    with pytest.raises(InvalidInputError, match=next(iter(change))):
        other.load_state_dict(state)


def test_detach_leaves_nothing_behind():
    model = make_model()
    optimizer = sgd(model)
    with NoiseMeter(model, optimizer) as meter:
        train(model, meter, optimizer, steps=2)
    train(model, meter, optimizer, steps=2)
    assert meter.steps == 2
    assert not optimizer._optimizer_step_pre_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for p in model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks


def test_an_optimizer_with_a_closure_is_unsupported():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    meter = NoiseMeter(model, optimizer)
    for batch in data(2):

        def closure(batch=batch):
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        optimizer.step(closure)
    found = meter.estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert "closure" in found.detail


def test_a_batch_of_one_is_refused():
    model = make_model()
    optimizer = sgd(model)
    meter = train(model, NoiseMeter(model, optimizer), optimizer, batches=data(2, n=1))
    found = meter.estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert "at least 2" in found.detail


def test_population():
    finite, infinite = metered(population_size=32, lr=0.0), metered(lr=0.0)
    np.testing.assert_allclose(finite.history.trace_cov, infinite.history.trace_cov * 31 / 32)
    assert finite.estimate().population == "train_set"
    small = metered(population_size=10).estimate()
    assert small.outcome == Outcome.UNSUPPORTED


@pytest.mark.parametrize(
    "options",
    [
        {"source": "exmples"},
        {"every": 0},
        {"every": 1.5},
        {"loss_reduction": "max"},
        {"level": 1.0},
        {"loss_scale": 0.0},
        {"loss_scale": "auto"},
        {"groups": {"0.weigth": "a"}},
    ],
)
def test_bad_arguments(options):
    with pytest.raises(InvalidInputError):
        NoiseMeter(make_model(), **options)


def test_a_model_without_trainable_parameters():
    with pytest.raises(InvalidInputError, match="trainable"):
        NoiseMeter(make_model().requires_grad_(False))


def test_the_log_moves_to_the_host_in_bulk():
    """No transfer per step: pending steps wait for 256 of them or for a reader."""
    meter = metered(steps=12)
    log = meter._log
    assert isinstance(log, StepLog)
    assert len(log._pending) == 12
    assert meter.steps == 12
    assert len(log._pending) == 0


def test_a_loop_that_closes_no_step_is_told_so():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = NoiseMeter(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    noise = meter.estimate()
    assert noise.outcome is Outcome.UNSUPPORTED
    assert "close_step()" in noise.detail


@pytest.mark.parametrize("source", ["examples", "microbatches"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_never_zeroed_are_refused(source, set_to_none):
    """The first step is clean; every later one would hold the gradients before it."""
    torch.manual_seed(0)

    def run(zero):
        model = torch.nn.Linear(5, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        meter = NoiseMeter(model, optimizer, source=source)
        for _ in range(20):
            if zero:
                optimizer.zero_grad(set_to_none=set_to_none)
            for _ in range(2):
                (model(torch.randn(8, 5)) - 1).square().mean().div(2).backward()
            optimizer.step()
        return meter.estimate()

    assert run(zero=True).steps == 20
    forgotten = run(zero=False)
    assert forgotten.steps == 1
    assert "zero_grad()" in forgotten.detail
    assert forgotten.b_simple is None
