"""Whose keys a configuration has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.formats.already_scaled import already_scaled

KINDS = ("noisescale", "transformers", "deepspeed", "lightning", "timm")

_TRANSFORMERS = (
    "per_device_train_batch_size",
    "per_gpu_train_batch_size",
    "num_train_epochs",
    "adam_beta1",
    "lr_scheduler_type",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "output_dir",
    "per_device_eval_batch_size",
    "warmup_ratio",
)
_DEEPSPEED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization",
    "gradient_clipping",
    "steps_per_print",
)
_TIMM = ("opt", "lr_base", "lr_base_size", "sched", "opt_betas", "opt_eps", "clip_grad")
_OWN = (
    "lr",
    "learning_rate",
    "batch_size",
    "betas",
    "total_steps",
    "total_examples",
    "unit",
    "clip_norm",
)


def detected_kind(data: Mapping[str, Any], path: Path) -> str:
    """Return the kind whose telling keys a file has.

    Args:
        data: the file's plain values.
        path: the file, for messages.

    Returns:
        One of ``KINDS``.

    Raises:
        InvalidInputError: no kind's telling keys are there, or those of several.
    """
    evidence = {kind: key for kind, find in _SIGNS.items() if (key := find(data))}
    if len(evidence) == 1:
        return next(iter(evidence))
    if not evidence and any(key in data for key in _OWN):
        return "noisescale"
    if not evidence:
        scaled = already_scaled(data)
        raise InvalidInputError(
            f"{path}",
            "no keys of a recipe that is known" + (f" ({scaled.rstrip('.')})" if scaled else ""),
            (
                "change the batch size there and let it scale, or write lr and batch_size into"
                " a file of our own keys"
                if scaled
                else "write at least lr and batch_size, or name whose keys it has: "
                + ", ".join(KINDS)
            ),
        )
    said = " and ".join(f"{kind} ({key})" for kind, key in evidence.items())
    raise InvalidInputError(
        f"{path}", f"has keys of {said}", f"say which it is: kind {' or '.join(evidence)}"
    )


def _first(data: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if data.get(key) is not None), None)


def _transformers(data: Mapping[str, Any]) -> str | None:
    if _deepspeed(data) or _timm(data):
        return None
    steps = data.get("max_steps") is not None and data.get("learning_rate") is not None
    # A table under such a name is someone else's: DINOv2's optim.
    plain = {key: value for key, value in data.items() if not isinstance(value, Mapping)}
    return "max_steps" if steps else _first(plain, _TRANSFORMERS)


def _deepspeed(data: Mapping[str, Any]) -> str | None:
    # TrainingArguments.to_dict once wrote train_batch_size too: its own keys decide.
    if _first(data, _TRANSFORMERS[:4]):
        return None
    optimizer = data.get("optimizer")
    if isinstance(optimizer, Mapping) and "params" in optimizer:
        return "optimizer.params"
    return _first(data, _DEEPSPEED)


def _timm(data: Mapping[str, Any]) -> str | None:
    return _first(data, _TIMM) if _first(data, _TRANSFORMERS[:4]) is None else None


def _lightning(data: Mapping[str, Any]) -> str | None:
    return "trainer" if isinstance(data.get("trainer"), Mapping) else None


_SIGNS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "transformers": _transformers,
    "deepspeed": _deepspeed,
    "lightning": _lightning,
    "timm": _timm,
}
