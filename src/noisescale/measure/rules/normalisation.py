"""Normalisations within an example, whose weight and bias act channel by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from noisescale.measure.rules.parts import Part, wide
from noisescale.measure.rules.registry import example_rule, trained

# Elements that are normalised again at a time: few enough to stay in the cache (measured).
_CHUNK_ELEMENTS = 1 << 18


def _step(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    del layer, g
    return len(x) if x.is_cuda else max(1, _CHUNK_ELEMENTS // max(1, x[0].numel()))


def _has_rows(layer: nn.Module, x: Tensor) -> bool:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    return x.dim() > len(layer.normalized_shape)


@example_rule(nn.LayerNorm, batched=_has_rows, step=_step)
@example_rule(nn.RMSNorm, batched=_has_rows, step=_step)
def row_norm(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """LayerNorm and RMSNorm: dw_i = sum_t g_it * xhat_it, db_i = sum_t g_it."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    # RMSNorm's own default depends on the precision of its input.
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    x, g = wide(x), wide(g)
    shape = list(layer.normalized_shape)
    normalise = F.layer_norm if isinstance(layer, nn.LayerNorm) else F.rms_norm
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        hat = normalise(x, shape, eps=eps)
        found["weight"] = hat.mul_(g).reshape(len(x), -1, *shape).sum(1)
    if trained(layer, "bias"):
        found["bias"] = g.reshape(len(x), -1, *shape).sum(1)
    return found


@example_rule(nn.GroupNorm, step=_step)
def group_norm(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """GroupNorm: dw_i = sum_t g_it * xhat_it over the positions of each channel."""
    assert isinstance(layer, nn.GroupNorm)
    x, g = wide(x), wide(g)
    hat = F.group_norm(x, layer.num_groups, eps=layer.eps) if trained(layer, "weight") else x
    return _by_channel(layer, hat, g)


def _own_statistics(layer: nn.Module, x: Tensor) -> bool:
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    dims = next(d for d, kind in enumerate(kinds, start=3) if isinstance(layer, kind))
    return x.dim() == dims


def _no_running_statistics(layer: nn.Module) -> str | None:
    assert isinstance(layer, _InstanceNorm)
    if layer.track_running_stats:
        return f"{type(layer).__name__} with running statistics has no rule"
    return None


@example_rule(nn.InstanceNorm1d, batched=_own_statistics, usable=_no_running_statistics, step=_step)
@example_rule(nn.InstanceNorm2d, batched=_own_statistics, usable=_no_running_statistics, step=_step)
@example_rule(nn.InstanceNorm3d, batched=_own_statistics, usable=_no_running_statistics, step=_step)
def instance_norm(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """InstanceNorm by the example's own statistics: dw_i = sum_t g_it * xhat_it."""
    assert isinstance(layer, _InstanceNorm)
    x, g = wide(x), wide(g)
    hat = F.instance_norm(x, eps=layer.eps) if trained(layer, "weight") else x
    return _by_channel(layer, hat, g)


def _by_channel(layer: nn.Module, hat: Tensor, g: Tensor) -> dict[str, Part]:
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        weighted = hat.mul_(g)
        found["weight"] = weighted.flatten(2).sum(2) if g.dim() > 2 else weighted
    if trained(layer, "bias"):
        found["bias"] = g.flatten(2).sum(2) if g.dim() > 2 else g
    return found
