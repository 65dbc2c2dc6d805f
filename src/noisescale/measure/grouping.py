"""Which group a parameter is reported under."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from noisescale.errors import InvalidInputError, nearest

Grouping = Mapping[str, str] | Callable[[str], str] | None


def group_function(names: list[str], groups: Grouping) -> Callable[[str], str]:
    """Return the function from a parameter's name to its group.

    Args:
        names: of all trainable parameters.
        groups: a function, a mapping (the rest is ``other``), or None for the module.

    Raises:
        InvalidInputError: the mapping names a parameter that does not exist.
    """
    if groups is None:
        return lambda name: name.rpartition(".")[0] or "(model)"
    if callable(groups):
        return groups
    for name in groups:
        if name not in names:
            raise InvalidInputError(
                f"groups: parameter {name!r}",
                "a name from model.named_parameters() that is trainable is required",
                nearest(name, names),
            )
    return lambda name: groups.get(name, "other")
