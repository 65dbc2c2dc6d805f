"""Lightning's YAML configuration, as LightningCLI or Hydra (``_target_``) write it.

The batch size is where the data (or the model) keeps it, and counts examples per device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from noisescale.errors import nearest
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading, Split, at

_OPTIMIZERS = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw", "RMSprop": "rmsprop", "Lion": "lion"}
_MODULES = ("", "torch.optim", "lion_pytorch")
_OPTIMIZER_AT = (
    "optimizer",
    "model.init_args.optimizer",
    "model.optimizer",
    "model.init_args.optimizer_init",
)
_BATCH_AT = "data.init_args.batch_size"
_BATCH_NAMES = ("batch_size", "train_batch_size")
_NOT_TRAINING = ("val", "test", "eval", "predict")
_RATE_AT = (
    "model.init_args.lr",
    "model.init_args.learning_rate",
    "model.lr",
    "model.learning_rate",
)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "lion": {"betas": (0.9, 0.99)},
}
_EMA_DECAY = 0.999


def read(keys: Keys, world_size: int | None, dataset_size: int | None) -> Reading:
    """Read a Lightning configuration.

    Raises:
        InvalidInputError: a value cannot be used, keys contradict each other, or the optimizer
            is not one that is known.
    """
    above, optimizer = _optimizer(keys)
    rates_at = _rates_at(keys, above)
    split, devices = _split(keys, world_size)
    batch_size = split.micro * split.accumulation * split.world_size if split else None
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": keys.number(rates_at[0], positive=True),
        "batch_size": batch_size,
        "weight_decay": keys.number(f"{above}.weight_decay"),
        "clip_norm": _clip(keys),
        "dataset_size": dataset_size,
    }
    values |= _moments(keys, above, optimizer)
    decay_at, values["ema_decay"] = _ema(keys)
    said, implied = _lengths(keys, batch_size, dataset_size)
    values |= said
    _note_more(keys)
    names = ("momentum", "dampening", "nesterov", "betas", "alpha", "eps", "weight_decay")
    places = {
        **{name: at(f"{above}.{name}") for name in names},
        "lr": at(*rates_at),
        "clip_norm": at("trainer.gradient_clip_val"),
        "batch_size": at(*_batches_at(keys), "trainer.accumulate_grad_batches"),
        "total_steps": at("trainer.max_steps"),
    }
    if decay_at is not None:
        places["ema_decay"] = (decay_at,)
    return Reading(values=values, places=places, implied=implied, split=split, world_size=devices)


def _optimizer(keys: Keys) -> tuple[str, str | None]:
    """Return where the optimizer's arguments stand, and its kind."""
    for place in _OPTIMIZER_AT:
        if isinstance(keys.value(place), Mapping):
            by_class = keys.has(f"{place}.class_path")
            arguments = f"{place}.init_args" if by_class else place
            named = f"{place}.{'class_path' if by_class else '_target_'}"
            name = keys.text(named)
            if name is None:
                return arguments, None
            module, _, short = name.rpartition(".")
            if short not in _OPTIMIZERS or module not in _MODULES:
                raise keys.refused(
                    named,
                    "an optimizer whose rule is known is required",
                    nearest(name, (f"torch.optim.{known}" for known in _OPTIMIZERS)),
                )
            return arguments, _OPTIMIZERS[short]
    return "optimizer.init_args", None


def _rates_at(keys: Keys, above: str) -> list[str]:
    """Return where the rate stands, or would: the optimizer and the model may both say it."""
    said = [place for place in (f"{above}.lr", *_RATE_AT) if keys.has(place)]
    if len({repr(keys.value(place)) for place in said}) > 1:
        raise keys.contradiction(said, "they disagree on the rate", "remove one")
    return said or [f"{above}.lr"]


def _moments(keys: Keys, above: str, optimizer: str | None) -> dict[str, Any]:
    """Return momentum or betas; torch's defaults where Adam's are not written."""
    if optimizer in _DEFAULTS:
        found = dict(_DEFAULTS[optimizer])
        absent = [name for name in found if not keys.has(f"{above}.{name}")]
        if absent:
            texts = ", ".join(f"{name} {found[name]}" for name in absent)
            keys.note(f"not in the file, so the optimizer's defaults: {texts}.")
        said = {"betas": keys.pair(f"{above}.betas"), "eps": keys.number(f"{above}.eps")}
        said["weight_decay"] = keys.number(f"{above}.weight_decay")
        return found | {name: value for name, value in said.items() if value is not None}
    return {
        "momentum": keys.fraction(f"{above}.momentum"),
        "dampening": keys.number(f"{above}.dampening"),
        "nesterov": keys.flag(f"{above}.nesterov"),
        "alpha": keys.fraction(f"{above}.alpha"),
        "eps": keys.number(f"{above}.eps"),
    }


def _batches_at(keys: Keys) -> list[str]:
    """Return where the data, or else the model, keep the batch size of the training, or would."""
    for top in ("data", "datamodule", "model"):
        said = list(_batch_sizes(keys.value(top), f"{top}."))
        if len({repr(keys.value(place)) for place in said}) > 1:
            raise keys.contradiction(said, "they disagree on the batch size", "remove one")
        if said:
            return said
    return [_BATCH_AT]


def _batch_sizes(table: Any, above: str) -> Iterator[str]:
    for key, value in table.items() if isinstance(table, Mapping) else ():
        if str(key) in _BATCH_NAMES and value is not None:
            yield f"{above}{key}"
        elif not str(key).startswith(_NOT_TRAINING):
            yield from _batch_sizes(value, f"{above}{key}.")


def _split(keys: Keys, world_size: int | None) -> tuple[Split | None, int | None]:
    place, *others = _batches_at(keys)
    micro = keys.count(place)
    passes = keys.count("trainer.accumulate_grad_batches") or 1
    said = _devices(keys)
    if said is not None and world_size is not None and said != world_size:
        raise keys.contradiction(
            ["trainer.devices", "trainer.num_nodes"],
            f"{said} devices train, but world size {world_size} was given",
            "correct one of them",
        )
    devices = said or world_size
    if devices is None:
        keys.note(
            "trainer.devices does not say how many: 1 is assumed; give the world size if there"
            " are more."
        )
    if micro is None:
        return None, devices
    if (devices or 1) > 1:
        keys.note(f"{place} {micro} is taken for the examples of one device.")
    split = Split(
        micro=micro,
        accumulation=passes,
        world_size=devices or 1,
        micro_at=tuple(place.split(".")),
        micro_also=at(*others),
        accumulation_at=("trainer", "accumulate_grad_batches"),
    )
    return split, devices


def _devices(keys: Keys) -> int | None:
    """Return devices times nodes; None where the file leaves it to the machine."""
    said = keys.value("trainer.devices")
    if isinstance(said, str) and "," in said:
        said = [part for part in said.split(",") if part.strip()]
    if said in (None, "auto", -1, "-1"):
        return None
    each = len(said) if isinstance(said, list) else keys.count("trainer.devices")
    return (each or 1) * (keys.count("trainer.num_nodes") or 1)


def _clip(keys: Keys) -> float | None:
    if keys.value("trainer.gradient_clip_algorithm") == "value":
        keys.note("trainer.gradient_clip_algorithm value: clipping by value has no rule here.")
        return None
    return keys.number("trainer.gradient_clip_val") or None


def _ema(keys: Keys) -> tuple[tuple[str | int, ...] | None, float | None]:
    """Return where an average of the weights keeps its decay, and the decay."""
    for number, callback in _callbacks(keys):
        if str(callback.get("class_path", "")).endswith("EMAWeightAveraging"):
            arguments = callback.get("init_args") or {}
            decay = Keys(arguments, keys.path, []).fraction("decay")
            place = ("trainer", "callbacks", number, "init_args", "decay")
            return place, _EMA_DECAY if decay is None else decay
    return None, None


def _callbacks(keys: Keys) -> Iterator[tuple[int, Mapping[str, Any]]]:
    listed = keys.value("trainer.callbacks")
    for number, callback in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(callback, Mapping):
            yield number, callback


def _lengths(
    keys: Keys, batch_size: int | None, dataset_size: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    if keys.value("trainer.max_steps") not in (None, -1, "-1"):
        return {"total_steps": keys.count("trainer.max_steps")}, {}
    if keys.value("trainer.max_epochs") in (None, -1, "-1"):
        return {}, {}
    epochs = keys.count("trainer.max_epochs") or 1
    if dataset_size is not None and batch_size is not None:
        return {}, {"total_steps": epochs * math.ceil(dataset_size / batch_size)}
    keys.note(
        f"trainer.max_epochs {epochs}: the length in steps needs the data-set size; epochs do"
        " not change with the batch size."
    )
    return {}, {}


def _note_more(keys: Keys) -> None:
    if keys.has("lr_scheduler"):
        keys.note(
            "lr_scheduler counts epochs unless the module says interval: step; in epochs it"
            " stays, in steps convert it by hand."
        )
    if isinstance(keys.value("trainer.val_check_interval"), int):
        keys.note("trainer.val_check_interval counts passes, not steps, and is left as it is.")
    if keys.flag("trainer.auto_scale_batch_size") or keys.value("trainer.auto_scale_batch_size"):
        keys.note("trainer.auto_scale_batch_size: the batch size is searched when it starts.")
    for _, callback in _callbacks(keys):
        name = str(callback.get("class_path", "")).rpartition(".")[2]
        if name in ("BatchSizeFinder", "LearningRateFinder", "GradientAccumulationScheduler"):
            keys.note(f"trainer.callbacks: {name} changes what the file says when it starts.")
