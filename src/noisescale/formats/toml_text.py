"""TOML changed in place: comments, order and spacing stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noisescale.errors import MissingExtraError


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
            table = table[key]
        if value is None:
            del table[last]
        else:
            table[last] = value
    return tomlkit.dumps(document)
