"""Standard output kept clean of what code under it writes, by whatever road it writes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_OUTPUT, _ERROR = 1, 2
"""File descriptors that every process is born with."""


@contextlib.contextmanager
def output_diverted() -> Iterator[None]:
    """Send what is written to standard output to standard error meanwhile.

    Both Python's ``sys.stdout`` and the descriptor under it, which ``os.write``, compiled
    code and child processes use. Without such descriptors only ``sys.stdout`` is sent over.
    """
    with contextlib.ExitStack() as stack:
        # A process may run without these descriptors: closed by its parent, or in a GUI.
        with contextlib.suppress(OSError):
            stack.enter_context(_descriptor_diverted())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def _descriptor_diverted() -> Iterator[None]:
    _flush()
    kept = os.dup(_OUTPUT)
    try:
        os.dup2(_ERROR, _OUTPUT)
        yield
    finally:
        _flush()
        os.dup2(kept, _OUTPUT)
        os.close(kept)


def _flush() -> None:
    """Send what Python still holds for the descriptor to where it points now."""
    for stream in (sys.stdout, sys.__stdout__):
        if stream is None:
            continue
        # The reader may have left, or user code closed it: not this function's to tell.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
