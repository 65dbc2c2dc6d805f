"""Calls of a model's layers, from the forward pass until their gradients come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from noisescale.measure.alignment import UNCERTAIN, Alignment, Constants
from noisescale.measure.gradients import Forward, Inventory, tensors_in
from noisescale.measure.harmless import Harmless
from noisescale.measure.kept import (
    OverwrittenError,
    Take,
    hooks_active,
    in_backward,
    keep,
    receives,
    recomputing,
    transformed,
)
from noisescale.measure.layers import Layer, find_layers
from noisescale.measure.rules.registry import NOT_BATCHED, Call, without_tensors
from noisescale.measure.tensor_hooks import base_of, on_output, rooted
from noisescale.measure.use_hooks import OVERWRITTEN, TWICE, failed, hook_uses

_FROZEN = "it was frozen after the meter was attached"
_REPEATED = (
    "it is used both inside and outside a re-entrant activation checkpoint, or in two; use"
    " use_reentrant=False"
)


class LayerCalls:
    """Hooks on layers: every call whose gradients came goes to ``answered``.

    Args:
        model: the model.
        inventory: its parameters.
        answered: called with the layer, the forward pass and the complete call.
        drop: called with a layer that cannot be measured, and why.
        by_grad: whether the backward passes to measure are those of ``torch.autograd.grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        answered: Callable[[Layer, Forward, Call], None],
        drop: Callable[[Layer, str], None],
        by_grad: bool = False,
    ) -> None:
        self.layers = find_layers(model, inventory)
        self.claim: Callable[[int], Any] = lambda _: None
        """Returns what ties a layer's last call to a backward pass of our own."""
        self.careful: Callable[[], bool] = lambda: True
        """Whether gradients are compared, so that rounding errors matter."""
        self.alignment = Alignment(model)
        self._constants = Constants()
        self.forward: Forward | None = None
        """The forward pass that runs now."""
        self._last: Forward | None = None
        self._begun: list[Forward] = []
        self._usual = False
        """Whether the forward pass that runs has nothing special."""
        self._trainable = [slot.tensor for slot in inventory.slots]
        self._task = -1
        self._running: set[int] = set()
        self._reached = False
        self._nodes: dict[int, Any] = {}
        self.second_order = False
        """Whether a backward pass of the step was to be differentiated itself."""
        self.stale = False
        """Whether one went through a forward pass of an earlier step."""
        self._known: set[int] = set()
        """Layers whose inputs were looked at."""
        self._inventory = inventory
        self._answered = answered
        self.drop = drop
        self._by_grad = by_grad

    def install(self) -> list[RemovableHandle]:
        """Hook every layer that still has a parameter to measure."""
        seen = set(self._inventory.seen)
        return [
            layer.module.register_forward_hook(
                Harmless(self._hook(layer)), prepend=True, with_kwargs=True
            )
            for layer in self.layers
            if not seen.isdisjoint(layer.slots.values())
        ]

    def begin(self, forward: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a forward pass of the model; None for one that is not to be measured."""
        self.forward = forward
        self._constants.begin()
        if forward is not None:
            self._begun.append(forward)
            tensors = self._trainable
            self._usual = self.alignment.settled and all(t.requires_grad for t in tensors)
            if not self.alignment.settled:
                self.alignment.begin(args, kwargs)

    def finish(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End a forward pass of the model."""
        self.forward, self._last = None, forward
        if not self.alignment.settled:
            for index, reason in self.alignment.finish(forward.size, args, kwargs).items():
                self.drop(self.layers[index], reason)

    def forget(self) -> None:
        """Drop the calls of the step."""
        self.forward = self._last = None
        self.second_order = self.stale = False
        self._running.clear()
        for forward in self._begun:
            forward.over = True
        self._begun.clear()
        for layer in self.layers:
            layer.pending.clear()

    @property
    def failed(self) -> bool:
        """Whether a backward pass ended before it was through."""
        return bool(self._running) and not in_backward()

    @property
    def repeating(self) -> bool:
        """Whether the model is called again for the backward pass of a call that was seen."""
        return self._last is not None and in_backward() and hooks_active()

    def _hook(self, layer: Layer) -> Callable[..., None]:
        straight, module = layer.rule.straight, layer.module

        def hook(
            called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            forward = self.forward
            if transformed():
                return
            # The usual call, on as few lines as possible: between large products every line is
            # a miss of the processor's cache.
            if (
                forward is not None
                and self._usual
                and layer.index in self._known
                and straight is not None
                and called is module
                and len(args) == 1
                and not kwargs
                and isinstance(x := args[0], Tensor)
                and isinstance(output, Tensor)
                and output.requires_grad
                and straight(module, x)
                and x.shape[0] == output.shape[0] == forward.size
                and not hooks_active()
            ):
                self._see_usual(layer, forward, x, output)
            # A copy of the model carries the hooks along.
            elif called is module and not is_dynamo_compiling():
                self._see_any(layer, args, kwargs, output)

        return hook

    def _see_usual(self, layer: Layer, forward: Forward, x: Tensor, output: Tensor) -> None:
        shape: Sequence[int] = ()
        watched = output
        if (base := output._base) is not None:
            if base_of(output) is None or not output.is_contiguous():
                self._see(layer, forward, (x,), {}, output)
                return
            watched, shape = base, output.shape
        expected = forward.expected
        for index in layer.slots.values():
            expected[index] = expected.get(index, 0) + 1
        ticket, held = self.claim(layer.index), x.detach()
        once, version = [held], held._version
        read = layer.rule.statistics
        known = () if read is None else read(output)

        def answer(gradient: Tensor) -> None:
            if self.ignored(layer, forward):
                return
            if not once:
                self.drop(layer, TWICE)
                return
            kept = once.pop()
            if kept._version != version:
                self.drop(layer, OVERWRITTEN)
                return
            if shape:
                # Size by size: torch takes longer to read a shape.
                gradient = gradient.view(*shape)
            gradients: list[Tensor | None] = [
                gradient.detach() if gradient.requires_grad or not shape else gradient
            ]
            call = Call(layer.module, [0], ((), {}), [0], [kept], gradients, {}, ticket, known)
            self.complete(layer, forward, call)

        # The hook lives as long as the graph; what it holds is gone once it was used.
        on_output(watched, answer)

    def complete(self, layer: Layer, forward: Forward, call: Call) -> None:
        """Hand on a call whose gradients came."""
        try:
            self._answered(layer, forward, call)
        except Exception as error:  # noqa: BLE001 - a measurement must not kill the training
            self.drop(layer, failed(error))

    def _see_any(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.forward is not None:
            self._see(layer, self.forward, args, kwargs, output)
        elif self.alignment.probing:
            self.alignment.note_half(layer.index, tensors_in((args, kwargs)))
        elif any(t.requires_grad for t in tensors_in(output)):
            self._unannounced(layer, args, kwargs, output)

    def _unannounced(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See a call outside a measured forward pass of the model."""
        last = self._last if in_backward() else None
        if last is None or (hooks_active() and (recomputing() or layer.pending.get(last))):
            # A first pass that is not measured, or the second one of any. Hooks on saved tensors
            # expect the second to save the same tensors in the same order: both save always.
            if hooks_active():
                keep(tensors_in((args, kwargs)))
            return
        # The re-entrant kind ran its first pass without gradients.
        if not last.done.isdisjoint(layer.slots.values()):
            self.drop(layer, _REPEATED)
        self._see(layer, last, args, kwargs, output)

    def _see(
        self,
        layer: Layer,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        outputs = [output] if isinstance(output, Tensor) else tensors_in(output)
        tensors = tensors_in(args if not kwargs else (args, kwargs))
        # Without gradients outputs require none.
        grad = any(t.requires_grad for t in outputs)
        if not grad and self.alignment.settled:
            return
        take = keep(tensors) if grad else None
        dims = layer.rule.inputs(layer.module, args, kwargs, forward.size)
        if layer.rule.direct and not isinstance(dims, str):
            told = self._constants.told(layer.index, tensors, dims)
            dims = told if 0 in told else NOT_BATCHED
        if isinstance(dims, str):
            self.drop(layer, dims)
            return
        if not self.alignment.settled:
            self._known.add(layer.index)
            self.alignment.note(layer.index, forward.size, tensors, dims, outputs)
        elif layer.index not in self._known:
            # Half a batch ran without it: what is doubtful stays so.
            if any(list(t.shape).count(forward.size) > 1 for t in tensors):
                self.drop(layer, UNCERTAIN)
                return
            self._known.add(layer.index)
        if take is None or hook_uses(self, layer, forward, args, kwargs, outputs):
            return
        unusable = layer.rule.again(layer.module)
        if unusable is not None:
            self.drop(layer, unusable)
            return
        out_dims = layer.rule.outputs(layer.module, outputs, forward.size)
        if isinstance(out_dims, str):
            self.drop(layer, out_dims)
            return
        live = self.live(layer)
        if not live:
            return
        for index in live:
            forward.expected[index] = forward.expected.get(index, 0) + 1
        if hooks_active():
            layer.pending[forward] = layer.pending.get(forward, 0) + 1
        call = Call(
            ticket=self.claim(layer.index),
            layer=layer.module,
            dims=dims,
            outputs=out_dims,
            arguments=without_tensors(args, kwargs) if layer.rule.repeats else ((), {}),
        )
        self._await(layer, forward, [(call, take)], outputs)

    def live(self, layer: Layer) -> list[int]:
        """Parameters that get a gradient from a call now: some loops freeze a model for a pass."""
        slots = self._inventory.slots
        live = [i for i in layer.slots.values() if slots[i].tensor.requires_grad]
        if live and len(live) < len(layer.slots):
            for index in layer.slots.values():
                if index not in live:
                    self._inventory.drop(index, _FROZEN)
        return live

    def _await(
        self, layer: Layer, forward: Forward, once: list[tuple[Call, Take]], outputs: list[Tensor]
    ) -> None:
        # The hook lives as long as the graph; what it holds is gone once it was used.
        watched, given = rooted(outputs)
        if len(outputs) == 1:
            on_output(watched[0], lambda g: self._answer(layer, forward, once, [given[0](g)]))
            return
        live = [i for i, t in enumerate(outputs) if t.requires_grad]

        def answer(gradients: Sequence[Tensor | None]) -> None:
            every: list[Tensor | None] = [None] * len(given)
            for i, gradient in zip(live, gradients, strict=True):
                every[i] = None if gradient is None else given[i](gradient)
            self._answer(layer, forward, once, every)

        register_multi_grad_hook([watched[i] for i in live], answer)

    def ignored(self, layer: Layer, forward: Forward) -> bool:
        """Whether a gradient is none of this step's forward passes'."""
        if not self._reaches(layer):
            return True
        self.stale |= forward.over
        return forward.over

    def _reaches(self, layer: Layer) -> bool:
        """Whether this backward pass goes on to the parameters, and not to the inputs alone."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._running.add(task)
            engine = torch.autograd.Variable._execution_engine
            # Not called where the pass fails.
            engine.queue_callback(lambda: self._running.discard(task))
            self.second_order |= torch.is_grad_enabled()
            self._reached = any(self._receives(i) for i in layer.slots.values())
        return self._reached

    def _receives(self, index: int) -> bool:
        # Its node is hard to get at: it is kept, and got anew when it seems to have no part.
        found = self._nodes.get(index)
        if found is None or not receives(found, self._by_grad):
            parameter = self._inventory.slots[index].tensor
            if not parameter.requires_grad:
                return False
            found = get_gradient_edge(parameter).node
            # Beside hooks on its gradient a node that is kept would keep the model, too.
            if parameter._backward_hooks is None:
                self._nodes[index] = found
            return receives(found, self._by_grad)
        return True

    def _answer(
        self,
        layer: Layer,
        forward: Forward,
        once: list[tuple[Call, Take]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        if self.ignored(layer, forward):
            return
        if not once:
            self.drop(layer, TWICE)
            return
        call, take = once.pop()
        try:
            call.tensors = take()
        except OverwrittenError:
            self.drop(layer, OVERWRITTEN)
            return
        call.gradients = [None if g is None else g.detach() for g in gradients]
        if layer.pending.get(forward):
            layer.pending[forward] -= 1
        self.complete(layer, forward, call)
