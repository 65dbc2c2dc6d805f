"""Keys of a recipe that cannot both be meant."""

from __future__ import annotations

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe

_VELOCITY = ("momentum", "dampening", "nesterov")
_FOREIGN = {
    "sgd": ("betas", "alpha", "eps"),
    "lars": ("betas", "alpha", "dampening"),
    "rmsprop": ("betas", "dampening", "nesterov"),
    "adam": (*_VELOCITY, "alpha"),
    "adamw": (*_VELOCITY, "alpha"),
    "lamb": (*_VELOCITY, "alpha"),
    "lion": (*_VELOCITY, "alpha", "eps"),
}
"""Keys that an optimizer does not have, and that would change how the recipe is converted."""

_TWINS = (("total_steps", "total_examples"), ("warmup_steps", "warmup_examples"))


_COUNTS = (
    "batch_size",
    "dataset_size",
    "total_steps",
    "total_examples",
    "warmup_steps",
    "warmup_examples",
    "evaluate_every",
)
LARGEST = 2**63
"""Largest count taken, above any real one; beyond it products overflow. (assumed)"""


def refuse_contradictions(recipe: Recipe, where: str) -> None:
    """Refuse a recipe whose keys contradict each other.

    Args:
        recipe: the recipe.
        where: how it is called in the error: the name of its file.

    Raises:
        InvalidInputError: a length in steps and its twin in examples disagree by a step or more,
            the batch is larger than the data, or the optimizer does not have a key; or a count
            is beyond all measure.
    """
    for name in _COUNTS:
        if (getattr(recipe, name) or 0) > LARGEST:
            raise InvalidInputError(
                f"{where}: {name}", f"at most {LARGEST} is required", f"correct {name}"
            )
    for steps, examples in _TWINS:
        _refuse_twins(recipe, steps, examples, where)
    for name in _FOREIGN.get(recipe.optimizer, ()):
        if getattr(recipe, name):
            raise InvalidInputError(
                f"{where}: optimizer {recipe.optimizer} and {name} {_text(getattr(recipe, name))}",
                f"they contradict each other: {recipe.optimizer} has no {name}",
                f"remove {name} or change optimizer",
            )
    if recipe.nesterov and (not recipe.momentum or recipe.dampening):
        raise InvalidInputError(
            f"{where}: nesterov and {'dampening' if recipe.dampening else 'momentum'}",
            "they contradict each other: nesterov needs a momentum and no dampening",
            "correct one of them",
        )
    size = recipe.dataset_size
    if recipe.unit != "tokens" and size is not None and recipe.batch_size > size:
        raise InvalidInputError(
            f"{where}: batch_size {recipe.batch_size} and dataset_size {size}",
            "they contradict each other: the batch is larger than the data",
            "correct one of them",
        )


def _refuse_twins(recipe: Recipe, steps: str, examples: str, where: str) -> None:
    count, total = getattr(recipe, steps), getattr(recipe, examples)
    if count is None or total is None:
        return
    stated = count * recipe.batch_size
    if abs(total - stated) >= recipe.batch_size:
        raise InvalidInputError(
            f"{where}: {steps} {count} and {examples} {total}",
            f"they contradict each other: {count} steps of {recipe.batch_size} are {stated}"
            f" {recipe.unit}",
            "remove one of them",
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
