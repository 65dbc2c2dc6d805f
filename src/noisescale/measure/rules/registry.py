"""The rules by kind of layer, and how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.parts import Part

GradientsFunction = Callable[..., Mapping[str, Part]]
NormsFunction = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor] | None]

NOT_BATCHED = "its input does not start with the batch dimension"
MORE_INPUTS = "it was called with more than its input"


Dims = list[int | None]


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer in one forward pass.

    Attributes:
        layer: the layer.
        dims: the batch dimension of each tensor among its arguments, None where it has none.
        arguments: its arguments, to be filled with tensors again.
        outputs: batch dimension of each output tensor.
        tensors: the tensors among its arguments, in order, detached; empty until the backward
            pass reaches the call.
        gradients: the gradient of each output, None where none came; empty until they come.
        known: sums of squared norms by parameter, where the backward pass itself formed them.
        ticket: ties the call to a backward pass of our own.
        statistics: what the forward pass itself worked out of its input, batch first; empty
            where nobody knows.
    """

    layer: nn.Module
    dims: Dims
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    outputs: list[int] = field(default_factory=lambda: [0])
    tensors: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    known: dict[str, Tensor] = field(default_factory=dict)
    ticket: Any = None
    statistics: Sequence[Tensor] = ()

    @property
    def gradient(self) -> Tensor:
        """Gradient of the only output."""
        assert self.gradients[0] is not None
        return self.gradients[0]

    @property
    def size(self) -> int:
        """Number of examples."""
        sizes = (t.shape[d] for t, d in zip(self.tensors, self.dims, strict=True) if d is not None)
        return next(sizes)

    def take(self, examples: Tensor) -> Call:
        """Return the same call of some of its examples alone.

        Args:
            examples: their numbers, shape (some,).
        """
        tensors = [
            t if d is None else t.index_select(d, examples.to(t.device))
            for t, d in zip(self.tensors, self.dims, strict=True)
        ]
        gradients = [
            None if g is None else g.index_select(d, examples.to(g.device))
            for g, d in zip(self.gradients, self.outputs, strict=True)
        ]
        statistics = [t.index_select(0, examples.to(t.device)) for t in self.statistics]
        return replace(self, tensors=tensors, gradients=gradients, statistics=statistics)


@dataclass(frozen=True)
class Rule:
    """How one kind of layer is measured.

    Attributes:
        parts: what each own parameter gets from the given examples of a call.
        step: how many examples to take at a time.
        inputs: batch dimension of every tensor of a call, given (layer, args, kwargs, batch
            size), or why the call cannot be measured.
        outputs: batch dimensions of its outputs, given (layer, output tensors, batch size),
            or why not.
        parameters: the parameters it answers for, by name.
        usable: why a layer of this kind cannot be measured, or None.
        norms: a faster way to the squared norms of a single call.
        repeats: whether it needs the arguments of the call again.
        straight: for layers that map one tensor to one, both batch first: whether an input has
            enough dimensions for one of them to be the batch.
        statistics: reads from an output what the layer worked out of its input; None for nothing.
    """

    parts: Callable[[Call, slice], Mapping[str, Part]]
    step: Callable[[Call], int]
    inputs: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], int], Dims | str]
    outputs: Callable[[nn.Module, list[Tensor], int], list[int] | str]
    parameters: Callable[[nn.Module], Mapping[str, nn.Parameter | None]]
    usable: Callable[[nn.Module], str | None]
    norms: NormsFunction | None = None
    repeats: bool = False
    straight: Callable[[nn.Module, Tensor], bool] | None = None
    direct: bool = False
    again: Callable[[nn.Module], str | None] = lambda _: None
    statistics: Callable[[Tensor], Sequence[Tensor]] | None = None


RULES: dict[type[nn.Module], Rule] = {}
WHOLE: list[Rule] = []
"""The rule of modules without one, once it is registered."""


def example_rule(
    kind: type[nn.Module],
    *,
    batched: Callable[[nn.Module, Tensor], bool] = lambda _, x: x.dim() >= 2,
    usable: Callable[[nn.Module], str | None] = lambda _: None,
    norms: NormsFunction | None = None,
    step: Callable[[nn.Module, Tensor, Tensor], int] | None = None,
    more_inputs: bool = False,
    statistics: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> Callable[[GradientsFunction], GradientsFunction]:
    """Register the rule of a layer: the gradient of every example.

    The decorated function gets the layer, its input x (batch first) and the gradient g of the
    loss with respect to its output, and returns for each of the layer's own parameters the
    gradient of every example, shape (examples, *parameter shape), summed over positions; or
    its factors as :class:`Outer` or :class:`Rows`, whose squared norms need less work. It may
    be called on some of the examples at a time.

    Args:
        kind: the layer's class; subclasses count while they keep its ``forward``.
        batched: whether an input has enough dimensions for one of them to be the batch.
        usable: returns why a particular layer cannot be measured, or None.
        norms: a faster way to the squared norms, per own parameter of shape (examples,) or
            summed over the examples; it may return None where there is none.
        step: how many examples to take at a time; default: as many as keep the gradients of
            the largest parameter small.
        more_inputs: whether the rule holds for calls with more arguments than the input.
        statistics: reads from the layer's output what its forward pass worked out already, as
            tensors with the batch first; the decorated function gets them behind g, where they
            are known.

    >>> import torch
    >>> class Scale(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(width))
    ...
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> @example_rule(Scale)
    ... def scale(layer, x, g):
    ...     return {"factor": (x * g).flatten(1, -2).sum(1) if x.dim() > 2 else x * g}
    """

    def register(gradients: GradientsFunction) -> GradientsFunction:
        def parts(call: Call, rows: slice) -> Mapping[str, Part]:
            x, g, known = call.tensors[0], call.gradient, call.statistics
            if rows.stop - rows.start < len(g):
                x, g, known = x[rows], g[rows], [t[rows] for t in known]
            return gradients(call.layer, x, g, *known)

        def examples(call: Call) -> int:
            if step is not None:
                return step(call.layer, call.tensors[0], call.gradient)
            largest = max((p.numel() for p in call.layer.parameters(recurse=False)), default=1)
            return max(1, _parts.CHUNK_ELEMENTS // max(1, largest))

        RULES[kind] = Rule(
            parts,
            examples,
            _one_input(batched, more_inputs),
            _one_output,
            own_parameters,
            usable,
            norms,
            straight=batched,
            statistics=statistics,
        )
        return gradients

    return register


HERE: Any = object()
"""Stands for a tensor in the arguments of a call."""


def replaced(value: Any, tensor: Callable[[Tensor], Any]) -> Any:
    """Copy nested tuples, lists and mappings with every tensor, in order, replaced."""
    if isinstance(value, Tensor) or value is HERE:
        return tensor(value)
    if isinstance(value, Mapping):
        return {k: replaced(v, tensor) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [replaced(v, tensor) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def without_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments of a call with a mark in place of every tensor."""
    return replaced(args, lambda _: HERE), replaced(kwargs, lambda _: HERE)


def rule_for(layer: nn.Module) -> Rule | str:
    """Return the rule of a layer, or why there is none."""
    if isinstance(layer, ScriptModule):
        return "torch.jit compiled its module, which can be neither hooked nor run again"
    for kind in type(layer).__mro__:
        if kind in RULES:
            if type(layer).forward is not kind.forward:
                break
            found = RULES[kind]
            return found.usable(layer) or found
    for rule in WHOLE:
        return rule.usable(layer) or rule
    return f"{type(layer).__name__} has no rule"


def trained(layer: nn.Module, key: str) -> bool:
    """Whether the layer has this parameter and it is to be measured."""
    parameter = layer._parameters.get(key)
    return parameter is not None and parameter.requires_grad


def all_examples(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    """Take all examples at once: factors cost no memory."""
    del layer, g
    return max(1, len(x))


def own_parameters(layer: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters that the layer itself holds."""
    return layer._parameters


def held_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """:func:`own_parameters`, and by dotted names those of children that are never called.

    Such are ``nn.ParameterList``, ``nn.ParameterDict`` and ``nn.ModuleList``: what uses the
    parameters that they hold is the module that holds them.
    """
    found = dict(module._parameters)
    for name, child in module._modules.items():
        if child is not None and never_called(child):
            found.update({f"{name}.{key}": p for key, p in held_parameters(child).items()})
    return found


def never_called(module: nn.Module) -> bool:
    """Whether a module has no forward."""
    # The class of what torch.jit compiled has none that could be looked at.
    if isinstance(module, ScriptModule) or "forward" in vars(module):
        return False
    return type(module).forward is nn.Module.forward


def _one_input(
    batched: Callable[[nn.Module, Tensor], bool], more_inputs: bool
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], int], Dims | str]:
    def inputs(
        layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
    ) -> Dims | str:
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        # By keyword only the input itself can come: the other arguments follow it.
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not batched(layer, x) or x.shape[0] != size:
            return NOT_BATCHED
        if len(given) > 1 and not more_inputs:
            return MORE_INPUTS
        others = sum(isinstance(value, Tensor) for value in given) - 1
        return [0, *[None] * others]

    return inputs


def _one_output(layer: nn.Module, outputs: list[Tensor], size: int) -> list[int] | str:
    del layer
    if len(outputs) != 1 or not outputs[0].dim() or outputs[0].shape[0] != size:
        return "its output does not start with the batch dimension"
    return [0]
