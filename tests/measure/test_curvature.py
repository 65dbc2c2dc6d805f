"""The largest eigenvalue of the Hessian against dense Hessians and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.measure.curvature import hessian_product, lanczos, largest_eigenvalue


def dense_hessian(model, loss, batch):
    """Row by row, by double backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(model, batch), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [
        torch.cat(
            [r.reshape(-1) for r in torch.autograd.grad(entry, parameters, retain_graph=True)]
        )
        for entry in flat
    ]
    return torch.stack(rows)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)
    batch = (torch.randn(40, 5, dtype=dtype), torch.randint(0, 3, (40,)))
    return model, batch


def test_equals_the_dense_hessians():
    model, batch = network()
    truth = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))[-1]
    found = largest_eigenvalue(model, cross_entropy, batch, iterations=80, tolerance=1e-9)
    assert found.value == pytest.approx(float(truth), rel=1e-9)
    assert found.residual <= 1e-9 * found.value


def test_the_residual_bounds_the_error():
    model, batch = network()
    values = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))
    for iterations in range(1, 12):
        found = largest_eigenvalue(
            model, cross_entropy, batch, iterations=iterations, tolerance=1e-12
        )
        assert found.products == iterations
        assert float((values - found.value).abs().min()) <= found.residual * (1 + 1e-9)
        assert found.value <= float(values[-1]) * (1 + 1e-12)


def test_scales_are_a_preconditioner():
    model, batch = network()
    torch.manual_seed(1)
    scales = [torch.rand_like(p) + 0.1 for p in model.parameters()]
    s = torch.cat([scale.reshape(-1) for scale in scales])
    hessian = dense_hessian(model, cross_entropy, batch)
    truth = torch.linalg.eigvalsh(s[:, None] * hessian * s)[-1]
    found = largest_eigenvalue(
        model, cross_entropy, batch, scales=scales, iterations=80, tolerance=1e-9
    )
    assert found.value == pytest.approx(float(truth), rel=1e-9)
    # the same eigenvalues as the preconditioned Hessian P^-1 H with P = s^-2
    unsymmetric = torch.linalg.eigvals((s**2)[:, None] * hessian).real.max()
    assert found.value == pytest.approx(float(unsymmetric), rel=1e-8)


def test_the_largest_not_the_largest_in_size():
    matrix = torch.diag(torch.tensor([-10.0, 1.0, 3.0], dtype=torch.float64))
    found = lanczos(lambda v: matrix @ v, torch.ones(3, dtype=torch.float64))
    assert found.value == pytest.approx(3.0, rel=1e-9)


def test_a_matrix_with_few_different_eigenvalues_ends_early():
    found = lanczos(lambda v: 2 * v, torch.arange(1.0, 9.0))
    assert found.value == pytest.approx(2.0, rel=1e-6)
    assert found.products == 1


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1)
    found = largest_eigenvalue(model, lambda m, x: m(x).mean(), torch.randn(4, 3))
    assert found.value == 0


def test_frozen_and_unused_parameters():
    model, batch = network()
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    found = largest_eigenvalue(model, cross_entropy, batch, iterations=80, tolerance=1e-9)
    model.unused.requires_grad_(False)
    truth = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))[-1]
    assert found.value == pytest.approx(float(truth), rel=1e-8)


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    found = largest_eigenvalue(model, cross_entropy, batch)
    assert math.isfinite(found.value)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7.0))
    assert model[0].bias.grad is None
    assert all(module.training for module in model.modules())


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x = Attends(), torch.randn(3, 5, 8)
    found = largest_eigenvalue(model, lambda m, b: m(b).square().mean(), x)
    assert found.value > 0


def test_not_finite_is_said():
    model = nn.Linear(2, 1)
    found = largest_eigenvalue(model, lambda m, x: (m(x) * math.inf).sum() ** 2, torch.ones(2, 2))
    assert math.isnan(found.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 0}, "iterations 0"),
        ({"tolerance": 0.0}, "tolerance 0"),
        ({"scales": [torch.ones(3)]}, "1 scales"),
    ],
)
def test_bad_arguments(options, words):
    model = nn.Linear(2, 1)
    with pytest.raises(InvalidInputError, match=words):
        largest_eigenvalue(model, lambda m, x: m(x).sum(), torch.ones(2, 2), **options)


def test_nothing_to_train():
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(InvalidInputError, match="requires_grad"):
        largest_eigenvalue(model, lambda m, x: m(x).sum(), torch.ones(2, 2))


def test_products_of_a_quadratic():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    product = hessian_product(0.5 * w @ matrix @ w, [w])
    v = torch.tensor([1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(product(v), matrix @ v, rtol=1e-12, atol=0)
