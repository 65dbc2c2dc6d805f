"""RNN, LSTM, GRU and their cells: run again step by step, so that every product is a Linear.

The gradients at the sums that enter the gates come out of one backward pass through the
repeated steps; those of the weights are then outer products with what each sum was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.parts import Outer, Part, wide
from noisescale.measure.rules.registry import (
    MORE_INPUTS,
    NOT_BATCHED,
    RULES,
    Call,
    Dims,
    Rule,
    own_parameters,
)

State = tuple[Tensor, ...]


@dataclass(eq=False)
class Product:
    """One weight's products: inputs of shape (n, i) and sums of shape (n, o), per step."""

    weight: str
    bias: str | None
    inputs: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


class _Cell:
    """One cell's parameters, and its products with them."""

    def __init__(self, layer: nn.Module, suffix: str, *, cut: bool = False) -> None:
        self.layer = layer
        self.cut = cut
        self.mode = _mode(layer)
        self.products = [
            Product(f"weight_ih{suffix}", f"bias_ih{suffix}"),
            Product(f"weight_hh{suffix}", f"bias_hh{suffix}"),
        ]
        if getattr(layer, "proj_size", 0):
            self.products.append(Product(f"weight_hr{suffix}", None))

    def _product(self, which: int, x: Tensor) -> Tensor:
        product = self.products[which]
        total = x @ wide(getattr(self.layer, product.weight).detach()).T.to(x.dtype)
        if product.bias is not None and self.layer.bias:
            total = total + wide(getattr(self.layer, product.bias).detach())
        if not total.requires_grad:
            total.requires_grad_()
        product.inputs.append(x.detach())
        product.sums.append(total)
        return total

    def step(self, x: Tensor, state: State) -> State:
        """Return the next state: (h,), or (h, c) of an LSTM."""
        a, b = self._product(0, x), self._product(1, state[0])
        if self.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4, 1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (c.detach() if self.cut else c).tanh()
            return (self._product(2, h) if len(self.products) == 3 else h), c
        if self.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
            new = (an + (ar + br).sigmoid() * bn).tanh()
            return (new + (az + bz).sigmoid() * (state[0] - new),)
        return ((a + b).tanh() if self.mode == "tanh" else (a + b).relu(),)


def _mode(layer: nn.Module) -> str:
    for name in ("LSTM", "GRU"):
        if isinstance(layer, getattr(nn, name) | getattr(nn, f"{name}Cell")):
            return name
    return str(layer.nonlinearity)


def _cut(call: Call, rows: slice) -> tuple[Tensor, list[Tensor]]:
    """The input, time first for layers, and the states, of some examples."""
    dims = [d or 0 for d in call.dims]
    cut = [
        wide(t.narrow(d, rows.start, rows.stop - rows.start))
        for t, d in zip(call.tensors, dims, strict=True)
    ]
    return cut[0], cut[1:]


def _layer_parts(call: Call, rows: slice) -> Mapping[str, Part]:
    layer = call.layer
    assert isinstance(layer, nn.RNNBase)
    x, given = _cut(call, rows)
    if layer.batch_first:
        x = x.transpose(0, 1)
    states = given or _zero_states(layer, x)
    directions = 2 if layer.bidirectional else 1
    cells: list[_Cell] = []
    ends: list[State] = []
    with torch.enable_grad():
        for depth in range(layer.num_layers):
            outputs = []
            for way in range(directions):
                cell = _Cell(layer, f"_l{depth}" + ("_reverse" if way else ""))
                state: State = tuple(s[depth * directions + way] for s in states)
                made = []
                for t in reversed(range(len(x))) if way else range(len(x)):
                    state = cell.step(x[t], state)
                    made.append(state[0])
                outputs.append(torch.stack(made[::-1] if way else made))
                ends.append(state)
                cells.append(cell)
            x = torch.cat(outputs, 2)
        results = [x.transpose(0, 1) if layer.batch_first else x]
        results += [torch.stack(last) for last in zip(*ends, strict=True)]
        return _weight_parts(call, rows, cells, results)


def _zero_states(layer: nn.RNNBase, x: Tensor) -> list[Tensor]:
    many = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size]
    widths += [layer.hidden_size] if layer.mode == "LSTM" else []
    return [x.new_zeros(many, x.shape[1], width) for width in widths]


def _cell_parts(call: Call, rows: slice) -> Mapping[str, Part]:
    layer = call.layer
    assert isinstance(layer, nn.RNNCellBase)
    x, given = _cut(call, rows)
    many = 2 if isinstance(layer, nn.LSTMCell) else 1
    states = tuple(given) or tuple(x.new_zeros(len(x), layer.hidden_size) for _ in range(many))
    # Where h is made from the c that is returned, c's gradient holds h's share of it already;
    # a fused kernel returns both at once.
    cell = _Cell(layer, "", cut=many == 2 and not x.is_cuda)
    with torch.enable_grad():
        return _weight_parts(call, rows, [cell], list(cell.step(x, states)))


def _weight_parts(
    call: Call, rows: slice, cells: list[_Cell], results: list[Tensor]
) -> Mapping[str, Part]:
    live = [
        (out, g.narrow(d, rows.start, rows.stop - rows.start).to(out.dtype))
        for out, g, d in zip(results, call.gradients, call.outputs, strict=True)
        if g is not None
    ]
    products = [product for cell in cells for product in cell.products]
    sums = [total for product in products for total in product.sums]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in live],
            sums,
            [g for _, g in live],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    parts: dict[str, Part] = {}
    for product in products:
        gradient = torch.stack([next(found) for _ in product.sums], 1)
        parts[product.weight] = Outer(gradient, torch.stack(product.inputs, 1))
        if product.bias is not None:
            parts[product.bias] = gradient.sum(1)
    return parts


def _layer_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> Dims | str:
    assert isinstance(layer, nn.RNNBase)
    values = _in_order(args, kwargs)
    if isinstance(values, str):
        return values
    if not isinstance(values[0], Tensor):
        return "packed sequences have no rule"
    dim = 0 if layer.batch_first else 1
    if values[0].dim() != 3 or values[0].shape[dim] != size:
        return NOT_BATCHED if layer.batch_first else "its input has no batch dimension second"
    return [dim, *[1] * (len(values) - 1)]


def _cell_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> Dims | str:
    del layer
    values = _in_order(args, kwargs)
    if isinstance(values, str):
        return values
    if values[0].dim() != 2 or values[0].shape[0] != size:
        return NOT_BATCHED
    return [0] * len(values)


def _in_order(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | str:
    """The input and the states, as they came."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if not given or (not args and next(iter(kwargs)) != "input") or len(given) > 2:
        return MORE_INPUTS
    states = given[1] if len(given) == 2 else ()
    return [given[0], *(states if isinstance(states, tuple | list) else (states,))]


def _layer_outputs(layer: nn.Module, outputs: list[Tensor], size: int) -> list[int] | str:
    del size
    assert isinstance(layer, nn.RNNBase)
    return [0 if layer.batch_first else 1, *[1] * (len(outputs) - 1)]


def _cell_outputs(layer: nn.Module, outputs: list[Tensor], size: int) -> list[int] | str:
    del layer, size
    return [0] * len(outputs)


def _step(call: Call) -> int:
    """Examples whose activations fill a few buffers: steps are dear, memory is not."""
    layer = call.layer
    gates = sum(p.shape[0] for p in layer.parameters(recurse=False))
    length = call.tensors[0].numel() // max(1, call.size * call.tensors[0].shape[-1])
    return max(1, 4 * _parts.CHUNK_ELEMENTS // max(1, gates * length))


def _usable(layer: nn.Module) -> str | None:
    between = isinstance(layer, nn.RNNBase) and layer.num_layers > 1 and layer.dropout > 0
    if between and layer.training:
        return "the random numbers of its dropout cannot be drawn again"
    return None


_LAYER = Rule(_layer_parts, _step, _layer_inputs, _layer_outputs, own_parameters, _usable)
_CELL = Rule(_cell_parts, _step, _cell_inputs, _cell_outputs, own_parameters, _usable)
RULES.update(dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _LAYER))
RULES.update(dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), _CELL))
