"""Mode ``fused``: a layer's weight gradient is the sum of its per-example ones.

While a step is measured, layers whose per-example gradients have to be formed anyway run with a
backward pass of our own, which adds them up in place of the ordinary product: the same terms in
another order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from noisescale.measure.kept import hooks_active
from noisescale.measure.rules.convolution import grid_shape, shifted, weight_part, whole
from noisescale.measure.rules.parts import Outer, forms_products, total_and_square_sum
from noisescale.measure.rules.registry import Call
from noisescale.measure.rules.windows import Windows

_FULL = (torch.float32, torch.float64)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Report = Callable[[Tensor | None], None]
"""Takes the sum of squared norms of the weight's per-example gradients; None where the gradient
will itself be differentiated."""


def fusible(layer: nn.Module) -> bool:
    """Whether the layer's kind has a backward pass of our own."""
    kind = type(layer)
    known = next((k for k in _KINDS if kind.forward is k.forward), None)
    if known is None or "forward" in layer.__dict__:
        return False
    if getattr(kind, "_conv_forward", None) is not getattr(known, "_conv_forward", None):
        return False  # weights that are standardised or masked on their way
    weight = layer._parameters["weight"]
    if weight is None or not weight.requires_grad or weight.dtype not in _FULL:
        return False
    if isinstance(layer, _ConvNd):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return True


_KINDS = (nn.Linear, *_CONVOLUTIONS)


def fused_forward(layer: nn.Module, x: Tensor, report: Report) -> Tensor | None:
    """Run the layer, or return None where its ordinary way is the better one.

    Args:
        layer: one that is :func:`fusible`.
        x: its input, batch first.
        report: called in the backward pass.
    """
    if not torch.is_grad_enabled() or x.dtype not in _FULL or hooks_active() or not x.numel():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    if isinstance(layer, _ConvNd):
        # Patches that must be unfolded, and few positions, are for the ordinary way.
        if x.dim() != len(layer.kernel_size) + 2 or not _fuses(layer, x):
            return None
        out: Tensor = _Convolution.apply(x, weight, bias, layer, report)  # type: ignore[no-untyped-call]
        return out
    length = x[0].numel() // max(1, x.shape[-1])
    if x.dim() < 3 or not forms_products(length, *weight.shape):
        return None
    into: Tensor = _Linear.apply(x, weight, bias, report)  # type: ignore[no-untyped-call]
    return into


def _fuses(layer: _ConvNd, x: Tensor) -> bool:
    """Whether the examples' gradients themselves are what is squared."""
    assert not isinstance(layer.padding, str)
    sizes = grid_shape(layer, x.shape[2:], list(layer.padding))
    # Stands for the output's gradient.
    grid = x.new_empty(1).expand(len(x), layer.out_channels, *sizes)
    return shifted(layer, prod(sizes)) or whole(layer, grid, x)


class Ticket:
    """What a fused call tells once its gradient is known.

    Attributes:
        call: the call, once its gradient came.
        alone: whether no other call uses the weight; None as long as nobody asks.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.alone: bool | None = None


class Replacements:
    """Layers that run fused while the model's own forward pass runs.

    Args:
        ready: whether calls of the layer at this place are measured at the moment.
        take: called with the layer's place and the sum of squared norms of its weight.
        refuse: called with the layer's place when its gradient will be differentiated again.
    """

    def __init__(
        self,
        ready: Callable[[int], bool],
        take: Callable[[int, Tensor], None],
        refuse: Callable[[int], None],
    ) -> None:
        self._ready = ready
        self._take = take
        self._refuse = refuse
        self._tickets: dict[int, Ticket] = {}
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []

    def add(self, module: nn.Module, place: int) -> None:
        """Run a layer fused in measured forward passes of the model."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._tickets.pop(place, None)
            ordinary = type(module).forward
            if kwargs or len(args) != 1 or not self._ready(place):
                return ordinary(module, *args, **kwargs)
            ticket = Ticket()
            out = fused_forward(module, args[0], self._reporter(place, ticket))
            if out is None:
                return ordinary(module, *args)
            self._tickets[place] = ticket
            return out

        self._forwards.append((module, forward))

    def begin(self) -> None:
        """A forward pass of the model starts: the layers run fused."""
        # Not longer than that: a copy of a module would run the original's forward.
        for module, forward in self._forwards:
            module.__dict__.setdefault("forward", forward)

    def end(self) -> None:
        """It ended, or failed: the layers run as they are."""
        for module, forward in self._forwards:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]

    def remove(self) -> None:
        """Forget every layer."""
        self.end()
        self._forwards.clear()
        self._tickets.clear()

    def claim(self, place: int) -> Ticket | None:
        """Return the ticket of the layer's last call, if it ran fused."""
        return self._tickets.pop(place, None)

    def _reporter(self, place: int, ticket: Ticket) -> Report:
        def report(square: Tensor | None) -> None:
            # Once only: the graph may be differentiated again when its step is over.
            alone, ticket.alone = ticket.alone, None
            if square is None:
                self._refuse(place)
            elif alone:
                self._take(place, square)
            elif ticket.call is not None:
                ticket.call.known["weight"] = square

        return report


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, report: Report) -> Tensor:
        # As autograd does: a weight that no input's gradient needs may change meanwhile.
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.report = weight.shape, report
        out = F.linear(x, weight, bias)
        # A view that was made here must not be changed in place.
        plain: Tensor = torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out
        return plain

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = g.flatten(0, -2)
        if torch.is_grad_enabled():
            # It will be differentiated again: the ordinary gradient, which can be.
            gradient = rows.mT @ x.flatten(0, -2)
            ctx.report(None)
        else:
            part = Outer(g.flatten(1, -2), x.flatten(1, -2))
            gradient, square = total_and_square_sum(part, ctx.shape)
            ctx.report(square)
        return (
            g @ weight if ctx.needs_input_grad[0] else None,
            gradient,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _ConvNd, report: Report
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.report = layer, report
        return layer._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        wants_input, _, wants_bias = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()
        # A bias here would make oneDNN compute the weight's gradient along with it.
        into_input, gradient, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            [wants_input, again, False],
        )
        into_bias = g.flatten(2).sum((0, 2)) if wants_bias else None
        if again:
            # It will be differentiated again: the ordinary gradient, which can be.
            ctx.report(None)
        else:
            part = weight_part(layer, g, x)
            assert isinstance(part, Outer | Windows)
            gradient, square = total_and_square_sum(part, weight.shape)
            ctx.report(square)
        return into_input, gradient, into_bias, None, None
