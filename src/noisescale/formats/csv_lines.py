"""The lines of a comma-separated file, with their numbers."""

from __future__ import annotations

import csv
from pathlib import Path

from noisescale.errors import InvalidInputError


def csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Read the lines of a CSV that are not blank.

    A byte-order mark and spaces round the cells do no harm.

    Args:
        path: the file, UTF-8.

    Returns:
        Number and cells of each line, the names among them.

    Raises:
        InvalidInputError: the file cannot be read or is no CSV text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            return [
                (reader.line_num, [cell.strip() for cell in line])
                for line in reader
                if any(cell.strip() for cell in line)
            ]
    except OSError as error:
        raise InvalidInputError(
            f"{path}", f"cannot be read ({error.strerror})", "give a CSV file"
        ) from None
    except (csv.Error, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidInputError(
            f"{path}", f"is no CSV text ({reason})", "save it as comma-separated UTF-8"
        ) from None
