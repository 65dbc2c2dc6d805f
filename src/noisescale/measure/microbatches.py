"""Source ``microbatches``: squared norms of the gradients that accumulation adds up.

Either as the user's loop accumulates, or by a pass of its own over the slices of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import batch_size_of, slices
from noisescale.measure.gradients import (
    Forward,
    GradientSource,
    Inventory,
    Refused,
    StepNorms,
    tensors_in,
)
from noisescale.measure.kept import receives
from noisescale.measure.metric import Euclidean, Metric
from noisescale.measure.tensor_hooks import on_gradient

_ONE_BACKWARD = (
    "one backward pass per optimizer step gives one micro-batch, which has no spread; accumulate "
    "gradients over at least 2 micro-batches, call meter.split_pass(loss, batch, "
    "micro_batch_size=...), or use source='examples'"
)
_TWICE = (
    "a parameter received its gradient twice in one backward pass, or two backward passes ran "
    "through one forward pass; run one backward pass per forward pass, and non-reentrant "
    "activation checkpointing"
)


class MicrobatchSource(GradientSource):
    """Every backward pass of an accumulating loop is a unit.

    A hook on each parameter sees the gradient n_j of this backward pass alone, another the
    accumulated one. Under a mean loss n_j is the micro-batch's mean gradient m_j up to one
    constant, and what the optimizer gets is the plain mean of the m_j: with unequal sizes b_j
    it is as noisy as one of ``effective`` = k^2 / sum_j (1/b_j) examples. Under a summed loss
    n_j = b_j m_j.
    """

    name: ClassVar[str] = "microbatches"
    sees_layers: ClassVar[bool] = False

    def __init__(self, model: nn.Module, inventory: Inventory, **options: Any) -> None:
        super().__init__(model, inventory, **options)
        self._squares: dict[int, Tensor] = {}
        self._passes: list[list[Forward]] = []
        self._received: set[int] = set()
        self._last: Forward | None = None
        self._twice = False

    def _install(self) -> None:
        super()._install()
        for index in self.inventory.seen:
            parameter = self.inventory.slots[index].tensor
            self._handles.append(on_gradient(parameter, self._gradient_hook(index)))

    def _clear(self) -> None:
        self._squares.clear()
        self._passes.clear()
        self._received.clear()
        self._last = None
        self._twice = False

    def _finish_forward(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del args, kwargs
        self._last = forward
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                on_gradient(tensor, lambda _: self._arrives(forward))

    def _arrives(self, forward: Forward) -> None:
        slots = self.inventory.slots
        tensors = [slots[i].tensor for i in self.inventory.seen]
        nodes = (get_gradient_edge(t).node for t in tensors if t.requires_grad)
        if any(receives(node, by_grad=False) for node in nodes):
            self._begin(forward)

    def _begin(self, forward: Forward) -> None:
        """A backward pass reached the output of ``forward``."""
        if forward.window != self._window or any(forward in p for p in self._passes):
            return
        if self._passes and not self._received:
            self._passes[-1].append(forward)
        else:
            self._passes.append([forward])
            self._received.clear()

    def _gradient_hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self._passes or index in self._received:
                # No output told of this pass: it belongs to the last forward, if it is new.
                before = len(self._passes)
                if self._last is not None:
                    self._begin(self._last)
                self._twice |= len(self._passes) == before
            self._received.add(index)
            if self._passes:
                self._add(index, self.metric.square(index, gradient))

        return hook

    def _add(self, index: int, square: Tensor) -> None:
        size = sum(forward.size for forward in self._passes[-1])
        if self._loss_reduction == "sum":
            square = square / max(size, 1)
        before = self._squares.get(index)
        self._squares[index] = square if before is None else before + square

    def _close(self) -> StepNorms | Refused:
        if not self._forwards:
            return self._no_forward()
        if self._twice or not self._squares:
            return Refused(_TWICE)
        if len(self._passes) < 2:
            return Refused(_ONE_BACKWARD)
        sizes = [sum(forward.size for forward in one) for one in self._passes]
        return microbatch_norms(
            sizes,
            weighted=self.inventory.pack(self._squares),
            mean=self.inventory.pack(self._mean),
            summed=self._loss_reduction == "sum",
        )


def microbatch_norms(
    sizes: Sequence[int], *, weighted: Tensor, mean: Tensor, summed: bool
) -> StepNorms | Refused:
    """Turn sums over micro-batches into what the moments need.

    Args:
        sizes: b_j, examples of each micro-batch.
        weighted: sum_j |n_j|^2, or sum_j |n_j|^2 / b_j when ``summed``; shape (parameters,).
        mean: |sum_j n_j|^2; shape (parameters,).
        summed: whether n_j = b_j m_j (else n_j = m_j / k).
    """
    k, count = len(sizes), sum(sizes)
    if min(sizes) < 1:
        return Refused(
            "the size of a micro-batch could not be read from the model's first tensor argument; "
            "pass batch_size_of"
        )
    if summed:
        effective, weighted_factor, mean_factor = float(count), 1.0, count**-2.0
    else:
        effective = k * k / sum(1 / size for size in sizes)
        weighted_factor, mean_factor = effective * k, 1.0
    return StepNorms(
        units=k,
        effective=effective,
        examples=count,
        largest_unit=max(sizes),
        weighted=weighted,
        mean=mean,
        weighted_factor=weighted_factor,
        mean_factor=mean_factor,
    )


@dataclass(frozen=True, eq=False)
class SplitGradients:
    """Gradients of one batch that was split into micro-batches.

    Attributes:
        sizes: examples of each micro-batch.
        weighted: sum_j b_j |m_j|^2 per parameter index.
        mean: the batch's mean gradient per parameter index.
    """

    sizes: tuple[int, ...]
    weighted: dict[int, Tensor]
    mean: dict[int, Tensor]

    def step_norms(self, inventory: Inventory, metric: Metric) -> StepNorms:
        """Return the norms of the batch as one step."""
        count = sum(self.sizes)
        return StepNorms(
            units=len(self.sizes),
            effective=count,
            examples=count,
            largest_unit=max(self.sizes),
            weighted=inventory.pack(self.weighted),
            mean=inventory.pack({i: metric.square(i, g) for i, g in self.mean.items()}),
            weighted_factor=1.0,
            mean_factor=1.0,
        )


def split_gradients(
    loss: Callable[[nn.Module, Any], Tensor],
    model: nn.Module,
    inventory: Inventory,
    batch: Any,
    micro_batch_size: int,
    *,
    loss_reduction: str = "mean",
    metric: Metric | None = None,
) -> SplitGradients:
    """Differentiate ``loss`` on each slice of ``batch``; ``p.grad`` is not touched.

    Args:
        loss: ``loss(model, micro_batch)`` returns a scalar.
        model: the model, at the weights to measure.
        inventory: its trainable parameters.
        batch: tensors, or nested tuples and mappings of tensors, batch first.
        micro_batch_size: examples per slice; the last one may be smaller.
        loss_reduction: whether the loss is a mean or a sum over the examples.
        metric: the norm; plain squares by default.

    Raises:
        InvalidInputError: the loss is not a scalar, or the size is not positive.
    """
    metric = metric or Euclidean()
    if micro_batch_size < 1:
        raise InvalidInputError(
            f"micro_batch_size {micro_batch_size}", "at least 1 is required", "give 8"
        )
    count = batch_size_of(batch)
    weighted: dict[int, Tensor] = {}
    mean: dict[int, Tensor] = {}
    sizes = []
    for part in slices(batch, micro_batch_size):
        size = batch_size_of(part)
        sizes.append(size)
        scale = 1.0 if loss_reduction == "mean" else 1 / size
        for index, gradient in gradients_of(loss(model, part), inventory):
            if not inventory.slots[index].asked:
                continue
            square = metric.square(index, gradient) * (size * scale**2)
            share = gradient * (size * scale / count)
            if index in weighted:
                weighted[index] += square
                mean[index] += share
            else:
                weighted[index], mean[index] = square, share
    return SplitGradients(tuple(sizes), weighted, mean)


def gradients_of(loss: Tensor, inventory: Inventory) -> Iterable[tuple[int, Tensor]]:
    """Yield (parameter index, gradient) for the parameters that ``loss`` depends on.

    Raises:
        InvalidInputError: the loss is not a scalar that depends on the model.
    """
    check_scalar(loss)
    tensors = [slot.tensor for slot in inventory.slots]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [
        (i, g.to_dense() if g.is_sparse else g.detach())
        for i, g in enumerate(found)
        if g is not None
    ]


def check_scalar(loss: Any) -> None:
    """Refuse what cannot be differentiated."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidInputError(
            f"loss {what}",
            "a scalar tensor that depends on the model's parameters is required",
            "return the mean over the batch's examples, with its graph",
        )
