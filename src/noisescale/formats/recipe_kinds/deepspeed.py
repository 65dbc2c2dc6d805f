"""DeepSpeed's JSON configuration.

train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x devices; any
one of them may be left out.
"""

from __future__ import annotations

from typing import Any

from noisescale.errors import nearest
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading, Split, at

_TOTAL = "train_batch_size"
_MICRO = "train_micro_batch_size_per_gpu"
_PASSES = "gradient_accumulation_steps"
_OPTIMIZERS = ("adam", "adamw", "sgd", "lamb", "lion", "rmsprop")
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_WARMUP_MAX = "scheduler.params.warmup_max_lr"
_WARMUP_MAX_DEFAULT = 0.001
_WARMUP_STEPS_DEFAULT = 1000


def read(keys: Keys, world_size: int | None, dataset_size: int | None) -> Reading:
    """Read a DeepSpeed configuration.

    Raises:
        InvalidInputError: a value cannot be used or is ``auto``, keys contradict each other, or
            the optimizer or scheduler is not one that is known.
    """
    _refuse_auto(keys)
    optimizer = _optimizer(keys)
    batch_size, split, devices = _batch(keys, world_size)
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "batch_size": batch_size,
        "weight_decay": keys.number("optimizer.params.weight_decay"),
        "clip_norm": keys.number("gradient_clipping") or None,
        "dataset_size": dataset_size,
    }
    if optimizer in ("sgd", "rmsprop"):
        values["alpha"] = keys.fraction("optimizer.params.alpha")
        values["eps"] = keys.number("optimizer.params.eps")
        values["momentum"] = keys.fraction("optimizer.params.momentum")
        values["nesterov"] = keys.flag("optimizer.params.nesterov")
    elif optimizer is not None:
        values |= _moments(keys, optimizer)
    values |= _rate(keys) | _lengths(keys)
    places = _places(keys)
    if split is None:
        places["batch_size"] = at(_TOTAL)
    return Reading(values=values, places=places, split=split, world_size=devices)


def _places(keys: Keys) -> dict[str, Any]:
    """Return where things stand; the warm-up's scheduler keeps a second copy of the rate."""
    params = ("momentum", "nesterov", "betas", "alpha", "eps", "weight_decay")
    rates = ("optimizer.params.lr", _WARMUP_MAX) if _sets_rate(keys) else ("optimizer.params.lr",)
    return {
        **{name: at(f"optimizer.params.{name}") for name in params},
        "lr": at(*rates),
        "clip_norm": at("gradient_clipping"),
        "batch_size": at(_TOTAL, _MICRO, _PASSES),
        "total_steps": at("scheduler.params.total_num_steps"),
        "warmup_steps": at("scheduler.params.warmup_num_steps"),
    }


def _refuse_auto(keys: Keys) -> None:
    names = [_TOTAL, _MICRO, _PASSES, "gradient_clipping"]
    for above in ("optimizer.params", "scheduler.params"):
        names += [f"{above}.{name}" for name in keys.table(above) or ()]
    for name in names:
        if keys.value(name) == "auto":
            raise keys.refused(
                name,
                "Transformers fills it in when the training starts",
                "convert the TrainingArguments instead, or write the number",
            )


def _optimizer(keys: Keys) -> str | None:
    if not keys.has("optimizer"):
        return None
    keys.table("optimizer")
    keys.table("optimizer.params")
    name = keys.text("optimizer.type") or ""
    if name.lower() not in _OPTIMIZERS:
        raise keys.refused(
            "optimizer.type",
            "an optimizer whose rule is known is required",
            nearest(name, ("Adam", "AdamW", "SGD", "Lamb", "Lion", "RMSprop")),
        )
    decoupled = _flag_or_true(keys, "optimizer.params.adam_w_mode")
    if name.lower() == "adam" and decoupled and not keys.flag("optimizer.params.torch_adam"):
        keys.note("optimizer.type Adam: DeepSpeed decouples its weight decay (adam_w_mode): AdamW.")
        return "adamw"
    return name.lower()


def _flag_or_true(keys: Keys, key: str) -> bool:
    said = keys.flag(key)
    return True if said is None else said


def _batch(keys: Keys, world_size: int | None) -> tuple[int | None, Split | None, int | None]:
    """Return the global batch, its parts, and the number of devices as far as it is known."""
    total, micro, passes = (keys.count(name) for name in (_TOTAL, _MICRO, _PASSES))
    said = [name for name in (_TOTAL, _MICRO, _PASSES) if keys.has(name)]
    if total and micro and passes and world_size is None:
        world_size = _divided(keys, said, total, micro * passes, "micro-batches times passes")
    if total and not micro and passes:
        micro = _divided(keys, said, total, passes * (world_size or 1), "passes times devices")
    if total is not None and micro is None:
        _divided(keys, said, total, world_size or 1, f"{world_size or 1} devices")
        return total, None, world_size
    if micro is None:
        return None, None, world_size
    devices = world_size or 1
    if passes is None:
        passes = _divided(keys, said, total, micro * devices, "micro-batch") if total else 1
    if total is not None and total != micro * passes * devices:
        raise keys.contradiction(
            said,
            f"{_TOTAL} must be {micro} x {passes} x {devices} devices = {micro * passes * devices}",
            "correct one of them or the world size",
        )
    if world_size is None and total is None:
        keys.note(
            "the number of devices is not in the file: 1 is assumed; give the world size if"
            " there are more."
        )
    split = Split(
        micro=micro,
        accumulation=passes,
        world_size=devices,
        micro_at=(_MICRO,) if keys.has(_MICRO) else None,
        accumulation_at=(_PASSES,) if keys.has(_PASSES) or total is None else None,
        total_at=(_TOTAL,) if total is not None else None,
    )
    return micro * passes * devices, split, world_size


def _divided(keys: Keys, said: list[str], total: int, parts: int, what: str) -> int:
    if total % parts:
        raise keys.contradiction(
            said, f"{_TOTAL} must be a multiple of {parts} ({what})", "correct one of them"
        )
    return total // parts


def _sets_rate(keys: Keys) -> bool:
    return keys.value("scheduler.type") in ("WarmupLR", "WarmupDecayLR")


def _rate(keys: Keys) -> dict[str, Any]:
    """Return the rate that is trained with: the scheduler's where that sets it."""
    rate = keys.number("optimizer.params.lr", positive=True)
    if not _sets_rate(keys):
        return {"lr": rate}
    highest = keys.number(_WARMUP_MAX, positive=True)
    used = _WARMUP_MAX_DEFAULT if highest is None else highest
    if rate is not None and rate != used:
        meant = "" if highest is not None else f" (DeepSpeed's default {_WARMUP_MAX_DEFAULT})"
        raise keys.contradiction(
            ["optimizer.params.lr", _WARMUP_MAX],
            f"the scheduler sets the rate to warmup_max_lr{meant}",
            "write the same rate in both",
        )
    return {"lr": used}


def _lengths(keys: Keys) -> dict[str, Any]:
    name = keys.text("scheduler.type") if keys.has("scheduler") else None
    if name is None:
        return {}
    if name not in _SCHEDULES:
        raise keys.refused(
            "scheduler.type",
            "it sets the rate by keys that are not read",
            f"use one of {', '.join(_SCHEDULES)}",
        )
    if keys.value("scheduler.params.warmup_type") is None and name != "WarmupCosineLR":
        keys.note("scheduler.params.warmup_type: DeepSpeed's default is log, not linear.")
    warmup = keys.count("scheduler.params.warmup_num_steps", least=0)
    if warmup is None:
        keys.note(f"scheduler: DeepSpeed's default warm-up of {_WARMUP_STEPS_DEFAULT} steps.")
        warmup = _WARMUP_STEPS_DEFAULT
    return {
        "schedule": {"kind": _SCHEDULES[name]},
        "warmup_steps": warmup or None,
        "total_steps": keys.count("scheduler.params.total_num_steps"),
    }


def _moments(keys: Keys, optimizer: str) -> dict[str, Any]:
    """Return betas and eps; the optimizer's defaults where they are not written."""
    found: dict[str, Any] = {"betas": (0.9, 0.99 if optimizer == "lion" else 0.999)}
    if optimizer != "lion":
        found["eps"] = 1e-8
    absent = [name for name in found if not keys.has(f"optimizer.params.{name}")]
    if absent:
        texts = ", ".join(f"{name} {found[name]}" for name in absent)
        keys.note(f"not in the file, so the optimizer's defaults: {texts}.")
    said = {
        "betas": keys.pair("optimizer.params.betas"),
        "eps": keys.number("optimizer.params.eps"),
    }
    return found | {name: value for name, value in said.items() if value is not None}
