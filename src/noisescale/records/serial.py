"""Records to JSON objects and back: full precision, null for what is not known."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
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
            InvalidInputError: a key is unknown or a required key is missing.
        """
        assert dataclasses.is_dataclass(cls)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise InvalidInputError(
                f"{cls.__name__} key {unknown[0]!r}",
                f"the keys are {', '.join(fields)}",
                "remove or rename it",
            )
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InvalidInputError(
                f"{cls.__name__} without {missing[0]!r}", "the key is required", "add it"
            )
        return cls(**{name: _typed(value, hints[name]) for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build the record from what :meth:`to_json` returned."""
        return cls.from_dict(json.loads(text))


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


def _typed(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _typed(value, inner[0]) if len(inner) == 1 else value
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_typed(item, arguments[0]) for item in value)
        return tuple(_typed(item, hint) for item, hint in zip(value, arguments, strict=True))
    if origin is dict:
        return {key: _typed(item, arguments[1]) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is float:
        return float(value)
    return value
