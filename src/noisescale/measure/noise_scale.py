"""NoiseMeter: the gradient noise scale of a training, measured while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import check_options
from noisescale.measure.compiled import untraced
from noisescale.measure.examples import ExamplesSource, fits
from noisescale.measure.frozen import measure_noise_scale
from noisescale.measure.gradients import (
    BatchSizeOf,
    GradientSource,
    Inventory,
    LossReduction,
    Refused,
    StepNorms,
)
from noisescale.measure.grouping import Grouping
from noisescale.measure.meter_state import load_meter_state, meter_state
from noisescale.measure.microbatches import MicrobatchSource
from noisescale.measure.modes import Mode, check_mode, norm_of
from noisescale.measure.preconditioned import Preconditioner
from noisescale.measure.self_test import check_meter
from noisescale.measure.split_pass import split_norms
from noisescale.measure.step_log import History, StepLog
from noisescale.measure.tally import Tally
from noisescale.measure.verdict import Circumstances, moving_record
from noisescale.records import NoiseScale

__all__ = ["NoiseMeter", "measure_noise_scale"]

SourceName = Literal["auto", "examples", "microbatches"]
_BY_NAME: dict[str, type[GradientSource]] = {
    "examples": ExamplesSource,
    "microbatches": MicrobatchSource,
}


class NoiseMeter:
    """Measure the gradient noise scale in a plain training loop, without changing it.

    Per measured step, unbiased |G|^2 and tr(Sigma) (per example) are formed from squared
    gradient norms; :meth:`estimate` averages the two separately over the steps and gives
    their ratio with an interval. Gradients are read at backward time, before clipping. With an
    optimizer every ``optimizer.step()`` ends a step; otherwise call :meth:`close_step`.
    Gradients must be zeroed between steps.

    |G|^2 and tr(Sigma) are those of the gradient that the optimizer gets, taken as the mean
    over the step's examples; with ``loss_reduction="sum"`` it is divided by their number.

    Args:
        model: the model, called as ``model(...)`` in train mode; the first tensor among the
            arguments starts with the batch dimension.
        optimizer: whose steps end the measured steps; None to call :meth:`close_step`.
        source: ``examples`` (per-example norms, any loop), ``microbatches`` (for loops that
            accumulate gradients, or with :meth:`split_pass`), or ``auto``: examples if every
            trainable parameter can be measured so, else micro-batches.
        mode: how per-example norms are computed: ``exact``, which leaves training as it is, bit
            for bit; or ``fused``, as exact and often cheaper, where weight gradients of measured
            steps are the sums of the per-example ones: the same terms in another order; or
            ``sketch``, which leaves training as it is and estimates the dear norms by random
            signs, without bias, its noise in the interval.
        every: measure each ``every``-th step, the first included; the others cost nothing.
        groups: parameter name -> group, as a mapping (the rest is ``other``) or a function;
            default: the module that holds the parameter.
        loss_scale: factor on the loss (``GradScaler.get_scale``), a number or a callable that
            is asked when a step ends.
        loss_reduction: ``mean`` when every backward pass is of a mean loss (divided by a
            constant or not), ``sum`` when it grows with the number of examples.
        unit: what one row of a batch is: ``examples`` or ``sequences``.
        population_size: number of training examples, to measure the gradient of the training
            loss itself; None for the distribution they were drawn from.
        level: confidence level of the intervals.
        batch_size_of: ``batch_size_of(args, kwargs)`` returns the number of examples of one
            call of the model; default: the first tensor's first dimension.
        preconditioner: ``none`` for plain squared norms; ``adam`` for those of gradients divided
            as the optimizer (Adam, AdamW, NAdam, RAdam, RMSprop) divides them; or an
            :class:`~noisescale.measure.preconditioned.AdamNorm` with options.
        parameters: whether a parameter is to be measured, by its name; default: all. See
            :func:`~noisescale.measure.norm_layers.norm_layers`.

    Raises:
        InvalidInputError: an argument cannot be used.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> meter = NoiseMeter(model, optimizer)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 2)).square().mean().backward()
    ...     optimizer.step()
    >>> meter.steps, meter.estimate().source
    (3, 'examples')
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        source: SourceName = "auto",
        mode: Mode = "exact",
        every: int = 1,
        groups: Grouping = None,
        loss_scale: float | Callable[[], float] = 1.0,
        loss_reduction: LossReduction = "mean",
        unit: str = "examples",
        population_size: int | None = None,
        level: float = 0.95,
        batch_size_of: BatchSizeOf | None = None,
        preconditioner: Preconditioner = "none",
        parameters: Callable[[str], bool] | None = None,
    ) -> None:
        check_options(source, loss_reduction, every, level, loss_scale)
        check_mode(mode, source, preconditioner)
        self.model = model
        self.level = level
        self.unit = unit
        self._auto = source == "auto"
        self._every = every
        self._groups = groups
        self._loss_scale = loss_scale
        self._loss_reduction: LossReduction = loss_reduction
        self._batch_size_of = batch_size_of
        self._population_size = population_size
        self._norm = preconditioner, optimizer
        self._mode = mode
        self._parameters = parameters
        self._norm_layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._tally = Tally()
        self._split_done = False
        self._use(source if source != "auto" else self._fitting())
        self._log = StepLog(self._source.inventory)
        hook = untraced(self._on_step)
        self._step_hook = None if optimizer is None else optimizer.register_step_pre_hook(hook)
        self._arm()

    @property
    def source(self) -> str:
        """The source in use: ``examples`` or ``microbatches``."""
        return self._source.name

    @property
    def steps(self) -> int:
        """Number of steps that were measured and finite."""
        return len(self._log)

    @property
    def due(self) -> bool:
        """Whether the coming optimizer step is to be measured."""
        return self._tally.optimizer_steps % self._every == 0

    @property
    def missing(self) -> dict[str, str]:
        """Parameters that are not measured, each with the reason."""
        return self._source.inventory.missing

    @property
    def history(self) -> History:
        """The moments of every measured, finite step."""
        return self._log.history(population_size=self._population_size)

    def _fitting(self) -> str:
        return "examples" if fits(self.model, self._parameters) else "microbatches"

    def _use(self, name: str) -> None:
        inventory = Inventory(self.model, self._groups, self._parameters)
        mode: Mode = self._mode if name == "examples" else "exact"
        self._source = _BY_NAME[name](
            self.model,
            inventory,
            loss_reduction=self._loss_reduction,
            batch_size_of=self._batch_size_of,
            metric=norm_of(mode, *self._norm, inventory, self._loss_reduction),
            mode=mode,
        )

    def _switch(self, name: str) -> None:
        """Change the source; what the other one measured does not mix with it."""
        self._source.detach()
        self._use(name)
        self._tally.modes.clear()
        self._log = StepLog(self._source.inventory)

    def _arm(self, *, at_once: bool = False) -> None:
        if self.due and not self._tally.split_only:
            self._source.open(at_once=at_once)
        elif self._source.watching:
            self._source.pause()

    # Steps

    def _on_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        del optimizer
        # args holds the optimizer itself, then what step() was given.
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            self._tally.refuse(
                "optimizer.step(closure) runs its backward passes inside the step, where the "
                "weights move; measure with measure_noise_scale at fixed weights"
            )
            self._source.close()
        self._end_step()

    def close_step(self) -> None:
        """End a step by hand, after its last backward pass and before the weights change.

        Raises:
            InvalidInputError: the meter has an optimizer, whose steps end it already.
        """
        if self._step_hook is not None:
            raise InvalidInputError(
                "close_step()",
                "a meter without optimizer is required",
                "leave it out: optimizer.step() closes the step",
            )
        self._end_step()

    def _end_step(self) -> None:
        tally = self._tally
        closed = self.due and not tally.split_only
        if closed:
            self._take(self._source.close())
        tally.optimizer_steps += 1
        self._split_done = False
        if self._source.watching or tally.optimizer_steps % self._every == 0:
            self._arm(at_once=closed)

    def _take(self, result: StepNorms | Refused | None) -> None:
        if self._auto and self.source == "examples" and self._unfit(result):
            self._switch("microbatches")
        elif isinstance(result, Refused):
            self._tally.refuse(result.detail)
            if result.norms is not None:
                self._settle(result.norms, self._scale())
        elif result is not None:
            self._record(result, self._scale())

    def _unfit(self, result: StepNorms | Refused | None) -> bool:
        unfit = isinstance(result, Refused) and result.norms is None
        return bool(self.missing) or (unfit and bool(self._norm_layers))

    def _scale(self) -> float:
        return float(self._loss_scale() if callable(self._loss_scale) else self._loss_scale)

    def _record(self, norms: StepNorms, scale: float) -> None:
        population = self._population_size
        if norms.units < 2:
            self._tally.refuse("a batch of one example has no spread; use at least 2 per step")
            return
        if population is not None and norms.examples > population:
            self._tally.refuse(f"a step of {norms.examples} from a population of {population}")
            return
        self._tally.normalised |= any(
            m.training or m.running_mean is None for m in self._norm_layers
        )
        self._settle(norms, scale)
        self._tally.measured_by(self._source.mode)
        self._log.add(self._tally.optimizer_steps, norms, scale)

    def _settle(self, norms: StepNorms, scale: float) -> None:
        factor = norms.weighted_factor / norms.units / scale**2
        self._source.metric.settle(effective=norms.effective, factor=factor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave passes of the model inside unmeasured; enter and leave between steps.

        What backward passes since the last step have accumulated is dropped with it.
        """
        self._source.pause()
        try:
            yield
        finally:
            self._arm()

    def split_pass(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        batch: Any,
        *,
        micro_batch_size: int,
    ) -> bool:
        """Measure this step by an extra pass over micro-batches of its batch.

        For loops that do not accumulate: call it once per step, before ``optimizer.step()``
        (or before :meth:`close_step`). It costs about one more forward and backward pass over
        the batch on each measured step and nothing on the others; the record says how much.
        ``p.grad``, random states, buffers and modes are left as they were. From the first call
        on, steps are measured by it alone.

        Args:
            loss: ``loss(model, micro_batch)`` returns a scalar, not scaled.
            batch: tensors, or nested tuples and mappings of tensors, batch first.
            micro_batch_size: examples per micro-batch, less than the batch.

        Returns:
            Whether the step was due and was measured.

        Raises:
            InvalidInputError: the meter's source is ``examples``, or the loss is not a scalar.
        """
        if not self._auto and self.source == "examples":
            raise InvalidInputError(
                "split_pass() with source='examples'",
                "source 'microbatches' is required",
                "make the meter with source='microbatches'",
            )
        if self.source == "examples":
            self._switch("microbatches")
        self._tally.split_only = True
        self._source.pause()
        if not self.due or self._split_done:
            return False
        self._split_done = True
        found, cost = split_norms(
            loss, self._source, batch, micro_batch_size, loss_reduction=self._loss_reduction
        )
        self._tally.split_cost = self._tally.split_cost.plus(cost)
        if isinstance(found, Refused):
            self._tally.refuse(found.detail)
            return False
        self._record(found, 1.0)
        return True

    def estimate(self, *, first: int | None = None, last: int | None = None) -> NoiseScale:
        """Estimate the noise scale of the whole model; cheap enough for any time.

        Args:
            first: first measured step to use, as in ``steps[first:last]``.
            last: end of the window.
        """
        return self._record_of(None, first, last)

    def estimate_groups(
        self, *, first: int | None = None, last: int | None = None
    ) -> dict[str, NoiseScale]:
        """Estimate each parameter group's own noise scale; groups never seen are left out."""
        slots = self._source.inventory.slots
        seen = dict.fromkeys(slot.group for slot in slots if slot.missing is None)
        return {group: self._record_of(group, first, last) for group in seen}

    def _record_of(self, group: str | None, first: int | None, last: int | None) -> NoiseScale:
        circumstances = Circumstances(
            source=self.source,
            unit=self.unit,
            population_size=self._population_size,
            level=self.level,
            refused=self._tally.refused,
            refusal=self._tally.refusal,
            abandoned=self._source.abandoned,
            closes_itself=self._step_hook is not None,
            normalised=self._tally.normalised and self.source == "microbatches",
            split_cost=self._tally.split_cost,
            preconditioner=self._source.metric.name,
            norm_notes=(*self._source.metric.notes(), *self._tally.mode_notes()),
        )
        history = self._log.history(
            group, first=first, last=last, population_size=self._population_size
        )
        return moving_record(self._log, history, self._source.inventory, circumstances, group)

    check = check_meter
    state_dict = meter_state
    load_state_dict = load_meter_state

    def detach(self) -> None:
        """Remove every hook from the model and the optimizer; estimates stay readable."""
        self._source.detach()
        if self._step_hook is not None:
            self._step_hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
