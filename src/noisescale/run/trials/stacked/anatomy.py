"""What a loss does with its model, found out by watching one call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Loss = Callable[[Any, Any], Any]


class StandIn:
    """Takes a model's place and answers with its output for one input.

    It knows no other input and has no other attribute: a loss that wants more of its model fails
    on it, and is not taken apart.

    Args:
        output: the answer.
        to: the input that it is the answer to.
    """

    def __init__(self, output: Any, *, to: Any) -> None:
        self._output, self._input = output, to

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the output."""
        if named or len(inputs) != 1 or inputs[0] is not self._input:
            raise ValueError("the model is called with another input than the loss gives it")
        return self._output


class _Watched:
    """Passes calls on to a model and notes them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, int]] = []

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        output = self._model(*inputs, **named)
        self.calls.append((inputs, named, output, _version(output)))
        return output


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a layer, and how often its tensors had been changed in place."""

    layer: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    before: int
    after: int


class _Layers:
    """Notes the calls of the layers that it is hooked to."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._before = 0

    def begin(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._before = _version(inputs[0]) if inputs else 0

    def end(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.calls.append(
            _Call(
                layer=layer,
                inputs=inputs,
                output=output,
                before=self._before,
                after=_version(output),
            )
        )


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model that is a chain of layers, applied once to one tensor of the batch.

    Attributes:
        layers: in the order of their calls.
        places: of each layer's weight and bias among the trained parameters; None where it has
            none.
        input: place of the model's input among the batch's tensors.
        spec: shape of the batch as nested containers.
        output: the model's output for the batch that was watched.
        widest: numbers per example of the largest activation that is computed.
        numbers: numbers per example of all activations.
    """

    layers: tuple[nn.Module, ...]
    places: tuple[tuple[int | None, int | None], ...]
    input: int
    spec: TreeSpec
    output: Tensor
    widest: int
    numbers: int

    def batch(self, leaves: Sequence[Any]) -> Any:
        """Put a batch together from its tensors."""
        return tree_unflatten(leaves, self.spec)


def take_apart(model: nn.Module, loss: Loss, batch: Any) -> Anatomy | None:
    """Return the anatomy of a model under a loss; None when it is no chain of layers.

    Args:
        model: one copy of it.
        loss: ``loss(model, batch)``.
        batch: some examples.
    """
    watched = _Watched(model)
    watch = _Layers()
    with ExitStack() as stack:
        for module in model.modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_pre_hook(watch.begin).remove)
                stack.callback(module.register_forward_hook(watch.end).remove)
        try:
            loss(watched, batch)
        except Exception:  # noqa: BLE001 - it wants more of the model than to call it
            return None
    leaves, spec = tree_flatten(batch)
    if len(watched.calls) != 1 or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    inputs, named, output, version = watched.calls[0]
    calls = watch.calls
    fed = [place for place, leaf in enumerate(leaves) if inputs and leaf is inputs[0]]
    if (
        named
        or len(inputs) != 1
        or len(fed) != 1
        or not _is_chain(calls, inputs[0], output, version)
    ):
        return None
    layers = tuple(call.layer for call in calls)
    places = _places(model, layers)
    if places is None:
        return None
    sizes = [
        call.output.numel() // max(1, len(call.output))
        for call in calls
        if type(call.layer) is not nn.Flatten
    ]
    return Anatomy(
        layers=layers,
        places=places,
        input=fed[0],
        spec=spec,
        output=output.detach(),
        widest=max(sizes, default=1),
        numbers=sum(sizes),
    )


def _is_chain(calls: Sequence[_Call], start: Tensor, end: Any, version: int) -> bool:
    """Whether each layer takes what the one before gave, as it gave it, and nothing else."""
    current: Any = start
    changed = calls[0].before if calls else 0
    for call in calls:
        if len(call.inputs) != 1 or call.inputs[0] is not current or call.before != changed:
            return False
        current, changed = call.output, call.after
    return bool(calls) and isinstance(end, Tensor) and current is end and version == changed


def _places(
    model: nn.Module, layers: Sequence[nn.Module]
) -> tuple[tuple[int | None, int | None], ...] | None:
    """Find every layer's parameters; None where one is shared, frozen, unused or unusual."""
    if any(True for _ in model.buffers()):
        return None
    number = {id(parameter): j for j, parameter in enumerate(model.parameters())}
    places, used = [], 0
    for layer in layers:
        own = dict(layer.named_parameters())
        if not set(own) <= {"weight", "bias"} or not all(p.requires_grad for p in own.values()):
            return None
        weight, bias = own.get("weight"), own.get("bias")
        places.append(
            (
                None if weight is None else number[id(weight)],
                None if bias is None else number[id(bias)],
            )
        )
        used += len(own)
    distinct = {place for pair in places for place in pair if place is not None}
    return tuple(places) if used == len(distinct) == len(number) else None
