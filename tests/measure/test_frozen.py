"""The pooled measurement at weights that are held still."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale import InvalidInputError, Outcome, measure_noise_scale
from noisescale.measure.gradients import Inventory
from noisescale.measure.mean_gradients import MeanGradients
from reference import census, flat, microbatch_moments, per_example_gradients, sample_moments


def make_model(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def make_data(n=120):
    torch.manual_seed(1)
    x = torch.randn(n, 6).double()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def all_rows(model, data):
    return flat(per_example_gradients(model, loss, data))


def test_a_full_pass_by_examples_is_a_census():
    model, data = make_model(), make_data()
    found, groups = measure_noise_scale(
        model, loss, data, batch_size=32, steps=100, population="train_set"
    )
    grad_sq, trace = census(all_rows(model, data))
    assert found.outcome == Outcome.DETERMINED
    assert found.grad_sq == pytest.approx(grad_sq, rel=1e-9)
    assert found.trace_cov == pytest.approx(trace, rel=1e-9)
    assert found.low == found.high == found.b_simple == pytest.approx(trace / grad_sq, rel=1e-9)
    assert (found.steps, found.examples, found.population) == (4, 120, "train_set")
    assert sum(g.trace_cov for g in groups.values()) == pytest.approx(trace, rel=1e-9)
    assert all(g.low == g.high for g in groups.values())


def test_all_draws_are_one_big_batch():
    """12 draws of 10 without replacement: the textbook on all 120 examples at once."""
    model, data = make_model(), make_data()
    found, _ = measure_noise_scale(model, loss, data, batch_size=10, steps=12)
    expected = sample_moments(all_rows(model, data))
    assert (found.grad_sq, found.trace_cov) == pytest.approx(expected, rel=1e-9)
    assert found.source == "examples"
    assert found.low < found.grad_sq**-1 * found.trace_cov < (found.high or np.inf)


def test_part_of_the_data_is_drawn_without_replacement():
    model, data = make_model(), make_data()
    found, _ = measure_noise_scale(model, loss, data, batch_size=6, steps=10, seed=3)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))[:60]
    expected = sample_moments(all_rows(model, data)[order])
    assert (found.grad_sq, found.trace_cov) == pytest.approx(expected, rel=1e-9)
    again, _ = measure_noise_scale(
        model, loss, data, batch_size=6, steps=10, generator=torch.Generator().manual_seed(3)
    )
    assert again == found


def test_microbatches():
    model, data = make_model(), make_data()
    found, _ = measure_noise_scale(
        model, loss, data, batch_size=12, steps=10, source="microbatches", micro_batch_size=3
    )
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    expected = microbatch_moments(all_rows(model, data)[order], 3)
    assert (found.grad_sq, found.trace_cov) == pytest.approx(expected, rel=1e-9)
    assert found.source == "microbatches"
    ones, _ = measure_noise_scale(
        model, loss, data, batch_size=12, steps=10, source="microbatches", micro_batch_size=1
    )
    by_examples, _ = measure_noise_scale(model, loss, data, batch_size=12, steps=10)
    for field in ("b_simple", "low", "high", "grad_sq", "trace_cov"):
        assert getattr(ones, field) == pytest.approx(getattr(by_examples, field), rel=1e-6)


def test_steps_merge_into_at_most_32_groups_without_changing_the_moments():
    model, data = make_model(), make_data(110)
    found, _ = measure_noise_scale(model, loss, data, batch_size=1, steps=110)
    expected = sample_moments(all_rows(model, data))
    assert (found.grad_sq, found.trace_cov) == pytest.approx(expected, rel=1e-9)
    assert found.low is not None


def test_leaves_no_trace():
    model, data = make_model(norm=True), make_data()
    model.append(nn.Dropout())
    model[1].eval()
    loss(model, data).backward()
    grads = [p.grad for p in model.parameters()]
    kept = [g.clone() for g in grads]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    for source in ("auto", "examples", "microbatches"):
        measure_noise_scale(model, loss, data, batch_size=10, steps=12, source=source)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_auto_takes_microbatches_for_batchnorm_and_says_the_unit():
    found, _ = measure_noise_scale(make_model(norm=True), loss, make_data(), batch_size=8, steps=15)
    assert found.source == "microbatches"
    assert "the unit is the normalised micro-batch of 2" in found.detail
    refused, groups = measure_noise_scale(
        make_model(norm=True), loss, make_data(), batch_size=8, steps=15, source="examples"
    )
    assert refused.outcome == Outcome.UNSUPPORTED
    assert "BatchNorm '1'" in refused.detail
    assert all(g.outcome == Outcome.UNSUPPORTED for g in groups.values())


def test_auto_falls_back_when_a_draw_shows_a_gap():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))

    model, data = Functional().double(), make_data()
    found, _ = measure_noise_scale(model, loss, data, batch_size=12, steps=10)
    assert found.source == "microbatches"
    assert found.parameters_seen.complete
    part, groups = measure_noise_scale(
        model, loss, data, batch_size=12, steps=10, source="examples"
    )
    assert part.parameters_seen.missing == ("a.weight", "a.bias")
    assert list(groups) == ["b"]
    rows = per_example_gradients(model, loss, data)
    expected = sample_moments(flat({k: v for k, v in rows.items() if k.startswith("b.")}))
    assert (part.grad_sq, part.trace_cov) == pytest.approx(expected, rel=1e-9)


def test_bad_draws_are_skipped():
    model, (x, y) = make_model(), make_data()
    x[7] = torch.nan
    for source in ("examples", "microbatches"):
        found, _ = measure_noise_scale(model, loss, (x, y), batch_size=10, steps=12, source=source)
        assert (found.skipped_steps, found.steps, found.examples) == (1, 11, 110)
        assert np.isfinite(found.trace_cov)
    nothing, _ = measure_noise_scale(model, loss, (x * torch.nan, y), batch_size=10, steps=12)
    assert nothing.outcome == Outcome.NOT_FINITE
    assert nothing.skipped_steps == 12


def test_datasets_and_containers():
    model, (x, y) = make_model(), make_data()
    expected, _ = measure_noise_scale(model, loss, (x, y), batch_size=10, steps=5)
    dataset = [(x[i], y[i]) for i in range(len(x))]
    found, _ = measure_noise_scale(model, loss, dataset, batch_size=10, steps=5)
    assert found == expected

    def collate(examples):
        return {
            "x": torch.stack([e[0] for e in examples]),
            "y": torch.stack([e[1] for e in examples]),
        }

    found, _ = measure_noise_scale(
        model,
        lambda m, b: loss(m, (b["x"], b["y"])),
        dataset,
        batch_size=10,
        steps=5,
        collate=collate,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 121}, "batch size 121"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"steps": 0}, "steps 0"),
        ({"source": "rank"}, "source 'rank'"),
        ({"population": "finite"}, "population 'finite'"),
        ({"level": 95}, "level 95"),
        ({"micro_batch_size": -1}, "micro_batch_size -1"),
        ({"loss": lambda m, b: m(b[0])}, "scalar"),
        ({"loss": lambda m, b: 1.0}, "float"),
        ({"model": nn.ReLU()}, "trainable"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "model": make_model(),
        "loss": loss,
        "data": make_data(),
        "batch_size": 10,
        "steps": 3,
    }
    with pytest.raises(InvalidInputError, match=message):
        measure_noise_scale(**{**good, **change})


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 5))


def means_of(rows, inventory, **options):
    means = MeanGradients(inventory, **options)
    sizes = [slot.tensor.numel() for slot in inventory.slots]
    for row in rows:
        parts = dict(enumerate(row.split(sizes)))
        weighted = np.array([float(p.square().sum()) for p in parts.values()])
        means.add(parts, weighted, examples=4, units=4)
    return means


@pytest.mark.parametrize("draws", [1, 5, 32, 33, 70, 127])
def test_groups_of_draws_are_about_equal_and_lose_nothing(draws):
    inventory = Inventory(wide_model())
    rows = torch.randn(draws, sum(s.tensor.numel() for s in inventory.slots)).double()
    means = means_of(rows, inventory)
    sizes = means.examples
    assert sizes.sum() == 4 * draws == means.units.sum()
    assert len(sizes) <= 32
    assert len(sizes) > 10 or draws <= 10
    assert sizes.max() <= 2.5 * sizes.min()
    share = sizes / sizes.sum()
    expected = float(rows.mean(0).square().sum())
    assert share @ means.gram() @ share == pytest.approx(expected)
    assert means.mean_sq() == pytest.approx(expected)
    assert means.weighted_sq().sum() == pytest.approx(float(rows.square().sum()))
    for group in ("0", "1"):
        assert share @ means.gram(group) @ share == pytest.approx(means.mean_sq(group))
    torch.testing.assert_close(means.gram("0") + means.gram("1"), means.gram())


def test_the_sketch_is_unbiased_and_its_total_exact():
    """Products of sketches over 200 seeds against the exact Gram matrix, 5 standard errors."""
    inventory = Inventory(wide_model())
    count = sum(s.tensor.numel() for s in inventory.slots)
    rows = torch.randn(3, count).double() + 0.3
    exact = means_of(rows, inventory)
    found = []
    for seed in range(200):
        means = means_of(rows, inventory, seed=seed, largest_exact=100, sketch_width=1024)
        assert means.sketched
        found.append(means.gram())
        assert means.mean_sq() == pytest.approx(exact.mean_sq(), rel=1e-5)
    table = np.array(found)
    error = table.std(0, ddof=1) / np.sqrt(len(table))
    assert np.all(np.abs(table.mean(0) - exact.gram()) < 5 * error)
    assert np.all(error > 0)


def test_a_model_above_the_limit_is_sketched_end_to_end(monkeypatch):
    model, data = make_model(), make_data()
    exact, _ = measure_noise_scale(model, loss, data, batch_size=10, steps=12)
    monkeypatch.setattr("noisescale.measure.mean_gradients._LARGEST_EXACT", 10)
    monkeypatch.setattr("noisescale.measure.mean_gradients._LEAST_WIDTH", 16)
    monkeypatch.setattr("noisescale.measure.mean_gradients._SKETCH_WIDTH", 64)
    found, _ = measure_noise_scale(model, loss, data, batch_size=10, steps=12)
    assert found.grad_sq == pytest.approx(exact.grad_sq, rel=1e-5)
    assert found.trace_cov == pytest.approx(exact.trace_cov, rel=1e-5)
    assert found.low != exact.low
