"""Checks of the arguments that every measurement of the noise scale takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from noisescale.errors import InvalidInputError, nearest

SOURCES = ("auto", "examples", "microbatches")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a word that is not among the known ones.

    >>> check_choice("source", "exmples", SOURCES)
    Traceback (most recent call last):
    ...
    noisescale.errors.InvalidInputError: source 'exmples': one of auto, examples, microbatches \
is required; did you mean examples?
    """
    if value not in known:
        close = nearest(str(value), known)
        # Where nothing is close the requirement has listed all there are.
        remedy = close if close.startswith("did you mean") else f"give {name}={known[0]!r}"
        raise InvalidInputError(
            f"{name} {value!r}", f"one of {', '.join(known)} is required", remedy
        )


def check_count(name: str, value: object, suggestion: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(
            f"{name} {value!r}",
            "a whole number of at least 1 is required",
            f"give {name}={suggestion}",
        )


def check_seed(seed: object) -> None:
    """Refuse what torch's generators do not take, or what cannot be counted up from.

    >>> check_seed(-1)
    Traceback (most recent call last):
    ...
    noisescale.errors.InvalidInputError: seed -1: a whole number from 0 to 2^63 - 1 is \
required; give seed=0
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInputError(
            f"seed {seed!r}", "a whole number from 0 to 2^63 - 1 is required", "give seed=0"
        )


def check_options(
    source: object, loss_reduction: object, every: object, level: object, loss_scale: object
) -> None:
    """Refuse what a meter does not take."""
    check_choice("source", source, SOURCES)
    check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    check_count("every", every, 1)
    check_level(level)
    check_loss_scale(loss_scale)


def check_state(state: Mapping[str, Any], mine: Mapping[str, object]) -> None:
    """Refuse a meter's state that was taken with other options."""
    for name, value in mine.items():
        if name in state and state[name] != value:
            raise InvalidInputError(
                f"state with {name}={state[name]!r}",
                f"this meter has {name}={value!r}",
                f"make the meter with {name}={state[name]!r}",
            )


def check_level(level: object) -> None:
    """Refuse what is not a confidence level."""
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise InvalidInputError(
            f"level {level!r}", "a number between 0 and 1 is required", "give level=0.95"
        )


def check_loss_scale(loss_scale: object) -> None:
    """Refuse what is neither a positive number nor a callable."""
    number = isinstance(loss_scale, int | float) and loss_scale > 0
    if not callable(loss_scale) and not number:
        raise InvalidInputError(
            f"loss_scale {loss_scale!r}",
            "a positive number or a callable is required",
            "pass scaler.get_scale",
        )
