"""Configuration files as text and data: what is refused, and that nothing is executed."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path

import pytest

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.formats.document import DEEPEST, LARGEST_FILE, read_document

GOOD = {
    "r.toml": "lr = 0.1\nbatch_size = 32\n",
    "r.json": '{"lr": 0.1, "batch_size": 32}',
    "r.yaml": "lr: 0.1\nbatch_size: 32\n",
    "r.yml": "lr: 0.1\nbatch_size: 32\n",
    "R.JSON": '{"lr": 0.1, "batch_size": 32}',
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_three_syntaxes_with_bom_and_line_endings(
    tmp_path: Path, name: str, bom: bool, newline: str
) -> None:
    text = GOOD[name].replace("\n", newline)
    content = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    document = read_document(write(tmp_path, name, content))
    assert document.data == {"lr": 0.1, "batch_size": 32}
    assert document.to_bytes(document.text) == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.toml", "", "is empty"),
        ("blank.json", " \n\t\n", "is empty"),
        ("bom.yaml", b"\xef\xbb\xbf", "is empty"),
        ("comment.yaml", "# nothing\n", "a table of keys is required"),
        ("list.json", "[1, 2]", "not a list"),
        ("word.yaml", "hello\n", "a table of keys is required"),
        ("number.json", "3", "a table of keys is required"),
        ("binary.toml", b"\x00\x01\x02", "is no UTF-8 text"),
        ("latin.toml", "name = 'ä'".encode("latin-1"), "is no UTF-8 text"),
        ("utf16.json", '{"lr": 1}'.encode("utf-16"), "is no UTF-8 text"),
        ("r.toml", '{"lr": 0.1}', r"but reads as JSON; rename it to r\.json"),
        ("r.json", "lr = 0.1\n", r"but reads as TOML; rename it to r\.toml"),
        ("r.yaml", "lr = 0.1\n", "reads as TOML; rename"),
        ("r2.yaml", 'lr = 0.1\n[schedule]\nkind = "cosine"\n', "reads as TOML"),
        ("r3.json", "lr: 0.1\n", r"but reads as YAML; rename it to r3\.yaml"),
        ("r3.toml", "lr: 0.1\n", r"but reads as YAML; rename it to r3\.yaml"),
        ("r2.json", '{"lr": 0.1,}', r"is no JSON \(.*\); correct it"),
        ("c.json", '{"lr": 0.1 // rate\n}', "is no JSON"),
        ("nan.json", '{"lr": NaN}', "NaN: is no JSON"),
        ("inf.json", '{"lr": -Infinity}', "-Infinity: is no JSON"),
        ("twice.json", '{"lr": 1, "lr": 2}', "key lr: given twice"),
        ("twice2.json", '{"a": {"lr": 1, "lr": 2}}', "key lr: given twice"),
        ("twice.yaml", "lr: 1\nlr: 2\n", "line 2: key lr: given twice"),
        ("twice.toml", "lr = 1\n# c\nlr = 2\n", "line 3: lr: given twice; remove one"),
        ("twice2.toml", "lr = 1\r\nlr = 2\r\n", "line 2: lr: given twice"),
        ("twice4.toml", "lr = 1\nlr = 2", "line 2: lr: given twice"),
        ("twice5.toml", "s = {a = 1, a = 2}", "line 1: s: given twice"),
        ("twice3.toml", "[a]\nb = 1\n[a]\nb = 2\n", r"line 3: \[a\]: given twice"),
        ("object.yaml", "lr: !!python/object/apply:os.system ['true']\n", "only plain values"),
        ("own.yaml", "lr: !mine 3\n", "line 1: tag !mine: only plain values"),
        ("binary.yaml", "lr: !!binary aGk=\n", "only plain values"),
        ("tab.yaml", "a:\n\tb: 1\n", "line 2: .*is no YAML|is no YAML"),
        ("two.yaml", "lr: 1\n---\nlr: 2\n", "is no YAML"),
        ("open.yaml", "lr: [1, 2\n", "is no YAML"),
        ("anchor.yaml", "lr: *rate\n", "is no YAML"),
        ("deep.json", '{"a":' * 200 + "1" + "}" * 200, "levels of nesting"),
        ("deeper.json", "[" * 200_000, "levels of nesting|is no JSON"),
        ("deep.yaml", "a: " + "[" * 5000 + "]" * 5000, "levels of nesting|is no YAML"),
        ("deep.toml", "a = " + "[" * 5000 + "]" * 5000, "levels of nesting|is no TOML"),
        ("long.json", '{"lr": ' + "9" * 5000 + "}", "is no JSON"),
        ("r.txt", "lr = 1", "ends in .toml, .json, .yaml, .yml is required"),
        ("recipe", "lr = 1", "ends in .toml"),
        ("config.py", "import os", "is Python, which is not executed"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_document(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_no_file_a_folder_and_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_document(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    for folder in (tmp_path, tmp_path / "folder.toml"):
        with pytest.raises(InvalidInputError, match=r"is a folder; name a recipe file$"):
            read_document(folder)
    huge = write(tmp_path, "huge.toml", b"# " + b"x" * LARGEST_FILE)
    with pytest.raises(InvalidInputError, match="is larger than 1 MiB"):
        read_document(huge)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_document("a\0b.toml")


def test_aliases_that_multiply_themselves_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(InvalidInputError, match="more than 100,000 values"):
        read_document(write(tmp_path, "bomb.yaml", "\n".join(lines)))


def test_an_alias_to_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"levels of nesting|is no YAML"):
        read_document(write(tmp_path, "loop.yaml", "a: &a [*a]\n"))


def test_nesting_up_to_the_limit_is_read(tmp_path: Path) -> None:
    levels = DEEPEST - 2
    text = '{"a":' * levels + "1" + "}" * levels
    assert read_document(write(tmp_path, "deep.json", text)).data


def test_aliases_merges_and_plain_tags_are_read(tmp_path: Path) -> None:
    text = "base: &b {lr: 0.1}\nuse:\n  <<: *b\n  n: 1\nsame: *b\nrate: !!float 2e-5\n"
    data = read_document(write(tmp_path, "a.yaml", text)).data
    assert data["use"] == {"lr": 0.1, "n": 1}
    assert data["rate"] == 2e-5


def test_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    text = "a: &x 1\nb: &x 2\nc: *x\n"
    assert read_document(write(tmp_path, "a.yaml", text)).data == {"a": 1, "b": 2, "c": 2}


def test_unicode_is_kept(tmp_path: Path) -> None:
    for name, text in (("u.toml", "note = 'τ ≈ ε/B 🚀'"), ("u.yaml", "note: τ ≈ ε/B 🚀")):
        assert read_document(write(tmp_path, name, text)).data == {"note": "τ ≈ ε/B 🚀"}


@pytest.mark.parametrize("package", ["ruamel.yaml"])
def test_a_missing_extra_is_named(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("ruamel")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("ruamel"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=re.escape("noisescale[formats]")):
        read_document(write(tmp_path, "r.yaml", "lr: 1\n"))
    assert read_document(write(tmp_path, "r.toml", "lr = 1\n")).data == {"lr": 1}
    assert read_document(write(tmp_path, "r.json", '{"lr": 1}')).data == {"lr": 1}
