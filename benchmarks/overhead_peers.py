"""Other ways to per-example squared gradient norms, each used as its documentation says.

They are compared with, never depended on: `make overhead` puts them into an environment of
their own. Each class leaves the ordinary mean gradient in ``p.grad`` and returns the squared
norms |g_i|^2 of the examples' own losses, shape (examples,). Imports happen on use, so that
what is not installed only misses its own row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from overhead_models import loss_of
from torch import Tensor, nn

# The best of 1, 4, 8, 16, 32 and no chunks on the convolutional net; worse than no chunks elsewhere
# (tried once, before the first full run).
CHUNK = 32


def square_norms(gradients: Tensor) -> Tensor:
    """Squared norms of per-example gradients of shape (examples, *parameter shape)."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1).square()


class BackpackL2:
    """BackPACK's BatchL2Grad: norms in the backward pass, nothing materialised.

    First-order extensions need neither an extended loss nor modules for residual sums. Layers
    without a rule are skipped by the extension (its own choice); the error column shows it.
    """

    def __init__(self, model: nn.Module) -> None:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad

        self._context, self._extension = backpack, BatchL2Grad
        self.model = extend(model)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Run forward and backward, sum the squared norms over the parameters."""
        loss = loss_of(self.model(x), y)
        with self._context(self._extension()):
            loss.backward()
        found = [p.batch_l2 for p in self.model.parameters() if hasattr(p, "batch_l2")]
        # They are those of the mean loss: of g_i / B.
        return torch.stack(found).sum(0) * len(x) ** 2

    def clear(self) -> None:
        """Drop the squared norms."""
        for parameter in self.model.parameters():
            if hasattr(parameter, "batch_l2"):
                del parameter.batch_l2


class OpacusSamples:
    """Opacus' GradSampleModule: every per-example gradient is written out."""

    def __init__(self, model: nn.Module) -> None:
        from opacus.grad_sample import GradSampleModule

        self.model = GradSampleModule(model, loss_reduction="mean")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Run forward and backward, then square what was written."""
        loss_of(self.model(x), y).backward()
        found = [square_norms(p.grad_sample) for p in self.model.parameters()]
        return torch.stack(found).sum(0)

    def clear(self) -> None:
        """Drop the per-example gradients."""
        self.model.zero_grad(set_to_none=True)


class OpacusGhost:
    """Opacus' ghost norms, as before its second (clipped) backward pass."""

    def __init__(self, model: nn.Module) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.model: Any = GradSampleModuleFastGradientClipping(
            model, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
        )

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Run forward and backward, then collect the norms."""
        loss_of(self.model(x), y).backward()
        return self.model.get_norm_sample().square()

    def clear(self) -> None:
        """Drop gradients and norms."""
        self.model.zero_grad(set_to_none=True)
        self.model.per_sample_gradient_norms = None


class VmapGrad:
    """torch.func's vmap(grad): all per-example gradients at once; their mean is the gradient.

    Args:
        model: the model.
        chunk: examples that are differentiated together; None for all.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        self.model = model
        names = [name for name, _ in model.named_parameters()]

        def loss(parameters: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
            values = dict(zip(names, parameters, strict=True))
            output = torch.func.functional_call(model, values, (x[None],))
            return loss_of(output, y[None])

        self._gradients = torch.func.vmap(
            torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=chunk
        )

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Differentiate every example, keep mean and squared norms."""
        parameters = tuple(self.model.parameters())
        gradients = self._gradients(tuple(p.detach() for p in parameters), x, y)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.mean(0)
        return torch.stack([square_norms(g) for g in gradients]).sum(0)

    def clear(self) -> None:
        """Nothing is left behind."""


PEERS: dict[str, Callable[[nn.Module], Any]] = {
    "backpack": BackpackL2,
    "opacus": OpacusSamples,
    "opacus-ghost": OpacusGhost,
    "vmap": VmapGrad,
    f"vmap-{CHUNK}": lambda model: VmapGrad(model, CHUNK),
}
