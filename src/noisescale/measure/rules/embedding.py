"""Tables that are looked up."""

from __future__ import annotations

from torch import Tensor, nn

from noisescale.measure.rules.parts import Part, Rows, wide
from noisescale.measure.rules.registry import all_examples, example_rule


def _usable(layer: nn.Module) -> str | None:
    assert isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq mixes the examples of a batch"
    if layer.max_norm is not None:
        return "max_norm changes the weight during the forward pass"
    if isinstance(layer, nn.EmbeddingBag) and layer.mode == "max":
        return "EmbeddingBag with mode='max' has no rule"
    return None


@example_rule(nn.Embedding, batched=lambda _, x: x.dim() >= 1, usable=_usable, step=all_examples)
def embedding(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """Embedding: rows of equal ids add up before they are squared; padding_idx gets nothing."""
    assert isinstance(layer, nn.Embedding)
    batch, width = x.shape[0], g.shape[-1]
    ids, g = x.reshape(batch, -1), wide(g).reshape(batch, -1, width)
    if layer.padding_idx is not None:
        g = g * (ids != layer.padding_idx).unsqueeze(2)
    return {"weight": Rows(ids, g, layer.num_embeddings)}


@example_rule(nn.EmbeddingBag, usable=_usable, step=all_examples)
def embedding_bag(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """EmbeddingBag of equally long bags: every id of a bag gets its gradient, or its share."""
    assert isinstance(layer, nn.EmbeddingBag)
    share = x.new_ones(x.shape) if layer.padding_idx is None else x != layer.padding_idx
    share = share.to(wide(g).dtype)
    if layer.mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1)
    return {"weight": Rows(x, wide(g).unsqueeze(1) * share.unsqueeze(2), layer.num_embeddings)}
