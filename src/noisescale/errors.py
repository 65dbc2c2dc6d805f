"""The whole error tree.

Errors are for the border: bad arguments, bad files, bad workloads.
What a measurement cannot determine is a record with an outcome, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NoisescaleError(Exception):
    """Base of every error that noisescale raises on purpose; its text is one line."""


class InvalidInputError(NoisescaleError, ValueError):
    """A value that cannot be used.

    The text names the value, what is required and the remedy; the command line prints it
    and exits with status 2.

    >>> raise InvalidInputError("--steps 0", "at least 1 step is required", "give --steps 100")
    Traceback (most recent call last):
    ...
    noisescale.errors.InvalidInputError: --steps 0: at least 1 step is required; give --steps 100
    """

    def __init__(self, value: str, requirement: str, remedy: str) -> None:
        self.value = value
        self.requirement = requirement
        self.remedy = remedy
        super().__init__(" ".join(f"{value}: {requirement}; {remedy}".split()))


class MissingExtraError(InvalidInputError):
    """An optional dependency is needed and not installed."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(
            what,
            f"needs {package}, which is not installed",
            f"pip install 'noisescale[{extra}]'",
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known names closest to a misspelt one, for a remedy.

    >>> nearest("digts", ["digits", "mnist"])
    'did you mean digits?'
    >>> nearest("zzz", ["digits", "mnist"])
    'choose from digits, mnist'
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names)}"
