"""Lines of a comma-separated file."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError
from noisescale.formats.csv_lines import csv_lines


def test_blank_lines_spaces_and_marks_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfa, b \r\n\r\n1,"x, y"\r\n , \n 2 ,3')
    assert csv_lines(path) == [(1, ["a", "b"]), (3, ["1", "x, y"]), (5, ["2", "3"])]


@pytest.mark.parametrize("content", [b"\xff\xfe1", b'a,"b\n', b'"a"b,c\n'])
def test_what_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="is no CSV text"):
        csv_lines(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(InvalidInputError, match="cannot be read"):
            csv_lines(path)
