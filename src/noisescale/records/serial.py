"""Records to JSON objects and back: full precision, null for what is not known."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Self

from noisescale.errors import InvalidInputError


class Record:
    """Mixin of every frozen dataclass that crosses a border."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values: dict, list, str, int, float, bool and None.

        Floats that JSON has no word for (NaN, infinity) become None.
        """
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the record as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the record from what :meth:`to_dict` returned.

        Raises:
            InvalidInputError: a key is unknown, a required key is missing, or a value is of
                another type.
        """
        assert dataclasses.is_dataclass(cls)
        if not isinstance(values, dict):
            raise _not_what_was_written(cls, values)
        readers, required = _readers(cls)
        unknown = sorted(values.keys() - readers.keys())
        if unknown:
            raise InvalidInputError(
                f"{cls.__name__} key {unknown[0]!r}",
                f"the keys are {', '.join(readers)}",
                "remove or rename it",
            )
        missing = [name for name in required if name not in values]
        if missing:
            raise InvalidInputError(
                f"{cls.__name__} without {missing[0]!r}", "the key is required", "add it"
            )
        try:
            return cls(
                **{
                    name: value if value is None else readers[name](value)
                    for name, value in values.items()
                }
            )
        except InvalidInputError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise _not_what_was_written(cls, values) from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build the record from what :meth:`to_json` returned.

        Raises:
            InvalidInputError: it is no JSON, or not what :meth:`from_dict` takes.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{cls.__name__}: {error}", "JSON is required", "give what to_json returned"
            ) from error
        return cls.from_dict(values)


def _not_what_was_written(cls: type, values: Any) -> InvalidInputError:
    text = repr(values)
    return InvalidInputError(
        f"{cls.__name__} {text if len(text) <= 80 else text[:77] + '...'}",
        "a value in it is of another type than the record's",
        "give what to_dict or to_json returned",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


@functools.cache
def _readers(cls: type) -> tuple[dict[str, Callable[[Any], Any]], tuple[str, ...]]:
    """Return by key how its value is read, and the keys that are required."""
    # Looked up once per class: stores hold many thousands of records.
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    required = tuple(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return {field.name: _reader(hints[field.name]) for field in fields}, required


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return how a value of a type is read; None, which is itself, is dealt with before."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _reader(inner[0]) if len(inner) == 1 else _as_it_is
    if origin is tuple:
        return _tuple_reader(arguments)
    if origin is dict:
        return _dict_reader(arguments[1])
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint
    return float if hint is float else _as_it_is


def _tuple_reader(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        read = _optional(_reader(arguments[0]))
        return lambda value: tuple(read(item) for item in value)
    readers = [_optional(_reader(argument)) for argument in arguments]
    return lambda value: tuple(read(item) for read, item in zip(readers, value, strict=True))


def _dict_reader(hint: Any) -> Callable[[Any], Any]:
    read = _optional(_reader(hint))
    return lambda value: {key: read(item) for key, item in value.items()}


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _as_it_is(value: Any) -> Any:
    return value
