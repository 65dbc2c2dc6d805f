"""Numbers and saved states, before they are taken up."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

from noisescale.errors import InvalidInputError


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Return a whole number of at least ``least``; numpy's count, bools do not.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InvalidInputError(
            f"{name} {value!r}", f"a whole number of at least {least} is required", f"change {name}"
        )
    return number


def take_state(
    state: Any, kind: str, needed: Collection[str], same: Mapping[str, Any] | None = None
) -> None:
    """Refuse a saved state that is not of this kind, or that belongs to another run.

    Args:
        state: what ``state_dict()`` returned.
        kind: the class that must have saved it.
        needed: keys that it must have.
        same: by key, what it must say.

    Raises:
        InvalidInputError: a key is missing, the version is another, or a value differs.

    >>> take_state({"version": 1, "seed": 3}, "Sampler", ["seed"], {"seed": 4})
    Traceback (most recent call last):
    ...
    noisescale.errors.InvalidInputError: state of Sampler with seed 3: here it is 4; resume with \
seed 3, or start afresh
    """
    missing = sorted({"version", *needed} - set(state)) if isinstance(state, Mapping) else ["all"]
    if missing:
        raise InvalidInputError(
            f"state without {', '.join(missing)}",
            f"a state of {kind} is required",
            "load the one that it saved",
        )
    if state["version"] != 1:
        raise InvalidInputError(
            f"state of {kind} of version {state['version']!r}",
            "version 1 is required",
            "resume with the noisescale that saved it",
        )
    for name, value in (same or {}).items():
        if state[name] != value:
            raise InvalidInputError(
                f"state of {kind} with {name} {state[name]}",
                f"here it is {value}",
                f"resume with {name} {state[name]}, or start afresh",
            )


def require_groups(state_dict: Mapping[str, Any], kind: str, needed: Collection[str]) -> None:
    """Refuse an optimizer's state dict whose parameter groups lack settings.

    Args:
        state_dict: what the ``state_dict()`` of a torch optimizer returned.
        kind: the class that must have saved it.
        needed: keys of every group.

    Raises:
        InvalidInputError: a group lacks a key: it is another optimizer's.

    >>> require_groups({"param_groups": [{"lr": 0.1}]}, "LARS", ["momentum"])
    Traceback (most recent call last):
    ...
    noisescale.errors.InvalidInputError: state dict without momentum: a state dict of LARS is \
required; load the one that this optimizer saved
    """
    for group in state_dict["param_groups"]:
        missing = sorted(set(needed) - set(group))
        if missing:
            raise InvalidInputError(
                f"state dict without {', '.join(missing)}",
                f"a state dict of {kind} is required",
                "load the one that this optimizer saved",
            )
