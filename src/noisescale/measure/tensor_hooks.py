"""Hooks on tensors' gradients: put on, told apart, and taken off without a trace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``hook`` with the gradient that one backward pass brings to ``tensor``."""
    handle: RemovableHandle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def on_output(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """:func:`on_gradient` for a tensor that a layer made, for good.

    What ``register_hook`` does, without its handle, which takes 30 microseconds where caches are
    cold.
    """
    node: Any = tensor.grad_fn
    # Where torch no longer has this way in, the public one does the same, more slowly.
    private = hasattr(node, "_register_hook_dict") and hasattr(tensor, "_backward_hooks")
    if not private or tensor._backward_hooks is not None or type(tensor) is not Tensor:
        on_gradient(tensor, hook)
        return
    hooks: OrderedDict[int, Any] = OrderedDict()
    tensor._backward_hooks = hooks
    node._register_hook_dict(tensor)
    # Handles that others take count from 0 upwards.
    hooks[-1] = hook


def base_of(output: Tensor) -> Tensor | None:
    """Return the tensor of which a layer's output is another arrangement; None for no view.

    An operation in place on a view gives the view a new node in the graph, and the hooks on its
    old one are never called. The base's node stays where it is: hooks on the base get the
    gradient before the operation.
    """
    base = output._base
    if type(base) is not Tensor or base.grad_fn is None or base.numel() != output.numel():
        return None
    return base if base.is_contiguous() and (output.is_contiguous() or _dense(output)) else None


def rooted(
    outputs: Sequence[Tensor],
) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
    """Return what to hook for each output of a call, and what makes its gradient of theirs."""
    bases = [base_of(t) for t in outputs]
    watched: list[Tensor] = []
    given: list[Callable[[Tensor], Tensor]] = []
    for output, base in zip(outputs, bases, strict=True):
        # The gradient of a base that several outputs view is no single one's.
        if base is None or sum(b is base for b in bases) > 1:
            watched.append(output)
            given.append(_same)
        else:
            watched.append(base)
            given.append(_arranged(output.shape, output.stride()))
    return watched, given


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _arranged(shape: Sequence[int], strides: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.contiguous().as_strided(shape, strides)


def _dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.detach().permute(order).is_contiguous()


def foreign_hooks(parameter: Tensor) -> tuple[int, ...]:
    """Tell the hooks on a parameter's gradient that are not from this package."""
    hooks: Mapping[int, Any] = parameter._backward_hooks or {}
    return tuple(
        number
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(__name__.split(".")[0] + ".")
    )


def after_accumulation(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``hook`` with the parameter once its ``grad`` holds this backward pass too."""
    register = parameter.register_post_accumulate_grad_hook
    handle: RemovableHandle = register(hook)  # type: ignore[no-untyped-call]
    return handle


def forget_hooks(parameter: Tensor) -> None:
    """Let backward passes no longer ask Python for hooks that were all removed."""
    held: Any = parameter
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(held, kind)
        if hooks is not None and not hooks:
            setattr(held, kind, None)
