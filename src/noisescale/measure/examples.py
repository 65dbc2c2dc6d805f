"""Source ``examples``: per-example squared gradient norms in the ordinary backward pass.

A forward hook on every layer with a rule ties the layer's input to the gradient of its
output; the rule turns the two into squared norms at once. What has no rule, or turns out not
to be measurable, is left out by name; the first steps check each layer's own gradient against
what its parameters really received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from noisescale.measure.example_rules import Rule, rule_for
from noisescale.measure.gradients import (
    Forward,
    GradientSource,
    Inventory,
    Refused,
    StepNorms,
    on_gradient,
    tensors_in,
)
from noisescale.measure.rules.account import Account
from noisescale.measure.rules.registry import NOT_BATCHED, Call, Dims, replaced, without_tensors
from noisescale.measure.rules.uses import Use, square_sums
from noisescale.measure.untouched import untouched

_TWICE = "its module was differentiated twice in one forward pass"
_OVERWRITTEN = "the input of its module was changed in place after the call"
_UNCERTAIN = "whether its input starts with the batch dimension could not be told"
_OUTSIDE = "its gradient does not come from calls of its module alone"


@dataclass(eq=False)
class Layer:
    """A module whose rule is known.

    Attributes:
        module: the layer.
        index: its place among the layers.
        rule: how it is measured.
        slots: own parameter name -> index in the inventory.
    """

    module: nn.Module
    index: int
    rule: Rule
    slots: dict[str, int]


class ExamplesSource(GradientSource):
    """Every example is a unit. See :class:`~noisescale.measure.gradients.GradientSource`.

    With loss contributions h_i of the examples, so that the accumulated gradient is
    sum_i h_i, equally weighted examples have gradients g_i = B h_i under a mean loss. When a
    window holds several passes of unequal size under a mean loss, examples weigh differently;
    the step then counts as one of ``effective`` = 1 / sum_i w_i^2 examples, which keeps both
    moments unbiased.
    """

    name: ClassVar[str] = "examples"

    def __init__(self, model: nn.Module, inventory: Inventory, **options: Any) -> None:
        super().__init__(model, inventory, **options)
        self._squares: dict[int, Tensor] = {}
        self._fired: list[Forward] = []
        self._mixing = ""
        self._aligned = False
        self._batched: dict[int, list[list[tuple[int, int]]]] = {}
        self._inputs: set[int] = set()
        self._probed: dict[int, list[bool]] | None = None
        self._half_size = 0
        self._checks: list[RemovableHandle] = []
        self._norm_layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
        self._shapes = {i: slot.tensor.shape for i, slot in enumerate(inventory.slots)}
        self._account = Account(self._shapes)
        self._layers = self._find_layers()

    def _find_layers(self) -> list[Layer]:
        indices = {id(slot.tensor): i for i, slot in enumerate(self.inventory.slots)}
        layers: list[Layer] = []
        answered_for: set[nn.Module] = set()
        for module in self.model.modules():
            rule = rule_for(module)
            named = module._parameters if isinstance(rule, str) else rule.parameters(module)
            slots = {key: indices[id(p)] for key, p in named.items() if id(p) in indices}
            if module in answered_for or not slots:
                continue
            if isinstance(rule, str):
                for index in slots.values():
                    self.inventory.drop(index, rule)
                continue
            layers.append(Layer(module, len(layers), rule, slots))
            if any("." in key for key in slots):
                answered_for.update(module.modules())
        return layers

    # Hooks

    def _install(self) -> None:
        super()._install()
        seen = set(self.inventory.seen)
        for layer in self._layers:
            if not seen.isdisjoint(layer.slots.values()):
                self._handles.append(
                    layer.module.register_forward_hook(
                        self._layer_hook(layer), prepend=True, with_kwargs=True
                    )
                )
        for name, module in self._norm_layers:
            self._handles.append(module.register_forward_hook(self._mixing_hook(name)))
        for index in seen & self._account.unchecked:
            parameter = self.inventory.slots[index].tensor
            self._checks.append(on_gradient(parameter, self._account.hook(index)))

    def pause(self) -> None:
        """Remove every hook; ``open()`` installs them again."""
        super().pause()
        self._end_checks()

    def _end_checks(self) -> None:
        for handle in self._checks:
            handle.remove()
        self._checks.clear()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(model, args, kwargs)
        if self._forward is not None and not self._aligned:
            given = tensors_in([*args, *kwargs.values()])
            self._inputs = {t.untyped_storage().data_ptr() for t in given}

    def _mixing_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self._forward is not None and (
                module.training or getattr(module, "running_mean", None) is None
            ):
                self._mixing = name

        return hook

    def _layer_hook(self, layer: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._probed is not None:
                self._note_lengths(layer, tensors_in([*args, *kwargs.values()]))
            forward = self._forward
            if forward is None or not torch.is_grad_enabled():
                return
            outputs = tensors_in(output)
            if not any(t.requires_grad for t in outputs):
                return
            call = self._call(layer, forward, args, kwargs, outputs)
            if isinstance(call, str):
                self._drop(layer, call)
                return
            for index in layer.slots.values():
                forward.expected[index] = forward.expected.get(index, 0) + 1
            if len(outputs) == 1:
                on_gradient(outputs[0], lambda g: self._answer(layer, forward, call, [g]))
            else:
                live = [i for i, t in enumerate(outputs) if t.requires_grad]

                def answer(gradients: Sequence[Tensor | None]) -> None:
                    by_output = dict(zip(live, gradients, strict=True))
                    every = [by_output.get(i) for i in range(len(outputs))]
                    self._answer(layer, forward, call, every)

                register_multi_grad_hook([outputs[i] for i in live], answer)

        return hook

    def _call(
        self,
        layer: Layer,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
    ) -> Call | str:
        dims = layer.rule.inputs(layer.module, args, kwargs, forward.size)
        if isinstance(dims, str):
            return dims
        out_dims = layer.rule.outputs(layer.module, outputs, forward.size)
        if isinstance(out_dims, str):
            return out_dims
        tensors = tensors_in([*args, *kwargs.values()])
        if not self._aligned:
            self._doubt(layer, forward.size, tensors, dims)
        return Call(
            layer=layer.module,
            tensors=[t.detach() for t in tensors],
            dims=dims,
            arguments=without_tensors(args, kwargs) if layer.rule.repeats else ((), {}),
            outputs=out_dims,
            versions=[t._version for t in tensors],
        )

    def _answer(
        self, layer: Layer, forward: Forward, call: Call, gradients: Sequence[Tensor | None]
    ) -> None:
        try:
            self._fire(layer, forward, call, [None if g is None else g.detach() for g in gradients])
        except Exception as error:  # noqa: BLE001 - a measurement must not kill the training
            self._drop(layer, f"its rule failed ({type(error).__name__}: {error})")

    def _fire(
        self, layer: Layer, forward: Forward, call: Call, gradients: list[Tensor | None]
    ) -> None:
        if forward.window != self._window or not self._watching:
            return
        if call.gradients:
            self._drop(layer, _TWICE)
            return
        if call.versions != [t._version for t in call.tensors]:
            self._drop(layer, _OVERWRITTEN)
            return
        call.gradients = gradients
        if not forward.fired:
            forward.fired = True
            self._fired.append(forward)
        ready: dict[int, list[Use]] = {}
        fresh: dict[int, list[Use]] = {}
        for key, index in layer.slots.items():
            if self.inventory.slots[index].missing is None:
                use = Use(layer.rule, call, key)
                if index in self._account.unchecked:
                    fresh.setdefault(index, []).append(use)
                uses = forward.waiting.setdefault(index, [])
                uses.append(use)
                if len(uses) == forward.expected[index]:
                    ready[index] = forward.waiting.pop(index)
        self._add_squares(ready)
        if fresh:
            self._account.add(fresh, call)

    def _add_squares(self, uses: dict[int, list[Use]]) -> None:
        if not uses:
            return
        for index, value in square_sums(uses, self._shapes).items():
            before = self._squares.get(index)
            self._squares[index] = value if before is None else before + value

    def _drop(self, layer: Layer, reason: str) -> None:
        for index in layer.slots.values():
            self.inventory.drop(index, reason)

    def _settle(self) -> None:
        for index in self._account.settle():
            for layer in self._layers:
                if index in layer.slots.values():
                    self._drop(layer, _OUTSIDE)
        if self._account.unchecked.isdisjoint(self.inventory.seen):
            self._end_checks()

    # Is it really the batch that a layer's input starts with?

    def _doubt(self, layer: Layer, size: int, tensors: list[Tensor], dims: Dims) -> None:
        """Note inputs with another dimension of the batch's length, or that no layer made."""
        doubtful = [
            (position, dim)
            for position, (x, dim) in enumerate(zip(tensors, dims, strict=True))
            if dim is not None
            and (
                list(x.shape).count(size) > 1
                or (x.grad_fn is None and x.untyped_storage().data_ptr() not in self._inputs)
            )
        ]
        self._batched.setdefault(layer.index, []).append(doubtful)

    def _note_lengths(self, layer: Layer, tensors: list[Tensor]) -> None:
        assert self._probed is not None
        seen = self._probed.setdefault(layer.index, [])
        calls = self._batched.get(layer.index, [])
        doubtful = calls[len(seen)] if len(seen) < len(calls) else []
        seen.append(
            all(
                p < len(tensors) and self._half_size in tensors[p].shape[d:][:1]
                for p, d in doubtful
            )
        )

    def _finish_forward(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del output
        if self._aligned:
            return
        if any(any(calls) for calls in self._batched.values()) and forward.size >= 2:
            self._probe_alignment(forward.size, args, kwargs)
        self._batched.clear()
        self._aligned = True

    def _probe_alignment(self, size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run half the batch without gradients: inputs that keep their length hold no batch."""
        self._half_size = half = max(1, size // 2)
        self._probed = {}
        try:
            with untouched(self.model), torch.no_grad():
                cut_args, cut_kwargs = _first_rows((args, kwargs), size, half)
                self.model(*cut_args, **cut_kwargs)
        except Exception:  # noqa: BLE001 - a model that cannot run on half a batch says nothing
            for layer in self._layers:
                if any(self._batched.get(layer.index, [])):
                    self._drop(layer, _UNCERTAIN)
        else:
            for layer in self._layers:
                if not all(self._probed.get(layer.index, [])):
                    self._drop(layer, NOT_BATCHED)
        finally:
            self._probed = None

    # Steps

    def _clear(self) -> None:
        self._squares.clear()
        self._fired.clear()
        self._mixing = ""
        if hasattr(self, "_account"):
            self._account.clear()

    def _close(self) -> StepNorms | Refused:
        if self._mixing:
            return Refused(
                f"BatchNorm {self._mixing!r} in training mode mixes the examples of a batch, so "
                "per-example gradients do not exist; use source='microbatches', or eval mode "
                "for that layer"
            )
        if not self._forwards:
            return self._no_forward()
        self._settle()
        for forward in self._fired:
            # Uses that had no part in the loss never answer.
            self._late(forward)
        for index in self._mean:
            if index not in self._squares:
                self.inventory.drop(index, _OUTSIDE)
        squares = {
            i: v for i, v in self._squares.items() if self.inventory.slots[i].missing is None
        }
        if not squares:
            return self._nothing_seen()
        return self._norms(squares, [forward.size for forward in self._fired])

    def _late(self, forward: Forward) -> None:
        seen = {i: u for i, u in forward.waiting.items() if i in self.inventory.seen}
        forward.waiting = {}
        try:
            self._add_squares(seen)
        except Exception as error:  # noqa: BLE001 - a measurement must not kill the training
            for index in seen:
                self.inventory.drop(index, f"its rule failed ({type(error).__name__}: {error})")

    def _nothing_seen(self) -> Refused:
        name, reason = next(iter(self.inventory.missing.items()), ("", "no gradient arrived"))
        return Refused(
            f"no parameter can be measured by example ({name}: {reason}); use source='microbatches'"
        )

    def _norms(self, squares: dict[int, Tensor], sizes: list[int]) -> StepNorms:
        count = sum(sizes)
        if self._loss_reduction == "mean":
            effective = len(sizes) ** 2 / sum(1 / size for size in sizes)
            weighted_factor, mean_factor = effective**2, 1.0
        else:
            effective, weighted_factor, mean_factor = float(count), 1.0, count**-2.0
        return StepNorms(
            units=effective,
            effective=effective,
            examples=count,
            largest_unit=1,
            weighted=self.inventory.pack(squares),
            mean=self.inventory.pack(self._mean),
            weighted_factor=weighted_factor,
            mean_factor=mean_factor,
        )


def fits(model: nn.Module) -> bool:
    """Whether every trainable parameter can be seen by example, as far as the modules tell."""
    inventory = Inventory(model)
    ExamplesSource(model, inventory)
    mixing = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    return not (inventory.missing or mixing)


def _first_rows(arguments: Any, size: int, rows: int) -> Any:
    """Copy nested arguments with batch-sized tensors cut to their first rows."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:rows].clone() if tensor.dim() and tensor.shape[0] == size else tensor

    return replaced(arguments, cut)
