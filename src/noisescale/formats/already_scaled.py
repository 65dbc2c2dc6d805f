"""Finding configurations that scale the rate themselves, so that nobody scales it twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SWITCHES = frozenset(
    {
        "auto_scale_lr",
        "autoscale_lr",
        "scale_lr",
        "lr_scale_sqrt",
        "linear_scaling",
        "linear_scale_lr",
        "lr_linear_scaling",
        "linear_lr_scaling",
        "sqrt_scaling",
        "sqrt_scale_lr",
        "scale_lr_by_world_size",
        "scale_lr_by_batch_size",
        "scale_lr_with_batch_size",
        "scale_learning_rate",
        "auto_lr_scale",
    }
)
"""On or off: Diffusers' scripts, latent-diffusion, SimpleTuner, mmdetection and many others."""
_RULES = frozenset({"scaling_rule", "lr_scaling_rule", "lr_scaling", "lr_scaling_method"})
"""A word for the rule: DINOv2, DeepSpeed's variable batch size."""
_REFERENCES = frozenset(
    {
        "base_batch_size",
        "lr_base_batch_size",
        "reference_batch_size",
        "lr_reference_batch_size",
        "reference_world_size",
        "base_total_batch_size",
    }
)
"""A batch size (or number of devices) for which the rate is meant: mmengine, timm, Detectron2."""
_NOMINAL = "nbs"
"""Ultralytics' nominal batch size: smaller batches are accumulated up to it, and the weight decay
follows what comes of that."""
_OFF = frozenset({"", "none", "null", "false", "no", "off", "disabled", "constant"})
_RATE = re.compile(r"(base_|blr|peak_|max_)?(lr|learning_rate|blr)(_base)?")
_SIZES = re.compile(r"world_?size|devices|gpus?\b|n_?gpus?|num_nodes|batch_?size|n_?proc", re.I)
_SIGN = re.compile(r"[*/]|\bsqrt\b|\bmul\b|\bmultiply\b", re.I)


def is_scaling_key(key: str) -> bool:
    """Return whether a key says that the rate is scaled with the batch size.

    >>> is_scaling_key("auto_scale_lr"), is_scaling_key("lr")
    (True, False)
    """
    return key.lower() in _SWITCHES | _RULES | _REFERENCES | {_NOMINAL}


def already_scaled(data: Mapping[str, Any]) -> str | None:
    """Return a sentence that names what scales the rate; None where nothing does.

    Switches that are off do not count; an expression that multiplies the rate by a number of
    devices or a batch size does.

    Args:
        data: a configuration's plain values.

    >>> already_scaled({"lr": 0.1, "auto_scale_lr": {"enable": True, "base_batch_size": 256}})
    'auto_scale_lr.enable is true: the rate is scaled with the batch size when the training starts.'
    >>> already_scaled({"auto_scale_lr": {"enable": False, "base_batch_size": 256}})
    """
    for place, key, value in _walk(data):
        if (reason := _reason(key.lower(), value)) is not None:
            return f"{place}{reason}"
    return None


def computed_rate(data: Mapping[str, Any]) -> str | None:
    """Return the key and text of a rate that is computed from the batch size or devices.

    >>> computed_rate({"optimizer": {"lr": "0.1 * world_size"}})
    "optimizer.lr '0.1 * world_size'"
    """
    for place, key, value in _walk(data):
        if _is_computed(key.lower(), value):
            return f"{place} '{_word(value)}'"
    return None


def _walk(data: Any, above: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(data, Mapping) and (data.get("enabled") is False or data.get("enable") is False):
        return
    items = data.items() if isinstance(data, Mapping) else enumerate(data)
    for key, value in items:
        name = f"{above}{key}"
        if str(key).lower() in _SWITCHES and isinstance(value, Mapping):
            # mmengine's table: its reference size counts only when it is switched on.
            if "enable" in value:
                yield f"{name}.enable", str(key), value["enable"]
            else:
                yield name, str(key), bool(value)
            continue
        yield name, str(key), value
        if isinstance(value, Mapping | list):
            yield from _walk(value, f"{name}.")


def _reason(key: str, value: Any) -> str | None:
    after = "when the training starts."
    # SimpleTuner's switch; as a number lr_scale is a factor, such as a layer's.
    if (key in _SWITCHES and _is_on(value)) or (key == "lr_scale" and value is True):
        return f" is {_word(value)}: the rate is scaled with the batch size {after}"
    if key in _RULES and _is_on(value) and isinstance(value, str | bool):
        return f" is {_word(value)}: the rate is scaled by this rule {after}"
    if key in _REFERENCES and _is_on(value) and not isinstance(value, Mapping):
        return f" is {_word(value)}: the rate is meant for this size and is scaled from it {after}"
    if key == _NOMINAL and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return (
            f" is {value}: passes are accumulated up to this batch size, and the weight decay is"
            f" scaled from it, {after}"
        )
    if _is_computed(key, value):
        return f" is {_word(value)}: the rate is computed from the batch size or devices {after}"
    return None


def _is_computed(key: str, value: Any) -> bool:
    is_rate = isinstance(value, str) and _RATE.fullmatch(key) is not None
    return is_rate and bool(_SIGN.search(value) and _SIZES.search(value))


def _is_on(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _OFF
    return bool(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
