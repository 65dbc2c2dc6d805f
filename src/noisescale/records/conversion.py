"""A recipe restated at another batch size, each change with its rule, source and reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from noisescale.records.recipe import Recipe
from noisescale.records.serial import Record

_text: Callable[[Record], str] = repr


def print_by(text: Callable[[Record], str]) -> None:
    """Say how conversions are printed: the reports, which do it, are a layer above the records.

    Args:
        text: from a conversion to what ``str`` of it is.
    """
    global _text
    _text = text


@dataclass(frozen=True, kw_only=True)
class Change(Record):
    """One key of a recipe: what it was, what it is now, by which rule.

    Attributes:
        name: key of the recipe.
        old: value before; None where the key was absent.
        new: value after; equal to ``old`` where the key stays as it is.
        rule: name of what decides the value.
        source: paper and section, or ``arithmetic``.
        validity: where the rule holds.
        why: one sentence.
        status: how sure the rule is: ``paper``, ``measured``, ``assumed``, or ``given``.
        key: what the file that the recipe was read from calls it, where that is another name.
    """

    name: str
    old: Any
    new: Any
    rule: str
    source: str
    validity: str
    why: str
    status: str = "paper"
    key: str | None = None

    def __post_init__(self) -> None:
        # JSON has no tuples: betas read back would not equal what was written.
        for name in ("old", "new"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True, kw_only=True)
class Alternative(Record):
    """What another rule says, where rules differ.

    Attributes:
        rule: its name, as ``convert`` takes it.
        values: keys of the recipe that it sets otherwise than the conversion, with its values;
            empty where it says the same or where ``needs`` are not met.
        source: paper and section.
        status: ``paper``, ``measured`` or ``assumed``.
        validity: where the rule holds.
        preserves: what of the training stays the same.
        when: when it is to be preferred, or why it has no answer.
        needs: what must be given for its values to be known: ``noise_scale``, ``curvature``.
    """

    rule: str
    values: dict[str, Any]
    source: str
    status: str
    validity: str
    preserves: str
    when: str
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.values.items()
        }
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, kw_only=True)
class DataConversion(Record):
    """How a recipe follows training data of another size.

    Attributes:
        old_dataset_size: training examples before.
        new_dataset_size: training examples after.
        rule: name of the rule by which the rate follows the data.
        recommended: name of the rule that is recommended.
        why: why this rule.
        source: of the rule: paper and section.
        status: ``paper``, ``measured`` or ``assumed``.
        assumption: what the rule takes for granted.
        validity: where the rule holds.
        preserves: what of the training stays the same.
        alternatives: what the other rule says of the whole recipe.
    """

    old_dataset_size: int
    new_dataset_size: int
    rule: str
    recommended: str
    why: str
    source: str
    status: str
    assumption: str
    validity: str
    preserves: str
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversion(Record):
    """A whole recipe at another batch size, for data of another size, or both.

    Attributes:
        recipe: the new recipe.
        original: the old one.
        old_batch_size: global batch size before, in ``unit``.
        new_batch_size: global batch size after, in ``unit``.
        unit: what both count: ``examples``, ``sequences`` or ``tokens``.
        unchanged: whether the global batch and the data, and so the recipe, are the same.
        summary: the answer in one sentence.
        rule: name of the rule by which the rate follows the batch; None where that is the same.
        recommended: name of the rule that is recommended here; None where the batch is the same.
        why: why this rule.
        source: of the rule: paper and section.
        status: ``paper``, ``measured`` or ``assumed``.
        assumption: what the rule takes for granted.
        validity: where the rule holds.
        preserves: what of the training stays the same.
        changes: keys whose value changes.
        kept: keys that a rule looked at and left alone, with the reason.
        alternatives: what other rules say, the recommended one first if another was asked for.
        warnings: what may go wrong.
        notes: what the reader of the recipe's file assumed, or did not understand.
        data: how it follows data of another size; None where that was not asked or is the same.
    """

    recipe: Recipe
    original: Recipe
    old_batch_size: int
    new_batch_size: int
    unit: str
    unchanged: bool
    summary: str
    rule: str | None = None
    recommended: str | None = None
    why: str = ""
    source: str = ""
    status: str = ""
    assumption: str = ""
    validity: str = ""
    preserves: str = ""
    changes: tuple[Change, ...] = ()
    kept: tuple[Change, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    data: DataConversion | None = None

    def __str__(self) -> str:
        """Return what ``noisescale convert`` prints."""
        return _text(self)


@dataclass(frozen=True, kw_only=True)
class GroupConversion(Record):
    """One parameter group of a live optimizer.

    Attributes:
        index: of the group in ``param_groups``.
        name: the group's own name, where it has one.
        changes: keys of the group whose value changes, ``initial_lr`` and the like among them.
        conversion: of the recipe that the group states; its ``lr`` is the peak of the schedule
            where a scheduler has noted one, not the rate of the moment.
    """

    index: int
    name: str | None
    changes: tuple[Change, ...]
    conversion: Conversion


@dataclass(frozen=True, kw_only=True)
class LiveConversion(Record):
    """A live optimizer, and its scheduler, at another batch size.

    Attributes:
        optimizer: name of its class.
        scheduler: name of its class; None without one.
        scheduler_per: what the scheduler counts: ``step`` or ``epoch``.
        old_batch_size: global batch size before, in ``unit``.
        new_batch_size: global batch size after, in ``unit``.
        unit: what both count.
        unchanged: whether the global batch, and so everything, is the same.
        groups: one for each parameter group.
        scheduler_changes: attributes of the scheduler whose value changes.
        not_converted: what was found and left alone, by name, with what to do about it.
        warnings: what may go wrong.
    """

    optimizer: str
    scheduler: str | None
    scheduler_per: str | None
    old_batch_size: int
    new_batch_size: int
    unit: str
    unchanged: bool
    groups: tuple[GroupConversion, ...]
    scheduler_changes: tuple[Change, ...] = ()
    not_converted: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it as ``noisescale convert`` prints a recipe's."""
        return _text(self)
