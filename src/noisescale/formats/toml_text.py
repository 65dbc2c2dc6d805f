"""TOML changed in place: comments, order and spacing stay."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError


def parse_toml(text: str) -> dict[str, Any]:
    """Read TOML.

    Raises:
        ValueError: the text is no TOML; InvalidInputError, with the line, for a key given twice.

    >>> parse_toml("lr = 0.1")
    {'lr': 0.1}
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"(Cannot|Duplicate).*at (line (\d+)|end of document)", str(error))
        if found is None:
            raise
        lines = text.rstrip().split("\n")
        number = int(found[3] or len(lines))
        key = lines[number - 1].partition("=")[0].strip()
        raise InvalidInputError(f"line {number}: {key[:60]}", "given twice", "remove one") from None


def edit_toml(text: str, changes: Mapping[tuple[str | int, ...], Any]) -> str:
    """Set values in a TOML text; None removes a key, which TOML has no word for.

    Args:
        text: a TOML document.
        changes: the new value by its place.

    Returns:
        The text with these values; all else is as before.

    Raises:
        MissingExtraError: tomlkit is not installed.
    """
    if not changes:
        return text
    try:
        import tomlkit
    except ImportError:
        raise MissingExtraError("writing a TOML file", package="tomlkit", extra="formats") from None
    document = tomlkit.parse(text)
    for (*above, last), value in changes.items():
        table: Any = document
        for key in above:
            if not isinstance(key, int):
                table.setdefault(key, {})
            table = table[key]
        if value is None:
            del table[last]
        else:
            table[last] = value
    return tomlkit.dumps(document)
