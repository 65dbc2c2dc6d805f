"""A file's values by key, each of the type that is needed, or one clear line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records.rate_schedule import FARTHEST

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"\s*[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


class Keys:
    """What a configuration says, by dotted key.

    Numbers written as text are read as numbers and noted: YAML 1.1 takes ``3e-4`` for a text.

    Args:
        data: the file's plain values.
        path: the file, for messages.
        notes: where what the reader should know is written.
    """

    def __init__(self, data: Mapping[str, Any], path: Path, notes: list[str]) -> None:
        self._data = data
        self.path = path
        self._notes = notes

    def names(self) -> tuple[str, ...]:
        """Return the keys at the top of the file."""
        return tuple(str(name) for name in self._data)

    def note(self, text: str) -> None:
        """Tell the reader something."""
        if text not in self._notes:
            self._notes.append(text)

    def has(self, key: str) -> bool:
        """Return whether the key is there and not null."""
        return self.value(key) is not None

    def value(self, key: str) -> Any:
        """Return the value as it is; None where it is absent or null."""
        found: Any = self._data
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return found

    def refused(self, key: str, requirement: str, remedy: str) -> InvalidInputError:
        """Return the error of a value that cannot be used."""
        return InvalidInputError(
            f"{self.path}: {key} {_shown(self.value(key))}", requirement, remedy
        )

    def contradiction(self, keys: Iterable[str], requirement: str, remedy: str) -> Exception:
        """Return the error of keys that cannot both be right."""
        said = " and ".join(f"{key} {_shown(self.value(key))}" for key in keys)
        return InvalidInputError(f"{self.path}: {said}", requirement, remedy)

    def refuse_foreign(self, names: Mapping[str, str], whose: str) -> None:
        """Refuse another tool's names where this one's are absent.

        Its default would be taken in their place, and nobody would notice.

        Raises:
            InvalidInputError: a foreign name is there, and the right one is not.
        """
        for foreign, right in names.items():
            if self.has(foreign) and not self.has(right):
                raise self.refused(
                    foreign, f"no key of {whose}, whose name for it is {right}", "rename it"
                )

    def number(self, key: str, *, positive: bool = False) -> float | None:
        """Return a finite number of at least 0 (above 0 if ``positive``), or None.

        Raises:
            InvalidInputError: the value is no such number.
        """
        value = self.value(key)
        if value is None:
            return None
        found = self._as_number(key, value)
        if found is None or found < 0 or (positive and not found):
            kind = "a positive number" if positive else "a number of at least 0"
            raise self.refused(key, f"{kind} is required", f"change {key}")
        return found

    def count(self, key: str, *, least: int = 1) -> int | None:
        """Return a whole number of at least ``least``, or None.

        Raises:
            InvalidInputError: the value is no such number.
        """
        value = self.value(key)
        if value is None:
            return None
        found = self._as_number(key, value)
        if found is None or found != math.floor(found) or found < least:
            raise self.refused(
                key, f"a whole number of at least {least} is required", f"change {key}"
            )
        return int(found)

    def steps(self, key: str, count: float) -> int:
        """Return a number of steps that follows from a key, rounded up and at least 1.

        Raises:
            InvalidInputError: it is beyond all measure.
        """
        if not count < FARTHEST:
            raise self.refused(key, f"at most {FARTHEST} steps can be counted", f"change {key}")
        return max(1, math.ceil(count))

    def fraction(self, key: str) -> float | None:
        """Return a number in [0, 1), or None.

        Raises:
            InvalidInputError: the value is no such number.
        """
        found = self.number(key)
        if found is not None and found >= 1:
            raise self.refused(key, "a number in [0, 1) is required", f"change {key}")
        return found

    def pair(self, key: str) -> tuple[float, float] | None:
        """Return two numbers in [0, 1), or None.

        Raises:
            InvalidInputError: the value is no list of two such numbers.
        """
        value = self.value(key)
        if value is None:
            return None
        parts = [self._as_number(key, item) for item in value] if _is_list(value) else []
        if len(parts) != 2 or any(part is None or not 0 <= part < 1 for part in parts):
            raise self.refused(key, "two numbers in [0, 1) are required", "write [0.9, 0.999]")
        first, second = (float(part) for part in parts if part is not None)
        return first, second

    def flag(self, key: str) -> bool | None:
        """Return true or false, or None.

        Raises:
            InvalidInputError: the value is neither.
        """
        value = self.value(key)
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if value is None or isinstance(value, bool):
            return value
        raise self.refused(key, "true or false is required", f"change {key}")

    def text(self, key: str) -> str | None:
        """Return a text, or None.

        Raises:
            InvalidInputError: the value is none.
        """
        value = self.value(key)
        if value is None or isinstance(value, str):
            return value
        raise self.refused(key, "a text is required", f"change {key}")

    def table(self, key: str) -> dict[str, Any] | None:
        """Return a table, or None.

        Raises:
            InvalidInputError: the value is none.
        """
        value = self.value(key)
        if value is None or isinstance(value, dict):
            return value
        raise self.refused(key, "a table is required", f"write {key} as a table of keys")

    def _as_number(self, key: str, value: Any) -> float | None:
        """Return a finite number; None where the value is none."""
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            number = float(value)
            self.note(f"the text {value!r} of {key} is read as the number {number:g}.")
            value = number
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            return value if math.isfinite(value) else None
        except OverflowError:
            return None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    """Return a value for a message: one short line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        text = "(a very long number)"
    return text if len(text) <= 60 else text[:57] + "..."
