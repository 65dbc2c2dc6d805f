"""Recipes in files: our own, and those of other people's frameworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.formats.already_scaled import already_scaled, computed_rate
from noisescale.formats.detection import KINDS, detected_kind
from noisescale.formats.document import Document, Path_, read_document
from noisescale.formats.keys import Keys
from noisescale.formats.reading import Reading, Split
from noisescale.records import Recipe


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe and the file it was read from.

    Attributes:
        path: the file.
        kind: whose keys it has: ``noisescale``, ``transformers``, ``deepspeed``,
            ``lightning`` or ``timm``.
        recipe: what it says, with what was given beside it and its framework's defaults.
        already_scaled: one sentence that names the key and value by which the file or its
            framework itself scales the rate with the batch size; None where nothing does.
        world_size: devices that train together; None where nobody said it (then 1 is assumed).
        micro_batch_size: examples per device and pass, where the file says it.
        accumulation: passes per step, where the file says it.
        notes: what was assumed, and keys that matter and were not understood.
        places: by recipe key, the keys of the file that say it (or would).
        said: recipe keys that the file itself says, with their values.
        implied: recipe keys that follow from others of the file (epochs, ratios): they change
            with the batch size while the file stays.
        document: the file's text and data.
    """

    path: Path
    kind: str
    recipe: Recipe
    already_scaled: str | None
    world_size: int | None
    micro_batch_size: int | None
    accumulation: int | None
    notes: tuple[str, ...]
    places: Mapping[str, tuple[Path_, ...]]
    said: Mapping[str, Any]
    implied: frozenset[str]
    document: Document = field(repr=False)
    split: Split | None = field(default=None, repr=False)
    dataset_size: int | None = field(default=None, repr=False)
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def where(self, key: str) -> str | None:
        """Return the file's name of a recipe key, dotted; None where it has none.

        Two names where the file keeps the parts apart, as a batch size or betas.
        """
        places = self.places.get(key)
        return ", ".join(".".join(map(str, place)) for place in places) if places else None


def read_recipe(
    path: str | PathLike[str],
    *,
    kind: str | None = None,
    world_size: int | None = None,
    dataset_size: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> RecipeFile:
    """Read a recipe from a TOML, JSON or YAML file.

    Args:
        path: the file; nothing in it is executed.
        kind: whose keys it has (``RecipeFile.kind``); default: what its keys look like.
        world_size: devices that train together, where the file does not say it.
        dataset_size: training examples, where the file does not say it; turns epochs into
            steps.
        given: recipe keys that replace or complete what the file says.

    Returns:
        The recipe, where it stands, and what its reader should know.

    Raises:
        InvalidInputError: the file cannot be read, its kind cannot be told, a value cannot be
            used, keys contradict each other, or the rate or the batch size is missing; the
            message names the file and the key.
        MissingExtraError: a YAML file, and ruamel.yaml is not installed.
    """
    _check_count("world_size", world_size)
    _check_count("dataset_size", dataset_size)
    if kind is not None and kind not in KINDS:
        raise InvalidInputError(f"kind {kind!r}", "no kind of recipe file", nearest(kind, KINDS))
    document = read_document(path)
    chosen = kind or detected_kind(document.data, document.path)
    reading, notes = _read(chosen, document, world_size, dataset_size)
    devices = _devices(reading, (given or {}).get("batch_size"))
    if devices is not None:
        reading, notes = _read(chosen, document, devices, dataset_size)
    recipe = _recipe(document.path, chosen, reading, dict(given or {}))
    scaled = already_scaled(document.data) or reading.already_scaled
    return RecipeFile(
        path=document.path,
        kind=chosen,
        recipe=recipe,
        already_scaled=scaled,
        world_size=reading.world_size,
        micro_batch_size=reading.split.micro if reading.split else None,
        accumulation=reading.split.accumulation if reading.split else None,
        notes=tuple(notes),
        places=reading.places,
        said={key: value for key, value in reading.values.items() if value is not None},
        implied=frozenset(reading.implied),
        document=document,
        split=reading.split,
        dataset_size=dataset_size,
        given=dict(given or {}),
    )


def _devices(reading: Reading, batch_size: Any) -> int | None:
    """Return the devices that a global batch, given beside the file, makes of its parts."""
    if reading.split is None or reading.world_size is not None or not isinstance(batch_size, int):
        return None
    devices, rest = divmod(batch_size, reading.split.micro * reading.split.accumulation)
    return devices if devices and not rest and reading.split.total_at is None else None


def _read(
    kind: str, document: Document, world_size: int | None, dataset_size: int | None
) -> tuple[Reading, list[str]]:
    """Read the keys of a kind; say it where the rate is no number since it is computed."""
    notes: list[str] = []
    keys = Keys(document.data, document.path, notes)
    try:
        return _reader(kind)(keys, world_size, dataset_size), notes
    except InvalidInputError:
        computed = computed_rate(document.data)
        if computed is None:
            raise
        raise InvalidInputError(
            f"{document.path}: {computed}",
            "the rate is computed from the batch size or devices when the training starts",
            "nothing is to be scaled; to convert it, write the number that it comes to",
        ) from None


def _reader(kind: str) -> Callable[[Keys, int | None, int | None], Reading]:
    """Return the reader of a kind; only what is needed is imported."""
    from importlib import import_module

    read: Callable[[Keys, int | None, int | None], Reading] = import_module(
        f"noisescale.formats.recipe_kinds.{kind}"
    ).read
    return read


def _recipe(path: Path, kind: str, reading: Reading, given: Mapping[str, Any]) -> Recipe:
    said = {key: value for key, value in reading.values.items() if value is not None}
    values = {**said, **reading.implied, **given}
    # Our own files may leave the optimizer out, as recipes do; guessing it for others is wrong.
    for key in ("lr", "batch_size") + (("optimizer",) if kind != "noisescale" else ()):
        if values.get(key) is None:
            raise InvalidInputError(f"{path}: {key}", "missing", f"write {_named(reading, key)}")
    known = Recipe.__dataclass_fields__
    for key in values:
        if key not in known:
            raise InvalidInputError(f"{path}: key {key!r}", "not a recipe key", nearest(key, known))
    try:
        recipe = Recipe(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.value}", error.requirement, error.remedy) from None
    if recipe.dataset_size is not None and recipe.unit != "tokens":
        _check_fits(path, recipe)
    return recipe


def _check_fits(path: Path, recipe: Recipe) -> None:
    if recipe.batch_size > (recipe.dataset_size or recipe.batch_size):
        raise InvalidInputError(
            f"{path}: batch_size {recipe.batch_size} with dataset_size {recipe.dataset_size}",
            "the batch is larger than the data",
            "correct one",
        )


def _named(reading: Reading, key: str) -> str:
    places = reading.places.get(key, ((key,),))
    return ", ".join(".".join(map(str, place)) for place in places) + " into the file"


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidInputError(
            f"{name} {value!r}", "a whole number of at least 1 is required", f"change {name}"
        )
