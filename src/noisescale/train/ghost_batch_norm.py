"""Ghost batch norm: a large batch normalised as the small batches that it replaces.

A batch of N examples is cut, in order, into ghost batches of b; each is normalised by its own
mean and variance, all in one call. What training sees, running statistics included, is what
separate batches of b would have given one after another.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisescale.errors import InvalidInputError, nearest
from noisescale.train.arguments import whole

Remainder = Literal["merge", "separate"]
"""What becomes of the N mod b examples left over: they join the last ghost batch, which then has
b to 2b - 1 examples, or form a ghost batch of their own, which is as noisy as it is small."""

M = TypeVar("M", bound=nn.Module)


class _GhostBatchNorm(_BatchNorm):
    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int,
        *,
        remainder: Remainder = "merge",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.virtual_batch_size = whole("virtual_batch_size", virtual_batch_size)
        self.remainder = _checked_remainder(remainder)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch of shape (N, C, ...); in evaluation mode as BatchNorm does.

        Raises:
            InvalidInputError: a ghost batch would have one value per channel.
            ValueError: the number of dimensions is not this layer's, as in torch.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        alike, tail = self._ghosts(len(input)) if self.training else (0, 0)
        if alike + (tail > 0) < 2:
            return super().forward(input)
        if (tail or self.virtual_batch_size) * input[0, 0].numel() == 1:
            raise InvalidInputError(
                f"a ghost batch of 1 in a batch of {len(input)}",
                "more than one value per channel is required in training",
                "raise virtual_batch_size or take remainder='merge'",
            )
        return self._normalised(input, alike, tail)

    def extra_repr(self) -> str:
        """Describe the layer, as BatchNorm's with the ghost batches added."""
        own = f"virtual_batch_size={self.virtual_batch_size}, remainder={self.remainder!r}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]

    def _ghosts(self, examples: int) -> tuple[int, int]:
        """Return how many ghost batches have the full size, and the size of one more, or 0."""
        size = self.virtual_batch_size
        full, left = examples // size, examples % size
        if left and self.remainder == "merge" and full:
            return full - 1, size + left
        return full, left

    def _normalised(self, input: Tensor, alike: int, tail: int) -> Tensor:
        if tail:
            head = alike * self.virtual_batch_size
            parts = [self._alike(input[:head], alike), self._alike(input[head:], 1)]
            output, means, variances = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        else:
            output, means, variances = self._alike(input, alike)
        if self.running_mean is not None and self.running_var is not None:
            self._track(means, variances)
        return output

    def _alike(self, input: Tensor, ghosts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise ghost batches of equal size; return the output, (n, C) means, variances.

        Ghost batches become channels of one call, n C of them. Which axes are swapped for that
        follows the memory, so that whole rows are copied.
        """
        channels = self.num_features
        # What the kernels want statistics in, where a half-precision input has single parameters.
        like = next((t for t in (self.running_mean, self.weight) if t is not None), input)
        means, variances = input.new_zeros((2, ghosts * channels), dtype=like.dtype).unbind()
        weight = None if self.weight is None else self.weight.repeat(ghosts)
        bias = None if self.bias is None else self.bias.repeat(ghosts)
        by_rows = _channels_are_innermost(input)
        shape = input.movedim(1, -1).shape if by_rows else input.shape
        if by_rows:
            together = input.movedim(1, -1).reshape(ghosts, -1, channels).transpose(0, 1)
            together = together.reshape(-1, ghosts * channels)
        else:
            together = input.reshape(ghosts, len(input) // ghosts, channels, -1).transpose(0, 1)
            together = together.reshape(len(input) // ghosts, ghosts * channels, -1)
        # With momentum 1 the statistics come back as they are, the variance unbiased.
        output = F.batch_norm(together, means, variances, weight, bias, True, 1.0, self.eps)
        unfolded = output.reshape(len(output), ghosts, -1).transpose(0, 1).reshape(shape)
        output = unfolded.movedim(-1, 1) if by_rows else unfolded
        return output, means.view(ghosts, channels), variances.view(ghosts, channels)

    @torch.no_grad()
    def _track(self, means: Tensor, variances: Tensor) -> None:
        """Update the running statistics as one update per ghost batch, in order, would.

        Everything stays on the device: the cumulative average reads its count there.
        """
        count = len(means)
        dtype = torch.promote_types(means.dtype, torch.float32)
        if self.momentum is not None:
            powers = torch.arange(count - 1, -1, -1, device=means.device, dtype=dtype)
            weights = self.momentum * (1 - self.momentum) ** powers
            kept: float | Tensor = (1 - self.momentum) ** count
        elif self.num_batches_tracked is not None:
            seen = self.num_batches_tracked.to(dtype)
            weights = (1 / (seen + count)).expand(count)
            kept = seen / (seen + count)
        else:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(count)
        for running, ours in ((self.running_mean, means), (self.running_var, variances)):
            assert running is not None
            running.copy_(kept * running.to(dtype) + weights @ ours.to(dtype))


@final
class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    r"""BatchNorm of inputs (N, C) or (N, C, L) in ghost batches.

    In training, examples i b to (i + 1) b - 1 are normalised together. Running statistics are
    updated once per ghost batch, in order::

        running <- (1 - eta)^n running + sum_i (1 - eta)^(n - i) eta statistic_i,   i = 1 .. n

    with eta = ``momentum``, or as the plain average over all ghost batches so far where it is
    None; ``num_batches_tracked`` counts ghost batches. In evaluation the layer is BatchNorm, also
    without running statistics. Parameters, buffers and state dict are BatchNorm's.

    Against BatchNorm the batch is copied twice each way: see benchmarks/ghost_batch_norm.py.

    Args:
        num_features: C.
        virtual_batch_size: b, examples per ghost batch, at least 1. Batches below 2 b (below
            b + 1 where the remainder is separate) are normalised as one.
        remainder: ``"merge"`` or ``"separate"``: see :data:`Remainder`.
        eps: as BatchNorm's.
        momentum: eta per ghost batch, or None for the cumulative average.
        affine: as BatchNorm's.
        track_running_stats: as BatchNorm's.
        device: as BatchNorm's.
        dtype: as BatchNorm's.

    Raises:
        InvalidInputError: a setting is out of its range.

    Source: Hoffer et al. 2017 (arXiv:1705.08741), algorithm 1. Its exponents are read so that the
    weights sum to 1 and the last ghost batch counts most, and variances are averaged, as separate
    passes do, which is how the authors' released code trains.

    >>> layer = GhostBatchNorm1d(1, virtual_batch_size=2, affine=False)
    >>> [round(x, 3) for x in layer(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).flatten().tolist()]
    [-1.0, 1.0, -1.0, 1.0]
    >>> round(layer.running_mean.item(), 3)  # 0.9 x 0.1 x 1 + 0.1 x 20
    2.09
    """  # noqa: E501


@final
class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """BatchNorm of inputs (N, C, H, W) in ghost batches; see :class:`GhostBatchNorm1d`."""


@final
class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """BatchNorm of inputs (N, C, D, H, W) in ghost batches; see :class:`GhostBatchNorm1d`."""


GHOSTS: dict[type[nn.Module], type[_GhostBatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def convert_ghost_batch_norm(
    model: M, virtual_batch_size: int, *, remainder: Remainder = "merge"
) -> M:
    """Replace every BatchNorm of a model by its ghost version, in place.

    The same parameters, buffers, hooks and mode go on: an optimizer that was made before stays
    valid, and so do state dicts either way. Ghost batch norms that are there already take the
    new settings. A layer used in two places stays one layer.

    Args:
        model: any module; if it is itself a BatchNorm, use what is returned.
        virtual_batch_size: b, examples per ghost batch, at least 1.
        remainder: ``"merge"`` or ``"separate"``: see :data:`Remainder`.

    Returns:
        The model.

    Raises:
        InvalidInputError: a setting is out of its range, or a layer is a SyncBatchNorm or another
            class derived from BatchNorm, whose behaviour would be lost; nothing is changed then.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> convert_ghost_batch_norm(model, 16)[1].virtual_batch_size
    16
    """
    settings = {
        "virtual_batch_size": whole("virtual_batch_size", virtual_batch_size),
        "remainder": _checked_remainder(remainder),
    }
    found = [(name, layer) for name, layer in model.named_modules() if _is_batch_norm(layer)]
    made = {layer: _ghost_of(name, layer, settings) for name, layer in found}
    for module in list(model.modules()):
        # Not named_children, which leaves out a shared layer's second name.
        for name, child in list(module._modules.items()):
            if child in made:
                setattr(module, name, made[child])
    for ghost in made.values():
        ghost.__dict__.update(settings)
    return cast(M, made.get(model, model))


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm)


def _ghost_of(name: str, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
    if isinstance(layer, _GhostBatchNorm):
        return layer
    kind = GHOSTS.get(type(layer))
    if kind is None:
        raise InvalidInputError(
            f"layer {name or 'given'} is a {type(layer).__name__}",
            "BatchNorm1d, 2d or 3d itself is required",
            _remedy(layer),
        )
    assert isinstance(layer, _BatchNorm)
    ghost = kind(layer.num_features, device="meta", **settings)
    ghost.__dict__.update(layer.__dict__)
    return ghost


def _remedy(layer: nn.Module) -> str:
    if isinstance(layer, nn.SyncBatchNorm):
        return "it normalises over more examples, ghost batches over fewer: choose one of the two"
    if "Lazy" in type(layer).__name__:
        return "run one batch through the model first, so that its size is known"
    return "replace this layer by hand"


def _channels_are_innermost(input: Tensor) -> bool:
    if input.ndim < 4:
        return input.ndim == 2 or input.shape[2] == 1
    form = torch.channels_last if input.ndim == 4 else torch.channels_last_3d
    return not input.is_contiguous() and input.is_contiguous(memory_format=form)


def _checked_remainder(remainder: str) -> Remainder:
    if remainder not in get_args(Remainder):
        raise InvalidInputError(
            f"remainder {remainder!r}",
            "'merge' or 'separate' is required",
            nearest(str(remainder), get_args(Remainder)),
        )
    return cast(Remainder, remainder)
