"""The function behind ``noisescale convert``: a recipe file to a conversion, and to a new file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, NoisescaleError
from noisescale.formats.recipe_file import RecipeFile, read_recipe
from noisescale.formats.recipe_writing import resplit, split_edits, write_recipe
from noisescale.plan.convert import convert
from noisescale.records import Change, Conversion
from noisescale.run.overrides import parse_overrides, recipe_changes


def convert_file(
    path: str | PathLike[str],
    *,
    batch_size: int | None = None,
    new_dataset_size: int | None = None,
    rule: str | None = None,
    data_rule: str | None = None,
    noise_scale: float | None = None,
    curvature: float | None = None,
    unit: str | None = None,
    replicas: int | None = None,
    new_replicas: int | None = None,
    old_batch_size: int | None = None,
    dataset_size: int | None = None,
    kind: str | None = None,
    overrides: Iterable[str] = (),
    target: str | PathLike[str] | None = None,
) -> Conversion:
    """Restate the recipe of a file at another global batch size, or for data of another size.

    Args:
        path: a TOML, YAML or JSON file: our own flat keys, or a configuration of Transformers,
            DeepSpeed, Lightning or timm.
        batch_size: see :func:`noisescale.plan.convert.convert`, as the next six are; by default
            what the file's parts make on ``new_replicas`` devices.
        new_dataset_size: training examples of the new run.
        rule: name of the rule by which the rate follows the batch.
        data_rule: name of the rule by which it follows the data.
        noise_scale: at the old batch size, in the recipe's unit.
        curvature: largest along the run.
        unit: what ``batch_size`` counts.
        replicas: devices of the old run, where the file does not say it.
        new_replicas: devices of the new run; those of the old run by default.
        old_batch_size: global batch size of the run, where the file does not say it.
        dataset_size: training examples of the old run, where the file does not say it.
        kind: whose keys the file has (``noisescale``, ``transformers``, ``deepspeed``,
            ``lightning``, ``timm``), where they do not tell.
        overrides: ``key=value`` texts that change the recipe first.
        target: a new file, a copy of the old one with the new values.

    Returns:
        The conversion; each change knows the file's own key, and a note tells how the file's
        parts make the new batch.

    Raises:
        InvalidInputError: the file cannot be read, says a rate that its own framework scales
            already, does not say its global batch; what ``convert`` refuses; or the new file
            cannot be written.
        MissingExtraError: a library that reads or writes this kind of file is not installed.
    """
    given = recipe_changes(parse_overrides(overrides))
    about: dict[str, Any] = {"kind": kind, "dataset_size": dataset_size, "given": given}
    file = _read(path, replicas, _old_batch_size(old_batch_size, given), about)
    if batch_size is None and (new_dataset_size is None or new_replicas is not None):
        batch_size, unit = _new_batch_size(file, new_replicas), None
    done = convert(
        file.recipe,
        batch_size=batch_size,
        new_dataset_size=new_dataset_size,
        pass_growth=None if unit is not None else _pass_growth(file, new_replicas, batch_size),
        rule=rule,
        data_rule=data_rule,
        noise_scale=noise_scale,
        curvature=curvature,
        unit=unit,
        where=str(file.path),
    )
    if (done.recipe.batch_size, done.recipe.lr) != (done.original.batch_size, done.original.lr):
        _refuse_scaling_twice(file)
    if done.data is not None:
        file = _on_data(file, done.data.new_dataset_size)
    if new_replicas is not None:
        file = _on_devices(file, new_replicas, done.new_batch_size)
    done = _in_the_words_of(file, done)
    parts = _parts(file, done.new_batch_size, required=new_replicas is not None)
    if target is None:
        return dataclasses.replace(done, notes=(*done.notes, *_foreseen(file, done), *parts))
    written = write_recipe(file, done.recipe, target)
    notes = (*done.notes, *written.notes, *parts)
    return dataclasses.replace(done, notes=tuple(dict.fromkeys(notes)))


def _old_batch_size(stated: int | None, given: dict[str, Any]) -> int | None:
    """Return the old global batch, by whichever option it was said."""
    other = given.get("batch_size", stated)
    if stated is not None and other != stated:
        raise InvalidInputError(
            f"--old-batch-size {stated} and --set batch_size={other}",
            "they contradict each other",
            "give one of them",
        )
    return stated


def _read(
    path: str | PathLike[str],
    replicas: int | None,
    old_batch_size: int | None,
    about: dict[str, Any],
) -> RecipeFile:
    """Read a file and find out its global batch, or refuse."""
    given = about["given"]
    if old_batch_size is not None:
        about = {**about, "given": {**given, "batch_size": old_batch_size}}
    file = read_recipe(path, world_size=replicas, **about)
    if file.split is None:
        _refuse_another_batch_size(file, old_batch_size)
        return file
    stated = about["given"].get("batch_size")
    if stated is not None:
        # It says how many devices share the file's parts; the parts stay what is written.
        rest = {key: value for key, value in given.items() if key != "batch_size"}
        devices = _devices(file, stated)
        return read_recipe(path, world_size=devices, **{**about, "given": rest})
    if replicas is None:
        _refuse_unknown_devices(file)
    return file


def _new_batch_size(file: RecipeFile, devices: int | None) -> int:
    """Return the global batch of a file that stays as it is on other devices."""
    split = file.split
    if devices is None or split is None or split.total_at is not None:
        raise InvalidInputError(
            "no --batch-size",
            "the new global batch is required",
            "give --batch-size N, or --new-replicas N where the file says examples per device, or"
            " --new-dataset-size N where only the data change",
        )
    return split.micro * split.accumulation * devices


def _on_data(file: RecipeFile, size: int) -> RecipeFile:
    """Return a file as it is to be written for data of another size."""
    recipe = file.recipe
    if "dataset_size" not in file.places:
        recipe = recipe.with_changes(dataset_size=size)  # only its lengths in epochs hang on it
    return dataclasses.replace(file, dataset_size=size, recipe=recipe)


def _pass_growth(file: RecipeFile, devices: int | None, size: int | None) -> float | None:
    """Return new over old examples of one device's pass; None where the file does not tell."""
    if file.split is None or not isinstance(size, int):
        return None
    try:
        there = file if devices is None else _on_devices(file, devices, size)
        assert there.split is not None
        micro, _ = resplit(there, there.split, size)
    except InvalidInputError:
        return None
    return micro / file.split.micro


def _on_devices(file: RecipeFile, devices: int, size: int) -> RecipeFile:
    """Return a file as it is to be written for another number of devices."""
    if file.split is None:
        return file  # it writes the global batch, whatever the devices
    if file.kind == "lightning" and _says_devices(file):
        raise InvalidInputError(
            f"--new-replicas {devices}",
            f"{file.path} says its own devices",
            "change trainer.devices in a copy and convert that, or leave --new-replicas out",
        )
    split = dataclasses.replace(file.split, world_size=devices)
    each, rest = divmod(size, split.accumulation * devices)
    if split.micro_at is None and file.world_size is None and each and not rest:
        # Nobody said what one device held: the passes are what the file says.
        split = dataclasses.replace(split, micro=each)
    says = split.micro * split.accumulation * devices
    recipe = file.recipe.with_changes(batch_size=says)
    # Where the parts are right already a total beside them may still be the old one: writing
    # compares with the file itself what was given beside it.
    given = {**file.given, "batch_size": says} if says == size and split.total_at else file.given
    return dataclasses.replace(file, split=split, world_size=devices, recipe=recipe, given=given)


def _says_devices(file: RecipeFile) -> bool:
    """Whether reading it with another number of devices contradicts the file."""
    try:
        read_recipe(
            file.path, kind=file.kind, world_size=(file.world_size or 1) + 1, given=file.given
        )
    except InvalidInputError:
        return True
    return False


def _parts(file: RecipeFile, size: int, *, required: bool) -> tuple[str, ...]:
    """Say how the file's parts make a global batch, and which of them change for it."""
    split = file.split
    if split is None:
        return ()
    try:
        edits = split_edits(file, split, size)
        micro, passes = resplit(file, split, size)
    except InvalidInputError as error:
        if required:
            raise
        return (str(error),)  # it matters to who writes the file
    changed = [f"{'.'.join(map(str, place))} becomes {new}" for place, new in edits.items()]
    return (
        f"in {file.path.name} the batch of {size:,} is {micro} per device and pass x"
        f" {_several(passes, 'pass', 'es')} x {_several(split.world_size, 'device', 's')}: "
        + (" and ".join(changed) if changed else "as it stands"),
    )


def _several(count: int, what: str, ending: str) -> str:
    return f"{count} {what}{ending if count != 1 else ''}"


def _refuse_unknown_devices(file: RecipeFile) -> None:
    """Refuse a file whose global batch hangs on devices that nobody counted."""
    assert file.split is not None
    if file.world_size is not None:
        return
    try:
        with_two = read_recipe(file.path, kind=file.kind, world_size=2, given=file.given)
    except InvalidInputError:
        return  # the file's own total forbids it
    if with_two.recipe.batch_size != file.recipe.batch_size:
        micro, passes = file.split.micro, file.split.accumulation
        raise InvalidInputError(
            f"{file.path}: the number of devices",
            f"it is not said, and the global batch is {micro} x {passes} x devices",
            "give --replicas N or --old-batch-size N",
        )


def _refuse_another_batch_size(file: RecipeFile, old_batch_size: int | None) -> None:
    said = file.said.get("batch_size")
    if old_batch_size is not None and said is not None and said != old_batch_size:
        raise InvalidInputError(
            f"--old-batch-size {old_batch_size}",
            f"contradicts {file.where('batch_size')} {said} in {file.path}",
            "give one of them",
        )


def _devices(file: RecipeFile, old_batch_size: int) -> int:
    """Return the devices that make a global batch of the file's micro-batches."""
    assert file.split is not None
    each = file.split.micro * file.split.accumulation
    devices, rest = divmod(old_batch_size, each)
    if rest or (file.world_size is not None and devices != file.world_size):
        total = each * (file.world_size or 1)
        stated = f"{file.split.micro} x {file.split.accumulation} x {file.world_size or 'devices'}"
        raise InvalidInputError(
            f"--old-batch-size {old_batch_size}",
            f"contradicts {stated} (micro x accumulation x devices) of {file.path}",
            f"give {total}" if file.world_size else f"give a multiple of {each}",
        )
    return devices


def _refuse_scaling_twice(file: RecipeFile) -> None:
    if file.already_scaled is not None:
        raise InvalidInputError(
            f"{file.path}: {file.already_scaled.rstrip('.')}",
            "a rate that is scaled already is not scaled again",
            "change the batch size there and let it scale, or remove that key and write the rate"
            " that it comes to",
        )


def _in_the_words_of(file: RecipeFile, done: Conversion) -> Conversion:
    """Name the file's own keys, and tell what its reader assumed."""

    def named(rows: tuple[Change, ...]) -> tuple[Change, ...]:
        return tuple(dataclasses.replace(row, key=_key(file, row.name)) for row in rows)

    return dataclasses.replace(
        done,
        changes=named(done.changes),
        kept=named(done.kept),
        notes=(*done.notes, *_following(file, done), *file.notes),
    )


def _key(file: RecipeFile, name: str) -> str | None:
    key = file.where(name)
    return None if key == name or name in file.implied else key


def _following(file: RecipeFile, done: Conversion) -> tuple[str, ...]:
    """Say which of the changes are made by keys of the file that stay: epochs and ratios."""
    rows = (*done.changes, *done.kept)
    names = [row.name for row in rows if row.name in file.implied and row.name != "lr"]
    if not names:
        return ()
    verb = "follows" if len(names) == 1 else "follow"
    return (f"{' and '.join(names)} {verb} from epochs or ratios of the file, which stay",)


def _foreseen(file: RecipeFile, done: Conversion) -> tuple[str, ...]:
    """Say what those keys make of the lengths where it is not what is meant."""
    if done.unchanged or not file.implied:
        return ()
    # Imported here since it takes several milliseconds, and most files say their lengths.
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as folder:
            draft = write_recipe(file, done.recipe, Path(folder) / file.path.name)
    except (NoisescaleError, OSError):
        return ()  # it matters to who writes the file
    return tuple(note for note in draft.notes if note not in file.notes)
