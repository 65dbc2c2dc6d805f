"""What single nodes of autograd's graph do with the gradients of single examples.

A parameter that a module uses by itself, without a layer, is followed through the graph: first
through nodes that hold no batch (a slice, a cast, a sum of two tables), each a linear map of
gradients that every example goes through alike; then to the node where it meets the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from noisescale.measure.kept import Take, keep
from noisescale.measure.rules.parts import Outer, Part, Rows, wide

Node = Any
"""Of autograd's graph."""

Back = Callable[[Tensor], Tensor]
"""Takes gradients of a node's output, by example, to those of its operand."""

# Nodes that only move or cast elements; they save no tensor.
_MOVING = {
    "AliasBackward0", "CloneBackward0", "PermuteBackward0", "ReshapeAliasBackward0",
    "SelectBackward0", "SliceBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "TBackward0", "ToCopyBackward0", "TransposeBackward0",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
_SPREADING = {"ExpandBackward0", "RepeatBackward0"}
# Functions of every element by itself, of one operand.
_POINTWISE = {
    "ExpBackward0", "LogBackward0", "NegBackward0", "PowBackward0", "ReciprocalBackward0",
    "ReluBackward0", "SigmoidBackward0", "SoftplusBackward0", "SqrtBackward0", "TanhBackward0",
}  # fmt: skip
_GATHERING = {"EmbeddingBackward0", "IndexBackward0"}


class UnknownError(Exception):
    """A node that the parameter cannot be followed through."""


def shape_of(node: Node) -> torch.Size:
    """Shape of a node's only output.

    Raises:
        UnknownError: it has several, or none that is known.
    """
    known: tuple[Any, ...] = getattr(node, "_input_metadata", ())
    if len(known) != 1:
        raise UnknownError
    return torch.Size(known[0].shape)


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where a parameter, or what was made of it, meets the batch.

    Attributes:
        part: the gradient of every example, given that of the output and tensors kept of the
            forward pass.
        terms: how many terms of every example are added up into one element.
    """

    part: Callable[[Tensor, list[Tensor]], Part]
    terms: int = 1


def keeps_norm(node: Node) -> bool:
    """Whether gradients keep their norm on the way back through a node without batch."""
    return node.name() in _MOVING and node.name() != "ToCopyBackward0"


def back_through(node: Node, operand: int, shape: torch.Size) -> Back:
    """How gradients by example go back through a node without batch.

    Args:
        node: the node.
        operand: which of its operands.
        shape: the operand's.

    Raises:
        UnknownError: it is none of the kinds that are known, or saved tensors are not at hand.
    """
    name = node.name()
    if name in _MOVING or name in _SPREADING:
        return lambda g: vmap(node)(g)
    if name in _GATHERING:
        ids, rows = _ids(node, shape), shape[0]
        return lambda g: _scattered(g, ids, rows)
    if name in _POINTWISE:
        _saved(node, *(key for key in dir(node) if key.startswith("_raw_saved_")))
        with torch.no_grad():
            slope = node(torch.ones(shape_of(node), dtype=_dtype(node), device=_device(node)))
        return lambda g: g * slope
    factor = _factor(node, operand)
    return lambda g: _summed(g * factor, shape)


def meets(node: Node, operand: int, shape: torch.Size) -> tuple[Take, Meeting]:
    """How a parameter's gradient by example comes out of that of the batch.

    Args:
        node: the node, whose output starts with the batch dimension.
        operand: which of its operands is the parameter, or was made of it.
        shape: the operand's.

    Raises:
        UnknownError: it is none of the kinds that are known, the operand has the batch's
            dimension as well, or saved tensors are not at hand.
    """
    name, out = node.name(), shape_of(node)
    if name in _GATHERING:
        ids, rows = _ids(node, shape), shape[0]
        return keep([ids]), Meeting(lambda g, kept: _rows(g, kept[0], rows))
    if name == "MmBackward0" and operand == 1:
        return keep(_saved(node, "_raw_saved_self")), Meeting(_outer)
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    if padded[0] != 1 or (name == "RepeatBackward0" and padded[1:] != out[1:]):
        raise UnknownError
    terms = out[1:].numel() // max(1, shape.numel())
    factor = 1.0 if name in _SPREADING else _factor(node, operand)
    if isinstance(factor, Tensor):
        return keep([factor]), Meeting(lambda g, kept: _summed(wide(g) * kept[0], shape), terms)
    return keep([]), Meeting(lambda g, _: _summed(wide(g), shape) * factor, terms)


def _factor(node: Node, operand: int) -> Tensor | float:
    """What the gradient of an elementwise node's operand is multiplied by."""
    name = node.name()
    if name in ("AddBackward0", "SubBackward0"):
        alpha = float(node._saved_alpha) if operand else 1.0
        return -alpha if operand and name == "SubBackward0" else alpha
    if name == "MulBackward0":
        return _saved(node, "_raw_saved_self" if operand else "_raw_saved_other")[0]
    if name == "DivBackward0" and not operand:
        return _saved(node, "_raw_saved_other")[0].reciprocal()
    if name == "WhereBackward0":
        condition = _saved(node, "_raw_saved_condition")[0]
        return ~condition if operand else condition
    raise UnknownError


def _saved(node: Node, *names: str) -> list[Tensor]:
    """Tensors that autograd keeps itself: what hooks hold may be unpacked only once."""
    found: list[Tensor] = []
    for name in names:
        raws = getattr(node, name, None)
        for raw in raws if isinstance(raws, tuple) else (raws,):
            data = getattr(raw, "data", None)
            if getattr(raw, "unpack_hook", 0) is not None or not isinstance(data, Tensor):
                raise UnknownError
            found.append(data.detach())
    return found


def _ids(node: Node, shape: torch.Size) -> Tensor:
    """Rows of a table that were taken, not negative."""
    saved = _saved(node, "_raw_saved_indices")
    if len(saved) != 1 or saved[0].dtype not in (torch.int64, torch.int32):
        raise UnknownError
    if node.name() == "EmbeddingBackward0":
        # -1 is none, unsigned.
        padded = 0 <= node._saved_padding_idx < shape[0]
        if padded or node._saved_scale_grad_by_freq:
            raise UnknownError
        return saved[0]
    return saved[0] % shape[0]


def _dtype(node: Node) -> torch.dtype:
    dtype = node._input_metadata[0].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _device(node: Node) -> torch.device:
    device = node._input_metadata[0].device
    assert isinstance(device, torch.device)
    return device


def _summed(g: Tensor, shape: torch.Size) -> Tensor:
    """Add up what was spread: (examples, *larger shape) -> (examples, *shape)."""
    skipped = g.dim() - 1 - len(shape)
    if skipped < 0:  # the operand's own leading dimension of 1 is the batch's
        return _summed(g, torch.Size(shape[-skipped:])).reshape(len(g), *shape)
    sizes = (1,) * skipped + tuple(shape)
    spread = [d + 1 for d, size in enumerate(sizes) if size == 1 and g.shape[d + 1] != 1]
    if spread:
        g = g.sum(spread, keepdim=True)
    return g.reshape(len(g), *shape)


def _scattered(g: Tensor, ids: Tensor, rows: int) -> Tensor:
    """(examples, *ids, ...) -> (examples, rows, ...)."""
    flat = g.flatten(1, ids.dim()) if ids.dim() else g.unsqueeze(1)
    table = flat.new_zeros(len(flat), rows, *flat.shape[2:])
    return table.index_add_(1, ids.reshape(-1), flat)


def _rows(g: Tensor, ids: Tensor, rows: int) -> Part:
    n = len(ids)
    return Rows(ids.reshape(n, -1), wide(g).reshape(n, ids[0].numel(), -1), rows)


def _outer(g: Tensor, kept: list[Tensor]) -> Part:
    return Outer(wide(kept[0]).unsqueeze(1), wide(g).unsqueeze(1))
