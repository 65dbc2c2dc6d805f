"""Values changed in place: the new data is right and every other character stays."""

from __future__ import annotations

import copy
import json
import random
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomlkit
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.formats.json_text import edit_json, parse_json
from noisescale.formats.toml_text import edit_toml
from noisescale.formats.yaml_text import edit_yaml, parse_yaml

NAMES = st.text("abcdefgh_-é", min_size=1, max_size=6).filter(lambda name: name.strip("-_"))
SCALARS = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text("abc :#,{}[]'\"\\é\n\t", max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
TABLES = st.dictionaries(NAMES, VALUES, min_size=1, max_size=5)
NEW = st.one_of(st.integers(-5, 5), st.floats(1e-8, 1e8), st.booleans(), st.lists(st.floats(0, 1)))


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a value that holds no others."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from places(value, (*above, key))
        elif not isinstance(value, dict | list):
            yield (*above, key)


def with_value(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(data)
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return changed


def one_place(data: Any, seed: int) -> tuple[Any, ...] | None:
    found = list(places(data))
    return random.Random(seed).choice(found) if found else None


STYLES = [{}, {"indent": 4}, {"indent": 2}, {"separators": (",", ":")}, {"indent": "\t"}]


@settings(max_examples=150, deadline=None)
@given(TABLES, NEW, st.integers(0, 100), st.sampled_from(STYLES), st.booleans())
def test_json(data: Any, value: Any, seed: int, style: Any, ascii_only: bool) -> None:
    text = json.dumps(data, ensure_ascii=ascii_only, **style) + "\n"
    assert edit_json(text, {}) == text
    place = one_place(data, seed)
    if place is not None:
        assert parse_json(edit_json(text, {place: value})) == with_value(data, place, value)
    added = edit_json(text, {("zz", "new"): value, ("zy",): 1})
    assert parse_json(added) == {**data, "zz": {"new": value}, "zy": 1}
    assert list(parse_json(added)) == [*data, "zz", "zy"]
    assert added.startswith(text.rstrip().removesuffix("}").rstrip())


@settings(max_examples=120, deadline=None)
@given(TABLES, NEW, st.integers(0, 100), st.sampled_from([None, False, True]), st.integers(2, 6))
def test_yaml(data: Any, value: Any, seed: int, flow: bool | None, indent: int) -> None:
    text = yaml.safe_dump(
        data, default_flow_style=flow, indent=indent, allow_unicode=True, sort_keys=False
    )
    if parse_yaml(text) != data:
        return  # YAML 1.1 and 1.2 disagree on some words; that is not the editor's matter.
    assert edit_yaml(text, {}) == text
    place = one_place(data, seed)
    if place is not None:
        assert parse_yaml(edit_yaml(text, {place: value})) == with_value(data, place, value)
    added = edit_yaml(text, {("zz",): value, ("zy", "new"): 1})
    assert parse_yaml(added) == {**data, "zz": value, "zy": {"new": 1}}
    assert yaml.safe_load(edit_yaml("a: 1\n", {("a",): value})) == {"a": value}


@settings(max_examples=100, deadline=None)
@given(TABLES, NEW, st.integers(0, 100))
def test_toml(data: Any, value: Any, seed: int) -> None:
    text = tomlkit.dumps(data)
    if tomllib.loads(text) != data:
        return
    assert edit_toml(text, {}) == text
    place = one_place(data, seed)
    if place is not None:
        changed = edit_toml(text, {place: value})
        assert tomllib.loads(changed) == with_value(data, place, value)


COMMENTED = """\
# The recipe of the paper, table 3.

lr:    0.1      # tuned on a grid   (5 values)
batch_size: 32
betas:  [0.9,   0.95]   # not the default
"quoted key": 'it''s'   # stays
text: |
  several
  lines
schedule:        # in steps
    kind: step

    milestones:
    - 100   # first
    - 200
# the end
"""


def test_yaml_keeps_comments_and_layout() -> None:
    changed = edit_yaml(COMMENTED, {("lr",): 2e-5, ("schedule", "milestones", 1): 20})
    expected = COMMENTED.replace("0.1 ", "2.0e-05 ").replace("- 200", "- 20")
    assert changed == expected
    added = edit_yaml(COMMENTED, {("momentum",): 0.9, ("schedule", "gamma"): 0.5})
    lines = added.splitlines()
    assert lines[lines.index("    kind: step") + 1] == "    gamma: 0.5"
    assert [line for line in lines if line not in ("momentum: 0.9", "    gamma: 0.5")] == (
        COMMENTED.splitlines()
    )
    assert parse_yaml(added)["momentum"] == 0.9


@pytest.mark.parametrize("text", ["a: 1", "a: 1\r\nb: 2\r\n", "{}", "{a: {}}", "a:\n- b: 1\n"])
def test_yaml_takes_new_keys_anywhere(text: str) -> None:
    before = parse_yaml(text)
    assert parse_yaml(edit_yaml(text, {("z",): 0.5})) == {**before, "z": 0.5}
    if "\r\n" in text:
        assert edit_yaml(text, {("z",): 0.5}) == "a: 1\r\nb: 2\r\nz: 0.5\r\n"


def test_an_empty_value_is_filled() -> None:
    assert edit_yaml("a:\nb: 1\n", {("a",): 2}) == "a: 2\nb: 1\n"
    assert edit_yaml("a: null # c\nb: 1\n", {("a",): 2}) == "a: 2 # c\nb: 1\n"


@pytest.mark.parametrize("value", [1e-5, 1e16, 1.5e-7, 0.1, 3.0, 1e300, 5e-324, 12345678.9])
def test_yaml_numbers_are_numbers_to_older_readers_too(value: float) -> None:
    assert yaml.safe_load(edit_yaml("a: 1\n", {("a",): value})) == {"a": value}
    assert parse_yaml(edit_yaml("a: 1\n", {("a",): value})) == {"a": value}


TOML = """\
# top
lr = 0.1   # tuned
betas = [ 0.9, 0.95 ] # not the default

[schedule]  # in steps
kind = "step"
milestones = [
    100, # first
    200,
]
"""


def test_toml_keeps_comments_and_layout() -> None:
    changed = edit_toml(TOML, {("lr",): 0.2, ("schedule", "kind"): "cosine"})
    assert changed == TOML.replace("lr = 0.1", "lr = 0.2").replace('"step"', '"cosine"')
    added = edit_toml(TOML, {("momentum",): 0.9, ("schedule", "gamma"): 0.5})
    assert tomllib.loads(added)["momentum"] == 0.9
    assert tomllib.loads(added)["schedule"]["gamma"] == 0.5
    assert all(line in added.splitlines() for line in TOML.splitlines())
    assert edit_toml(TOML.replace("\n", "\r\n"), {("lr",): 0.2}) == (
        TOML.replace("lr = 0.1", "lr = 0.2").replace("\n", "\r\n")
    )


def test_toml_has_no_null_so_a_key_goes() -> None:
    assert edit_toml(TOML, {("lr",): None}) == TOML.replace("lr = 0.1   # tuned\n", "")
