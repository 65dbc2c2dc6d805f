"""Source ``examples``: per-example squared gradient norms in the ordinary backward pass.

A forward hook on every layer with a rule ties the layer's input to the gradient of its
output; the rule turns the two into squared norms at once. What has no rule, or turns out not
to be measurable, is left out by name; the first steps check each layer's own gradient against
what its parameters really received.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
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
    squared_norm,
    tensors_in,
)
from noisescale.measure.untouched import untouched

# Largest relative difference between a layer's own gradient and what its parameter received
# that rounding explains, in full and in half precision. (assumed; TF32 rounds at 1e-3)
_SAME_GRADIENT = 5e-3
_SAME_GRADIENT_HALF = 5e-2

_NOT_BATCHED = "its input does not start with the batch dimension"
_REUSED = "its module ran more than once in one forward pass, or was differentiated twice"
_UNCERTAIN = "whether its input starts with the batch dimension could not be told"
_HALF = (torch.float16, torch.bfloat16)
_OUTSIDE = "its gradient does not come from one call of its module alone"


@dataclass(eq=False)
class Layer:
    """A module whose rule is known.

    Attributes:
        module: the layer.
        index: its place among the layers.
        rule: how it is measured.
        slots: own parameter name -> index in the inventory.
        checked: whether its own gradient was compared with what its parameters receive.
        half: whether its gradient came in half precision.
        own: its own gradient of this backward pass, until it is compared.
    """

    module: nn.Module
    index: int
    rule: Rule
    slots: dict[str, int]
    checked: bool = False
    half: bool = False
    own: dict[int, Tensor] = field(default_factory=dict)


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
        self._ambiguous: set[int] = set()
        self._inputs: set[int] = set()
        self._checks: list[RemovableHandle] = []
        self._probed: dict[int, int] | None = None
        self._errors: dict[int, Tensor] = {}
        self._norm_layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
        self._layers = self._find_layers()

    def _find_layers(self) -> list[Layer]:
        layers: dict[int, Layer] = {}
        for index, slot in enumerate(self.inventory.slots):
            rule = rule_for(slot.owner)
            if slot.shared:
                self.inventory.drop(index, "it is shared by several modules (tied weights)")
            elif isinstance(rule, str):
                self.inventory.drop(index, rule)
            else:
                layer = layers.setdefault(
                    id(slot.owner), Layer(slot.owner, len(layers), rule, slots={})
                )
                layer.slots[slot.key] = index
        return list(layers.values())

    # Hooks

    def _install(self) -> None:
        super()._install()
        seen = set(self.inventory.seen)
        for layer in self._layers:
            if not seen.isdisjoint(layer.slots.values()):
                hook = layer.module.register_forward_hook(self._layer_hook(layer), prepend=True)
                self._handles.append(hook)
        for name, module in self._norm_layers:
            self._handles.append(module.register_forward_hook(self._mixing_hook(name)))
        for layer in self._layers:
            if not layer.checked:
                for index in layer.slots.values():
                    parameter = self.inventory.slots[index].tensor
                    self._checks.append(on_gradient(parameter, self._check_hook(layer, index)))

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
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._probed is not None and args:
                self._probed[layer.index] = args[0].shape[0] if args[0].dim() else 0
            forward = self._forward
            if forward is None or not torch.is_grad_enabled() or not output.requires_grad:
                return
            x = args[0] if args else None
            if not self._is_batched(layer, forward, x):
                self._drop(layer, _NOT_BATCHED)
                return
            assert x is not None
            inputs = x.detach()
            on_gradient(output, lambda g: self._answer(layer, forward, inputs, g.detach()))

        return hook

    def _is_batched(self, layer: Layer, forward: Forward, x: Tensor | None) -> bool:
        if x is None or not layer.rule.batched(layer.module, x):
            return False
        if x.shape[0] != forward.size:
            return False
        if not self._aligned:
            # Another dimension of the same length, or an input that no layer made: the first
            # dimension may be anything of the batch's size.
            made = x.grad_fn is not None or x.untyped_storage().data_ptr() in self._inputs
            if forward.size in x.shape[1:] or not made:
                self._ambiguous.add(layer.index)
        return True

    def _answer(self, layer: Layer, forward: Forward, x: Tensor, grad: Tensor) -> None:
        try:
            self._fire(layer, forward, x, grad)
        except Exception as error:  # noqa: BLE001 - a measurement must not kill the training
            self._drop(layer, f"its rule failed ({type(error).__name__}: {error})")

    def _fire(self, layer: Layer, forward: Forward, x: Tensor, grad: Tensor) -> None:
        if forward.window != self._window or not self._watching:
            return
        if layer.index in forward.fired:
            self._drop(layer, _REUSED)
            return
        if not forward.fired:
            self._fired.append(forward)
        forward.fired.add(layer.index)
        for key, norms in layer.rule.norms(layer.module, x, grad).items():
            index = layer.slots.get(key)
            if index is not None:
                total = norms.sum()
                before = self._squares.get(index)
                self._squares[index] = total if before is None else before + total
        if not layer.checked:
            layer.half |= grad.dtype in _HALF or x.dtype in _HALF
            self._own_gradient(layer, x, grad)

    def _drop(self, layer: Layer, reason: str) -> None:
        for index in layer.slots.values():
            self.inventory.drop(index, reason)

    # Is the layer's own gradient all that its parameters receive?

    def _own_gradient(self, layer: Layer, x: Tensor, grad: Tensor) -> None:
        clone: Any = object.__new__(type(layer.module))
        leaves = {
            key: None if p is None else p.detach().requires_grad_(p.requires_grad)
            for key, p in layer.module._parameters.items()
        }
        vars(clone).update({**layer.module.__dict__, "_parameters": leaves})
        wanted = [leaf for key in layer.slots if (leaf := leaves[key]) is not None]
        # forward, not __call__: nobody's hooks run.
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            output = clone.forward(x.to(wanted[0].dtype) if x.is_floating_point() else x)
        own = torch.autograd.grad(output, wanted, grad.to(output.dtype))
        for index, gradient in zip(layer.slots.values(), own, strict=True):
            before = layer.own.get(index)
            layer.own[index] = gradient if before is None else before + gradient

    def _check_hook(self, layer: Layer, index: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            own = layer.own.pop(index, None)
            if own is None or layer.checked:
                return
            received = gradient.detach()
            if received.is_sparse:
                received = received.to_dense()
            if own.is_sparse:
                own = own.to_dense()
            pair = torch.stack([squared_norm(received - own), squared_norm(own)])
            before = self._errors.get(index)
            self._errors[index] = pair if before is None else torch.maximum(before, pair)

        return hook

    def _settle_checks(self) -> None:
        if not self._errors:
            return
        for layer in self._layers:
            pairs = [self._errors[i].tolist() for i in layer.slots.values() if i in self._errors]
            finite = all(math.isfinite(value) for pair in pairs for value in pair)
            if layer.checked or len(pairs) < len(layer.slots) or not finite:
                continue
            layer.checked = True
            bound = _SAME_GRADIENT_HALF if layer.half else _SAME_GRADIENT
            if any(error > bound**2 * size for error, size in pairs):
                self._drop(layer, _OUTSIDE)
        if all(layer.checked for layer in self._layers):
            self._end_checks()
        self._errors.clear()

    # Is the first dimension of every layer's input the batch?

    def _finish_forward(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del output
        if self._aligned:
            return
        if self._ambiguous and forward.size >= 2:
            self._probe_alignment(forward.size, args, kwargs)
        self._aligned = True

    def _probe_alignment(self, size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run half the batch without gradients: inputs that keep their length hold no batch."""
        half = max(1, size // 2)
        self._probed = {}
        try:
            with untouched(self.model), torch.no_grad():
                self.model(
                    *(_first_rows(a, size, half) for a in args),
                    **{k: _first_rows(v, size, half) for k, v in kwargs.items()},
                )
        except Exception:  # noqa: BLE001 - a model that cannot run on half a batch says nothing
            for layer in self._layers:
                if layer.index in self._ambiguous:
                    self._drop(layer, _UNCERTAIN)
        else:
            for layer in self._layers:
                if self._probed.get(layer.index, half) != half:
                    self._drop(layer, _NOT_BATCHED)
        finally:
            self._probed = None

    # Steps

    def _clear(self) -> None:
        self._squares.clear()
        self._fired.clear()
        self._errors.clear()
        self._mixing = ""
        for layer in getattr(self, "_layers", ()):
            layer.own.clear()

    def _close(self) -> StepNorms | Refused:
        if self._mixing:
            return Refused(
                f"BatchNorm {self._mixing!r} in training mode mixes the examples of a batch, so "
                "per-example gradients do not exist; use source='microbatches', or eval mode "
                "for that layer"
            )
        if not self._forwards:
            return self._no_forward()
        self._settle_checks()
        for index in self._mean:
            if index not in self._squares:
                self.inventory.drop(index, _OUTSIDE)
        squares = {
            i: v for i, v in self._squares.items() if self.inventory.slots[i].missing is None
        }
        if not squares:
            return self._nothing_seen()
        return self._norms(squares, [forward.size for forward in self._fired])

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


def _first_rows(value: Any, size: int, rows: int) -> Any:
    """Copy nested arguments with batch-sized tensors cut to their first rows."""
    if isinstance(value, Tensor):
        cut = value.dim() > 0 and value.shape[0] == size
        return value[:rows].clone() if cut else value
    if isinstance(value, Mapping):
        return {k: _first_rows(v, size, rows) for k, v in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_first_rows(v, size, rows) for v in value)
    return value
