"""A whole recipe at another batch size: the optimizer's rule first, then what goes with it.

Data of another size come before it: the recipe is restated for them at its own batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from noisescale.errors import InvalidInputError
from noisescale.plan.alternatives import alternatives
from noisescale.plan.batch_units import in_unit_of, noise_scale_of
from noisescale.plan.contradictions import refuse_contradictions
from noisescale.plan.data_size import (
    DataStage,
    data_conversion,
    data_notes,
    data_stage,
    data_warnings,
    joined,
)
from noisescale.plan.restated import Restatement, restate
from noisescale.records import Conversion, NoiseScale, Recipe
from noisescale.theory.per_example import shrinkage_ratio
from noisescale.theory.scaling import (
    RULES,
    Facts,
    Rule,
    named,
    recommended,
    scale_or_fall_back,
    why_recommended,
)

LARGEST_CHECKED = 32
"""Largest factor, up or down, over which our own conversions were checked. (measured)"""

RAISED = 4
"""Rise of the rate from which a warm-up is advised: without one Goyal et al. lost 1.1 points of
error at 32 times the batch. (assumed: they report no smaller factor)"""

SMALLEST_HALF = 2.0**-24
"""Smallest number above 0 in float16. (paper: IEEE 754)"""

SAME = "Nothing changes: the global batch is the same"


def convert(
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    new_dataset_size: int | None = None,
    rule: str | None = None,
    data_rule: str | None = None,
    noise_scale: float | NoiseScale | None = None,
    curvature: float | None = None,
    unit: str | None = None,
    pass_growth: float | None = None,
    where: str = "recipe",
) -> Conversion:
    """Restate a recipe at another global batch size, for data of another size, or both.

    The rate and the optimizer's averages follow a rule of
    :mod:`noisescale.theory.scaling`; weight decay, averages of the weights, clipping, warm-up,
    length, schedule and cadence follow their own.

    Args:
        recipe: at the old batch size.
        batch_size: the new global batch size: per optimizer step, over all devices and passes;
            the recipe's where only the data change.
        new_dataset_size: training examples of the new run; the recipe's ``dataset_size`` by
            default.
        rule: name of the rule by which the rate follows the batch; the recommended one by
            default.
        data_rule: name of the rule by which the rate follows the data: ``keep-rate`` (the
            default) or ``long-run``.
        noise_scale: B_n, the online B_simple of the training at the old batch size, in the
            recipe's unit; or the record of a measurement, in its own.
        curvature: upper quantile along the run of the largest eigenvalue of the Hessian (for
            Adam: of the preconditioned one); caps the rate at stability.
        unit: what ``batch_size`` counts; the recipe's unit by default.
        pass_growth: new over old examples of one device's pass, which BatchNorm averages over;
            by default it grows as the global batch does.
        where: how the recipe is called in errors: the name of its file.

    Returns:
        The new recipe, each change with rule, source and reason, what other rules say, and
        warnings. The same recipe where the global batch and the data are the same.

    Raises:
        InvalidInputError: the batch size cannot be used or is larger than the data, keys of the
            recipe contradict each other, there is no such rule, it is not for this optimizer,
            lacks a fact, or has no answer here; there is nothing to convert to, or the old
            data-set size is not known.

    >>> old = Recipe(lr=0.1, momentum=0.9, batch_size=256, total_steps=9000)
    >>> new = convert(old, batch_size=1024)
    >>> new.rule, new.recipe.lr, new.recipe.momentum, new.recipe.total_steps
    ('keep-momentum', 0.4, 0.9, 2250)
    >>> convert(old, batch_size=256).summary
    'Nothing changes: the global batch is the same (256 examples)'
    >>> more = convert(old.with_changes(dataset_size=50_000), new_dataset_size=100_000)
    >>> more.data.rule, more.recipe.lr, more.recipe.total_steps
    ('keep-rate', 0.1, 18000)
    >>> more.data.alternatives[0].rule, more.data.alternatives[0].values
    ('long-run', {'lr': 0.05})
    """
    refuse_contradictions(recipe, where)
    stage = data_stage(recipe, new_dataset_size, data_rule, where)
    here = recipe if stage is None else stage.recipe
    size = _new_size(here, batch_size, new_dataset_size, unit, where)
    facts = Facts(
        noise_scale=noise_scale_of(noise_scale, recipe, where),
        curvature=curvature,
        pass_growth=pass_growth,
    )
    asked = None if rule is None else named(rule, recipe.optimizer_kind)
    if size == recipe.batch_size:
        return _same(recipe) if stage is None else _other_data(stage)
    best = recommended(here, size, facts)
    restated = _restated(here, size, facts, asked, best)
    done = _converted(here, size, facts, restated, best, asked is not None)
    if stage is None:
        return done
    return _with_data(stage, done, lambda data: _restated(data, size, facts, asked, best).recipe)


def _new_size(
    recipe: Recipe,
    batch_size: int | None,
    new_dataset_size: int | None,
    unit: str | None,
    where: str,
) -> int:
    if batch_size is None and new_dataset_size is None:
        raise InvalidInputError(
            "neither batch_size nor new_dataset_size",
            "something to convert to is required",
            "give one of them, or both",
        )
    if batch_size is None:
        batch_size, unit = recipe.batch_size, None
    return in_unit_of(recipe, batch_size, unit, where)


def _converted(
    recipe: Recipe, size: int, facts: Facts, restated: Restatement, best: Rule, asked: bool
) -> Conversion:
    return Conversion(
        recipe=restated.recipe,
        original=recipe,
        old_batch_size=recipe.batch_size,
        new_batch_size=size,
        unit=recipe.unit,
        unchanged=False,
        summary=_sentence(_turn(recipe, size), recipe, restated.recipe),
        rule=restated.rule.name,
        recommended=best.name,
        why=_why(recipe, size, facts, restated.rule, best, asked),
        source=restated.rule.source,
        status=restated.rule.status,
        assumption=restated.rule.assumption,
        validity=restated.rule.validity,
        preserves=restated.rule.preserves,
        alternatives=alternatives(recipe, restated, facts, best),
        changes=restated.changes,
        kept=restated.kept,
        warnings=_warnings(recipe, restated, facts),
    )


def _with_data(stage: DataStage, done: Conversion, by: Callable[[Recipe], Recipe]) -> Conversion:
    """Put the data's stage before what the batch size did to the recipe for that data."""
    rows = joined(stage.rows, (*done.changes, *done.kept))
    turns = f"{_turn(stage.original, done.new_batch_size)} and {_data_turn(stage)}"
    return replace(
        done,
        original=stage.original,
        summary=_sentence(turns, stage.original, done.recipe),
        changes=tuple(row for row in rows if row.old != row.new),
        kept=tuple(row for row in rows if row.old == row.new),
        warnings=(*done.warnings, *data_warnings(stage)),
        notes=data_notes(stage, done.recipe),
        data=data_conversion(stage, done.recipe, by),
    )


def _other_data(stage: DataStage) -> Conversion:
    """Tell of data of another size at the same batch size."""
    old, new = stage.original, stage.recipe
    return Conversion(
        recipe=new,
        original=old,
        old_batch_size=old.batch_size,
        new_batch_size=old.batch_size,
        unit=old.unit,
        unchanged=False,
        summary=_sentence(_data_turn(stage), old, new),
        changes=tuple(row for row in stage.rows if row.old != row.new),
        kept=tuple(row for row in stage.rows if row.old == row.new),
        warnings=tuple(data_warnings(stage)),
        notes=data_notes(stage, new),
        data=data_conversion(stage, new, lambda data: data),
    )


def _restated(
    recipe: Recipe, size: int, facts: Facts, asked: Rule | None, best: Rule
) -> Restatement:
    if asked is not None:
        return restate(recipe, asked, asked.scale(recipe, size, facts), facts)
    rule, scaled = scale_or_fall_back(best.name, recipe, size, facts)
    return restate(recipe, rule, scaled, facts)


def _same(recipe: Recipe) -> Conversion:
    return Conversion(
        recipe=recipe,
        original=recipe,
        old_batch_size=recipe.batch_size,
        new_batch_size=recipe.batch_size,
        unit=recipe.unit,
        unchanged=True,
        summary=f"{SAME} ({recipe.batch_size:,} {recipe.unit})",
        warnings=_warnings_of_the_same(recipe),
    )


def _warnings_of_the_same(recipe: Recipe) -> tuple[str, ...]:
    if recipe.batchnorm_momentum is None:
        return ()
    return (
        "BatchNorm normalises what one device holds in one pass: if that part of the global batch"
        " changes, so does the training",
    )


def _turn(recipe: Recipe, new: int) -> str:
    old = recipe.batch_size
    turn = "grows" if new > old else "shrinks"
    return f"the global batch {turn} from {old:,} to {new:,} {recipe.unit} ({_times(old, new)})"


def _data_turn(stage: DataStage) -> str:
    old, new = stage.original.dataset_size, stage.recipe.dataset_size
    assert old is not None
    assert new is not None
    turn = "grow" if new > old else "shrink"
    return f"the data {turn} from {old:,} to {new:,} examples ({_times(old, new)})"


def _sentence(turns: str, old: Recipe, new: Recipe) -> str:
    rate = f"goes from {old.lr:.6g} to {new.lr:.6g}"
    if new.lr == old.lr:
        rate = f"stays {old.lr:.6g}"
    return f"{turns[0].upper()}{turns[1:]}; the rate {rate}"


def _times(old: int, new: int) -> str:
    return f"x{new / old:.4g}" if new > old else f"1/{old / new:.4g}"


def _why(recipe: Recipe, size: int, facts: Facts, used: Rule, best: Rule, asked: bool) -> str:
    reason = why_recommended(recipe, size, facts)
    if used.name == best.name:
        return f"recommended here: {reason}"
    if asked:
        return f"asked for; recommended here is {best.name}: {reason}"
    return f"in place of {best.name}, which has no answer here; that was recommended: {reason}"


def _warnings(recipe: Recipe, restated: Restatement, facts: Facts) -> tuple[str, ...]:
    new = restated.recipe
    found = [
        *restated.warnings,
        *_warnings_of_eps(recipe, new),
        *_warnings_of_facts(recipe, new, facts),
        *_warnings_of_defaults(recipe, new),
    ]
    factor = max(new.batch_size / recipe.batch_size, recipe.batch_size / new.batch_size)
    if factor > LARGEST_CHECKED:
        found.append(
            f"a factor of {factor:.4g} is more than the {LARGEST_CHECKED} over which our own"
            " conversions were checked: check the rate by short runs at a third and three times it"
        )
    # Without a length it is no whole training: an optimizer's group says nothing of warm-up.
    long = recipe.total_steps is not None or recipe.total_examples is not None
    cold = recipe.warmup_steps is None and recipe.warmup_examples is None
    if long and cold and new.lr >= RAISED * recipe.lr:
        found.append(
            f"the rate rises {new.lr / recipe.lr:.3g} times and the recipe has no warm-up: give it"
            " one (warmup_steps; Goyal et al. 2017, sec. 2.2, rise over five epochs)"
        )
    return tuple(dict.fromkeys(found))


def _warnings_of_facts(old: Recipe, new: Recipe, facts: Facts) -> list[str]:
    found = []
    if facts.curvature is not None and old.optimizer != "sgd":
        found.append(
            f"the curvature is not used: no stability limit of {old.optimizer} was seen to hold"
        )
    Bn = facts.noise_scale
    if Bn is not None and old.optimizer_kind not in RULES["noise-aware"].optimizers:
        found.append(
            f"the noise scale does not set the rate: no rule for {old.optimizer} that uses it was"
            " checked"
        )
    if Bn is not None and new.batch_size > max(Bn, old.batch_size):
        waste = (1 + new.batch_size / Bn) / (1 + old.batch_size / Bn)
        found.append(
            f"a batch of {new.batch_size:,} is {new.batch_size / Bn:.3g} times the noise scale: for"
            f" the same loss it may need about {waste:.2g} times the {old.unit} (McCandlish et al."
            " 2018, eq. 2.11; a noise scale tells the critical batch within a factor of several)"
        )
    return found


def _warnings_of_defaults(old: Recipe, new: Recipe) -> list[str]:
    """Say which keys the recipe leaves to defaults that would have to change."""
    found = []
    share = shrinkage_ratio(new, old)
    if (
        old.optimizer in ("adamw", "lamb")
        and old.weight_decay is None
        and not 0.999 < share < 1.001
    ):
        found.append(
            f"weight_decay is not in the recipe: where {old.optimizer} takes its usual default of"
            f" 0.01, the share of the weights that it takes per {old.unit.removesuffix('s')}"
            f" becomes {share:.3g} times the old one; write it into the recipe to have it converted"
        )
    if old.optimizer == "lars" and old.momentum is None:
        found.append(
            "momentum is not in the recipe: none is assumed, but implementations of LARS have 0.9"
            " by default; write what is trained with"
        )
    return found


def _warnings_of_eps(old: Recipe, new: Recipe) -> list[str]:
    if old.eps is None or new.eps is None or not new.eps < SMALLEST_HALF <= old.eps:
        return []
    return [
        f"eps {new.eps:.3g} is below {SMALLEST_HALF:.2g}, the smallest number of float16: an"
        " optimizer that keeps its averages in float16 loses it (float32 and bfloat16 do not)"
    ]
