"""The real step against the same step written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.measure.real_step import RealStep, make_optimizer
from noisescale.records import Recipe


def mean_square(model, batch):
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).mean()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 3, generator=generator)
    targets = torch.randn(16, 2, generator=generator)
    torch.manual_seed(1)
    return nn.Linear(3, 2), (inputs, targets)


@pytest.mark.parametrize(
    ("recipe", "optimizer", "settings"),
    [
        (Recipe(lr=0.1, batch_size=8), torch.optim.SGD, {"momentum": 0, "weight_decay": 0}),
        (
            Recipe(lr=0.1, batch_size=8, momentum=0.9, nesterov=True, weight_decay=0.01),
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "dampening": 0},
        ),
        (
            Recipe(optimizer="adam", lr=0.1, batch_size=8, eps=1e-6),
            torch.optim.Adam,
            {"eps": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0},
        ),
        (
            Recipe(optimizer="adamw", lr=0.1, batch_size=8, betas=(0.8, 0.9)),
            torch.optim.AdamW,
            {"betas": (0.8, 0.9), "weight_decay": 0.01},
        ),
    ],
)
def test_absent_keys_take_torch_defaults(recipe, optimizer, settings):
    made = make_optimizer(nn.Linear(2, 2), recipe)
    assert type(made) is optimizer
    assert {key: made.defaults[key] for key in settings} == settings
    assert made.defaults["lr"] == recipe.lr


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    made = make_optimizer(model, Recipe(lr=0.1, batch_size=8))
    assert made.param_groups[0]["params"] == [model.weight]


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (Recipe(optimizer="adam", lr=0.1, batch_size=8, momentum=0.9), "momentum=0.9"),
        (Recipe(lr=0.1, batch_size=8, betas=(0.9, 0.99)), "betas"),
        (Recipe(lr=0.1, batch_size=8, nesterov=True), "Nesterov"),
        (Recipe(lr=0.1, batch_size=8, trust_coefficient=0.01), "trust_coefficient"),
        (Recipe(optimizer="lars", lr=0.1, batch_size=8), "optimizer 'lars'"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(recipe, named):
    with pytest.raises(InvalidInputError, match=named):
        make_optimizer(nn.Linear(2, 2), recipe)


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(InvalidInputError, match="trainable"):
        make_optimizer(nn.ReLU(), Recipe(lr=0.1, batch_size=8))


def test_step_equals_the_step_by_hand(problem):
    model, batch = problem
    recipe = Recipe(lr=0.1, batch_size=16, momentum=0.9, clip_norm=0.05, ema_decay=0.75)
    by_hand = copy.deepcopy(model)
    velocity = [torch.zeros_like(p) for p in by_hand.parameters()]
    average = [p.detach().clone() for p in by_hand.parameters()]
    step = RealStep(model, mean_square, recipe)
    for _ in range(4):
        loss = step(batch)
        expected = mean_square(by_hand, batch)
        gradients = torch.autograd.grad(expected, list(by_hand.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        scale = min(1.0, 0.05 / (norm.item() + 1e-6))
        with torch.no_grad():
            for p, v, a, g in zip(by_hand.parameters(), velocity, average, gradients, strict=True):
                v.mul_(0.9).add_(g * scale)
                p.sub_(0.1 * v)
                a.mul_(0.75).add_(0.25 * p)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()))
    torch.testing.assert_close(step.average, average)


def test_accumulated_micro_batches_make_the_whole_batch_step(problem):
    model, (inputs, targets) = problem
    recipe = Recipe(lr=0.1, batch_size=16)
    whole = RealStep(copy.deepcopy(model), mean_square, recipe)
    split = RealStep(model, mean_square, recipe)
    for _ in range(2):
        whole((inputs, targets))
        split.backward((inputs[:4], targets[:4]), weight=0.25)
        split.backward((inputs[4:], targets[4:]), weight=0.75)
        split.update()
    torch.testing.assert_close(list(model.parameters()), list(whole.model.parameters()))


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda model, batch: model(batch[0]), r"shape \(16, 2\)"),
        (lambda model, batch: 1.0, "type float"),
        (lambda model, batch: model(batch[0]).mean().detach(), "without a gradient"),
    ],
)
def test_losses_that_are_no_scalar_are_refused(problem, loss, named):
    model, batch = problem
    with pytest.raises(InvalidInputError, match=named):
        RealStep(model, loss, Recipe(lr=0.1, batch_size=16))(batch)
