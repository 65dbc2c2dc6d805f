"""The largest eigenvalue of the Hessian, by Lanczos on products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noisescale.errors import InvalidInputError
from noisescale.measure.untouched import untouched

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector."""

ITERATIONS = 30
"""Most products. (measured: on networks a residual of 2 % takes 5 to 20)"""

TOLERANCE = 0.02
"""Residual over value at which Lanczos stops; the value's own error is of second order in it.
(assumed: the caps that inherit it are good to tens of per cent)"""


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """A largest eigenvalue.

    Attributes:
        value: the largest Ritz value, a lower bound of the largest eigenvalue.
        residual: some eigenvalue lies within this distance of ``value``.
        products: Hessian-vector products that it took.
    """

    value: float
    residual: float
    products: int


def largest_eigenvalue(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    scales: Sequence[Tensor] | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Eigenvalue:
    """Return the largest eigenvalue of the Hessian of a loss in a model's trainable parameters.

    With ``scales`` s it is that of diag(s) H diag(s): for a preconditioner P, s = P^(-1/2), which
    has the eigenvalues of P^-1 H. One forward pass is differentiated again and again, in the
    mode that the model is in: what it draws (dropout) is the same for every product. Random
    state, buffers, gradients and mode are left as they were.

    Args:
        model: the model; ``loss(model, batch)`` is called once.
        loss: returns a scalar.
        batch: what the loss is of: the Hessian is that of this batch.
        scales: one tensor per trainable parameter, of its shape; None for plain curvature.
        iterations: most products.
        tolerance: stop when the residual is at most this share of the value.
        seed: of the first vector.

    Returns:
        The eigenvalue. It is NaN when the loss or a product is not finite.

    Raises:
        InvalidInputError: nothing can be trained, ``scales`` do not fit, or a limit is not
            positive.

    Source: Lanczos with full reorthogonalisation, Golub and Van Loan, Matrix Computations
    (4th ed.), sec. 10.1; products as Pearlmutter 1994 (Neural Computation 6(1)).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> inputs = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> found = largest_eigenvalue(model, lambda m, x: m(x).square().mean(), inputs)
    >>> round(found.value, 5)
    9.0
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    _check(parameters, scales, iterations, tolerance)
    # Fused attention has no second derivative.
    with untouched(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        product = hessian_product(loss(model, batch), parameters, scales)
        size = sum(p.numel() for p in parameters)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(size, generator=generator).to(parameters[0])
        return lanczos(product, start, iterations=iterations, tolerance=tolerance)


def hessian_product(
    value: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor] | None = None
) -> Product:
    """Return v -> diag(s) H diag(s) v of a scalar with its graph, vectors flat.

    Args:
        value: the scalar, a function of ``parameters``.
        parameters: tensors of any shapes, n numbers in all; each must enter the graph.
        scales: s, one tensor per parameter; None for ones.

    Returns:
        The product, of and to vectors of n numbers.
    """
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    flat = _flat(gradients)
    scale = None if scales is None else _flat(scales)

    def product(vector: Tensor) -> Tensor:
        scaled = vector if scale is None else scale * vector
        if not flat.requires_grad:  # the scalar is linear in all of them
            return torch.zeros_like(vector)
        found = torch.autograd.grad(
            flat, parameters, scaled, retain_graph=True, materialize_grads=True
        )
        return _flat(found) if scale is None else scale * _flat(found)

    return product


def lanczos(
    product: Product, start: Tensor, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE
) -> Eigenvalue:
    """Return the algebraically largest eigenvalue of a symmetric matrix.

    Args:
        product: the matrix times a vector.
        start: shape [n], not in the span of a few eigenvectors; any length.
        iterations: most products.
        tolerance: stop when the residual is at most this share of the value.

    Returns:
        The eigenvalue; NaN when a product is not finite.

    Source: as :func:`largest_eigenvalue`.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    value, residual = float("nan"), float("nan")
    for _ in range(min(iterations, start.numel())):
        vector = product(basis[-1])
        diagonal.append(float(basis[-1] @ vector))
        vector = _orthogonal(vector, basis)
        rest = float(vector.norm())
        if not rest < float("inf"):
            return Eigenvalue(value=float("nan"), residual=float("nan"), products=len(diagonal))
        value, share = _top(diagonal, beside)
        residual = rest * share
        # A vector of rounding errors would lead nowhere: the span is the matrix's own.
        scale = max(map(abs, [*diagonal, *beside]))
        if residual <= tolerance * abs(value) or rest <= 1e-7 * scale:
            break
        beside.append(rest)
        basis.append(vector / rest)
    return Eigenvalue(value=value, residual=residual, products=len(diagonal))


def _top(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Largest eigenvalue of the tridiagonal matrix, and its vector's last share."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), abs(float(vectors[-1, -1]))


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    # Twice is enough (Kahan and Parlett): once leaves what cancellation lost.
    for _ in range(2):
        for known in basis:
            vector = vector - (known @ vector) * known
    return vector


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _check(
    parameters: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    iterations: int,
    tolerance: float,
) -> None:
    if not parameters:
        raise InvalidInputError(
            "the model", "a parameter with requires_grad=True is required", "make one trainable"
        )
    if scales is not None and [s.shape for s in scales] != [p.shape for p in parameters]:
        raise InvalidInputError(
            f"{len(scales)} scales",
            "one of the shape of each trainable parameter is required",
            "take them in the order of model.parameters()",
        )
    for name, value in (("iterations", iterations), ("tolerance", tolerance)):
        if not value > 0:
            raise InvalidInputError(f"{name} {value}", "a positive number is required", "raise it")
