"""Keeps Ray's own messages off standard output, which belongs to the results."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def rays_messages_to_stderr() -> Iterator[None]:
    """Send to standard error what Ray's threads print within; others print as before.

    Ray prints the deaths of workers to the driver's standard output and has no option not to;
    ``log_to_driver=False`` silences the workers only.
    """
    before = sys.stdout
    sorted_output: Any = _ByThread(before)
    sys.stdout = sorted_output
    try:
        yield
    finally:
        if sys.stdout is sorted_output:  # else someone has replaced it since
            sys.stdout = before


class _ByThread:
    """A text stream that passes everything on, by who writes."""

    def __init__(self, usual: TextIO) -> None:
        self._usual = usual

    def __getattr__(self, name: str) -> Any:
        # Ray's threads are called ray_listen_error_messages and ray_print_logs.
        rays = threading.current_thread().name.startswith("ray_")
        return getattr(sys.stderr if rays else self._usual, name)
