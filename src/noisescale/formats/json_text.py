"""JSON read strictly, and changed in place: every other character stays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from noisescale.errors import InvalidInputError

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[^,\]}\s]+")


def parse_json(text: str) -> Any:
    """Read JSON; NaN, infinities and keys given twice are refused.

    Raises:
        ValueError: the text is no JSON; InvalidInputError for the values refused.

    >>> parse_json('{"lr": 0.1}')
    {'lr': 0.1}
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidInputError(f"key {key}", "given twice", "remove one")
        found[key] = value
    return found


def _refuse(word: str) -> Any:
    raise InvalidInputError(f"{word}", "is no JSON and no value that can be used", "give a number")


@dataclass(frozen=True)
class _Value:
    """A value's place in the text; members of an object with where their keys stand."""

    start: int
    end: int
    members: Mapping[Any, _Value]
    keys: tuple[tuple[int, int], ...] = ()


def edit_json(text: str, changes: Mapping[tuple[str | int, ...], Any]) -> str:
    """Set values in a JSON text; new keys follow the last one of their object.

    Args:
        text: a JSON object.
        changes: the new value by its place.

    Returns:
        The text with these values; all else is as before.

    >>> edit_json('{"lr":  0.1, "n": [1, 2]}', {("lr",): 0.2, ("n", 1): 3, ("k",): None})
    '{"lr":  0.2, "n": [1, 3], "k": null}'
    """
    for place, value in changes.items():
        text = _set(text, _scan(text, _past_space(text, 0)), place, value)
    return text


def _set(text: str, at: _Value, place: tuple[str | int, ...], value: Any) -> str:
    for depth, key in enumerate(place):
        if key not in at.members:
            for missing in reversed(place[depth + 1 :]):
                value = {missing: value}
            return _inserted(text, at, str(key), json.dumps(value, ensure_ascii=False))
        at = at.members[key]
    return text[: at.start] + json.dumps(value, ensure_ascii=False) + text[at.end :]


def _inserted(text: str, table: _Value, key: str, value: str) -> str:
    name = json.dumps(key, ensure_ascii=False)
    if not table.keys:
        return f"{text[: table.start + 1]}{name}: {value}{text[table.end - 1 :]}"
    last = list(table.members.values())[-1]
    start, end = table.keys[-1]
    before = text[:start][len(text[:start].rstrip(" \t\r\n")) :]
    colon = text[end : last.start]
    return f"{text[: last.end]},{before}{name}{colon}{value}{text[last.end :]}"


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _scan(text: str, at: int) -> _Value:
    """Find where values stand in a text that is known to be JSON."""
    if text[at] in "{[":
        return _scan_members(text, at, closing="}" if text[at] == "{" else "]")
    if text[at] == '"':
        return _Value(at, scanstring(text, at + 1)[1], {})
    found = _SCALAR.match(text, at)
    assert found is not None
    return _Value(at, found.end(), {})


def _scan_members(text: str, start: int, *, closing: str) -> _Value:
    members: dict[Any, _Value] = {}
    keys = []
    at = _past_space(text, start + 1)
    while text[at] != closing:
        name: Any = len(members)
        if closing == "}":
            name, end = scanstring(text, at + 1)
            keys.append((at, end))
            at = _past_space(text, _past_space(text, end) + 1)
        members[name] = _scan(text, at)
        at = _past_space(text, members[name].end)
        if text[at] == ",":
            at = _past_space(text, at + 1)
    return _Value(start, at + 1, members, tuple(keys))
