"""Batch-size schedules in a training loop: sizes, rates and positions, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import SchedulePlan
from noisescale.train.accumulation import GradientAccumulation
from noisescale.train.arguments import take_state, whole
from noisescale.train.batching import ResizableBatchSampler
from noisescale.train.replicas import as_the_first_says

Driven = ResizableBatchSampler | GradientAccumulation

COUPLINGS = ("plan", "linear", "square_root", "none")


@runtime_checkable
class PlannedSizes(Protocol):
    """Sizes and rates by position, as :class:`noisescale.records.schedule.BatchSchedule` has."""

    def batch_size_at(self, position: int) -> int:
        """Return the global batch size of a step that begins at a position."""

    def lr_at(self, position: int) -> float | None:
        """Return its learning rate; None where the plan says nothing about rates."""


@runtime_checkable
class Controller(Protocol):
    """Decides from the noise scale, as :class:`noisescale.plan.schedule.noise_driven.NoiseDriven`.

    Attributes:
        batch_size: the present global batch size.
        unit: what it counts.
    """

    batch_size: int
    unit: str

    def update(self, noise: Any) -> Any:
        """Take a measurement, or None, and set ``batch_size``."""


class BatchSizeSchedule:
    """Drives the batch size of a loop, and the learning rates that go with it.

    ``step()`` after every optimizer step is all that the loop does. Positions are those of the
    examples trained on: a step takes the size and the rate that hold where it begins. The state
    includes the sampler's or the accumulation's.

    What a controller decides takes effect at the next update of an accumulation, and ``lead``
    batches later in a sampler. With several processes the first one decides for all.

    Attributes:
        position: where the next step begins, in ``unit``.
        updates: optimizer steps done.
        unit: what positions and sizes count.

    Args:
        plan: a schedule record (sizes and rates by position) or a plan that holds one, a function
            from position to size, which must say the same whenever it is asked, or a controller
            driven by noise.
        driven: the sampler of the loop's loader, or the accumulation.
        optimizer: whose learning rates are set; None leaves rates alone.
        coupling: ``plan`` (the plan's rate; the default where it has one), ``linear`` or
            ``square_root`` (each group's own rate times B over the first B, or its root), or
            ``none``. Without a plan's rate it must be said. An epoch's last batch keeps the rate
            where it is smaller than meant.
        reference_lr: the plan's rate at which each group has its own rate; by default the rate
            of the optimizer's first group, which then follows the plan exactly.
        sequence_length: tokens per example, where the plan counts tokens.
        noise: for a controller: a noise scale, or a function that gives one or None, such as
            ``meter.estimate``; called on every process.
        every: updates from one question to the controller to the next.

    Raises:
        InvalidInputError: an argument is out of its range, the unit does not fit, or a size of
            the plan cannot be made here.

    >>> from noisescale.train import ResizableBatchSampler
    >>> sampler = ResizableBatchSampler(100, batch_size=1, shuffle=False)
    >>> schedule = BatchSizeSchedule(lambda position: 2 if position < 4 else 8, sampler)
    >>> for batch in sampler:
    ...     if schedule.position < 20:
    ...         print(schedule.position, len(batch))
    ...     schedule.step()
    0 2
    2 2
    4 8
    12 8
    """

    def __init__(
        self,
        plan: PlannedSizes | SchedulePlan | Controller | Callable[[int], int],
        driven: Driven,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        coupling: str | None = None,
        reference_lr: float | None = None,
        sequence_length: int | None = None,
        noise: Any = None,
        every: int = 100,
    ) -> None:
        _refuse_others(driven, optimizer)
        self._plan = plan = _sizes_of(plan)
        self._driven, self._optimizer = driven, optimizer
        self.unit = str(getattr(plan, "unit", "examples"))
        self._per_example = _per_example(self.unit, sequence_length)
        self.updates = 0
        self._noise, self._every = noise, whole("every", every)
        self._begin()
        self._first_size = driven.nominal_batch_size
        self.coupling = _coupling(coupling, optimizer, plan)
        self._base_rates = [] if optimizer is None else _own_rates(optimizer)
        self._reference = self._reference_of(reference_lr)
        self._set_rates()

    @property
    def position(self) -> int:
        """Where the next step begins, in ``unit``, over all replicas."""
        return self._driven.position * self._per_example

    @property
    def batch_size(self) -> int:
        """Global batch size of the step at hand, in ``unit``, as the loop sees it."""
        return self._driven.batch_size * self._per_example

    @property
    def factor(self) -> float:
        """What every group's own learning rate is multiplied by now."""
        if self.coupling == "plan":
            assert isinstance(self._plan, PlannedSizes)
            rate = self._plan.lr_at(self.position)
            return 1.0 if rate is None else rate / self._reference
        ratio = self._driven.nominal_batch_size / self._first_size
        return {"none": 1.0, "linear": ratio, "square_root": math.sqrt(ratio)}[self.coupling]

    def step(self) -> None:
        """Count one optimizer step, and prepare the next: its size and its rates.

        Raises:
            InvalidInputError: there was no batch since the last call, a size of the plan cannot
                be made, or a scheduler of the optimizer's sets the same rates.
        """
        self._refuse_two_schedulers()
        self._driven.advance()
        self.updates += 1
        if isinstance(self._plan, Controller) and self.updates % self._every == 0:
            self._decide(self._plan)
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, the driven one's included; take it after step()."""
        plan_state = getattr(self._plan, "state_dict", None)
        return {
            "version": 1,
            "updates": self.updates,
            "unit": self.unit,
            "coupling": self.coupling,
            "first_size": self._first_size,
            "base_rates": list(self._base_rates),
            "reference_lr": self._reference,
            "plan": plan_state() if callable(plan_state) else None,
            "driven": self._driven.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where a state was taken, under any number of replicas.

        Load the optimizer's own state before or after it: rates are set from the position.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            InvalidInputError: it belongs to another unit, coupling or optimizer, or its batch
                size cannot be made here.
        """
        needed = ("updates", "first_size", "base_rates", "reference_lr", "plan", "driven")
        same = {"unit": self.unit, "coupling": self.coupling}
        take_state(state, "BatchSizeSchedule", (*needed, *same), same)
        if len(state["base_rates"]) != len(self._base_rates):
            raise InvalidInputError(
                f"state of an optimizer with {len(state['base_rates'])} groups",
                f"this one has {len(self._base_rates)}",
                "make the optimizer as it was",
            )
        self._driven.load_state_dict(state["driven"])
        if state["plan"] is not None and hasattr(self._plan, "load_state_dict"):
            self._plan.load_state_dict(state["plan"])
        self.updates, self._first_size = state["updates"], state["first_size"]
        self._base_rates, self._reference = list(state["base_rates"]), state["reference_lr"]
        self._set_rates()

    def __str__(self) -> str:
        """Say where the loop is, in one line.

        >>> from noisescale.train import ResizableBatchSampler
        >>> print(BatchSizeSchedule(lambda _: 8, ResizableBatchSampler(100, batch_size=1)))
        update 0 at 0 examples: global batch 8 examples
        """
        text = f"update {self.updates} at {self.position:,} {self.unit}"
        text += f": global batch {self.batch_size:,} {self.unit}"
        return text if self._optimizer is None else f"{text}, rates x {self.factor:.6g}"

    def _examples_at(self, position: int) -> int:
        assert not isinstance(self._plan, Controller)
        ask = self._plan.batch_size_at if isinstance(self._plan, PlannedSizes) else self._plan
        return self._in_examples(ask(position * self._per_example))

    def _in_examples(self, size: int) -> int:
        size = whole("batch_size", size)
        if size % self._per_example:
            below = size // self._per_example * self._per_example
            raise InvalidInputError(
                f"batch_size {size} {self.unit}",
                f"does not divide into sequences of {self._per_example} tokens",
                f"the nearest are {below or self._per_example} and {below + self._per_example}",
            )
        return size // self._per_example

    def _check_pieces(self) -> None:
        """Refuse sizes that cannot be made before the training begins, not hours into it."""
        for piece in getattr(self._plan, "pieces", ()):
            self._driven.check_batch_size(self._in_examples(piece.batch_size))

    def _begin(self) -> None:
        plan, driven = self._plan, self._driven
        if isinstance(plan, Controller) != (self._noise is not None):
            raise InvalidInputError(
                "a controller without noise" if self._noise is None else "noise for a fixed plan",
                "a controller and its noise scale go together",
                "give noise=meter.estimate" if self._noise is None else "leave noise out",
            )
        if not isinstance(plan, Controller):
            self._check_pieces()
            driven.follow(self._examples_at)
            return
        self._check_steps()
        if isinstance(driven, ResizableBatchSampler):
            driven.set_batch_size(self._in_examples(plan.batch_size), at=driven.position)
        else:
            driven.set_batch_size(self._in_examples(plan.batch_size))

    def _check_steps(self) -> None:
        sizes = getattr(self._plan, "sizes", None)
        if sizes is None:
            return
        step = sizes.bottom if sizes.powers else sizes.multiple_of
        self._driven.check_batch_size(self._in_examples(step))
        if not isinstance(self._driven, ResizableBatchSampler):
            return
        most = self._driven.dataset_size * self._per_example
        if sizes.top > most:
            raise InvalidInputError(
                f"a controller of sizes up to {sizes.top:,} {self.unit}",
                f"larger than the data, which hold {most:,}",
                f"give sizes=Sizes(largest={most}) or less",
            )

    def _decide(self, controller: Controller) -> None:
        controller.update(self._noise() if callable(self._noise) else self._noise)
        controller.batch_size = as_the_first_says(controller.batch_size)
        size = self._in_examples(controller.batch_size)
        if size != self._driven.last_asked:
            self._driven.set_batch_size(size)

    def _reference_of(self, given: float | None) -> float:
        reference = given if given is not None else (self._base_rates or [1.0])[0]
        if self.coupling == "plan" and not 0 < reference < math.inf:
            raise InvalidInputError(
                f"reference_lr {reference}",
                "a positive rate is required",
                "give the rate at which groups have their own, such as the plan's highest",
            )
        return reference

    def _refuse_two_schedulers(self) -> None:
        # What torch's schedulers leave on an optimizer; each would undo what the other has set.
        step = getattr(self._optimizer, "step", None)
        if self.coupling != "none" and getattr(step, "_wrapped_by_lr_sched", False):
            raise InvalidInputError(
                f"coupling {self.coupling!r} beside a learning-rate scheduler of the optimizer",
                "both set its rates, and one would undo the other",
                "put the rates into the plan, or take coupling='none' and step that scheduler by"
                " schedule.position",
            )

    def _set_rates(self) -> None:
        if self._optimizer is None or self.coupling == "none":
            return
        groups = len(self._optimizer.param_groups)
        if groups != len(self._base_rates):
            raise InvalidInputError(
                f"an optimizer with {groups} groups",
                f"it had {len(self._base_rates)} when the schedule was made",
                "add groups before making the schedule",
            )
        factor = self.factor
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor


def _sizes_of(plan: Any) -> PlannedSizes | Controller | Callable[[int], int]:
    found: Any = plan.schedule if isinstance(plan, SchedulePlan) else plan
    if not isinstance(found, PlannedSizes | Controller) and not callable(found):
        raise InvalidInputError(
            f"a plan of type {type(plan).__name__}",
            "a schedule record, a function from position to size or a controller is required",
            "read text by parse_schedule(text, unit=...), the command's --json by"
            " SchedulePlan.from_json",
        )
    return cast("PlannedSizes | Controller | Callable[[int], int]", found)


def _refuse_others(driven: Any, optimizer: Any) -> None:
    if not isinstance(driven, Driven):
        raise InvalidInputError(
            f"a schedule that drives a {type(driven).__name__}",
            "a ResizableBatchSampler or a GradientAccumulation is required",
            "hand over the sampler itself, and make the loader with batch_sampler=sampler",
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise InvalidInputError(
            f"optimizer of type {type(optimizer).__name__}",
            "a torch.optim.Optimizer is required",
            "hand over the optimizer itself, or None",
        )


def _own_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _per_example(unit: str, sequence_length: int | None) -> int:
    if unit != "tokens":
        if sequence_length is not None:
            raise InvalidInputError(
                f"sequence_length with a plan in {unit}",
                "only plans in tokens need it",
                "leave it out, or state the plan in tokens",
            )
        return 1
    if sequence_length is None:
        raise InvalidInputError(
            "a plan in tokens for batches of examples",
            "the length of a sequence is required",
            "give sequence_length",
        )
    return whole("sequence_length", sequence_length)


def _coupling(given: str | None, optimizer: torch.optim.Optimizer | None, plan: Any) -> str:
    has_rates = isinstance(plan, PlannedSizes) and plan.lr_at(0) is not None
    if given is None:
        if optimizer is not None and not has_rates:
            raise InvalidInputError(
                "an optimizer with a plan that says no rates",
                "how rates follow the batch size must be said",
                "give coupling='linear', 'square_root' or 'none'",
            )
        return "plan" if has_rates and optimizer is not None else "none"
    if given not in COUPLINGS:
        raise InvalidInputError(
            f"coupling {given!r}", "not a coupling", nearest(str(given), COUPLINGS)
        )
    if given == "plan" and not has_rates:
        raise InvalidInputError(
            "coupling 'plan'", "the plan says no rates", "choose linear, square_root or none"
        )
    if given != "none" and optimizer is None:
        raise InvalidInputError(
            f"coupling {given!r} without an optimizer", "rates are set in it", "give optimizer"
        )
    return given
