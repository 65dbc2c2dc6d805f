"""Stacked chains of layers with convolutions: trials side by side along the channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisescale.run.trials.stacked.anatomy import Anatomy
from noisescale.run.trials.stacked.groups import Groups
from noisescale.run.trials.stacked.heads import CrossEntropy, Head
from noisescale.run.trials.stacked.shelf import columns
from noisescale.run.trials.stacked.updates import Update

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity,
)  # fmt: skip
POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


PIECE_BYTES = 10e6
"""A batch is cut into pieces so that the outputs of all layers and trials take about so much, and
stay in cache until the backward pass. (measured on digits-cnn at batch 512, two threads: 5 to 20
MB alike, 1.3 times as fast as whole batches of 6 trials)"""

FEWEST_EXAMPLES = 32
"""In one piece, about. (measured: 16 are slower)"""


def is_known(layer: nn.Module) -> bool:
    """Whether a layer can be applied to many trials side by side."""
    kind: Any = type(layer)
    if kind is nn.Flatten:
        return bool(layer.start_dim == 1 and layer.end_dim == -1)
    if kind is nn.Conv2d:
        return layer.padding_mode == "zeros"
    if kind is nn.Dropout:
        return not layer.p
    return kind is nn.Linear or kind in ELEMENTWISE + POOLS


class ChainNetwork:
    """Many chains of one shape that see the same batch, differentiated by autograd.

    While there are planes, activations lie as (examples, trials x channels, height, width), then
    as (trials, features, examples).

    Args:
        anatomy: one of them.
        head: what the loss makes of their outputs.
    """

    name = "channels"
    joins_orders = False
    together = 96
    """Examples in one pass of an evaluation, at most. (measured on digits: from 45 to 180 alike
    with 8 trials together)"""
    multiplies: int | None = None

    def __init__(self, anatomy: Anatomy, head: Head) -> None:
        self._pairs = list(zip(anatomy.layers, anatomy.places, strict=True))
        self.head, self.input = head, anatomy.input
        self._numbers = anatomy.numbers

    def step(self, update: Update, leaves: Sequence[Tensor], groups: Groups) -> None:
        """Hand the gradients of all trials, one group, to their update."""
        weights = [part.detach().requires_grad_() for part in update.weights.parts]
        examples = leaves[self.input].shape[1]
        gradients: list[Tensor] = []
        for piece in self._pieces(weights[0], leaves):
            with torch.enable_grad():
                outputs = self._forward(weights, piece[self.input][0])
            slope = self.head.slope(outputs.detach(), piece, groups)
            if update.scale is not None:
                slope = slope.mul_(columns(update.scale, slope))
            if outputs.shape[2] < examples:
                slope = slope.mul_(outputs.shape[2] / examples)
            own = list(torch.autograd.grad(outputs, weights, slope))
            if gradients:
                torch._foreach_add_(gradients, own)
            else:
                gradients = own
        for j, gradient in enumerate(gradients):
            update.value(j, gradient)

    def _pieces(self, weight: Tensor, leaves: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
        """Cut a batch, shape (1, examples, ...), into pieces as equal as they can be."""
        examples = leaves[self.input].shape[1]
        size = len(weight) * self._numbers * weight.element_size()  # of one example
        wanted = round(examples * size / PIECE_BYTES)
        count = min(wanted, examples // FEWEST_EXAMPLES)
        # Another loss may divide by something of the whole batch.
        known = isinstance(self.head, CrossEntropy) and weight.device.type == "cpu"
        if count < 2 or not known:
            return [leaves]
        return zip(*(leaf.tensor_split(count, dim=1) for leaf in leaves), strict=True)

    def outputs(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Return outputs on one batch that all trials share, shape (trials, classes, examples)."""
        return self._forward(weights, inputs)

    def _forward(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        trials = len(weights[0])
        hidden, shared = inputs, True
        for layer, (weight, bias) in self._pairs:
            if weight is None:
                hidden = self._plain(layer, hidden, trials, shared=shared)
                continue
            w, b = weights[weight], None if bias is None else weights[bias]
            if isinstance(layer, nn.Conv2d):
                hidden = _convolve(layer, hidden, w, b, shared=shared)
            else:
                hidden = _multiply(hidden, w, b, shared=shared)
            shared = False
        return hidden

    def _plain(self, layer: nn.Module, hidden: Tensor, trials: int, *, shared: bool) -> Tensor:
        if not isinstance(layer, nn.Flatten):
            answer: Tensor = layer(hidden)
            return answer
        if shared:
            return hidden.flatten(1)
        if hidden.dim() == 3:
            return hidden
        return hidden.reshape(len(hidden), trials, -1).permute(1, 2, 0)


def _convolve(
    layer: nn.Conv2d, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, shared: bool
) -> Tensor:
    trials = len(weight)
    groups = layer.groups * trials
    if shared and layer.groups == 1:
        groups = 1
    elif shared:
        hidden = hidden.repeat(1, trials, 1, 1)
    return F.conv2d(
        hidden,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
    )


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, shared: bool) -> Tensor:
    trials, outputs, _ = weight.shape
    if shared:
        flat = weight.flatten(0, 1) @ hidden.T
        z = flat.view(trials, outputs, -1)
        return z if bias is None else z + bias.unsqueeze(2)
    if bias is None:
        return torch.bmm(weight, hidden)
    return torch.baddbmm(bias.unsqueeze(2), weight, hidden)
