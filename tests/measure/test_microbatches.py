"""The micro-batch source: as accumulation happens, by a split pass, and against the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import GradientSource, Inventory, Refused, StepNorms
from noisescale.measure.microbatches import MicrobatchSource, split_gradients
from noisescale.theory.noise_scale import unbiased_moments
from reference import flat, microbatch_moments, per_example_gradients, sample_moments


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batch(n=64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, 6).double(), torch.randint(0, 3, (n,))


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def sum_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def accumulate(source: GradientSource, model, batch, sizes, *, factor=None, loss=mean_loss):
    """One optimizer step in micro-batches; the loss over ``factor``, by default their number."""
    model.zero_grad()
    source.open()
    for x, y in zip(batch[0].split(sizes), batch[1].split(sizes), strict=True):
        (loss(model, (x, y)) / (factor or len(sizes))).backward()
    return source.close()


def by_microbatches(model, batch, sizes, **options):
    reduction = options.pop("loss_reduction", "mean")
    source = MicrobatchSource(model, Inventory(model), loss_reduction=reduction)
    result = accumulate(source, model, batch, sizes, **options)
    source.detach()
    return result


def by_examples(model, batch, sizes, **options):
    reduction = options.pop("loss_reduction", "mean")
    source = ExamplesSource(model, Inventory(model), loss_reduction=reduction)
    result = accumulate(source, model, batch, sizes, **options)
    source.detach()
    return result


def moments(norms: StepNorms) -> tuple[float, float]:
    assert isinstance(norms, StepNorms), norms
    g, s = unbiased_moments(
        units=norms.units,
        examples=norms.effective,
        weighted_sq=float(norms.weighted.sum()) * norms.weighted_factor,
        mean_sq=float(norms.mean.sum()) * norms.mean_factor,
    )
    return float(g), float(s)


@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_equals_the_textbook(size):
    model, batch = make_model(), make_batch()
    rows = flat(per_example_gradients(model, mean_loss, batch))
    expected = microbatch_moments(rows, size)
    assert moments(by_microbatches(model, batch, [size] * (64 // size))) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("sizes", [[64], [32, 32], [8] * 8])
def test_examples_do_not_see_the_split(sizes):
    model, batch = make_model(), make_batch()
    expected = sample_moments(flat(per_example_gradients(model, mean_loss, batch)))
    assert moments(by_examples(model, batch, sizes)) == pytest.approx(expected, rel=1e-9)


def test_examples_equal_micro_batches_of_one():
    model, batch = make_model(), make_batch()
    assert moments(by_examples(model, batch, [64])) == pytest.approx(
        moments(by_microbatches(model, batch, [1] * 64)), rel=1e-9
    )


def test_every_split_agrees_in_expectation():
    """2x32, 8x8 and examples over 100 batches: paired means within 4 standard errors.

    64x1 equals the examples exactly, in the test above.
    """
    model = make_model()
    examples = ExamplesSource(model, Inventory(model))
    microbatches = MicrobatchSource(model, Inventory(model))
    values = []
    for seed in range(100):
        batch = make_batch(seed=seed)
        found = []
        for source, sizes in (
            (examples, [64]),
            (microbatches, [32] * 2),
            (microbatches, [8] * 8),
        ):
            found.append(moments(accumulate(source, model, batch, sizes)))
            source.pause()
        values.append(found)
    table = np.array(values)
    difference = table[:, 1:] - table[:, :1]
    error = difference.std(0, ddof=1) / np.sqrt(len(table))
    assert np.all(np.abs(difference.mean(0)) < 4 * error)


def test_one_backward_pass_names_the_remedy():
    result = by_microbatches(make_model(), make_batch(), [64])
    assert isinstance(result, Refused)
    for remedy in ("accumulate", "split_pass", "examples"):
        assert remedy in result.detail


@pytest.mark.parametrize("by", [by_examples, by_microbatches])
@pytest.mark.parametrize("sizes", [[16] * 4, [10, 20, 34]])
def test_sum_and_mean_reduction_agree(by, sizes):
    """A summed loss: equal sizes give the mean loss's numbers; unequal ones the weighted."""
    model, batch = make_model(), make_batch()
    summed = moments(by(model, batch, sizes, loss=sum_loss, factor=1.0, loss_reduction="sum"))
    rows = flat(per_example_gradients(model, mean_loss, batch))
    if by is by_examples:
        assert summed == pytest.approx(sample_moments(rows), rel=1e-9)
    else:
        means = torch.stack([part.mean(0) for part in rows.split(sizes)])
        b = torch.tensor(sizes).double()
        trace = float((b * (means - rows.mean(0)).square().sum(1)).sum()) / (len(sizes) - 1)
        expected = float(rows.mean(0).square().sum()) - trace / 64, trace
        assert summed == pytest.approx(expected, rel=1e-9)
    if len(set(sizes)) == 1:
        assert summed == pytest.approx(moments(by(model, batch, sizes)), rel=1e-9)


@pytest.mark.parametrize("by", [by_examples, by_microbatches])
def test_any_constant_before_the_mean_cancels(by):
    model, batch = make_model(), make_batch()
    g, s = moments(by(model, batch, [8] * 8, factor=8.0))
    g1, s1 = moments(by(model, batch, [8] * 8, factor=1.0))
    assert s1 / g1 == pytest.approx(s / g, rel=1e-9)


@pytest.mark.parametrize("by", [by_examples, by_microbatches])
def test_unequal_sizes_under_a_mean_loss_are_unbiased(by):
    """Sizes 2, 6, 24: |G|^2 and tr(Sigma) of linear regression against the exact ones.

    Gradients are exact draws from a known population of 4 vectors, so that the truth is its
    census with replacement; tolerance 4 standard errors over 600 draws.
    """
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    vectors = torch.tensor([[1.0, 0, 2], [0, -1, 1], [3, 1, 0], [-1, 1, 1]]).double()
    rows = vectors
    truth = (
        float(rows.mean(0).square().sum()),
        float(rows.var(0, correction=0).sum()),
    )
    generator = torch.Generator().manual_seed(0)

    def loss(model, batch):
        return model(batch[0]).mean()

    source = (ExamplesSource if by is by_examples else MicrobatchSource)(model, Inventory(model))
    found = []
    for _ in range(400):
        x = vectors[torch.randint(4, (32,), generator=generator)]
        found.append(moments(accumulate(source, model, (x, x), [2, 6, 24], loss=loss)))
    table = np.array(found)
    error = table.std(0, ddof=1) / np.sqrt(len(table))
    assert np.all(np.abs(table.mean(0) - truth) < 4 * error)


def test_two_forwards_in_one_backward_are_one_unit():
    model, (x, y) = make_model(), make_batch(8)
    source = MicrobatchSource(model, Inventory(model))
    source.open()
    for half in ((0, 2, 4), (4, 6, 8)):
        a, b, c = half
        (mean_loss(model, (x[a:b], y[a:b])) / 2 + mean_loss(model, (x[b:c], y[b:c])) / 2).div(
            2
        ).backward()
    assert moments(source.close()) == pytest.approx(
        moments(by_microbatches(model, (x, y), [4, 4])), rel=1e-9
    )


def test_all_forwards_before_all_backwards():
    model, (x, y) = make_model(), make_batch(12)
    source = MicrobatchSource(model, Inventory(model), loss_reduction="sum")
    source.open()
    sizes = [2, 4, 6]
    losses = [sum_loss(model, part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
    for value in reversed(losses):
        value.backward()
    found = moments(source.close())
    expected = by_microbatches(
        model, (x, y), sizes, loss=sum_loss, factor=1.0, loss_reduction="sum"
    )
    assert found == pytest.approx(moments(expected), rel=1e-9)


def test_outputs_of_any_shape():
    """A dataclass output carries no hooks: passes are told apart by the parameters."""

    class Out:
        def __init__(self, logits):
            self.logits = logits

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, *, x):
            return Out(self.body(x))

    model, batch = Model(), make_batch(12)

    def loss(model, batch):
        return F.cross_entropy(model(x=batch[0]).logits, batch[1])

    assert moments(by_microbatches(model, batch, [4] * 3, loss=loss)) == pytest.approx(
        moments(by_microbatches(model.body, batch, [4] * 3)), rel=1e-9
    )


def test_gradient_twice_in_one_pass_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            x = x.requires_grad_()
            return sum(checkpoint(self.body, x, use_reentrant=True) for _ in range(2))

    result = by_microbatches(Twice(), make_batch(8), [4, 4])
    assert isinstance(result, Refused)
    assert "twice" in result.detail


def test_tied_weights_are_measured():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))[:, :3]

    model, batch = Tied().double(), make_batch(16)
    rows = flat(per_example_gradients(model, mean_loss, batch))
    assert moments(by_microbatches(model, batch, [4] * 4)) == pytest.approx(
        microbatch_moments(rows, 4), rel=1e-9
    )


def test_sparse_gradients_are_measured():
    def model_of(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 6, sparse=sparse), nn.Flatten(), nn.Linear(18, 3))

    batch = torch.randint(0, 5, (8, 3)), torch.randint(0, 3, (8,))
    assert moments(by_microbatches(model_of(True), batch, [2] * 4)) == pytest.approx(
        moments(by_microbatches(model_of(False), batch, [2] * 4)), rel=1e-5
    )


def test_sizes_by_a_function_of_the_user():
    model = nn.Sequential(nn.Flatten(0, 1), make_model())
    source = MicrobatchSource(
        model, Inventory(model), batch_size_of=lambda args, _: args[0].shape[0] * args[0].shape[1]
    )
    x, y = make_batch(12)
    norms = accumulate(
        source,
        model,
        (x.unflatten(0, (2, 6)), y.unflatten(0, (2, 6))),
        [1, 1],
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1].flatten()),
    )
    assert norms.examples == 12


def test_split_gradients_are_the_slices_gradients():
    model, batch = make_model(), make_batch(11)
    rows = flat(per_example_gradients(model, mean_loss, batch))
    found = split_gradients(mean_loss, model, Inventory(model), batch, 4)
    assert found.sizes == (4, 4, 3)
    mean = torch.cat([found.mean[i].flatten() for i in range(4)])
    torch.testing.assert_close(mean, rows.mean(0))
    expected = sum(len(r) * float(r.mean(0).square().sum()) for r in rows.split(4))
    assert float(sum(found.weighted.values())) == pytest.approx(expected)
    summed = split_gradients(sum_loss, model, Inventory(model), batch, 4, loss_reduction="sum")
    torch.testing.assert_close(summed.mean, found.mean)
    torch.testing.assert_close(summed.weighted, found.weighted)


def test_split_gradients_refuse_what_is_no_loss():
    model = make_model()
    with pytest.raises(InvalidInputError, match="scalar"):
        split_gradients(lambda m, b: m(b[0]), model, Inventory(model), make_batch(4), 2)
    with pytest.raises(InvalidInputError, match="scalar"):
        split_gradients(lambda m, b: torch.ones(()), model, Inventory(model), make_batch(4), 2)
    with pytest.raises(InvalidInputError, match="micro_batch_size 0"):
        split_gradients(mean_loss, model, Inventory(model), make_batch(4), 0)


@pytest.mark.parametrize("source", ["examples", "microbatches"])
def test_passes_weighted_by_size_need_sum_and_are_told_so(source):
    """One gradient, three ways to make it: the ratio is the same where the weights are declared."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(960, 6), torch.randint(3, (960,))
    found = {}
    for name, sizes, reduction in (
        ("whole", (48,) if source == "examples" else (24, 24), "mean"),
        ("declared", (44, 4), "sum"),
        ("undeclared", (44, 4), "mean"),
    ):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        meter = NoiseMeter(model, optimizer, source=source, loss_reduction=reduction)
        for start in range(0, 960, 48):
            optimizer.zero_grad()
            rows = torch.arange(start, start + 48)
            for part in rows.split(list(sizes)):
                loss = torch.nn.functional.cross_entropy(model(inputs[part]), labels[part])
                (loss * len(part) / 48).backward()
            optimizer.step()
        found[name] = meter.estimate()
    assert "loss_reduction='sum'" in found["undeclared"].detail
    assert found["declared"].detail == ""
    if source == "examples":
        assert found["declared"].b_simple == pytest.approx(found["whole"].b_simple, rel=1e-4)
    else:
        assert found["declared"].low < found["whole"].b_simple < found["declared"].high
