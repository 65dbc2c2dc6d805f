"""Source ``examples``: per-example squared gradient norms in the ordinary backward pass.

A forward hook on every layer with a rule ties the layer's input to the gradient of its
output; the rule turns the two into squared norms at once. What has no rule, or turns out not
to be measurable, is left out by name; the first steps check each layer's own gradient against
what its parameters really received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from noisescale.measure.compiled import plain_name
from noisescale.measure.fused import Replacements, fusible
from noisescale.measure.gradients import (
    Forward,
    GradientSource,
    Inventory,
    Refused,
    StepNorms,
)
from noisescale.measure.harmless import Harmless
from noisescale.measure.kept import transformed
from noisescale.measure.layer_calls import LayerCalls
from noisescale.measure.layers import Layer
from noisescale.measure.rules.account import Account
from noisescale.measure.rules.registry import Call, Rule
from noisescale.measure.rules.uses import Use, lone_square_sums, square_sums
from noisescale.measure.tensor_hooks import foreign_hooks, forget_hooks, on_gradient
from noisescale.measure.use_hooks import TWICE

_STALE = "a backward pass went through a forward pass of an earlier step"
_FAILED = "a backward pass of the step failed half-way"
_OUTSIDE = "its gradient does not come from calls of its module alone"

_SECOND_ORDER = (
    "the loss holds gradients (create_graph=True), which no example's own pass shows; measure "
    "steps without that penalty, or use source='microbatches'"
)


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
        self._found: list[dict[int, Tensor]] = []
        self._fired: list[Forward] = []
        self._mixing = ""
        self._checks: list[RemovableHandle] = []
        self._others: dict[int, tuple[int, ...]] = {}
        named = self.model.named_modules()
        self._norm_layers = [(plain_name(n), m) for n, m in named if isinstance(m, _BatchNorm)]
        self._shapes = {i: slot.tensor.shape for i, slot in enumerate(inventory.slots)}
        self._account = Account(self._shapes)
        by_grad = self._any_mode
        self._calls = LayerCalls(self.model, inventory, self._answered, self._drop, by_grad)
        self._fused = Replacements(self._runs_fused, self._take, self._refuse_again)
        self._calls.claim = self._fused.claim
        self._calls.careful = lambda: bool(self._checks)

    # Hooks

    def _install(self) -> None:
        super()._install()
        seen = set(self.inventory.seen)
        self._handles += self._calls.install()
        for name, module in self._norm_layers:
            self._handles.append(module.register_forward_hook(Harmless(self._mixing_hook(name))))
        for index in seen & self._account.unchecked:
            parameter = self.inventory.slots[index].tensor
            self._checks.append(on_gradient(parameter, self._account.hook(index)))
        if self.mode == "fused" and self.metric.plain:
            for layer in self._calls.layers:
                if layer.slots.get("weight") in seen and fusible(layer.module):
                    self._fused.add(layer.module, layer.index)
            self._handles.append(self._fused)
            # A forward pass that fails has no other end.
            end = Harmless(lambda *_: self._fused.end())
            self._handles.append(self._root.register_forward_hook(end, always_call=True))

    def _runs_fused(self, place: int) -> bool:
        calls = self._calls
        if calls.forward is None or not calls.alignment.settled or self._checks or transformed():
            return False
        return calls.layers[place].slots["weight"] in self.inventory.seen

    def _take(self, place: int, square: Tensor) -> None:
        self._found.append({self._calls.layers[place].slots["weight"]: square})

    def _refuse_again(self, place: int) -> None:
        self._drop(self._calls.layers[place], TWICE)

    def open(self, *, at_once: bool = False) -> None:
        """Watch the coming passes as one step."""
        super().open(at_once=at_once)
        slots = self.inventory.slots
        for index in self.inventory.seen:
            parameter = slots[index].tensor
            if parameter._backward_hooks is None and index not in self._others:
                continue
            forget_hooks(parameter)
            others = foreign_hooks(parameter)
            if others != self._others.get(index, ()):
                # It may change the gradient: what was found to agree is compared again.
                self._others[index] = others
                self._account.unchecked.add(index)
                self._checks.append(on_gradient(parameter, self._account.hook(index)))

    def pause(self) -> None:
        """Remove every hook; ``open()`` installs them again."""
        super().pause()
        self._end_checks()

    def _end_checks(self) -> None:
        for handle in self._checks:
            handle.remove()
        self._checks.clear()
        for slot in self.inventory.slots:
            forget_hooks(slot.tensor)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling() or self._calls.repeating:
            return
        if self._calls.failed and not self._mean:
            # Nothing came of it: the step begins anew.
            self._reset()
        super()._enter(model, args, kwargs)
        if model is not self._root:
            return
        self._calls.begin(self._forward, args, kwargs)
        if self._forward is not None:
            self._fused.begin()

    def _finish_forward(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del output
        self._fused.end()
        self._calls.finish(forward, args, kwargs)

    def _mixing_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self._forward is not None and (
                module.training or getattr(module, "running_mean", None) is None
            ):
                self._mixing = name

        return hook

    def _answered(self, layer: Layer, forward: Forward, call: Call) -> None:
        """All the gradients of one call came."""
        if not forward.fired:
            forward.fired = True
            self._fired.append(forward)
        expected, checked = forward.expected, not self._checks
        live = layer.slots
        if len(self.inventory.seen) < len(self._shapes):
            slots = self.inventory.slots
            live = {k: i for k, i in live.items() if slots[i].missing is None}
        if checked and all(expected[i] == 1 for i in live.values()):
            forward.done.update(live.values())
            if call.ticket is not None:
                call.ticket.alone = True
                live = {key: i for key, i in live.items() if key != "weight"}
            if live:
                self._found.append(
                    lone_square_sums(layer.rule, call, live, self._shapes, self.metric)
                )
        else:
            if call.ticket is not None:
                call.ticket.call = call
            self._account_for(layer.rule, live, forward, call)

    def _account_for(self, rule: Rule, live: dict[str, int], forward: Forward, call: Call) -> None:
        """Wait for all uses of the call's parameters, and compare gradients not yet checked."""
        ready: dict[int, list[Use]] = {}
        fresh: dict[int, list[Use]] = {}
        for key, index in live.items():
            use = Use(rule, call, key)
            if index in self._account.unchecked:
                fresh.setdefault(index, []).append(use)
            uses = forward.waiting.setdefault(index, [])
            uses.append(use)
            if len(uses) == forward.expected[index]:
                ready[index] = forward.waiting.pop(index)
                forward.done.add(index)
        if ready:
            self._found.append(square_sums(ready, self._shapes, self.metric))
        if fresh:
            self._account.add(fresh, call)

    def _squares(self) -> dict[int, Tensor]:
        squares: dict[int, Tensor] = {}
        for found in self._found:
            for index, value in found.items():
                before = squares.get(index)
                squares[index] = value if before is None else before + value
        return squares

    def _drop(self, layer: Layer, reason: str) -> None:
        for index in layer.slots.values():
            self.inventory.drop(index, reason)

    def _settle(self) -> None:
        if not self._checks:
            return
        for index in self._account.settle():
            for layer in self._calls.layers:
                if index in layer.slots.values():
                    self._drop(layer, _OUTSIDE)
        if self._account.unchecked.isdisjoint(self.inventory.seen):
            self._end_checks()

    # Steps

    def _clear(self) -> None:
        self._found.clear()
        self._fired.clear()
        self._mixing = ""
        self._account.clear()
        self._calls.forget()
        self._fused.end()

    def _close(self) -> StepNorms | Refused:
        if self._mixing:
            return Refused(
                f"BatchNorm {self._mixing!r} in training mode mixes the examples of a batch, so "
                "per-example gradients do not exist; use source='microbatches', or eval mode "
                "for that layer"
            )
        if not self._forwards:
            return self._no_forward()
        if self._calls.second_order:
            return Refused(_SECOND_ORDER)
        if self._calls.stale:
            return Refused(_STALE)
        if self._calls.failed:
            return Refused(_FAILED)
        self._settle()
        for forward in self._fired:
            if forward.waiting:
                # Uses that had no part in the loss never answer.
                self._late(forward)
        squares = self._squares()
        for index in self._mean:
            if index not in squares:
                self.inventory.drop(index, _OUTSIDE)
        seen = set(self.inventory.seen)
        squares = {i: v for i, v in squares.items() if i in seen}
        if not squares:
            return self._nothing_seen()
        return self._norms(squares, [forward.size for forward in self._fired])

    def _late(self, forward: Forward) -> None:
        seen = {i: u for i, u in forward.waiting.items() if i in self.inventory.seen}
        forward.waiting = {}
        try:
            if seen:
                self._found.append(square_sums(seen, self._shapes, self.metric))
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
        weighted, mean = self.inventory.pack_all(squares, self._mean)
        return StepNorms(
            units=effective,
            effective=effective,
            examples=count,
            largest_unit=1,
            weighted=weighted,
            mean=mean,
            weighted_factor=weighted_factor,
            mean_factor=mean_factor,
        )


def fits(model: nn.Module, parameters: Callable[[str], bool] | None = None) -> bool:
    """Whether every parameter asked for can be seen by example, as far as the modules tell."""
    inventory = Inventory(model, parameters=parameters)
    ExamplesSource(model, inventory)
    mixing = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    return not (inventory.missing or mixing)
