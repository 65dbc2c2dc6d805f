"""How a recipe follows the number of training examples N, at one batch size.

Two statements about the rate, and what goes with either: the noise that a pass over the data
brings, lr N/((1 - m) B), confines the weights late in training; early in training the data are not
yet known, and the best rate does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Change, Recipe
from noisescale.theory.scaling.companions import COUPLED, Companion
from noisescale.theory.scaling.lengths import LARGEST_SHARE
from noisescale.theory.scaling.limits import temperature_for_data
from noisescale.theory.scaling.rule import shown
from noisescale.theory.schedule_counts import COUNTS, recounted

KINDS = ("sgd", "momentum", "adam", "rmsprop")
"""Kinds of optimizer for which either statement is sound. LARS, LAMB and Lion set the length of
a step whatever the gradient: no temperature of theirs was derived or measured."""

LARGEST_CHECKED = 8
"""Largest factor of N over which the best rate was seen not to change. (measured: digits)"""


@dataclass(frozen=True, kw_only=True)
class DataRule:
    """How the rate follows the number of training examples.

    Attributes:
        name: as ``--data-rule`` takes it.
        power: the rate goes with (N/N')^power.
        source: paper with section, or the derivation.
        status: ``paper``, ``measured`` or ``assumed``.
        assumption: what must hold for the rule to preserve what it says.
        validity: where it holds, and where it was seen to fail.
        preserves: what stays the same.
        spoken: by kind of optimizer, other words for some of the texts above.
    """

    name: str
    power: int
    source: str
    status: str
    assumption: str
    validity: str
    preserves: str
    spoken: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def of(self, kind: str) -> DataRule:
        """Return the rule in the words that are meant for one kind of optimizer.

        Args:
            kind: :attr:`~noisescale.records.Recipe.optimizer_kind`.
        """
        words: dict[str, Any] = dict(self.spoken.get(kind, {}))
        return replace(self, **words)

    def rate(self, recipe: Recipe, new_size: int) -> float:
        """Return the rate for training data of another size.

        Args:
            recipe: with its ``dataset_size``.
            new_size: N', training examples.
        """
        if not self.power or recipe.dataset_size == new_size:
            return recipe.lr
        # The rate goes as the temperature: batch size and averages stay.
        return temperature_for_data(tau=recipe.lr, old_size=_size(recipe), new_size=new_size)


_OF_ADAM = {
    "source": "derived from Smith and Le 2018 (arXiv:1710.06451), sec. 5, and Malladi et al. 2022",
    "status": "assumed",
    "preserves": "noise that a pass over the data brings: lr N/sqrt(B)",
    "assumption": (
        "late in training the noise of the gradients, which also dominates the averages of their"
        " squares, confines the weights, as sharply as N examples determine them"
    ),
}
KEEP_RATE = DataRule(
    name="keep-rate",
    power=0,
    source="McCandlish et al. 2018 (arXiv:1812.06162) and Shallue et al. 2019 (arXiv:1811.03600)"
    " on the batch size; our own tuning on digits",
    status="measured",
    assumption="the best rate is set early in training, before the data repeat",
    validity=(
        "early in training, and where the rate falls; on digits, over a factor of 8 in the data, it"
        " cost at most 1.5 times the least loss after as many epochs, at constant rates too"
    ),
    preserves="learning rate, temperature",
)
LONG_RUN = DataRule(
    name="long-run",
    power=1,
    source="Smith and Le 2018 (arXiv:1710.06451), sec. 5",
    status="paper",
    assumption=(
        "late in training the noise confines the weights, as sharply as N examples determine them"
    ),
    validity=(
        "late in training at a rate that does not fall; contested: McCandlish et al. 2018 and"
        " Shallue et al. 2019 saw no dependence on N, and on digits it cost 1.4 to 13 times the"
        " least loss"
    ),
    preserves="noise that a pass over the data brings: lr N/((1 - m) B)",
    spoken={"adam": _OF_ADAM, "rmsprop": _OF_ADAM},
)
DATA_RULES: Mapping[str, DataRule] = MappingProxyType(
    {rule.name: rule for rule in (KEEP_RATE, LONG_RUN)}
)
"""The recommended first."""

DECOUPLED_PER_EPOCH = Companion(
    rule="weight-decay-per-epoch",
    source="Wang and Aitchison 2024 (arXiv:2405.13698), sec. 4",
    status="paper",
    validity=(
        "as many epochs as before; language models in one pass: Bergsma et al. 2025 saw the best"
        " share per pass grow about as the root of the data"
    ),
)
COUPLED_PER_EPOCH = Companion(
    rule="weight-decay-per-epoch",
    source="by analogy with AdamW: Wang and Aitchison 2024 (arXiv:2405.13698), sec. 4",
    status="assumed",
    validity=(
        "as many epochs as before; without a normalisation layer the decay is part of the loss"
    ),
)
_EPOCHS = Companion(
    rule="length-in-epochs",
    source="arithmetic",
    status="assumed",
    validity="where the training is to see each example as often as before",
)
_WARM_UP = Companion(
    rule="warm-up-in-examples",
    source="Goyal et al. 2017 (arXiv:1706.02677), sec. 2.2",
    status="assumed",
    validity="early in training, which does not know how many examples there are",
)


def data_rule(name: str | None, recipe: Recipe) -> DataRule:
    """Return the rule that a user named, the recommended one by default.

    Args:
        name: of the rule.
        recipe: its optimizer is used.

    Raises:
        InvalidInputError: there is no such rule, or none for this optimizer.
    """
    if recipe.optimizer_kind not in KINDS:
        raise InvalidInputError(
            f"new dataset size with {recipe.optimizer}",
            "how a rate follows the data is known for sgd, adam, adamw and rmsprop only",
            "convert the batch size alone",
        )
    if name is None:
        return KEEP_RATE.of(recipe.optimizer_kind)
    if name not in DATA_RULES:
        raise InvalidInputError(f"data rule {name!r}", "not a rule", nearest(name, DATA_RULES))
    return DATA_RULES[name].of(recipe.optimizer_kind)


def for_data(recipe: Recipe, new_size: int, rule: DataRule) -> tuple[Change, ...]:
    """Return what follows the number of training examples.

    The rate by the rule; the share of the weights that decay takes in an epoch stays, wd' =
    wd lr N/(lr' N'); length, schedule and cadence stay in epochs, the warm-up in examples.

    Args:
        recipe: with its ``dataset_size`` N.
        new_size: N', training examples.
        rule: of the rate, in the words of the optimizer.

    Returns:
        One change for each key that the recipe has; ``old == new`` where it stays.

    Source: the rules' own.

    >>> old = Recipe(lr=0.1, batch_size=10, weight_decay=0.01, dataset_size=100, total_steps=50)
    >>> [(row.name, row.new) for row in for_data(old, 200, LONG_RUN)][1:]
    [('lr', 0.05), ('weight_decay', 0.01), ('total_steps', 100)]
    """
    ratio = Fraction(new_size, _size(recipe))  # counts of steps are scaled without rounding errors
    new = recipe.with_changes(dataset_size=new_size, lr=rule.rate(recipe, new_size))
    return (
        _given(recipe, new_size),
        _rate(recipe, new, rule),
        *_weight_decay(recipe, new),
        *_averages(recipe),
        *_warmup(recipe, ratio),
        *_length(recipe, ratio),
        *_schedule(recipe, ratio),
        *_cadence(recipe, ratio),
    )


def epochs(recipe: Recipe) -> float | None:
    """Return how often a recipe's training sees each example; None where that is not known.

    Args:
        recipe: its length, batch size, unit and ``dataset_size`` are used.

    >>> epochs(Recipe(lr=0.1, batch_size=10, total_steps=50, dataset_size=100))
    5.0
    """
    seen = recipe.total_examples
    if seen is None and recipe.total_steps is not None:
        seen = recipe.total_steps * recipe.batch_size
    length = recipe.sequence_length if recipe.unit == "tokens" else 1
    if seen is None or recipe.dataset_size is None or length is None:
        return None
    return seen / (recipe.dataset_size * length)


def _size(recipe: Recipe) -> int:
    assert recipe.dataset_size is not None
    return recipe.dataset_size


def _given(recipe: Recipe, new_size: int) -> Change:
    return Change(
        name="dataset_size", old=recipe.dataset_size, new=new_size, rule="given",
        source="asked for", validity="always", status="given", why="training examples",
    )  # fmt: skip


def _rate(old: Recipe, new: Recipe, rule: DataRule) -> Change:
    why = "kept: early in training the best rate does not depend on how many examples there are"
    if rule.power:
        why = f"the rate times {shown(new.lr / old.lr)} = {shown(new.lr)}: {rule.preserves} stays"
    return Change(
        name="lr", old=old.lr, new=new.lr, rule=rule.name, source=rule.source,
        validity=rule.validity, why=why, status=rule.status,
    )  # fmt: skip


def _weight_decay(old: Recipe, new: Recipe) -> tuple[Change, ...]:
    if old.weight_decay is None:
        return ()
    # The order keeps a rate that falls as the data grow at exactly the old decay.
    value = old.weight_decay * (old.lr * _size(old)) / (new.lr * _size(new))
    if math.isclose(value, old.weight_decay, rel_tol=1e-12):
        value = old.weight_decay
    rule = COUPLED_PER_EPOCH if old.optimizer in COUPLED else DECOUPLED_PER_EPOCH
    why = "the share of the weights that decay takes in a pass over the data stays"
    return (rule.change("weight_decay", old.weight_decay, value, why),)


def _averages(recipe: Recipe) -> tuple[Change, ...]:
    """Say of the average of the weights that it stays: nobody measured otherwise."""
    if recipe.ema_decay is None:
        return ()
    return (
        Change(
            name="ema_decay", old=recipe.ema_decay, new=recipe.ema_decay, rule="keep",
            source="assumed", validity="an average that is short beside the training",
            why="kept: its half-life stays in examples", status="assumed",
        ),
    )  # fmt: skip


def _warmup(recipe: Recipe, ratio: Fraction) -> tuple[Change, ...]:
    """Keep the warm-up, but for training that becomes so short that it would fill it."""
    found = []
    for count in ("steps", "examples"):
        old, total = getattr(recipe, f"warmup_{count}"), _total(recipe, count)
        if old is None:
            continue
        new, why = old, f"kept: it is early in training, as long in {recipe.unit} as before"
        if ratio < 1 and total is not None and old > LARGEST_SHARE * total * ratio:
            new = max(1, round(max(old * ratio, LARGEST_SHARE * total * ratio)))
            why = f"as long as before would be more than {LARGEST_SHARE:.0%} of the training"
            why += " that is left; no larger a share than before"
        found.append(_WARM_UP.change(f"warmup_{count}", old, new, why))
    return tuple(found)


def _total(recipe: Recipe, count: str) -> float | None:
    """Return the length of the training in steps or examples, whichever key has it."""
    steps, examples = recipe.total_steps, recipe.total_examples
    if count == "steps":
        return steps if steps is not None or examples is None else examples / recipe.batch_size
    return examples if examples is not None or steps is None else steps * recipe.batch_size


def _length(recipe: Recipe, ratio: Fraction) -> tuple[Change, ...]:
    passes = epochs(recipe)
    told = "" if passes is None else f", {shown(passes)}"
    return tuple(
        _EPOCHS.change(name, old, max(1, round(old * ratio)), f"as many epochs as before{told}")
        for name in ("total_steps", "total_examples")
        if (old := getattr(recipe, name)) is not None
    )


def _schedule(recipe: Recipe, ratio: Fraction) -> tuple[Change, ...]:
    table = recounted(recipe.schedule, lambda steps: max(round(steps * ratio), min(1, steps)))
    if recipe.schedule is None or table is None:
        return ()
    fall, room = table.get("decay_steps"), _room(recipe, ratio)
    if fall is not None and room is not None and fall > room >= 1:
        table["decay_steps"] = room
    counts = any(key in table for key in COUNTS)
    return (
        Change(
            name="schedule", old=recipe.schedule, new=table, rule="schedule-in-epochs",
            source="arithmetic", status="assumed", validity=_EPOCHS.validity,
            why="its counts come after as many epochs as before" if counts
            else "it counts no steps",
        ),
    )  # fmt: skip


def _room(recipe: Recipe, ratio: Fraction) -> int | None:
    """Return the steps after the warm-up of the new length, for a fall that fitted before."""
    total, fall = _total(recipe, "steps"), (recipe.schedule or {}).get("decay_steps")
    if total is None or fall is None:
        return None
    warm = {row.name: row for row in _warmup(recipe, ratio)}
    row, size = warm.get("warmup_steps"), 1
    if row is None and "warmup_examples" in warm:
        row, size = warm["warmup_examples"], recipe.batch_size
    before, after = (0.0, 0.0) if row is None else (row.old / size, row.new / size)
    if fall > total - before:
        return None
    return max(1, round(total * ratio)) - round(after)


def _cadence(recipe: Recipe, ratio: Fraction) -> tuple[Change, ...]:
    if recipe.evaluate_every is None:
        return ()
    new = max(1, round(recipe.evaluate_every * ratio))
    why = "as often in an epoch as before"
    return (
        Change(
            name="evaluate_every", old=recipe.evaluate_every, new=new, rule="cadence-in-epochs",
            source="arithmetic", status="assumed", validity="always", why=why,
        ),
    )  # fmt: skip
