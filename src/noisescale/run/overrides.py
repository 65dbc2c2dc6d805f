"""``--set key=value``: texts to recipe keys of the right type."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Recipe

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_overrides(texts: Iterable[str]) -> dict[str, str]:
    """Split ``key=value`` texts; a later one wins.

    Raises:
        InvalidInputError: a text has no key or no ``=``.

    >>> parse_overrides(["momentum=0.9", "betas=0.9,0.99"])
    {'momentum': '0.9', 'betas': '0.9,0.99'}
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidInputError(
                f"--set {text!r}", "key=value is required", "write for example --set momentum=0.9"
            )
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def recipe_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Give each recipe key a value of its type; what is not a text passes through.

    Raises:
        InvalidInputError: a key is unknown or a text is not of its key's type.

    >>> recipe_changes({"batch_size": "64", "betas": "0.9,0.99", "momentum": "none"})
    {'batch_size': 64, 'betas': (0.9, 0.99), 'momentum': None}
    """
    return {key: _converted(key, value) for key, value in given.items()}


def _converted(key: str, value: Any) -> Any:
    names = [field.name for field in dataclasses.fields(Recipe)]
    if key not in names:
        raise InvalidInputError(
            f"--set {key}={value}", f"{key!r} is not a key of a recipe", nearest(key, names)
        )
    if not isinstance(value, str):
        return value
    kind, convert = _reader(key)
    if value.lower() in ("none", "null") and key not in ("lr", "batch_size", "optimizer"):
        return None
    try:
        return convert(value)
    except (ValueError, KeyError):
        raise InvalidInputError(
            f"--set {key}={value}", f"{kind} is required", f"write --set {key}={_example(key)}"
        ) from None


def _reader(key: str) -> tuple[str, Callable[[str], Any]]:
    hint = str(typing.get_type_hints(Recipe)[key])
    if key == "betas":
        return "two numbers", _pair
    if key == "schedule":
        return "kind:constant, kind:cosine or kind:step,milestones:100/200", _table
    for name, kind, convert in (
        ("bool", "true or false", lambda text: _SWITCHES[text.lower()]),
        ("int", "a whole number", int),
        ("float", "a number", float),
    ):
        if name in hint:
            return kind, typing.cast("Callable[[str], Any]", convert)
    return "a text", str


def _example(key: str) -> str:
    examples = {"betas": "0.9,0.99", "nesterov": "true", "schedule": "kind:cosine"}
    kind, _ = _reader(key)
    return examples.get(key, "100" if kind == "a whole number" else "0.1")


def _pair(text: str) -> tuple[float, float]:
    first, second = (float(part) for part in text.split(","))
    return first, second


def _table(text: str) -> dict[str, Any]:
    """Read ``kind:step,milestones:100/200,gamma:0.1``; a bare word is the kind."""
    table: dict[str, Any] = {}
    for part in text.split(","):
        key, colon, value = part.partition(":")
        if not colon:
            key, value = "kind", part
        table[key.strip()] = _scalar_or_list(key.strip(), value.strip())
    return table


def _scalar_or_list(key: str, value: str) -> Any:
    if key == "milestones":
        return [int(part) for part in value.split("/")]
    if key == "kind":
        return value
    return float(value)
