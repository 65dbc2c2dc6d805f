"""A live torch optimizer and its scheduler at another batch size, without importing torch.

First a record of what would change, then :func:`apply` writes it in place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.plan.convert import convert
from noisescale.plan.live_scheduler import (
    Restated,
    SchedulerEdits,
    inside,
    one_factor,
    scheduler_edits,
    write_rate,
)
from noisescale.records import Change, Conversion, GroupConversion, LiveConversion, Recipe
from noisescale.records.recipe import OPTIMIZERS

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Rates that torch's optimizers and schedulers keep in a group; all go by the same factor."""

_SETTINGS = (
    "momentum",
    "dampening",
    "betas",
    "alpha",
    "eps",
    "weight_decay",
    "trust_coefficient",
)
_COUNTS = ("step", "epoch")


def convert_live(
    optimizer: Any,
    *,
    old_batch_size: int,
    batch_size: int,
    scheduler: Any = None,
    scheduler_per: str | None = None,
    kind: str | None = None,
    rule: str | None = None,
    noise_scale: float | None = None,
    curvature: float | None = None,
    unit: str = "examples",
    dataset_size: int | None = None,
) -> LiveConversion:
    """Say what changes in an optimizer and its scheduler; nothing is changed yet.

    Every parameter group is converted by itself, at the rate from which its schedule starts or
    where it peaks, not at the rate of the moment.

    Args:
        optimizer: of torch.optim or alike: ``param_groups`` with torch's keys.
        old_batch_size: global batch size that its settings are for, in ``unit``.
        batch_size: global batch size that they shall be for, in ``unit``.
        scheduler: of torch.optim.lr_scheduler, driving this optimizer.
        scheduler_per: ``step`` or ``epoch``: how often the scheduler is stepped, which it does
            not know itself; required with ``scheduler``.
        kind: what the optimizer acts like (``sgd``, ``adam``, ...), where its class is not known.
        rule: name of the rule; the recommended one by default.
        noise_scale: see :func:`noisescale.plan.convert.convert`.
        curvature: see :func:`noisescale.plan.convert.convert`.
        unit: what batch sizes count.
        dataset_size: training examples.

    Returns:
        The changes by group and of the scheduler, and what was not converted.

    Raises:
        InvalidInputError: no optimizer, an unknown one, or what ``convert`` refuses.
    """
    real, scheduler = _unwrapped(optimizer), inside(scheduler)
    named = kind if kind is not None else _kind_of(real)
    shared: dict[str, Any] = {"batch_size": old_batch_size, "unit": unit}
    if dataset_size is not None:
        shared["dataset_size"] = dataset_size
    asked: dict[str, Any] = {"rule": rule, "noise_scale": noise_scale, "curvature": curvature}
    groups = tuple(
        _group(index, group, convert(_recipe(named, group, shared), batch_size=batch_size, **asked))
        for index, group in enumerate(_groups(real))
    )
    first = groups[0].conversion
    edits = _scheduler_edits(scheduler, scheduler_per, groups)
    return LiveConversion(
        optimizer=type(real).__name__,
        scheduler=None if scheduler is None else type(scheduler).__name__,
        scheduler_per=scheduler_per,
        old_batch_size=first.old_batch_size,
        new_batch_size=first.new_batch_size,
        unit=unit,
        unchanged=first.unchanged,
        groups=groups,
        scheduler_changes=_shown(edits),
        not_converted=tuple(edits.left),
        warnings=_warnings(real, scheduler, groups),
    )


def apply(conversion: LiveConversion, optimizer: Any, scheduler: Any = None) -> None:
    """Write a conversion into the optimizer, and into the scheduler, in place.

    Args:
        conversion: what :func:`convert_live` said of them.
        optimizer: the optimizer it was asked about.
        scheduler: the scheduler it was asked about.

    Raises:
        InvalidInputError: they are others, or have changed since (a conversion applied before
            is such a change): nothing is written then.
    """
    real, scheduler = _unwrapped(optimizer), inside(scheduler)
    groups = _groups(real)
    _refuse_others(conversion, groups, scheduler)
    edits = _scheduler_edits(scheduler, conversion.scheduler_per, conversion.groups)
    if _shown(edits) != conversion.scheduler_changes:
        raise _changed("scheduler")
    for group, planned in zip(groups, conversion.groups, strict=True):
        for change in planned.changes:
            if not _same(_plain(group[change.name]), change.old):
                raise _changed(f"{change.name} of parameter group {planned.index}")
    for group, planned in zip(groups, conversion.groups, strict=True):
        for change in planned.changes:
            _write(group, change)
    for edit in edits.edits:
        edit.write()
    for settle in edits.settle:
        settle()


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside those that accelerate and others wrap around it."""
    seen = 0
    while _named(optimizer) is None and hasattr(optimizer, "optimizer") and seen < 8:
        optimizer, seen = optimizer.optimizer, seen + 1
    return optimizer


def _named(optimizer: Any) -> str | None:
    for cls in type(optimizer).__mro__:
        if cls.__name__.lower() in OPTIMIZERS:
            return cls.__name__.lower()
    return None


def _kind_of(optimizer: Any) -> str:
    _groups(optimizer)
    named = _named(optimizer)
    if named is None:
        name = type(optimizer).__name__
        raise InvalidInputError(
            f"optimizer {name}",
            "an optimizer that noisescale knows is required",
            f"{nearest(name.lower(), OPTIMIZERS).rstrip('?')}; give kind= if it acts like one of"
            " them",
        )
    if named == "adam" and any(g.get("decoupled_weight_decay") for g in optimizer.param_groups):
        return "adamw"
    return named


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not all(isinstance(group, Mapping) and "lr" in group for group in groups):
        raise InvalidInputError(
            f"optimizer {type(optimizer).__name__}",
            "param_groups with a rate in each are required",
            "give an optimizer of torch.optim, or one like it",
        )
    return list(groups)


def _recipe(kind: str, group: Mapping[str, Any], shared: Mapping[str, Any]) -> Recipe:
    """State a group as a recipe; what is 0 acts like what is absent, but is known to be 0."""
    values = {name: _plain(group[name]) for name in (*_SETTINGS, "nesterov") if name in group}
    given = {
        name: value
        for name, value in values.items()
        if value or (value is not None and name in ("momentum", "weight_decay"))
    }
    return Recipe(optimizer=kind, lr=_peak(group) or 1.0, **given, **shared)


def _peak(group: Mapping[str, Any]) -> float:
    """Return the rate that the schedule is built on; 0 for a group that is held still."""
    for name in ("max_lr", "initial_lr", "lr"):
        if name in group:
            return float(group[name])
    return 0.0


def _group(index: int, group: Mapping[str, Any], conversion: Conversion) -> GroupConversion:
    factor = conversion.recipe.lr / conversion.original.lr
    rate = next((c for c in conversion.changes if c.name == "lr"), None)
    changes = []
    for name in _RATES:
        if name in group and rate is not None and float(group[name]):
            old = float(group[name])
            # The peak exactly as the recipe has it, the others in proportion.
            new = conversion.recipe.lr if old == conversion.original.lr else old * factor
            changes.append(_like(rate, name, old, new))
    for change in conversion.changes:
        if change.name in _SETTINGS and change.name in group:
            changes.append(change)
    title = group.get("name")
    return GroupConversion(
        index=index,
        name=title if isinstance(title, str) else None,
        changes=tuple(changes),
        conversion=conversion,
    )


def _like(change: Change, name: str, old: Any, new: Any) -> Change:
    return Change(
        name=name, old=old, new=new, rule=change.rule, source=change.source,
        validity=change.validity, why=change.why, status=change.status,
    )  # fmt: skip


def _scheduler_edits(
    scheduler: Any, per: str | None, groups: tuple[GroupConversion, ...]
) -> SchedulerEdits:
    if scheduler is None:
        return SchedulerEdits()
    if per not in _COUNTS:
        raise InvalidInputError(
            f"scheduler_per {per!r}",
            f"how often {type(scheduler).__name__} is stepped is required, it does not know itself",
            "give scheduler_per='step' or scheduler_per='epoch'",
        )
    first = groups[0].conversion
    if first.unchanged:
        return SchedulerEdits()
    restated = Restated(
        growth=first.new_batch_size / first.old_batch_size,
        factors=[g.conversion.recipe.lr / g.conversion.original.lr for g in groups],
        per_step=per == "step",
    )
    return scheduler_edits(scheduler, restated)


def _shown(edits: SchedulerEdits) -> tuple[Change, ...]:
    return tuple(
        Change(
            name=edit.name, old=_listed(edit.old), new=_listed(edit.new), rule="same examples",
            source="arithmetic", validity="always", why=edit.why, status="paper",
        )
        for edit in edits.edits
    )  # fmt: skip


def _listed(value: Any) -> Any:
    """Give a value a form that JSON has."""
    if isinstance(value, Counter):
        return tuple(sorted(value.elements()))
    if isinstance(value, list | tuple):
        return tuple(_listed(item) for item in value)
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return float(value) if hasattr(value, "item") else value


def _warnings(
    optimizer: Any, scheduler: Any, groups: tuple[GroupConversion, ...]
) -> tuple[str, ...]:
    if groups[0].conversion.unchanged:
        return ()
    found = [text for group in groups for text in group.conversion.warnings]
    if scheduler is None and any("initial_lr" in group for group in optimizer.param_groups):
        found.append(
            "a scheduler drives this optimizer and was not given: it would write its old rates"
            " again; give scheduler="
        )
    factors = [g.conversion.recipe.lr / g.conversion.original.lr for g in groups]
    if not one_factor(factors):
        found.append(
            "the rates of the parameter groups change by different factors, "
            f"{min(factors):.3g} to {max(factors):.3g}: their ratios are no longer yours"
        )
    if getattr(optimizer, "state", None):
        found.append(
            "the optimizer's averages (momentum, second moments) were gathered at the old batch"
            " size and are left as they are; they adapt over their own memory"
        )
    return tuple(dict.fromkeys(found))


def _refuse_others(
    conversion: LiveConversion, groups: list[dict[str, Any]], scheduler: Any
) -> None:
    if len(groups) != len(conversion.groups):
        raise InvalidInputError(
            f"optimizer with {len(groups)} parameter groups",
            f"the conversion is of one with {len(conversion.groups)}",
            "convert this optimizer and apply that",
        )
    name = None if scheduler is None else type(scheduler).__name__
    if name != conversion.scheduler:
        raise InvalidInputError(
            f"scheduler {name}",
            f"the conversion is of {conversion.scheduler}",
            "give the scheduler that was converted",
        )


def _changed(what: str) -> InvalidInputError:
    return InvalidInputError(
        what,
        "it is no longer what the conversion saw (was it applied before?)",
        "convert anew from the batch size that the settings are for now",
    )


def _write(group: dict[str, Any], change: Change) -> None:
    held = group[change.name]
    if isinstance(held, tuple | list) and any(hasattr(item, "fill_") for item in held):
        for item, value in zip(held, change.new, strict=True):
            item.fill_(value)
    elif isinstance(change.new, tuple):
        group[change.name] = type(held)(change.new)
    else:
        write_rate(group, change.name, change.new)


def _plain(value: Any) -> Any:
    """Return a number for a tensor that holds one."""
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    return float(value) if hasattr(value, "fill_") else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    # A recipe leaves out what the group spells as 0: plain SGD's momentum.
    one, other = one or 0.0, other or 0.0
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=0.0)
