"""Transformers' TrainingArguments, as JSON or YAML.

Names and defaults: transformers 5.23 and 4, ``training_args.py``.
"""

from __future__ import annotations

import math
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.formats.document import Path_
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading, Split, at

_ADAMW = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "paged_adamw",
    "paged_adamw_32bit",
)
_LION = ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit")
_DEFAULTS = {
    "optim": "adamw_torch",
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
}
_MOMENTS: dict[str, dict[str, float]] = {
    "adamw": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "lion": {"adam_beta1": 0.9, "adam_beta2": 0.999},
    "sgd": {},
    "rmsprop": {},
}
"""By optimizer, the keys of its averages, with their defaults."""
_KINDS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ADAMS = ("betas", "eps")
_PLACES = {
    "lr": at("learning_rate"),
    "betas": at("adam_beta1", "adam_beta2"),
    "eps": at("adam_epsilon"),
    "weight_decay": at("weight_decay"),
    "clip_norm": at("max_grad_norm"),
    "total_steps": at("max_steps"),
    "warmup_steps": at("warmup_steps"),
    "batch_size": at("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def read(keys: Keys, world_size: int | None, dataset_size: int | None) -> Reading:
    """Read training arguments.

    Raises:
        InvalidInputError: a value cannot be used, or the optimizer is not one that is known.
    """
    keys.refuse_foreign(_foreign(keys), "Transformers")
    optimizer = _optimizer(keys)
    assumed = {**_DEFAULTS, **_MOMENTS[optimizer]}
    split = _split(keys, world_size)
    batch_size = split.micro * split.accumulation * split.world_size
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": _or(keys.number("learning_rate", positive=True), assumed["learning_rate"]),
        "batch_size": batch_size,
        "weight_decay": _or(keys.number("weight_decay"), assumed["weight_decay"]),
        "clip_norm": _or(keys.number("max_grad_norm"), assumed["max_grad_norm"]) or None,
        "dataset_size": dataset_size,
        "evaluate_every": _every(keys),
        "schedule": _schedule(keys),
    }
    moments = {key: _or(keys.fraction(key), value) for key, value in _MOMENTS[optimizer].items()}
    if moments:
        values["betas"] = (moments["adam_beta1"], moments["adam_beta2"])
        values["eps"] = moments.get("adam_epsilon")
    else:
        values |= _arguments(keys)
    said, implied = _lengths(keys, batch_size, dataset_size)
    values |= said
    _note_defaults(keys, assumed)
    _note_more(keys)
    places = {name: place for name, place in _PLACES.items() if moments or name not in _ADAMS}
    places |= {"evaluate_every": _cadence(keys)}
    return Reading(
        values=values, places=places, implied=implied, split=split, world_size=world_size
    )


def _foreign(keys: Keys) -> dict[str, str]:
    """Return names of other tools, as Axolotl's, with Transformers' own."""
    new, old = "per_device_train_batch_size", "per_gpu_train_batch_size"
    batch = old if keys.has(old) else new
    sizes = ("batch_size", "micro_batch_size", "train_batch_size", "global_batch_size")
    return {"lr": "learning_rate", **dict.fromkeys(sizes, batch)}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _optimizer(keys: Keys) -> str:
    if keys.flag("adafactor"):
        raise keys.refused("adafactor", "Adafactor has no rule here", "use adamw_torch or sgd")
    name = (keys.text("optim") or "adamw_torch").lower().removeprefix("optimizernames.")
    if name in ("sgd", "rmsprop"):
        return name
    if keys.has("optim_args"):
        keys.note(f"optim_args {keys.value('optim_args')!r} is not read.")
    if name in _ADAMW or name in _LION:
        return "lion" if name in _LION else "adamw"
    if "adamw" in name and "8bit" in name and "galore" not in name:
        keys.note(f"taken for AdamW: optim {name}, whose 8-bit averages round.")
        return "adamw"
    raise keys.refused(
        "optim", "an optimizer whose rule is known is required", "use adamw_torch or sgd"
    )


def _arguments(keys: Keys) -> dict[str, Any]:
    """Return what ``optim_args`` says of SGD or RMSProp: ``momentum=0.9,nesterov=True``."""
    text = keys.text("optim_args") or ""
    said = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(",") if part)
    arguments = Keys(said, keys.path, [])
    if not said:
        keys.note(f"without optim_args, optim {keys.value('optim')} has no momentum.")
        return {}
    keys.note(f"optim_args {text!r} is read as transformers 5 does; version 4 ignores it here.")
    found = {
        "momentum": arguments.fraction("momentum"),
        "dampening": arguments.number("dampening"),
        "nesterov": arguments.flag("nesterov"),
        "alpha": arguments.fraction("alpha"),
        "eps": arguments.number("eps"),
        "weight_decay": arguments.number("weight_decay"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _split(keys: Keys, world_size: int | None) -> Split:
    new, old = "per_device_train_batch_size", "per_gpu_train_batch_size"
    if keys.value(new) == "auto" or keys.value("gradient_accumulation_steps") == "auto":
        raise InvalidInputError(f"{keys.path}: {new} 'auto'", "a number is required", "write one")
    if keys.flag("auto_find_batch_size"):
        keys.note(
            "auto_find_batch_size is on: the batch size may be halved when memory runs out,"
            " and the rate is not: switch it off."
        )
    micro_at = old if keys.has(old) and not keys.has(new) else new
    micro = keys.count(micro_at) or 8
    accumulation = keys.count("gradient_accumulation_steps") or 1
    devices = world_size or 1
    if keys.flag("accelerator_config.split_batches") or keys.flag("split_batches"):
        keys.note(f"split_batches is on: {micro_at} is the batch of all devices together.")
        devices = 1
    elif world_size is None:
        keys.note(
            "the number of devices is not in the file: 1 is assumed; give the world size if"
            " there are more."
        )
    return Split(
        micro=micro,
        accumulation=accumulation,
        world_size=devices,
        micro_at=(micro_at,),
        accumulation_at=("gradient_accumulation_steps",),
    )


def _lengths(
    keys: Keys, batch_size: int, dataset_size: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the lengths that the file says in steps, and those that follow from epochs."""
    said: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    steps = keys.count("max_steps", least=0) if _is_set(keys, "max_steps") else None
    if steps:
        said["total_steps"] = steps
    epochs = _or(keys.number("num_train_epochs"), 3.0)
    if not steps and dataset_size is not None and epochs:
        each = math.ceil(dataset_size / batch_size)
        implied["total_steps"] = keys.steps("num_train_epochs", epochs * each)
    elif not steps:
        keys.note(
            f"num_train_epochs {epochs:g}: the length in steps needs the data-set size; epochs"
            " do not change with the batch size."
        )
    warmup = keys.number("warmup_steps") or 0
    ratio = keys.number("warmup_ratio") or 0
    if warmup >= 1:
        said["warmup_steps"] = keys.count("warmup_steps")
        if ratio:
            keys.note(f"warmup_ratio {ratio:g} is overruled by warmup_steps.")
        return said, implied
    share = warmup or ratio
    if share > 1:
        raise keys.refused("warmup_ratio", "a number of at most 1 is required", "change it")
    total = {**said, **implied}.get("total_steps")
    if share and total:
        implied["warmup_steps"] = math.ceil(share * total)
    elif share:
        keys.note(f"warm-up is {share:g} of the training: it does not change with the batch size.")
    return said, implied


def _is_set(keys: Keys, key: str) -> bool:
    """Return whether a key has a value other than -1, which means that it is not set."""
    return keys.has(key) and keys.value(key) not in (-1, "-1")


def _every(keys: Keys) -> int | None:
    every = keys.number("eval_steps") if keys.has("eval_steps") else None
    if every is None or every < 1:
        return None
    return keys.count("eval_steps")


def _cadence(keys: Keys) -> tuple[Path_, ...]:
    """Keep saving where evaluating is, if the file has both at the same steps."""
    if keys.has("eval_steps") and keys.value("save_steps") == keys.value("eval_steps"):
        return at("eval_steps", "save_steps")
    return at("eval_steps")


def _schedule(keys: Keys) -> dict[str, Any] | None:
    word = (keys.text("lr_scheduler_type") or "linear").lower().removeprefix("schedulertype.")
    if word in _KINDS:
        return {"kind": _KINDS[word]}
    keys.note(f"lr_scheduler_type {word}: not read; steps in its arguments stay as they are.")
    return None


def _note_defaults(keys: Keys, assumed: dict[str, Any]) -> None:
    if keys.has("max_steps") and _is_set(keys, "max_steps"):
        assumed = {key: value for key, value in assumed.items() if key != "num_train_epochs"}
    absent = [f"{key} {value}" for key, value in assumed.items() if not keys.has(key)]
    if "per_gpu_train_batch_size" in keys.names():
        absent = [text for text in absent if not text.startswith("per_device")]
    if absent:
        keys.note(f"not in the file, so Transformers' defaults: {', '.join(absent)}.")


def _note_more(keys: Keys) -> None:
    if keys.has("deepspeed"):
        keys.note("deepspeed: numbers in that configuration overrule these; read it too.")
    steps = keys.number("save_steps") if keys.has("save_steps") else None
    if steps is not None and steps >= 1 and steps != keys.value("eval_steps"):
        keys.note(f"save_steps {steps:g} counts steps and is left as it is.")
