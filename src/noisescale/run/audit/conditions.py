"""Conditions under which gradients are compared: what may be to blame, switched off in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from noisescale.measure.compiled import plain

QUIET = ("layers", "functions", "modes")
"""Ways to draw no random numbers, each with those before: the dropout of torch's own layers; its
functions, wherever they are called; evaluation mode of all but BatchNorm."""

_DROPS = {
    function
    for name in (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
    )
    for function in (getattr(F, name), getattr(torch, name, None))
    if function is not None
} | {torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.native_dropout}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How a pass differs from training as it is.

    Attributes:
        quiet: one of :data:`QUIET`; None draws as training does.
        frozen: BatchNorm normalises by constants, the statistics of the whole batch.
        restored: buffers are put back after every micro-batch.
        cut: parts are rows of the batch as it was collated whole, not collated anew.
    """

    quiet: str | None = None
    frozen: bool = False
    restored: bool = False
    cut: bool = False


AS_IT_IS = Condition()


@contextmanager
def applied(
    model: nn.Module, condition: Condition, see_whole_batch: Callable[[], Any]
) -> Iterator[None]:
    """Hold a model in a condition; to be used within ``untouched``, which restores modes.

    Args:
        model: in training mode.
        condition: what to switch off.
        see_whole_batch: runs the model forward once on the whole batch.
    """
    with ExitStack() as stack:
        if condition.quiet is not None:
            stack.enter_context(_drawing_nothing(model, QUIET.index(condition.quiet)))
        if condition.frozen:
            stack.enter_context(_frozen(model, see_whole_batch))
        yield


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm modules that normalise by the batch at hand, by name."""
    return {
        name: module
        for name, module in plain(model).named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }


def seed_everything(model: nn.Module, seed: int) -> None:
    """Seed torch, NumPy, Python and the generators that modules hold.

    To be used within ``untouched``, which restores them all.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may draw from it
    random.seed(seed)
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, torch.Generator):
                held.manual_seed(seed)
            elif isinstance(held, np.random.Generator):
                held.bit_generator.state = type(held.bit_generator)(seed).state


@contextmanager
def _drawing_nothing(model: nn.Module, level: int) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            name = "p" if isinstance(module, _DropoutNd) else "dropout"
            if isinstance(module, _DropoutNd | nn.MultiheadAttention | nn.RNNBase):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, 0.0)
            # A recurrent layer on a GPU differentiates in training mode only.
            if level == 2 and not isinstance(module, _BatchNorm | nn.RNNBase):
                module.training = False
        if level >= 1:
            stack.enter_context(_NoDropout())
        yield


class _NoDropout(TorchFunctionMode):
    """Calls of dropout functions that drop nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:  # query, key, value, attn_mask, dropout_p
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def _frozen(model: nn.Module, see_whole_batch: Callable[[], Any]) -> Iterator[None]:
    """Let BatchNorm take the whole batch's statistics once and keep them.

    Those of a fresh model, mean 0 and variance 1, could let activations grow without bound.
    """
    modules = list(batch_norms(model).values())
    with ExitStack() as stack:
        for module in modules:
            for name in ("momentum", "track_running_stats"):
                stack.callback(setattr, module, name, getattr(module, name))
            if module.running_mean is None:
                like = next(model.parameters())
                module.running_mean = like.new_zeros(module.num_features)
                module.running_var = like.new_ones(module.num_features)
            module.momentum, module.track_running_stats = 1.0, True
            module.training = True
        with torch.no_grad():
            see_whole_batch()
        for module in modules:
            module.training = False
        yield
