"""A model's weights from a file, loaded as data: no code in it is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisescale.errors import InvalidInputError

KEYS = ("model", "state_dict", "model_state_dict", "module")
"""Where checkpoints that hold more than weights keep them. (assumed: the common names)"""


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a model the weights of a checkpoint.

    Args:
        model: as the workload makes it.
        path: what ``torch.save`` wrote: a state dict, or a dict that holds one under ``model``,
            ``state_dict``, ``model_state_dict`` or ``module``.

    Raises:
        InvalidInputError: the file is missing, is no checkpoint of tensors, or does not fit.
    """
    state = _state(path)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as problem:
        lines = [line.strip() for line in str(problem).splitlines()[1:]]
        raise InvalidInputError(
            f"checkpoint {str(path)!r}",
            f"it does not fit the workload's model ({lines[0] if lines else problem})",
            "give a checkpoint of this model",
        ) from None


def _state(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    place = Path(path).expanduser()
    if not place.is_file():
        raise InvalidInputError(
            f"checkpoint {str(path)!r}", "there is no such file", "check the path"
        )
    try:
        found = torch.load(place, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise _no_checkpoint(path) from None
    for key in KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = isinstance(found, Mapping) and any(
        isinstance(value, torch.Tensor) for value in found.values()
    )
    if not tensors:
        raise _no_checkpoint(path)
    state: Mapping[str, Any] = found
    return state


def _no_checkpoint(path: str | os.PathLike[str]) -> InvalidInputError:
    return InvalidInputError(
        f"checkpoint {str(path)!r}",
        "a state dict of tensors is required; the file is loaded weights-only",
        "write it with torch.save(model.state_dict(), FILE)",
    )
