"""Schedulers of a live optimizer at another batch size: their rates, and clocks that count steps.

Known by the name of their class and the attributes that torch.optim.lr_scheduler gives them;
torch itself is never imported.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_WHY = "counts optimizer steps, and a step holds another number of examples now"
_CLOCKS = {
    "StepLR": ("step_size",),
    "CosineAnnealingLR": ("T_max",),
    "LinearLR": ("total_iters",),
    "ConstantLR": ("total_iters",),
    "PolynomialLR": ("total_iters",),
}
"""Attributes that count steps, of schedulers that have no others."""

_NEEDED = _CLOCKS | {
    "MultiStepLR": ("milestones",),
    "ExponentialLR": ("gamma",),
    "OneCycleLR": ("total_steps", "_schedule_phases"),
    "CosineAnnealingWarmRestarts": ("T_0", "T_i", "T_cur", "T_mult"),
    "LambdaLR": ("lr_lambdas",),
}
"""A class of a known name without these is another class."""

_KEYWORDS = (
    "num_warmup_steps",
    "num_training_steps",
    "num_stable_steps",
    "num_decay_steps",
    "timescale",
)
"""Arguments in steps of the functions that transformers hands to LambdaLR."""


@dataclass(frozen=True)
class Edit:
    """One attribute of a scheduler, and how the new value is written."""

    name: str
    old: Any
    new: Any
    why: str
    write: Callable[[], None]


@dataclass
class SchedulerEdits:
    """What of a scheduler changes, and what nobody can change for the user.

    Attributes:
        edits: in the order in which they are written.
        left: sentences that name what was not converted.
        settle: what is done last: the rate that follows from the new position.
    """

    edits: list[Edit] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    settle: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Restated:
    """What changes for schedulers.

    Attributes:
        growth: new batch size over the old one.
        factors: new rate over the old one, by parameter group.
        per_step: whether the scheduler is stepped once per optimizer step, and not per epoch.
    """

    growth: float
    factors: Sequence[float]
    per_step: bool

    def steps(self, count: float, least: int = 1) -> int:
        """Return the whole steps at the new batch size that hold as many examples."""
        return max(least, math.floor(count / self.growth + 0.5))


def inside(scheduler: Any) -> Any:
    """Return the scheduler inside one that accelerate and others wrap around it."""
    for _ in range(8):
        if hasattr(scheduler, "base_lrs") or not hasattr(scheduler, "scheduler"):
            break
        scheduler = scheduler.scheduler
    return scheduler


def scheduler_edits(
    scheduler: Any, restated: Restated, name: str = "", position: int | None = None
) -> SchedulerEdits:
    """Find what changes in a scheduler; nothing is written yet.

    Args:
        scheduler: of torch.optim.lr_scheduler, or of a class of such a name and attributes.
        restated: what changes.
        name: how it is called where one scheduler holds others; its class's name by default.
        position: steps done at the new batch size, where the holder says so.

    Returns:
        The edits, and what was not converted.
    """
    kind = type(scheduler).__name__
    name = name or kind
    found = SchedulerEdits()
    if kind in ("SequentialLR", "ChainedScheduler"):
        _holder(found, scheduler, restated, name)
        return found
    _rates(found, scheduler, restated, name)
    if not restated.per_step:
        return found
    if _clock(found, scheduler, restated, kind, name):
        _position(found, scheduler, restated, name, position)
    return found


def _rates(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> None:
    """Scale the rates that the scheduler keeps for itself."""
    if not hasattr(scheduler, "base_lrs") and not hasattr(scheduler, "min_lrs"):
        found.left.append(
            f"{name}: it is not known here where it keeps its rates; if it keeps any, build it anew"
        )
    for key in ("base_lrs", "max_lrs", "min_lrs", "_last_lr"):
        rates = getattr(scheduler, key, None)
        if isinstance(rates, list) and len(rates) == len(restated.factors):
            new = [rate * f for rate, f in zip(rates, restated.factors, strict=True)]
            _set(found, scheduler, key, new, name, "follows the optimizer's rate")
    low = getattr(scheduler, "eta_min", 0)
    if not low:
        return
    if one_factor(restated.factors):
        _set(found, scheduler, "eta_min", low * restated.factors[0], name, "follows the rate")
    else:
        found.left.append(
            f"{name}.eta_min {low:g} holds for all groups, whose rates change by different factors"
        )


def _clock(found: SchedulerEdits, scheduler: Any, restated: Restated, kind: str, name: str) -> bool:
    """Convert what counts steps, by the name of the class; False where it stays."""
    special = {
        "MultiStepLR": _milestones,
        "ExponentialLR": _exponential,
        "OneCycleLR": _one_cycle,
        "CosineAnnealingWarmRestarts": _restarts,
        "LambdaLR": _lambdas,
    }
    if not all(hasattr(scheduler, key) for key in _NEEDED.get(kind, ("?",))):
        found.left.append(
            f"{name}: its clock is not known here; if it counts steps, build it anew with its"
            f" steps divided by {restated.growth:g}"
        )
        return False
    if kind in special:
        return special[kind](found, scheduler, restated, name)
    for key in _CLOCKS[kind]:
        _set(found, scheduler, key, restated.steps(getattr(scheduler, key)), name, _WHY)
    return True


def _milestones(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> bool:
    # A Counter: milestones that rounding puts on one step decay the rate there as often.
    moved: Counter[int] = Counter()
    for step, times in scheduler.milestones.items():
        moved[restated.steps(step)] += times
    _set(found, scheduler, "milestones", moved, name, _WHY)
    return True


def _exponential(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> bool:
    gamma = scheduler.gamma**restated.growth
    _set(found, scheduler, "gamma", gamma, name, "decays per step; the same decay per example")
    return True


def _one_cycle(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> bool:
    total = restated.steps(scheduler.total_steps)
    share = total / scheduler.total_steps
    phases = [
        {**phase, "end_step": (phase["end_step"] + 1) * share - 1}
        for phase in scheduler._schedule_phases
    ]
    # The last phase ends with the run, to the step: torch refuses any step beyond it.
    phases[-1]["end_step"] = total - 1
    _set(found, scheduler, "total_steps", total, name, _WHY)
    _set(found, scheduler, "_schedule_phases", phases, name, _WHY)
    if getattr(scheduler, "cycle_momentum", False):
        found.left.append(
            f"{name} cycles the momentum (or beta1) between bounds of its own, which stay as"
            " they are: a converted momentum is overwritten at its next step"
        )
    return True


def _restarts(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> bool:
    first = restated.steps(scheduler.T_0)
    cycle = scheduler.T_i // scheduler.T_0 * first
    _set(found, scheduler, "T_0", first, name, _WHY)
    _set(found, scheduler, "T_i", cycle, name, _WHY)
    position = max(scheduler.T_cur, 0) * cycle / scheduler.T_i
    _set(found, scheduler, "T_cur", position, name, _WHY)
    return True


def _lambdas(found: SchedulerEdits, scheduler: Any, restated: Restated, name: str) -> bool:
    """Restate functions whose arguments say what they count; others stay, and are named."""
    functions: list[Any] = []
    old: dict[str, int] = {}
    new: dict[str, int] = {}
    for function in scheduler.lr_lambdas:
        inner = function.func if isinstance(function, functools.partial) else None
        known = str(getattr(inner, "__module__", "")).startswith("transformers.")
        keywords = {
            key: restated.steps(value, least=0)
            for key, value in (function.keywords if known else {}).items()
            if key in _KEYWORDS and isinstance(value, int) and value > 0
        }
        if not keywords:
            found.left.append(
                f"{name} multiplies the rate by a function of the step, which stays as it is:"
                f" give it one of the step times {restated.growth:g}"
            )
            return False
        old |= {key: function.keywords[key] for key in keywords}
        new |= keywords
        functions.append(functools.partial(function, **keywords))
    write = functools.partial(setattr, scheduler, "lr_lambdas", functions)
    found.edits.append(Edit(f"{name}.lr_lambdas", old, new, _WHY, write))
    return True


def _position(
    found: SchedulerEdits, scheduler: Any, restated: Restated, name: str, position: int | None
) -> None:
    """Convert the steps done; torch's rates follow from it where they are not on the grid."""
    done = getattr(scheduler, "last_epoch", 0)
    if not isinstance(done, int) or done <= 0:
        return
    new = restated.steps(done, least=0) if position is None else position
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    if new * restated.growth != done and closed is not None:
        groups = scheduler.optimizer.param_groups
        if all(_close(rate, g["lr"]) for rate, g in zip(closed(), groups, strict=True)):
            found.settle.append(lambda: _write_rates(scheduler, closed()))
        else:
            found.left.append(
                f"{name} was {done} steps into its run, between two steps of the new batch size,"
                " at a rate that something else changes too: check the rate after its next step"
            )
    _set(found, scheduler, "last_epoch", new, name, _WHY)


def _holder(found: SchedulerEdits, holder: Any, restated: Restated, name: str) -> None:
    """Convert a scheduler made of others."""
    positions = {}
    if type(holder).__name__ == "SequentialLR" and restated.per_step:
        positions = _sequence(found, holder, restated, name)
    for index, scheduler in enumerate(holder._schedulers):
        part = f"{name}[{index}] {type(scheduler).__name__}"
        inner = scheduler_edits(scheduler, restated, part, positions.get(index))
        found.edits += inner.edits
        found.left += inner.left
        if not positions or index in positions:
            found.settle += inner.settle
    if isinstance(getattr(holder, "_last_lr", None), list):
        new = [rate * f for rate, f in zip(holder._last_lr, restated.factors, strict=True)]
        _set(found, holder, "_last_lr", new, name, "follows the optimizer's rate")


def _sequence(found: SchedulerEdits, holder: Any, restated: Restated, name: str) -> dict[int, int]:
    """Convert when each scheduler starts; return the index of the one at work and its steps."""
    moved: list[int] = []
    for milestone in holder._milestones:
        # Each scheduler keeps a step at least: one that is skipped would never be started.
        moved.append(restated.steps(milestone, least=(moved[-1] if moved else 0) + 1))
    _set(found, holder, "_milestones", moved, name, _WHY)
    active = bisect.bisect_right(holder._milestones, holder.last_epoch)
    start = [0, *moved][active]
    done = max(restated.steps(holder.last_epoch, least=0), start)
    if active < len(moved):
        done = min(done, moved[active] - 1)
    _set(found, holder, "last_epoch", done, name, _WHY)
    return {active: done - start}


def _set(found: SchedulerEdits, owner: Any, key: str, new: Any, name: str, why: str) -> None:
    old = getattr(owner, key)
    if old != new:
        write = functools.partial(setattr, owner, key, new)
        found.edits.append(Edit(f"{name}.{key}", old, new, why, write))


def _write_rates(scheduler: Any, rates: Sequence[Any]) -> None:
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        write_rate(group, "lr", float(rate))
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def one_factor(factors: Sequence[float]) -> bool:
    """Whether all rates change alike; factors found by division differ in their last digits."""
    return math.isclose(min(factors), max(factors), rel_tol=1e-9)


def write_rate(group: dict[str, Any], key: str, value: float) -> None:
    """Write a number where a group holds a number, or into the tensor that it holds."""
    held = group[key]
    if hasattr(held, "fill_"):
        held.fill_(value)  # graphs captured with this tensor read it again
    else:
        group[key] = value


def _close(one: Any, other: Any) -> bool:
    return math.isclose(float(one), float(other), rel_tol=1e-6, abs_tol=1e-15)
