"""Hooks on modules that do nothing in a copy of the module, or in a file that it was saved to."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any


class Harmless(functools.partial[Any]):
    """A hook as it is; a copy or a pickle of it takes anything and does nothing.

    What stands in for it is a method of the standard library: a saved model is loaded where
    this package is not installed.

    >>> import copy
    >>> hook = Harmless(print)
    >>> hook("watched")
    watched
    >>> copy.deepcopy(hook)("watched")
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
