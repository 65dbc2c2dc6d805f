"""Per-example squared gradient norms of single layers, from their input and output gradient.

A rule gets the layer, its input x (batch first) and the gradient g of the loss with respect
to its output, and returns, for each of the layer's own parameters, the squared norm of every
example's gradient: shape (batch,). No per-example gradient outlives the rule. Register one
for a layer of your own with ``@rule(MyLayer)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RuleFunction = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

# Elements of one unfolded buffer. (measured on one CPU core: of 2^16 to 2^25, convolutions of
# 32 and 64 channels at 14x14 and 28x28 are fastest, or within noise of it, at 2^20 to 2^22)
_CHUNK_ELEMENTS = 1 << 21


# torch's norm on a CPU adds up in one pass: over more elements than this it loses more than
# 3e-6 in float32, where a sum by halves does not. (measured)
_NORM_LENGTH = 1 << 16


@dataclass(frozen=True)
class Rule:
    """How one kind of layer is measured.

    Attributes:
        norms: from (layer, x, g) to squared norms per own parameter.
        batched: whether an input has a batch dimension in front.
        usable: why a layer of this kind cannot be measured, or None.
    """

    norms: RuleFunction
    batched: Callable[[nn.Module, Tensor], bool]
    usable: Callable[[nn.Module], str | None]


_RULES: dict[type[nn.Module], Rule] = {}


def rule(
    kind: type[nn.Module],
    *,
    batched: Callable[[nn.Module, Tensor], bool] = lambda _, x: x.dim() >= 2,
    usable: Callable[[nn.Module], str | None] = lambda _: None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register the rule of a layer.

    Args:
        kind: the layer's class; subclasses count while they keep its ``forward``.
        batched: whether an input has enough dimensions for one of them to be the batch.
        usable: returns why a particular layer cannot be measured, or None.
    """

    def register(norms: RuleFunction) -> RuleFunction:
        _RULES[kind] = Rule(norms, batched, usable)
        return norms

    return register


def rule_for(layer: nn.Module) -> Rule | str:
    """Return the rule of a layer, or why there is none."""
    for kind in type(layer).__mro__:
        if kind in _RULES:
            if type(layer).forward is not kind.forward:
                return f"{type(layer).__name__} overrides the forward of {kind.__name__}"
            found = _RULES[kind]
            return found.usable(layer) or found
    return f"{type(layer).__name__} has no rule"


def _trained(layer: nn.Module, key: str) -> bool:
    parameter = layer._parameters.get(key)
    return parameter is not None and parameter.requires_grad


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _row_sq(rows: Tensor) -> Tensor:
    """Squared norm of every example: shape (batch, ...) -> (batch,)."""
    flat = rows.flatten(1)
    if flat.shape[1] > _NORM_LENGTH and not flat.is_cuda:
        return flat.square().sum(1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norm.square()


def _product_sq(a: Tensor, g: Tensor) -> Tensor:
    """|sum_t g_t a_t^T|_F^2 for each item: a (n, t, i), g (n, t, o) -> (n,).

    Either through the t x t Gram matrices or through the o x i product itself, whichever
    needs fewer operations.
    """
    items, length, inner = a.shape
    outer = g.shape[2]
    if length * (inner + outer) < inner * outer:
        return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    step = max(1, _CHUNK_ELEMENTS // (inner * outer))
    parts = [_row_sq(torch.bmm(g[i : i + step].mT, a[i : i + step])) for i in range(0, items, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@rule(nn.Linear)
def linear_norms(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Linear: dW_i = sum_t g_it x_it^T, db_i = sum_t g_it, over all dimensions but the first.

    Source: Goodfellow 2015 (arXiv:1510.01799) for one position; Gram form: Li et al. 2021
    (arXiv:2110.05679), section 4.
    """
    x, g = _wide(x), _wide(g)
    norms: dict[str, Tensor] = {}
    if x.dim() == 2:
        g_sq = _row_sq(g)
        if _trained(layer, "weight"):
            norms["weight"] = g_sq * _row_sq(x)
        if _trained(layer, "bias"):
            norms["bias"] = g_sq
        return norms
    x, g = x.flatten(1, -2), g.flatten(1, -2)
    if _trained(layer, "weight"):
        norms["weight"] = _product_sq(x, g)
    if _trained(layer, "bias"):
        norms["bias"] = _row_sq(g.sum(1))
    return norms


@rule(nn.Conv2d, batched=lambda _, x: x.dim() == 4)
def conv2d_norms(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Conv2d with groups, stride, dilation and any padding: a Linear on unfolded patches."""
    assert isinstance(layer, nn.Conv2d)
    g = _wide(g).flatten(2)
    norms: dict[str, Tensor] = {}
    if _trained(layer, "weight"):
        norms["weight"] = _conv2d_weight(layer, _wide(x), g)
    if _trained(layer, "bias"):
        norms["bias"] = _row_sq(g.sum(2))
    return norms


def _conv2d_weight(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    batch, groups = x.shape[0], layer.groups
    patch = layer.weight[0].numel() * groups
    step = max(1, _CHUNK_ELEMENTS // (patch * g.shape[2]))
    parts = []
    for start in range(0, batch, step):
        a = _patches(layer, x[start : start + step])
        items = a.shape[0] * groups
        a = a.reshape(items, patch // groups, -1)
        d = g[start : start + step].reshape(items, layer.out_channels // groups, -1)
        parts.append(_product_sq(a.mT, d.mT).view(-1, groups).sum(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Unfold to (batch, channels * kernel, positions)."""
    padding: tuple[int, ...] | int
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, _pad_widths(layer), mode=mode), 0
    else:
        padding = layer.padding
    return F.unfold(
        x, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
    )


def _pad_widths(layer: nn.Conv2d) -> list[int]:
    """Padding in the order of ``F.pad``: last dimension first."""
    widths: list[int] = []
    for axis in (1, 0):
        if layer.padding == "valid":
            widths += [0, 0]
        elif isinstance(layer.padding, str):
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [layer.padding[axis], layer.padding[axis]]
    return widths


def _embedding_usable(layer: nn.Module) -> str | None:
    assert isinstance(layer, nn.Embedding)
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq mixes the examples of a batch"
    if layer.max_norm is not None:
        return "max_norm changes the weight during the forward pass"
    return None


@rule(nn.Embedding, batched=lambda _, x: x.dim() >= 1, usable=_embedding_usable)
def embedding_norms(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Embedding: rows of equal ids add up before they are squared; padding_idx gets nothing."""
    assert isinstance(layer, nn.Embedding)
    batch, width = x.shape[0], g.shape[-1]
    ids, g = x.reshape(batch, -1), _wide(g).reshape(batch, -1, width)
    if layer.padding_idx is not None:
        g = g * (ids != layer.padding_idx).unsqueeze(2)
    length = ids.shape[1]
    if length == 1:
        return {"weight": _row_sq(g)}
    if length <= width:
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        return {"weight": (torch.bmm(g, g.mT) * same).sum((1, 2))}
    return {"weight": _scattered_sq(ids, g, layer.num_embeddings)}


def _scattered_sq(ids: Tensor, g: Tensor, vocabulary: int) -> Tensor:
    """Add up the rows of equal (example, id), then square: long sequences."""
    batch, _, width = g.shape
    example = torch.arange(batch, device=ids.device).unsqueeze(1)
    pairs, where = torch.unique(ids + example * vocabulary, return_inverse=True)
    rows = g.new_zeros(len(pairs), width).index_add_(0, where.reshape(-1), g.reshape(-1, width))
    return g.new_zeros(batch).index_add_(0, pairs // vocabulary, _row_sq(rows))


def _layer_norm_batched(layer: nn.Module, x: Tensor) -> bool:
    assert isinstance(layer, nn.LayerNorm)
    return x.dim() > len(layer.normalized_shape)


@rule(nn.LayerNorm, batched=_layer_norm_batched)
def layer_norm_norms(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """LayerNorm: dw_i = sum_t g_it * xhat_it, db_i = sum_t g_it."""
    assert isinstance(layer, nn.LayerNorm)
    x, g = _wide(x), _wide(g)
    shape = layer.normalized_shape
    batch, width = x.shape[0], layer.weight.numel()
    norms: dict[str, Tensor] = {}
    if _trained(layer, "weight"):
        hat = F.layer_norm(x, shape, eps=layer.eps)
        norms["weight"] = _row_sq((hat * g).reshape(batch, -1, width).sum(1))
    if _trained(layer, "bias"):
        norms["bias"] = _row_sq(g.reshape(batch, -1, width).sum(1))
    return norms
