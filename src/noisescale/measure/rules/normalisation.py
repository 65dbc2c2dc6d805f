"""Normalisations within an example, whose weight and bias act channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from noisescale.measure.rules.parts import Part, wide
from noisescale.measure.rules.registry import all_examples, example_rule, trained

# Elements that are normalised again at a time: few enough to stay in the cache (measured).
_CHUNK_ELEMENTS = 1 << 18


def _weighted(
    x: Tensor,
    g: Tensor,
    normalise: Callable[[Tensor], Tensor],
    over_positions: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum g * xhat over the positions of every example."""
    step = len(x) if x.is_cuda else max(1, _CHUNK_ELEMENTS // max(1, x[0].numel()))
    found = [
        over_positions(normalise(x[i : i + step]).mul_(g[i : i + step]))
        for i in range(0, len(x), step)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _has_rows(layer: nn.Module, x: Tensor) -> bool:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    return x.dim() > len(layer.normalized_shape)


@example_rule(nn.LayerNorm, batched=_has_rows, step=all_examples)
@example_rule(nn.RMSNorm, batched=_has_rows, step=all_examples)
def row_norm(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """LayerNorm and RMSNorm: dw_i = sum_t g_it * xhat_it, db_i = sum_t g_it."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    # RMSNorm's own default depends on the precision of its input.
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    x, g = wide(x), wide(g)
    shape = list(layer.normalized_shape)
    kind = F.layer_norm if isinstance(layer, nn.LayerNorm) else F.rms_norm

    def over_positions(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), -1, *shape).sum(1)

    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        found["weight"] = _weighted(x, g, lambda t: kind(t, shape, eps=eps), over_positions)
    if trained(layer, "bias"):
        found["bias"] = over_positions(g)
    return found


def _mean_and_rstd(output: Tensor) -> Sequence[Tensor]:
    """What GroupNorm's node in the graph keeps for its own backward pass."""
    node = output.grad_fn
    if type(node).__name__ != "NativeGroupNormBackward0":
        return ()
    # Private, but the only place that has them; where a version has none they are computed again.
    found = [getattr(node, f"_saved_result{i}", None) for i in (1, 2)]
    known = [t.detach() for t in found if isinstance(t, Tensor)]
    return known if len(known) == 2 else ()


@example_rule(nn.GroupNorm, step=all_examples, statistics=_mean_and_rstd)
def group_norm(layer: nn.Module, x: Tensor, g: Tensor, *known: Tensor) -> dict[str, Part]:
    """GroupNorm: dw_i = sum_t g_it * xhat_it over the positions of each channel."""
    assert isinstance(layer, nn.GroupNorm)
    return _by_channel(layer, x, g, layer.num_groups, layer.eps, known)


def _own_statistics(layer: nn.Module, x: Tensor) -> bool:
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    dims = next(d for d, kind in enumerate(kinds, start=3) if isinstance(layer, kind))
    return x.dim() == dims


def _no_running_statistics(layer: nn.Module) -> str | None:
    assert isinstance(layer, _InstanceNorm)
    if layer.track_running_stats:
        return f"{type(layer).__name__} with running statistics has no rule"
    return None


@example_rule(
    nn.InstanceNorm1d, batched=_own_statistics, usable=_no_running_statistics, step=all_examples
)
@example_rule(
    nn.InstanceNorm2d, batched=_own_statistics, usable=_no_running_statistics, step=all_examples
)
@example_rule(
    nn.InstanceNorm3d, batched=_own_statistics, usable=_no_running_statistics, step=all_examples
)
def instance_norm(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """InstanceNorm by the example's own statistics: dw_i = sum_t g_it * xhat_it."""
    assert isinstance(layer, _InstanceNorm)
    return _by_channel(layer, x, g, layer.num_features, layer.eps, ())


def _by_channel(
    layer: nn.Module, x: Tensor, g: Tensor, groups: int, eps: float, known: Sequence[Tensor]
) -> dict[str, Part]:
    """Gradients of every example: those of one example that has all their channels."""
    x, g = wide(x).contiguous(), wide(g).contiguous()
    examples, channels = x.shape[:2]
    if not x.numel():
        return {key: x.new_zeros(examples, channels) for key in ("weight", "bias")}
    mean, rstd = (t.to(x.dtype) for t in known or _statistics(x, groups, eps))
    total = examples * channels
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        g.view(1, total, -1),
        x.view(1, total, -1),
        mean.reshape(1, -1),
        rstd.reshape(1, -1),
        x.new_ones(total),
        1,
        total,
        x.numel() // total,
        examples * groups,
        [False, True, True],
    )
    found = {"weight": weight, "bias": bias}
    return {k: v.view(examples, channels) for k, v in found.items() if trained(layer, k)}


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of every example's groups, (examples, groups)."""
    step = len(x) if x.is_cuda else max(1, _CHUNK_ELEMENTS // max(1, x[0].numel()))
    channels, positions = x.shape[1], x[0].numel() // x.shape[1]
    found = [
        torch.native_group_norm(c, None, None, len(c), channels, positions, groups, eps)[1:]
        for c in torch.split(x, step)
    ]
    means, rstds = zip(*found, strict=True)
    return torch.cat(means), torch.cat(rstds)
