"""Stacked multi-layer perceptrons: batched products, the backward pass written out.

Activations lie as (trials, features, examples). The first layer of all trials that see the same
batch is one product, their weights side by side along the hidden dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.run.trials.stacked.anatomy import Anatomy
from noisescale.run.trials.stacked.columns import Piece, Pieces
from noisescale.run.trials.stacked.groups import Groups
from noisescale.run.trials.stacked.heads import Head
from noisescale.run.trials.stacked.shelf import columns
from noisescale.run.trials.stacked.updates import Update

COPIES_BELOW = 0.25
"""Unequal groups: up to so many examples per hidden unit every trial gets its own copy of the
inputs, which is then small beside its weights. (assumed)"""

FEW_EXAMPLES = 16
"""With fewer, products are made with the examples as rows. (measured at 64-64-10, 784-100-10 and
64-256-100: 1.4 to 4 times as fast with 2 to 12 examples, slower with 16)"""

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function.

    Attributes:
        forward: may overwrite its argument.
        backward: from the gradient by the output, which it overwrites, the input (unless
            overwritten) and the output.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def activation(layer: nn.Module) -> Activation | None:
    """Return what a layer does to each element; None when it is no such layer."""
    kind: Any = type(layer)
    if kind is nn.ReLU:
        return Activation(
            forward=torch.relu_,
            backward=lambda d, _, h: aten.threshold_backward(d, h, 0, grad_input=d),
        )
    if kind is nn.Tanh:
        return Activation(
            forward=torch.tanh_,
            backward=lambda d, _, h: aten.tanh_backward(d, h, grad_input=d),
        )
    if kind is nn.Sigmoid:
        return Activation(
            forward=torch.sigmoid_,
            backward=lambda d, _, h: aten.sigmoid_backward(d, h, grad_input=d),
        )
    if kind is nn.GELU:
        how: Any = layer.approximate
        return Activation(
            forward=lambda z: nn.functional.gelu(z, approximate=how),
            backward=lambda d, z, _: aten.gelu_backward(d, z, approximate=how, grad_input=d),
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Affine:
    """One Linear and what follows it.

    Attributes:
        weight: place of its weight.
        bias: place of its bias, or None.
        then: the activation, or None.
    """

    weight: int
    bias: int | None
    then: Activation | None


def passes_through(layer: nn.Module) -> bool:
    """Whether a layer changes nothing."""
    return type(layer) is nn.Identity or (type(layer) is nn.Dropout and not layer.p)


def perceptron(anatomy: Anatomy) -> list[Affine] | None:
    """Return the anatomy as Linear layers with at most one activation after each, or None."""
    found: list[Affine] = []
    for layer, (weight, bias) in zip(anatomy.layers, anatomy.places, strict=True):
        flat = type(layer) is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1
        if passes_through(layer) or flat:
            continue
        if type(layer) is nn.Linear and weight is not None:
            found.append(Affine(weight=weight, bias=bias, then=None))
            continue
        follows = activation(layer)
        if follows is None or not found or found[-1].then is not None:
            return None
        last = found[-1]
        found[-1] = Affine(weight=last.weight, bias=last.bias, then=follows)
    return found or None


class DenseNetwork:
    """Many perceptrons of one shape.

    Args:
        affines: their layers.
        head: what the loss makes of their outputs.
        input: place of the input among the batch's tensors.
    """

    name = "products"
    joins_orders = True
    together = 512
    """Examples in one pass of an evaluation, at most. (measured on a busy machine: 500 of MNIST
    are 1.3 times as fast as all 2,000, whose inputs leave the cache, and 1.1 as 250 or 125)"""

    def __init__(self, affines: Sequence[Affine], head: Head, input: int) -> None:
        self._affines, self.head, self.input = affines, head, input
        self.multiplies: int | None = affines[0].weight

    def step(
        self,
        update: Update,
        leaves: Sequence[Tensor],
        groups: Groups,
        pieces: Pieces | None = None,
    ) -> None:
        """Hand the gradients of all trials to their update.

        Args:
            update: holds the weights.
            leaves: the batch's tensors, shape (groups, examples, ...).
            groups: which trials see which batch.
            pieces: of each group's batch, which columns they use; they are in the weights' order.
        """
        weights = update.weights.parts
        inputs = leaves[self.input].flatten(2)
        if pieces is None and self._wants_copies(weights, inputs, groups):
            inputs = inputs.index_select(0, groups.owner)
        before: list[Tensor] = []
        after: list[Tensor] = []
        for affine in self._affines:
            if after:
                before.append(_apply(affine, weights, after[-1]))
            else:
                before.append(self._first(weights, inputs, groups, pieces))
            after.append(_activate(affine, before[-1]))
        slope = self.head.slope(after[-1], leaves, groups)
        if update.scale is not None:
            slope = slope.mul_(columns(update.scale, slope))
        for depth in range(len(self._affines) - 1, -1, -1):
            affine = self._affines[depth]
            if affine.then is not None:
                slope = affine.then.backward(slope, before[depth], after[depth])
            if depth == 0 and pieces is not None:
                self._hand_over_pieces(update, slope, inputs, groups, pieces)
                continue
            if depth == 0:
                self._hand_over_first(update, slope, inputs, groups)
                continue
            below = _product(weights[affine.weight].transpose(1, 2), slope)
            update.product(affine.weight, slice(None), slope, after[depth - 1].transpose(1, 2))
            if affine.bias is not None:
                update.value(affine.bias, slope.sum(2))
            slope = below

    def outputs(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Return outputs on one batch that all trials share, shape (trials, classes, examples).

        Args:
            weights: per parameter, shape (trials, ...).
            inputs: shape (examples, ...); without their last columns where these are zero.
        """
        first, *rest = self._affines
        hidden = _activate(first, _side_by_side(first, weights, inputs.flatten(1).T))
        for affine in rest:
            hidden = _activate(affine, _apply(affine, weights, hidden))
        return hidden

    def _wants_copies(self, weights: Sequence[Tensor], inputs: Tensor, groups: Groups) -> bool:
        """Whether every trial is better off with its own copy of its group's inputs."""
        examples, hidden = inputs.shape[1], weights[self._affines[0].weight].shape[1]
        return examples < FEW_EXAMPLES or not (groups.even or examples > COPIES_BELOW * hidden)

    def _first(
        self, weights: Sequence[Tensor], inputs: Tensor, groups: Groups, pieces: Pieces | None
    ) -> Tensor:
        affine = self._affines[0]
        weight = weights[affine.weight]
        trials, hidden, features = weight.shape
        examples = inputs.shape[1]
        if pieces is None and len(inputs) == trials:
            return _apply(affine, weights, inputs.transpose(1, 2))
        if pieces is None and groups.even:
            views = weight.view(groups.count, -1, features), inputs.transpose(1, 2)
            if affine.bias is None:
                return torch.bmm(*views).view(trials, hidden, examples)
            biases = weights[affine.bias].view(groups.count, -1, 1)
            return torch.baddbmm(biases, *views).view(trials, hidden, examples)
        whole = [Piece(examples=slice(None), columns=features)]
        out = weight.new_empty(trials, hidden, examples)
        for rows, x, own in zip(groups.rows, inputs, pieces or [whole] * groups.count, strict=True):
            w, z = weight[rows].view(-1, features), out[rows].view(-1, examples)
            bias = None if affine.bias is None else weights[affine.bias][rows].reshape(-1, 1)
            for piece in own:
                left, right = w[:, : piece.columns], x[piece.examples, : piece.columns].T
                if bias is None:
                    torch.mm(left, right, out=z[:, piece.examples])
                else:
                    torch.addmm(bias, left, right, out=z[:, piece.examples])
        return out

    def _hand_over_pieces(
        self, update: Update, slope: Tensor, inputs: Tensor, groups: Groups, pieces: Pieces
    ) -> None:
        affine = self._affines[0]
        if affine.bias is not None:
            update.value(affine.bias, slope.sum(2))
        examples = slope.shape[2]
        for rows, x, own in zip(groups.rows, inputs, pieces, strict=True):
            flat = slope[rows].reshape(-1, examples)
            products = [
                (flat[:, piece.examples], x[piece.examples, : piece.columns]) for piece in own
            ]
            update.columns(affine.weight, rows, products)

    def _hand_over_first(
        self, update: Update, slope: Tensor, inputs: Tensor, groups: Groups
    ) -> None:
        affine = self._affines[0]
        everyone = slice(None)
        if affine.bias is not None:
            update.value(affine.bias, slope.sum(2))
        trials, _, examples = slope.shape
        if len(inputs) == trials:
            update.product(affine.weight, everyone, slope, inputs)
        elif groups.even:
            left = slope.reshape(groups.count, -1, examples)
            update.product(affine.weight, everyone, left, inputs)
        else:
            for rows, x in zip(groups.rows, inputs, strict=True):
                left = slope[rows].reshape(1, -1, examples)
                update.product(affine.weight, rows, left, x.unsqueeze(0))


def _apply(affine: Affine, weights: Sequence[Tensor], hidden: Tensor) -> Tensor:
    bias = None if affine.bias is None else weights[affine.bias]
    return _product(weights[affine.weight], hidden, bias)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left @ right``, shape (trials, rows, examples), with a bias (trials, rows)."""
    if right.shape[2] >= FEW_EXAMPLES:
        if bias is None:
            return torch.bmm(left, right)
        return torch.baddbmm(bias.unsqueeze(2), left, right)
    turned = right.transpose(1, 2), left.transpose(1, 2)
    product = torch.bmm(*turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), *turned)
    return product.transpose(1, 2)


def _activate(affine: Affine, z: Tensor) -> Tensor:
    return z if affine.then is None else affine.then.forward(z)


def _side_by_side(affine: Affine, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Apply the first layer of several trials to inputs of shape (features, examples)."""
    trials, hidden, _ = weights[affine.weight].shape
    weight = weights[affine.weight].flatten(0, 1)[:, : len(inputs)]
    if affine.bias is None:
        flat = torch.mm(weight, inputs)
    else:
        flat = torch.addmm(weights[affine.bias].reshape(-1, 1), weight, inputs)
    return flat.view(trials, hidden, -1)
