"""What every source of squared gradient norms shares: one interface, one bookkeeping.

A source watches the user's own forward and backward passes and says, per optimizer step,
what :func:`noisescale.theory.noise_scale.unbiased_moments` needs. It reads gradients at
backward time, before any clipping, moves nothing to the host and keeps no gradient.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from noisescale.measure.attached import Attached
from noisescale.measure.compiled import Uncompiled, plain
from noisescale.measure.harmless import Harmless
from noisescale.measure.inventory import Inventory as Inventory
from noisescale.measure.kept import transformed
from noisescale.measure.leftovers import Leftovers
from noisescale.measure.metric import Euclidean, Metric
from noisescale.measure.rules.scratch import release
from noisescale.measure.tensor_hooks import after_accumulation, forget_hooks

LossReduction = Literal["mean", "sum"]
BatchSizeOf = Callable[[tuple[Any, ...], dict[str, Any]], int]


class Handle(Protocol):
    """Undoes what was installed."""

    def remove(self) -> None:
        """Undo it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepNorms:
    """Squared norms of one optimizer step, per parameter, still on the device.

    ``weighted_factor * weighted`` and ``mean_factor * mean`` are the ``weighted_sq`` and
    ``mean_sq`` of :func:`~noisescale.theory.noise_scale.unbiased_moments`; a sum over
    parameters is a group. The factors stay apart so that large ones meet float64 only.

    Attributes:
        units: examples or micro-batches that were told apart (may be fractional when the
            examples of a step weigh differently).
        effective: examples of an equally weighted batch whose gradient is as noisy.
        examples: examples in the step.
        largest_unit: examples in its largest unit.
        weighted: shape (parameters,), 0 where not seen.
        mean: shape (parameters,), squared norm of the accumulated gradient.
        weighted_factor: scale of ``weighted``.
        mean_factor: scale of ``mean``.
    """

    units: float
    effective: float
    examples: int
    largest_unit: int
    weighted: Tensor
    mean: Tensor
    weighted_factor: float
    mean_factor: float


@dataclass(frozen=True)
class Refused:
    """A step that a source could not measure: what, why and what to use instead.

    Attributes:
        detail: one sentence.
        norms: what was found where the source did its part and the norm was missing.
    """

    detail: str
    norms: StepNorms | None = None


class Forward:
    """One forward pass of the watched model, and the uses of its parameters."""

    __slots__ = ("done", "expected", "fired", "over", "size", "waiting", "window")

    def __init__(self, size: int, window: int) -> None:
        self.size = size
        self.window = window
        self.fired = False
        self.over = False
        """Whether its step has ended."""
        self.done: set[int] = set()
        """Parameters whose uses were all counted."""
        self.expected: dict[int, int] = {}
        """How often each parameter was used, by its index."""
        self.waiting: dict[int, list[Any]] = {}
        """Its uses so far whose gradient came, until all have."""


def leading_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the first dimension of the first tensor among a call's arguments; 0 if none."""
    for value in (*args, *kwargs.values()):
        found = _first_tensor(value)
        if found is not None:
            return int(found.shape[0])
    return 0


def _first_tensor(value: Any) -> Tensor | None:
    for tensor in tensors_in(value):
        if tensor.dim() > 0:
            return tensor
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    return []


_LEFTOVERS = (
    "gradients of earlier steps were still there when the step began; call optimizer.zero_grad() "
    "once per step"
)
_STANCE = (
    "torch.compiler.set_stance was called while a step was measured, so that compiled code may "
    "have run without the hooks; call it before the meter is made"
)
_TOUCHED = (
    "gradients were changed between two backward passes of one step; unscale or clip them once, "
    "before optimizer.step()"
)


class GradientSource(abc.ABC):
    """Squared gradient norms out of the user's own backward passes.

    ``open()`` starts to watch for one optimizer step, ``close()`` ends it; between the two
    any number of forward and backward passes may run. While closed no hook is installed.
    """

    name: ClassVar[str]
    sees_layers: ClassVar[bool] = True
    """Whether it hooks more than the model itself and its parameters."""

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        *,
        loss_reduction: LossReduction = "mean",
        batch_size_of: BatchSizeOf | None = None,
        any_mode: bool = False,
        metric: Metric | None = None,
        mode: str = "exact",
    ) -> None:
        self.mode = mode
        self.model = plain(model)
        # The wrapper's own hooks are called outside the compiled code.
        self._root = self.model if self.sees_layers else model
        self._uncompiled = Uncompiled(self.model) if self._root is self.model else None
        self.inventory = inventory
        self.metric = metric or Euclidean()
        self.abandoned = 0
        self._loss_reduction = loss_reduction
        self._batch_size_of = batch_size_of or leading_size
        self._any_mode = any_mode
        self._handles: list[Handle] = []
        self._watching = False
        self._window = 0
        self._forward: Forward | None = None
        self._eval_forward = False
        self._forwards = 0
        self._mean: dict[int, Tensor] = {}
        self._leftovers = Leftovers()
        self._attached = Attached(self.model)
        self._refusal = ""

    @property
    def watching(self) -> bool:
        """Whether the passes that run now are measured."""
        return self._watching

    def open(self, *, at_once: bool = False) -> None:
        """Watch the coming passes as one step.

        Args:
            at_once: whether nothing ran since ``close()``.
        """
        if self._uncompiled is not None:
            self._uncompiled.hold()
        if not self._handles:
            self._install()
        if not (at_once and self._watching):
            self._watching = True
            self._reset()
        self.metric.freeze()

    def close(self, gradients: Mapping[int, Tensor] | None = None) -> StepNorms | Refused | None:
        """End the step: its norms, why there are none, or None when no gradient was seen.

        Args:
            gradients: the step's accumulated gradient per parameter index, for passes by
                ``torch.autograd.grad``; default: what the backward passes accumulated.
        """
        if gradients is not None:
            self._mean.clear()
            self._mean.update({i: self.metric.square(i, g) for i, g in gradients.items()})
        result = self._judged(accumulated=gradients is None)
        self._reset()
        return result

    def _judged(self, *, accumulated: bool) -> StepNorms | Refused | None:
        changed = self._refusal
        if self._mean or self._forwards:
            changed = changed or self._attached.change()
            if self._uncompiled is not None and not self._uncompiled.holds():
                changed = _STANCE
        if changed:
            return Refused(changed)
        blind = self._forwards and not self.inventory.seen
        result = self._close() if self._mean or blind else None
        if isinstance(result, StepNorms):
            if accumulated and self._leftovers.judge():
                return Refused(_LEFTOVERS)
            if self.metric.refusal:
                return Refused(self.metric.refusal, result)
        return result

    def pause(self) -> None:
        """Remove every hook; ``open()`` installs them again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for slot in self.inventory.slots:
            forget_hooks(slot.tensor)
        if self._uncompiled is not None:
            self._uncompiled.release()
        self._watching = False
        self._reset()

    def detach(self) -> None:
        """Remove every hook for good, and give work buffers back."""
        self.pause()
        release()

    @abc.abstractmethod
    def _close(self) -> StepNorms | Refused: ...

    @abc.abstractmethod
    def _clear(self) -> None: ...

    def _install(self) -> None:
        enter, leave = Harmless(self._enter), Harmless(self._leave)
        self._handles += [
            self._root.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            self._root.register_forward_hook(leave, with_kwargs=True),
        ]
        for index in self.inventory.seen:
            parameter = self.inventory.slots[index].tensor
            self._handles.append(after_accumulation(parameter, self._accumulated(index)))
        if self.inventory.seen:
            first = self.inventory.seen[0]
            watched = self.inventory.slots[first].tensor
            self._leftovers.watch(watched, lambda g: self.metric.square(first, g))
            self._handles.append(self._leftovers)

    def _accumulated(self, index: int) -> Callable[[Tensor], None]:
        mean, leftovers, square = self._mean, self._leftovers, self.metric.square
        watched = index == self.inventory.seen[0]

        def hook(parameter: Tensor) -> None:
            # Backward passes before the last are overwritten: which is last is not known yet.
            if parameter.grad is not None:
                mean[index] = square(index, parameter.grad)
                if watched:
                    leftovers.accumulated(mean[index], parameter.grad)

        return hook

    def _reset(self) -> None:
        self._window += 1
        self._forward = None
        self._eval_forward = False
        self._forwards = 0
        self._refusal = ""
        self._mean.clear()
        self._leftovers.forget()
        self._clear()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy of the model carries the hooks along.
        if is_dynamo_compiling() or model is not self._root:
            return
        self._forward = None
        if transformed():
            return
        if not torch.is_grad_enabled() or not self._watching:
            return
        if not (model.training or self._any_mode):
            self._eval_forward = True
            return
        self._discard_abandoned()
        self._forwards += 1
        size = int(self._batch_size_of(args, kwargs))
        if size < 1:
            self._refusal = "a forward pass ran over no examples; skip empty batches"
            return
        self._forward = Forward(size, self._window)

    def _leave(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not is_dynamo_compiling() and self._forward is not None and model is self._root:
            # Calls of submodules outside the model's own forward belong to no batch.
            forward, self._forward = self._forward, None
            self._finish_forward(forward, args, kwargs, output)

    def _finish_forward(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del forward, args, kwargs, output

    def _discard_abandoned(self) -> None:
        # Gradients were zeroed with no optimizer step: the step was skipped (GradScaler).
        if not self._mean:
            return
        slots = self.inventory.slots
        watched = slots[next(iter(self.inventory.seen), 0)].tensor.grad
        touched = self._leftovers.touched(watched)
        if watched is not None and touched and bool(watched.any()):
            self._refusal = _TOUCHED
        elif touched or all(slots[i].tensor.grad is None for i in self._mean):
            self.abandoned += 1
            self._reset()

    def _no_forward(self) -> Refused:
        if self._eval_forward:
            return Refused(
                "the model was in eval mode, and forward passes in eval mode are not measured; "
                "call model.train(), or use measure_noise_scale for a fixed mode"
            )
        return Refused(
            "gradients arrived without a call of the model itself; call model(...) rather than "
            "one of its methods, and attach the meter to the module that is called"
        )
