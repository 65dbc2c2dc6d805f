"""Tensors kept from a forward pass for its backward pass, as autograd keeps its own.

Where hooks on saved tensors are at work (activation checkpointing, offloading to the host), a
plain reference would keep alive what they set out to free. There the tensors go through the
same hooks: a node beside the graph saves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OverwrittenError(Exception):
    """A kept tensor was changed in place."""


Take = Callable[[], list[Tensor]]
"""Gives back, once, what was kept; raises OverwrittenError."""


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(())

    @staticmethod
    def backward(*_: Any) -> Any:
        raise AssertionError  # nothing depends on the node


def keep(tensors: list[Tensor]) -> Take:
    """Keep tensors until they are taken or forgotten."""
    if not hooks_active():
        held = [t.detach() for t in tensors]
        versions = [t._version for t in held]

        def take() -> list[Tensor]:
            if versions != [t._version for t in held]:
                raise OverwrittenError
            return held

        return take
    anchor = torch.zeros((), requires_grad=True)
    node: Any = _Save.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]

    def unpack() -> list[Tensor]:
        try:
            return [t.detach() for t in node.saved_tensors]
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise OverwrittenError from None
            raise

    return unpack


def hooks_active() -> bool:
    """Whether hooks on saved tensors are at work."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def recomputing() -> bool:
    """Whether non-reentrant activation checkpointing runs a pass that was seen before."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def transformed() -> bool:
    """Whether a transform of torch.func runs: its passes are not the training's."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: a forward pass now is a repetition."""
    return bool(torch._C._current_graph_task_id() != -1)


def receives(leaf: Any, by_grad: bool) -> bool:
    """Whether the backward pass that is running goes on to a parameter.

    Args:
        leaf: the node that accumulates its gradient.
        by_grad: what to say under ``torch.autograd.grad``, which does not tell.
    """
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:
        return by_grad
