"""The goal of a training: a quantity and the value it must pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from noisescale.errors import InvalidInputError
from noisescale.records.serial import Record

_PATTERN = re.compile(
    r"^\s*(train|validation)_([A-Za-z_][A-Za-z0-9_]*)\s*([<>])\s*"
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$"
)


@dataclass(frozen=True, kw_only=True)
class Target(Record):
    """A goal such as ``validation_error<0.05``.

    Attributes:
        split: ``train`` (evaluated on a fixed subset) or ``validation``.
        metric: ``loss`` or the name of one of the workload's metrics.
        comparison: ``<`` or ``>``.
        value: the value to pass.
    """

    split: str
    metric: str
    comparison: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME<VALUE`` or ``NAME>VALUE``.

        Raises:
            InvalidInputError: the text is not a target.

        >>> Target.parse("validation_error<0.05").reached(0.049)
        True
        """
        match = _PATTERN.match(text)
        if match is None:
            raise InvalidInputError(
                f"target {text!r}",
                "NAME<VALUE or NAME>VALUE with NAME train_... or validation_... is required",
                'write for example "validation_error<0.05"',
            )
        split, metric, comparison, value = match.groups()
        return cls(split=split, metric=metric, comparison=comparison, value=float(value))

    @property
    def name(self) -> str:
        """The quantity, for example ``validation_error``."""
        return f"{self.split}_{self.metric}"

    def reached(self, value: float) -> bool:
        """Whether a value of the quantity passes the target (NaN never does)."""
        return value < self.value if self.comparison == "<" else value > self.value

    def __str__(self) -> str:
        """Spell the target as :meth:`parse` reads it."""
        return f"{self.name}{self.comparison}{self.value:g}"
