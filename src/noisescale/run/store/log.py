"""Append-only lines on disk that survive kills, torn writes and full disks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from noisescale.errors import InvalidInputError


@dataclass(frozen=True)
class SkippedLine:
    """A line of a store that could not be read and was left out.

    Attributes:
        file: name of the file in the store's folder.
        line: its number, from 1.
        what: what was wrong with it.
    """

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.file}, line {self.line}: {self.what}; left out"


class AppendLog:
    """A file that only grows, by whole lines, each on disk before the call returns.

    Opening mends the end: what a killed writer left of a line is cut away, or ended where only
    its newline is missing, so that the next line is not glued to it. One writer at a time,
    which the caller's lock sees to.

    Args:
        path: the file; made when it is absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as problem:
            raise cannot_write(path.parent, problem) from None
        try:
            self._mend()
            sync_folder(path.parent)
        except OSError as problem:
            os.close(self._descriptor)
            raise cannot_write(path.parent, problem) from None

    def append(self, lines: bytes) -> None:
        """Write whole lines in one call and wait until they are on disk.

        Raises:
            InvalidInputError: the disk is full or fails; the file is as it was before.
        """
        assert lines.endswith(b"\n")
        good = os.fstat(self._descriptor).st_size
        try:
            done = os.write(self._descriptor, lines)
            while done < len(lines):  # writing on tells why: a full disk raises then
                done += os.write(self._descriptor, lines[done:])
            os.fsync(self._descriptor)
        except OSError as problem:
            os.ftruncate(self._descriptor, good)
            raise cannot_write(self.path.parent, problem) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _mend(self) -> None:
        size = os.fstat(self._descriptor).st_size
        whole = _end_of_last_line(self._descriptor, size)
        if whole == size:
            return
        if _is_json(os.pread(self._descriptor, size - whole, whole)):
            os.write(self._descriptor, b"\n")
        else:
            os.ftruncate(self._descriptor, whole)
        os.fsync(self._descriptor)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line's number, from 1, and its bytes.

    A file that is absent has no lines.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from enumerate(file, start=1)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of files to disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(folder: Path, problem: OSError) -> InvalidInputError:
    """Return the error of a disk that is full or fails."""
    return InvalidInputError(
        f"store {str(folder)!r}",
        f"it could not be written ({problem.strerror})",
        "make room there and give the same command again: every result written before is kept",
    )


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


_BLOCK = 1 << 16


def _end_of_last_line(descriptor: int, size: int) -> int:
    """Offset just after the last newline; 0 when there is none."""
    stop = size
    while stop > 0:
        start = max(0, stop - _BLOCK)
        found = os.pread(descriptor, stop - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0
