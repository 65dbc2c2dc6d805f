"""timm's args.yaml: the arguments of its training script.

Names, defaults and the scaling of ``lr_base``: timm 1.0, ``train.py``.
"""

from __future__ import annotations

import math
from typing import Any

from noisescale.errors import nearest
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading, Split, at

_OPTIMIZERS = {
    "sgd": ("sgd", True),
    "nesterov": ("sgd", True),
    "momentum": ("sgd", False),
    "adam": ("adam", None),
    "adamw": ("adamw", None),
    "lamb": ("lamb", None),
    "lars": ("lars", False),
    "lion": ("lion", None),
}
"""timm's name: ours, and whether its momentum is Nesterov's (plain ``sgd`` has it)."""
_DEFAULTS = {
    "opt": "sgd",
    "momentum": 0.9,
    "weight_decay": 2e-5,
    "batch_size": 128,
    "lr_base": 0.1,
    "lr_base_size": 256,
}
_SCHEDULES = {"cosine": "cosine", "none": "constant", "constant": "constant"}


def read(keys: Keys, world_size: int | None, dataset_size: int | None) -> Reading:
    """Read timm's training arguments.

    Raises:
        InvalidInputError: a value cannot be used, keys contradict each other, or the optimizer
            is not one that is known.
    """
    keys.refuse_foreign({"learning_rate": "lr", "optimizer": "opt"}, "timm")
    assumed: list[str] = []
    optimizer, nesterov = _optimizer(keys, assumed)
    split, devices = _split(keys, world_size, assumed)
    batch_size = split.micro * split.accumulation * split.world_size
    rate, scaled = _rate(keys, batch_size, assumed)
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": None if scaled else rate,
        "batch_size": batch_size,
        "weight_decay": _or_default(keys, "weight_decay", assumed),
        "clip_norm": _clip(keys),
        "batchnorm_momentum": keys.fraction("bn_momentum"),
        "ema_decay": _ema(keys),
        "dataset_size": dataset_size,
    }
    if nesterov is not None:
        values["momentum"] = _fraction_or_default(keys, "momentum", assumed)
        values["nesterov"] = nesterov or None
    else:
        values |= _moments(keys, optimizer)
    implied = _lengths(keys, batch_size, dataset_size, values)
    if scaled:
        implied["lr"] = rate
    if assumed:
        keys.note(f"not in the file, so timm's defaults: {', '.join(assumed)}.")
    places = {
        "lr": at("lr"),
        "batch_size": at("batch_size", "grad_accum_steps"),
        "betas": at("opt_betas"),
        "eps": at("opt_eps"),
        "momentum": at("momentum"),
        "weight_decay": at("weight_decay"),
        "clip_norm": at("clip_grad"),
        "batchnorm_momentum": at("bn_momentum"),
        "ema_decay": at("model_ema_decay"),
    }
    return Reading(
        values=values,
        places=places,
        implied=implied,
        split=split,
        world_size=devices,
        already_scaled=scaled,
    )


def _or_default(keys: Keys, key: str, assumed: list[str]) -> Any:
    """Return a number, timm's default where it is absent, which is then noted."""
    found = keys.number(key)
    if found is not None:
        return found
    assumed.append(f"{key} {_DEFAULTS[key]}")
    return _DEFAULTS[key]


def _fraction_or_default(keys: Keys, key: str, assumed: list[str]) -> Any:
    found = keys.fraction(key)
    return _or_default(keys, key, assumed) if found is None else found


def _optimizer(keys: Keys, assumed: list[str]) -> tuple[str, bool | None]:
    name = keys.text("opt")
    if name is None:
        name = "sgd"
        assumed.append("opt sgd")
    if name.lower() not in _OPTIMIZERS:
        raise keys.refused(
            "opt", "an optimizer whose rule is known is required", nearest(name, _OPTIMIZERS)
        )
    if name.lower() == "sgd":
        keys.note("by opt sgd timm means Nesterov's momentum.")
    return _OPTIMIZERS[name.lower()]


def _moments(keys: Keys, optimizer: str) -> dict[str, Any]:
    """Return betas and eps; timm's defaults where they are not written."""
    betas = keys.pair("opt_betas") or (0.9, 0.99 if optimizer == "lion" else 0.999)
    if optimizer == "lion":
        return {"betas": betas}
    eps = keys.number("opt_eps")
    return {"betas": betas, "eps": eps or (1e-6 if optimizer == "lamb" else 1e-8)}


def _split(keys: Keys, world_size: int | None, assumed: list[str]) -> tuple[Split, int | None]:
    micro = keys.count("batch_size")
    if micro is None:
        micro = 128
        assumed.append("batch_size 128")
    said = keys.count("world_size")
    if said is not None and world_size is not None and said != world_size:
        raise keys.refused(
            "world_size", f"world size {world_size} was given", "correct one of them"
        )
    devices = said or world_size
    if devices is None:
        keys.note(
            "the number of devices is not in the file (batch_size is that of one): 1 is assumed;"
            " give the world size if there are more."
        )
    split = Split(
        micro=micro,
        accumulation=keys.count("grad_accum_steps") or 1,
        world_size=devices or 1,
        micro_at=("batch_size",),
        accumulation_at=("grad_accum_steps",),
    )
    return split, devices


def _rate(keys: Keys, batch_size: int, assumed: list[str]) -> tuple[float | None, str | None]:
    """Return the rate that is trained with; where timm computes it, a sentence that says so."""
    if rate := keys.number("lr"):
        if keys.has("lr_base"):
            keys.note("lr is given, so timm does not use lr_base.")
        return rate, None
    base = keys.number("lr_base", positive=True) or _or_default(keys, "lr_base", assumed)
    size = keys.count("lr_base_size") or _or_default(keys, "lr_base_size", assumed)
    scale = (keys.text("lr_base_scale") or "").lower()
    if scale not in ("", "linear", "sqrt"):
        raise keys.refused("lr_base_scale", "linear or sqrt is required", "correct it")
    name = (keys.text("opt") or "sgd").lower()
    rule = scale or ("sqrt" if "ada" in name or "lamb" in name else "linear")
    ratio = batch_size / size
    rate = base * (math.sqrt(ratio) if rule == "sqrt" else ratio)
    word = "square-root" if rule == "sqrt" else "linear"
    return rate, (
        f"lr_base is {base:g} for lr_base_size {size}: timm scales it to the global batch size by"
        f" the {word} rule, here to {rate:g}."
    )


def _clip(keys: Keys) -> float | None:
    mode = keys.text("clip_mode") or "norm"
    if mode != "norm" and keys.has("clip_grad"):
        keys.note(f"clip_mode {mode}: clip_grad has no rule here.")
        return None
    return keys.number("clip_grad") or None


def _ema(keys: Keys) -> float | None:
    """Return the decay of the averaged weights, where the average is switched on."""
    if not keys.flag("model_ema"):
        return None
    decay = keys.fraction("model_ema_decay")
    return 0.9998 if decay is None else decay


def _lengths(
    keys: Keys, batch_size: int, dataset_size: int | None, values: dict[str, Any]
) -> dict[str, Any]:
    """Return the steps that follow from epochs; timm counts everything in epochs."""
    sched = (keys.text("sched") or "cosine").lower()
    if sched in _SCHEDULES:
        values["schedule"] = {"kind": _SCHEDULES[sched]}
    else:
        keys.note(
            f"the schedule, sched {sched}, counts epochs, which do not change with the batch size."
        )
    epochs = _number_or(keys.number("epochs", positive=True), 300)
    warmup = _number_or(keys.number("warmup_epochs"), 5)
    if dataset_size is None:
        keys.note(
            f"in epochs, which do not change with the batch size: epochs {epochs:g}, warmup_epochs"
            f" {warmup:g}; lengths in steps need the data-set size."
        )
        return {}
    each = max(1, dataset_size // batch_size)
    implied: dict[str, Any] = {"total_steps": keys.steps("epochs", epochs * each)}
    if warmup:
        implied["warmup_steps"] = keys.steps("warmup_epochs", warmup * each)
    return implied


def _number_or(number: float | None, default: float) -> float:
    return default if number is None else number
