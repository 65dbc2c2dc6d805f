"""What goes wrong inside the user's own code, told in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import noisescale
from noisescale.errors import InvalidInputError, NoisescaleError


@contextmanager
def blame_user(doing: str, *, only_theirs: bool = False) -> Iterator[None]:
    """Turn any exception of the code inside into one line that says what, why and where.

    Args:
        doing: what was being done, for people; the value of the error.
        only_theirs: let through what no line of the user's has part in: that is our own defect.

    Raises:
        InvalidInputError: the code raised (or called ``exit``).
    """
    try:
        yield
    except (NoisescaleError, MemoryError):
        raise
    except SystemExit as problem:
        raise _error(doing, problem, f"it called exit({problem.code!r})") from None
    except SyntaxError as problem:
        where = f"{problem.filename}, line {problem.lineno}"
        raise InvalidInputError(doing, f"SyntaxError: {problem.msg}", f"correct {where}") from None
    except Exception as problem:
        if only_theirs and not _their_frames(problem):
            raise
        words = str(problem).strip() or "no message"
        raise _error(doing, problem, f"{type(problem).__name__}: {words}") from problem


def _error(doing: str, problem: BaseException, what: str) -> InvalidInputError:
    return InvalidInputError(doing, what, f"correct {_where(problem)}")


def _where(problem: BaseException) -> str:
    frames = _their_frames(problem)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "the workload"


def _their_frames(problem: BaseException) -> list[traceback.FrameSummary]:
    """Keep the lines that are the user's: neither ours nor a library's."""
    return [
        frame
        for frame in traceback.extract_tb(problem.__traceback__)
        if "site-packages" not in frame.filename and not _ours_or_frozen(frame.filename)
    ]


def _ours_or_frozen(filename: str) -> bool:
    ours = str(Path(noisescale.__file__).parent)
    standard = str(Path(traceback.__file__).parent)
    return filename.startswith(("<", ours, standard))
