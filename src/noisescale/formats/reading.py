"""What the reader of one kind of file hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from noisescale.formats.document import Path_


@dataclass(frozen=True, kw_only=True)
class Split:
    """A global batch that a file writes in parts.

    Attributes:
        micro: examples per device and pass.
        accumulation: passes per step.
        world_size: devices.
        micro_at: where ``micro`` stands; None where it follows from the others.
        micro_also: where it stands besides.
        accumulation_at: where ``accumulation`` stands, or would; None where it follows.
        total_at: where the product stands, if the file writes it too.
    """

    micro: int
    accumulation: int
    world_size: int
    micro_at: Path_ | None
    accumulation_at: Path_ | None
    total_at: Path_ | None = None
    micro_also: tuple[Path_, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A file in the words of a recipe.

    Attributes:
        values: recipe keys that the file says, or its framework by default.
        places: by recipe key, where it stands or would: one place, or as many as it has parts.
        implied: recipe keys that follow from others of the file, such as steps from epochs.
        split: how the global batch is written, where it is in parts.
        world_size: devices; None where nobody said it.
        already_scaled: a sentence, where the framework scales the rate by these keys.
    """

    values: Mapping[str, Any]
    places: Mapping[str, tuple[Path_, ...]]
    implied: Mapping[str, Any] = field(default_factory=dict)
    split: Split | None = None
    world_size: int | None = None
    already_scaled: str | None = None


def at(*keys: str) -> tuple[Path_, ...]:
    """Return the places of dotted keys.

    >>> at("optimizer.params.lr")
    (('optimizer', 'params', 'lr'),)
    """
    return tuple(tuple(key.split(".")) for key in keys)
