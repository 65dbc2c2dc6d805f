"""A converted recipe into a copy of the file it came from: comments, order and the rest stay."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.formats.document import Document, Path_, parse, syntax_of
from noisescale.formats.reading import Split
from noisescale.formats.recipe_file import RecipeFile, read_recipe
from noisescale.records import Recipe

_TOLERANCE = 1e-12
"""Relative (assumed): what computing a file's ratio and reading it back may change."""
_OF_A_COUNT = 0.01
"""Share of a count of steps that is not worth a note. (assumed)"""


def write_recipe(
    file: RecipeFile,
    changed: Recipe | Mapping[str, Any],
    path: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> RecipeFile:
    """Write a recipe in the words of the file that another one was read from.

    Only values that differ are changed, every other character stays. Keys that follow from
    others of the file (steps from epochs) are left to it. The file appears whole or not at all.

    Args:
        file: what :func:`~noisescale.formats.recipe_file.read_recipe` returned.
        changed: the new recipe, or its changed keys.
        path: the new file, which ends as the old one does.
        overwrite: replace a file that exists, also the one that was read.

    Returns:
        The new file, read back.

    Raises:
        InvalidInputError: the file exists, cannot be written, has no place for a key that
            changes, or cannot hold the new batch size at its number of devices.
        MissingExtraError: TOML, and tomlkit is not installed.
    """
    target = Path(path)
    _check_target(file, target, overwrite=overwrite)
    recipe = changed if isinstance(changed, Recipe) else file.recipe.with_changes(**changed)
    text = edited(file.document, recipe_edits(file, recipe))
    _write(file, target, file.document.to_bytes(text), recipe)
    copy = _read_again(file, target)
    return dataclasses.replace(copy, notes=(*copy.notes, *_left_over(copy, recipe)))


def recipe_edits(file: RecipeFile, recipe: Recipe) -> dict[Path_, Any]:
    """Return what must change in a file so that it says another recipe, by place.

    Args:
        file: the file and the recipe it says.
        recipe: the recipe it shall say.

    Returns:
        New values by place; empty where the file says the recipe already.

    Raises:
        InvalidInputError: the file has no place for a key that changes, or cannot hold the
            batch size at its number of devices.
    """
    edits: dict[Path_, Any] = {}
    for name in (field.name for field in dataclasses.fields(Recipe)):
        new, old = getattr(recipe, name), _old(file, name)
        if new == old or name in file.implied:
            continue
        if name == "batch_size" and file.split is not None:
            edits.update(split_edits(file, file.split, new))
        elif name in file.places:
            edits.update(_placed(file.places[name], old, new))
        elif name not in file.given or new != getattr(file.recipe, name):
            raise InvalidInputError(
                f"{file.path}: {name}",
                f"a {file.kind} file has no key for it",
                f"leave {name} as it is, or set it where the training is started",
            )
    return edits


def edited(document: Document, edits: Mapping[Path_, Any]) -> str:
    """Return a document's text with new values, after making sure that nothing else changed.

    Raises:
        InvalidInputError: a value cannot be changed alone, as behind a YAML alias, or stands
            where a table would have to be.
        MissingExtraError: the library that edits this syntax is not installed.
    """
    edits = _grounded(document, edits)
    now = None
    try:
        text = _editor(document.syntax)(document.text, edits)
        now = parse(text, syntax=document.syntax, path=document.path)
    except MissingExtraError:
        raise
    except ValueError:
        pass  # it has become unreadable
    wanted = _with_edits(document.data, edits, document.syntax)
    if now is None or not _same(now, wanted):
        places = ", ".join(".".join(map(str, place)) for place in edits)
        raise InvalidInputError(
            f"{document.path}: {places}",
            "cannot be changed without changing more (an alias or a merged key, perhaps)",
            "write the values out in the file",
        )
    return text


def _grounded(document: Document, edits: Mapping[Path_, Any]) -> dict[Path_, Any]:
    """Return edits whose tables are there: below a null, one of the null itself."""
    found: dict[Path_, Any] = {}
    for place, value in edits.items():
        depth, above = _last_there(document.data, place)
        if above is None:
            table = found.setdefault(place[:depth], {})
            for key in place[depth:-1]:
                table = table.setdefault(key, {})
            table[place[-1]] = value
        elif isinstance(above, dict | list):
            found[place] = value
        else:
            raise InvalidInputError(
                f"{document.path}: {'.'.join(map(str, place[:depth]))} {above!r:.60}",
                f"a table is required, so that {place[-1]} can be written into it",
                "correct it",
            )
    return found


def _last_there(data: Any, place: Path_) -> tuple[int, Any]:
    """Return how many keys above the last one lead somewhere, and where."""
    for depth, key in enumerate(place[:-1]):
        leads_on = key in data if isinstance(data, dict) else isinstance(data, list)
        if not leads_on:
            return depth, data
        data = data[key]
    return len(place) - 1, data


def _old(file: RecipeFile, name: str) -> Any:
    """Return what the file itself says; what was only given beside it is written."""
    return file.said.get(name) if name in file.given else getattr(file.recipe, name)


def _placed(places: tuple[Path_, ...], old: Any, new: Any) -> dict[Path_, Any]:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        changed = {key: new.get(key) for key in (*old, *new) if new.get(key) != old.get(key)}
        return {(*places[0], key): value for key, value in changed.items()}
    if isinstance(new, tuple) and len(places) == 1:
        return {places[0]: list(new)}
    if isinstance(new, tuple):
        before = old or (None,) * len(new)
        parts = zip(places, before, new, strict=True)
        return {place: value for place, was, value in parts if value != was}
    return dict.fromkeys(places, new)


def split_edits(file: RecipeFile, split: Split, batch_size: int) -> dict[Path_, Any]:
    """Keep the examples per device and pass where possible, and change the passes.

    Args:
        file: what was read.
        split: its parts, on the devices that are meant.
        batch_size: the new global batch.

    Returns:
        New values by place; empty where the parts make this batch.

    Raises:
        InvalidInputError: they cannot make it.
    """
    parts = split.micro * split.accumulation * split.world_size
    if parts != file.recipe.batch_size:
        raise InvalidInputError(
            f"{file.path}: batch_size {file.recipe.batch_size} as given",
            f"the file's parts make {split.micro} x {split.accumulation} x {split.world_size}"
            f" devices = {parts}",
            "give the number of devices, or correct the file",
        )
    micro, accumulation = resplit(file, split, batch_size)
    edits: dict[Path_, Any] = {}
    if micro != split.micro and split.micro_at is not None:
        edits.update(dict.fromkeys((split.micro_at, *split.micro_also), micro))
    if accumulation != split.accumulation and split.accumulation_at is not None:
        edits[split.accumulation_at] = accumulation
    if split.total_at is not None and file.said.get("batch_size") != batch_size:
        edits[split.total_at] = batch_size
    return edits


def resplit(file: RecipeFile, split: Split, batch_size: int) -> tuple[int, int]:
    """Return examples per device and pass, and passes, that make a global batch.

    Args:
        file: what was read.
        split: its parts, on the devices that are meant.
        batch_size: the global batch.

    Raises:
        InvalidInputError: nothing near the old parts makes it.
    """
    each, rest = divmod(batch_size, split.world_size)
    if rest or not each:
        raise InvalidInputError(
            f"{file.path}: batch size {batch_size} over {split.world_size} devices",
            f"a multiple of {split.world_size} is required",
            f"take {max(each, 1) * split.world_size} or {max(each + 1, 2) * split.world_size}",
        )
    # Passes of half the old size still use the device; smaller ones are for the user to choose.
    for micro in range(min(split.micro, each), (split.micro - 1) // 2, -1):
        if each % micro == 0:
            return micro, each // micro
    if each <= split.micro:
        return each, 1
    step = split.micro * split.world_size
    near = max(1, round(batch_size / step)) * step
    raise InvalidInputError(
        f"{file.path}: batch size {batch_size}",
        f"passes of {split.micro} on {split.world_size} devices do not divide it",
        f"take {near}",
    )


def _editor(syntax: str) -> Callable[[str, Mapping[Path_, Any]], str]:
    if syntax == "TOML":
        from noisescale.formats.toml_text import edit_toml

        return edit_toml
    if syntax == "JSON":
        from noisescale.formats.json_text import edit_json

        return edit_json
    from noisescale.formats.yaml_text import edit_yaml

    return edit_yaml


def _with_edits(data: Any, edits: Mapping[Path_, Any], syntax: str) -> Any:
    """Return plain data with values set; the slow way, on a copy without shared parts."""
    copied: Any = _spelt_out(data)
    for (*above, last), value in edits.items():
        table = copied
        for key in above:
            table = _below(table, key)
        if value is None and syntax == "TOML":
            del table[last]
        else:
            table[last] = _spelt_out(value)
    return copied


def _same(one: Any, other: Any) -> bool:
    """Compare plain data; a value that is not a number equals itself here."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or (one != one and other != other))


def _below(table: Any, key: str | int) -> Any:
    return table[key] if isinstance(key, int) else table.setdefault(key, {})


def _spelt_out(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelt_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt_out(item) for item in value]
    return value


def _check_target(file: RecipeFile, target: Path, *, overwrite: bool) -> None:
    if target.suffix.lower() != file.path.suffix.lower() and (
        target.suffix == "" or syntax_of(target) != file.document.syntax
    ):
        raise InvalidInputError(
            f"{target}",
            f"a copy of {file.path.name} is {file.document.syntax}",
            f"end its name in {file.path.suffix}",
        )
    if target.exists() and not overwrite:
        same = target.samefile(file.path) if file.path.exists() else False
        raise InvalidInputError(
            f"{target}",
            "is the recipe that was read" if same else "exists",
            "name a new file",
        )


def _write(file: RecipeFile, target: Path, content: bytes, recipe: Recipe) -> None:
    """Write beside the target, read back and compare, then put it in its place."""
    # Imported here since they take several milliseconds, and most conversions write nothing.
    import shutil
    import tempfile

    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix
        )
    except OSError as error:
        raise _unwritable(target, error) from None
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        _check_says(_read_again(file, draft), recipe)
        shutil.copymode(file.path if file.path.exists() else draft, draft)
        os.replace(draft, target.resolve())
    except OSError as error:
        raise _unwritable(target, error) from None
    except InvalidInputError as error:
        told = error.value.replace(str(draft), str(target))
        raise InvalidInputError(told, error.requirement, error.remedy) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _unwritable(target: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"{target}", f"cannot be written ({error.strerror})", "name a file in another folder"
    )


def _read_again(file: RecipeFile, path: Path) -> RecipeFile:
    unsaid = {key: file.given[key] for key in file.given if key not in file.places}
    return read_recipe(
        path,
        kind=file.kind,
        world_size=file.world_size,
        dataset_size=file.dataset_size,
        given=unsaid,
    )


def _check_says(copy: RecipeFile, recipe: Recipe) -> None:
    for name in (field.name for field in dataclasses.fields(Recipe)):
        says, meant = getattr(copy.recipe, name), getattr(recipe, name)
        if name in copy.implied or _equal(says, meant):
            continue
        raise InvalidInputError(
            f"{copy.path}: {name}",
            f"would read {says!r} where {meant!r} is meant",
            f"write {copy.where(name) or name} by hand",
        )


def _left_over(copy: RecipeFile, recipe: Recipe) -> list[str]:
    """Say where what follows from the file's other keys is not what was meant."""
    found = []
    for name in sorted(copy.implied):
        says, meant = getattr(copy.recipe, name), getattr(recipe, name)
        if not _equal(says, meant) and not _rounded(says, meant):
            found.append(
                f"{name} follows from other keys of the file: {says}, where {meant} is meant."
            )
    return found


def _rounded(says: Any, meant: Any) -> bool:
    """Whether counts differ by no more than an epoch's last, smaller batch may make."""
    counts = isinstance(says, int) and isinstance(meant, int)
    return counts and abs(says - meant) <= max(1, _OF_A_COUNT * meant)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= _TOLERANCE * abs(other)
    return bool(one == other)
