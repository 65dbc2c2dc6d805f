"""Linear regression on drawn data: every quantity is known by counting the examples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from noisescale.records import Recipe, Target
from noisescale.workload import Workload

DIMENSION = 32
EXAMPLES = 4096
VALIDATION = 1024

LABEL_NOISE = 1.0
"""Standard deviation of the labels about the plane: the loss cannot fall below about 0.5."""

SPECTRUM_POWER = 1.0
"""The inputs' variances fall as 1, 1/2, 1/3, ...: eigenvalues of the Hessian."""

Batch = tuple[Tensor, Tensor]
"""Inputs (examples, 32) and labels (examples,)."""


def quadratic() -> Workload:
    """Least squares y = x.w + noise with a power-law spectrum, trained by plain SGD.

    The loss of one example is half its squared error, so its gradient is (x.w - y) x and
    :func:`exact_noise_scale` is a sum over the training examples.
    """
    inputs, labels = _draw(EXAMPLES + VALIDATION)
    return Workload(
        name="quadratic",
        model=partial(nn.Linear, DIMENSION, 1, bias=False),
        loss=half_squared_error,
        train=(inputs[:EXAMPLES], labels[:EXAMPLES]),
        evaluate=(inputs[EXAMPLES:], labels[EXAMPLES:]),
        recipe=Recipe(optimizer="sgd", lr=1.5, batch_size=32, dataset_size=EXAMPLES),
        target=Target.parse("train_loss<0.6"),
    )


def half_squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of half the squared error over the batch; a scalar."""
    inputs, labels = batch
    predictions: Tensor = model(inputs).squeeze(1)
    return 0.5 * (predictions - labels).square().mean()


def exact_noise_scale(weight: Tensor, data: Batch) -> tuple[float, float]:
    """Return |G|^2 and tr(Sigma) over the data as the whole population, by counting.

    G = mean g_i and tr(Sigma) = mean |g_i|^2 - |G|^2 with g_i = (x_i.w - y_i) x_i.

    Args:
        weight: the model's weights, shape (1, 32) or (32,).
        data: inputs (examples, 32) and labels (examples,).
    """
    inputs, labels = (part.double() for part in data)
    residual = inputs @ weight.detach().double().reshape(-1) - labels
    gradients = residual[:, None] * inputs
    grad_sq = gradients.mean(0).square().sum()
    trace_cov = gradients.square().sum(1).mean() - grad_sq
    return float(grad_sq), float(trace_cov)


def _draw(examples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, DIMENSION + 1).pow(-SPECTRUM_POWER / 2)
    inputs = deviations * torch.randn(examples, DIMENSION, generator=generator)
    # Far from the start in every direction, so that early training is nearly noise-free.
    weight = 3 * torch.ones(DIMENSION)
    noise = LABEL_NOISE * torch.randn(examples, generator=generator)
    return inputs, inputs @ weight + noise
