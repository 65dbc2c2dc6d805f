"""Our own recipe files: flat keys with torch's names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.formats.already_scaled import is_scaling_key
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading
from noisescale.records import Recipe

NAMES = tuple(field.name for field in dataclasses.fields(Recipe))
_TWINS = (("total_steps", "total_examples"), ("warmup_steps", "warmup_examples"))
_ALIASES = {
    "learning_rate": "lr",
    "global_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "bs": "batch_size",
    "wd": "weight_decay",
    "max_grad_norm": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "max_steps": "total_steps",
    "steps": "total_steps",
    "ema": "ema_decay",
    "opt": "optimizer",
    "eval_steps": "evaluate_every",
    "beta1": "betas",
    "beta2": "betas",
}
"""Names by which others call our keys."""
_OWN_KEYS = {
    **dict.fromkeys(("sgd", "lars"), ("momentum", "dampening", "nesterov")),
    **dict.fromkeys(("adam", "adamw", "lamb", "lion"), ("betas",)),
    "rmsprop": ("momentum", "alpha"),
}
"""By optimizer, the keys that not every one has."""


def read(keys: Keys, world_size: int | None, dataset_size: int | None) -> Reading:
    """Read a flat recipe.

    Raises:
        InvalidInputError: a key is unknown, a value cannot be used, or keys contradict each
            other.
    """
    for key in keys.names():
        if key not in NAMES and not is_scaling_key(key):
            remedy = f"did you mean {_ALIASES[key]}?" if key in _ALIASES else nearest(key, NAMES)
            raise InvalidInputError(f"{keys.path}: key {key!r}", "not a recipe key", remedy)
    values = {key: value for key in NAMES if (value := _value(keys, key)) is not None}
    _check_optimizer(keys, values)
    _check_lengths(keys, values)
    if dataset_size is not None and values.setdefault("dataset_size", dataset_size) != dataset_size:
        raise keys.refused(
            "dataset_size", f"dataset_size {dataset_size} was given", "give one of them"
        )
    return Reading(
        values=values,
        places={key: ((key,),) for key in NAMES},
        world_size=world_size,
    )


def _value(keys: Keys, key: str) -> Any:
    """Return a key's value in its type; a length of 0 means that there is none."""
    if key in ("optimizer", "unit"):
        return keys.text(key)
    if key == "schedule":
        return _schedule(keys)
    if key == "betas":
        return keys.pair(key)
    if key == "nesterov":
        return keys.flag(key)
    if key in ("momentum", "alpha", "ema_decay", "batchnorm_momentum"):
        return keys.fraction(key)
    if key in ("warmup_steps", "warmup_examples"):
        return keys.count(key, least=0) or None
    hint = str(Recipe.__annotations__[key])
    if hint.startswith("int"):
        return keys.count(key)
    return keys.number(key, positive=key in ("lr", "clip_norm", "trust_coefficient"))


def _schedule(keys: Keys) -> dict[str, Any] | None:
    if isinstance(word := keys.value("schedule"), str):
        raise keys.refused("schedule", "a table is required", f'write {{kind = "{word}"}}')
    table = keys.table("schedule")
    if table is not None and not isinstance(table.get("kind"), str):
        raise keys.refused("schedule", "its kind is required", 'add kind = "cosine"')
    if table is not None and not _is_finite(table):
        raise keys.refused("schedule", "finite numbers are required", "change it")
    return table


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_optimizer(keys: Keys, values: dict[str, Any]) -> None:
    """Refuse keys that the optimizer does not have."""
    optimizer = values.get("optimizer", "sgd")
    every = {key for names in _OWN_KEYS.values() for key in names}
    for key in sorted(every - set(_OWN_KEYS.get(optimizer, every))):
        if values.get(key):
            raise keys.contradiction(
                ["optimizer", key], f"{optimizer} has no {key}", f"remove {key} or change optimizer"
            )
    if values.get("nesterov") and (not values.get("momentum") or values.get("dampening")):
        raise keys.contradiction(
            ["nesterov", "momentum", "dampening"],
            "nesterov needs a momentum and no dampening",
            "correct one of them",
        )


def _check_lengths(keys: Keys, values: dict[str, Any]) -> None:
    """Refuse lengths in steps and in examples that disagree by a step or more."""
    batch = values.get("batch_size")
    for steps, examples in _TWINS:
        both = steps in values and examples in values and batch
        if both and abs(values[examples] - values[steps] * batch) >= batch:
            raise keys.contradiction(
                [steps, examples],
                f"they disagree: at batch size {batch}, {values[steps]} steps are"
                f" {values[steps] * batch}, not {values[examples]}",
                "remove one",
            )
    for total, warmup in (("total_steps", "warmup_steps"), ("total_examples", "warmup_examples")):
        if values.get(warmup, 0) > values.get(total, math.inf):
            raise keys.contradiction(
                [warmup, total], "the warm-up is longer than the training", "correct one"
            )
