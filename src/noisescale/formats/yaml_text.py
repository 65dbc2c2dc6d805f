"""YAML read safely (no tags that build objects), and changed in place, comments kept."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError

_PLAIN = "tag:yaml.org,2002:"
_TAGS = frozenset(
    _PLAIN + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")
)

LARGEST_TEXT = 1 << 18
"""Characters: the safe reader is written in Python, about 0.4 s per 100,000 (measured)."""
_MOST_BRACKETS = 200
"""Assumed; with 2,000 the reader takes seconds to find that it is too deep (measured)."""
_ANCHOR = re.compile(r"&\S+\s+")


def parse_yaml(text: str) -> Any:
    """Read one YAML document into plain values.

    Raises:
        ValueError: it is no YAML; InvalidInputError where a key is given twice, or a tag would
            build something else than plain values.
        MissingExtraError: ruamel.yaml is not installed.
    """
    tree = _checked(text)
    if tree is None:
        return None
    return _translated(lambda reader: reader.constructor.construct_document(tree))


def _reader() -> Any:
    try:
        from ruamel.yaml import YAML
    except ImportError:
        raise MissingExtraError("a YAML file", package="ruamel.yaml", extra="formats") from None
    return YAML(typ="safe", pure=True)


def _checked(text: str) -> Any:
    """Return the tree of nodes after its size and its tags have been looked at."""
    if len(text) > LARGEST_TEXT:
        raise InvalidInputError(
            "its YAML", f"is longer than {LARGEST_TEXT:,} characters", "give a recipe file"
        )
    if _open_brackets(text) > _MOST_BRACKETS:
        raise RecursionError
    tree = _translated(lambda reader: reader.compose(text))
    seen, waiting = set(), [tree] if tree is not None else []
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if str(node.tag) not in _TAGS and not str(node.tag).endswith(":merge"):
            raise InvalidInputError(
                f"line {node.start_mark.line + 1}: tag {node.tag}",
                "only plain values are read",
                "remove the tag",
            )
        if isinstance(node.value, list):
            for item in node.value:
                waiting.extend(item if isinstance(item, tuple) else (item,))
    return tree


def _open_brackets(text: str) -> int:
    """Return how many brackets are open at most; in texts and comments they count too."""
    most = now = 0
    for found in re.finditer(r"[\[\]{}]", text):
        now += 1 if found[0] in "[{" else -1
        most = max(most, now)
    return most


def _translated(act: Any) -> Any:
    """Call ruamel.yaml; what it raises becomes a ValueError with the line."""
    reader = _reader()
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError

    try:
        with warnings.catch_warnings(category=ReusedAnchorWarning, action="ignore"):
            return act(reader)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        found = str(error.problem).split('"')
        key = found[1] if len(found) > 1 else ""
        raise InvalidInputError(f"line {line}: key {key}", "given twice", "remove one") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def edit_yaml(text: str, changes: Mapping[tuple[str | int, ...], Any]) -> str:
    """Set values in a YAML text; a new key follows a plain one of its table.

    Args:
        text: a YAML mapping.
        changes: the new value by its place.

    Returns:
        The text with these values; all else is as before, comments too.
    """
    tree = _checked(text)
    for whole, new in changes.items():
        for place, value in _by_item(tree, whole, new):
            text = _set(text, _checked(text), place, value)
    return text


def _by_item(
    node: Any, place: tuple[str | int, ...], value: Any
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the items of a list that is written over several lines: each keeps its line."""
    for key in place:
        node = None if node is None else _child(node, key)[1]
    listed = node is not None and isinstance(node.value, list) and isinstance(value, list | tuple)
    if not listed or node.flow_style is not False or len(node.value) != len(value):
        yield place, value
        return
    for number, item in enumerate(value):
        yield from ((place + below, new) for below, new in _by_item(node, (number,), item))


def _set(text: str, node: Any, place: tuple[str | int, ...], value: Any) -> str:
    name = None
    for depth, key in enumerate(place):
        name, child = _child(node, key)
        if child is None:
            for missing in reversed(place[depth + 1 :]):
                value = {missing: value}
            return _inserted(text, node, f"{key}: {_spelt(value)}")
        node = child
    start, end = node.start_mark.index, node.end_mark.index
    if start == end and name is not None:
        # The mark of a value that is not written may stand behind comments and line ends.
        at = text.index(":", name.end_mark.index) + 1
        return f"{text[:at]} {_spelt(value)}{text[at:]}"
    if anchor := _ANCHOR.match(text, start, end):
        start = anchor.end()
    old = text[start:end]
    kept = old[len(old.rstrip()) :]
    # A block may begin in its key's column, where nothing else may.
    shallow = (
        name is not None
        and node.start_mark.line > name.start_mark.line
        and node.start_mark.column <= name.start_mark.column
    )
    return text[:start] + ("  " if shallow else "") + _spelt(value) + kept + text[end:]


def _child(node: Any, key: str | int) -> tuple[Any, Any]:
    """Return the nodes of a key, None in a list, and of its value, None where it is not there."""
    if isinstance(node.value, str):
        return None, None
    if isinstance(key, int):
        return None, node.value[key]
    return next((pair for pair in node.value if pair[0].value == key), (None, None))


def _inserted(text: str, table: Any, entry: str) -> str:
    if table.flow_style:
        at = table.value[-1][1].end_mark.index if table.value else table.start_mark.index + 1
        return f"{text[:at]}{', ' if table.value else ''}{entry}{text[at:]}"
    newline = "\r\n" if "\r\n" in text else "\n"
    indent = " " * table.start_mark.column
    for name, item in reversed(table.value):
        if isinstance(item.value, str) and item.end_mark.line == name.start_mark.line:
            at = _end_of_line(text, item.end_mark.index)
            return f"{text[:at]}{newline}{indent}{entry}{text[at:]}"
    at = table.value[0][0].start_mark.index
    return f"{text[:at]}{entry}{newline}{indent}{text[at:]}"


def _end_of_line(text: str, at: int) -> int:
    while at < len(text) and text[at] not in "\r\n":
        at += 1
    return at


def _spelt(value: Any) -> str:
    """Write a value so that YAML 1.1 readers take it as meant, as most frameworks use one.

    There ``1e-05`` is a text; with a point it is a number.

    >>> _spelt([1e-05, 0.5, "a"]), _spelt({"kind": True})
    ('[1.0e-05, 0.5, "a"]', '{"kind": true}')
    """
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spelt(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_spelt(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
