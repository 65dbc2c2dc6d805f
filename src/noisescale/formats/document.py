"""A TOML, JSON or YAML file as text and as plain data; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError

ENDINGS = {".toml": "TOML", ".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
LARGEST_FILE = 1 << 20
"""Bytes (assumed): recipes have a few thousand; what is larger is something else."""
DEEPEST = 64
"""Levels of nesting (assumed): configurations have about five."""
MOST_VALUES = 100_000
"""Values after YAML's aliases are spelt out (assumed): stops files that multiply themselves."""
_BOM = "\ufeff"

Path_ = tuple[str | int, ...]
"""Where a value stands: keys and positions from the top of the file."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A configuration file.

    Attributes:
        path: where it was read.
        syntax: ``TOML``, ``JSON`` or ``YAML``.
        text: the file's text without byte-order mark, line endings as they are.
        data: the same as plain values; the top is a table.
        bom: whether the file began with a byte-order mark.
    """

    path: Path
    syntax: str
    text: str
    data: dict[str, Any]
    bom: bool = False

    def to_bytes(self, text: str) -> bytes:
        """Return what a file with this text in place of its own holds."""
        return ((_BOM if self.bom else "") + text).encode()


def read_document(path: str | PathLike[str]) -> Document:
    """Read a configuration file as its ending says.

    Args:
        path: a file that ends in .toml, .json, .yaml or .yml; UTF-8.

    Returns:
        The text and its data.

    Raises:
        InvalidInputError: there is no such file, it is too large, no text, not what its ending
            says, holds a key twice, or its top is no table.
        MissingExtraError: a YAML file, and ruamel.yaml is not installed.
    """
    place = Path(path)
    syntax = syntax_of(place)
    text = _decoded(_bytes(place), place)
    bom = text.startswith(_BOM)
    text = text.removeprefix(_BOM)
    if not text.strip():
        raise InvalidInputError(f"{place}", "is empty", "give a file with at least lr")
    return Document(
        path=place, syntax=syntax, text=text, data=parse(text, syntax=syntax, path=place), bom=bom
    )


def syntax_of(path: Path) -> str:
    """Return ``TOML``, ``JSON`` or ``YAML``, as the file's name ends.

    Raises:
        InvalidInputError: the ending is none of these.
    """
    ending = path.suffix.lower()
    if ending == ".py":
        raise InvalidInputError(
            f"{path}",
            "is Python, which is not executed to read a recipe",
            "write its lr, batch_size and optimizer into a TOML file",
        )
    if ending not in ENDINGS and not _is_folder(path):
        raise InvalidInputError(
            f"{path}", f"a file that ends in {', '.join(ENDINGS)} is required", "rename it"
        )
    return ENDINGS.get(ending, "TOML")


def parse(text: str, *, syntax: str, path: Path) -> dict[str, Any]:
    """Read a text into plain values.

    Raises:
        InvalidInputError: it is not what ``syntax`` says, or holds what a recipe cannot.
        MissingExtraError: YAML, and ruamel.yaml is not installed.
    """
    try:
        data = _parser(syntax)(text)
    except RecursionError:
        raise _too_much(path, f"more than {DEEPEST} levels of nesting") from None
    except MissingExtraError:
        raise
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.value}", error.requirement, error.remedy) from None
    except ValueError as error:
        raise _not_what_it_says(path, syntax, text, error) from None
    if syntax == "YAML" and isinstance(data, str) and _reads_as("TOML", text):
        raise _not_what_it_says(path, syntax, text, ValueError("one long text"))
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise InvalidInputError(
            f"{path}", f"a table of keys is required at the top, not {kind}", "write key and value"
        )
    _check_size(data, path)
    return data


def _bytes(path: Path) -> bytes:
    if _is_folder(path):
        raise InvalidInputError(f"{path}", "is a folder", "name a recipe file")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"{path}", f"cannot be read ({reason})", "give a recipe file"
        ) from None
    if len(content) > LARGEST_FILE:
        raise InvalidInputError(
            f"{path}", f"is larger than {LARGEST_FILE >> 20} MiB", "give a recipe file"
        )
    return content


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _decoded(content: bytes, path: Path) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InvalidInputError(f"{path}", "is no UTF-8 text", "save it as UTF-8")
    return text


def _parser(syntax: str) -> Callable[[str], Any]:
    if syntax == "TOML":
        from noisescale.formats.toml_text import parse_toml

        return parse_toml
    if syntax == "JSON":
        from noisescale.formats.json_text import parse_json

        return parse_json
    from noisescale.formats.yaml_text import parse_yaml

    return parse_yaml


def _not_what_it_says(path: Path, syntax: str, text: str, error: ValueError) -> InvalidInputError:
    """Say why a text cannot be read, and what it looks like instead."""
    reason = " ".join(str(error).split())
    # Nearly all broken JSON is YAML, but no one who writes a brace first means that.
    others = ("JSON", "TOML") if text.lstrip().startswith("{") else ("JSON", "TOML", "YAML")
    instead = next((other for other in others if _reads_as(other, text)), None)
    if instead is None or instead == syntax:
        return InvalidInputError(f"{path}", f"is no {syntax} ({reason[:200]})", "correct it")
    return InvalidInputError(
        f"{path}",
        f"is no {syntax} ({reason[:200]}), but reads as {instead}",
        f"rename it to {path.stem}.{instead.lower()}",
    )


def _reads_as(syntax: str, text: str) -> bool:
    try:
        return isinstance(_parser(syntax)(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_size(data: Any, path: Path) -> None:
    """Refuse what is nested too deeply, or grows beyond measure when aliases are spelt out."""
    waiting, count = [(data, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > DEEPEST:
            raise _too_much(path, f"more than {DEEPEST} levels of nesting")
        if count > MOST_VALUES:
            raise _too_much(path, f"more than {MOST_VALUES:,} values")
        if isinstance(value, dict):
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend((item, depth + 1) for item in value)


def _too_much(path: Path, what: str) -> InvalidInputError:
    return InvalidInputError(f"{path}", f"has {what}", "give a recipe file")
