"""From what a user typed to a workload that is known to work.

A workload is a built-in name, ``module:attribute`` or ``path/to/file.py:attribute``. Whatever
goes wrong here, in the user's file too, becomes one :class:`InvalidInputError`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from noisescale.errors import InvalidInputError, NoisescaleError, nearest
from noisescale.records import Target
from noisescale.run.builtins import BUILT_INS, DATA_VARIABLE, build
from noisescale.run.overrides import parse_overrides, recipe_changes
from noisescale.run.users_code import blame_user
from noisescale.workload import Workload


def resolve_workload(
    spec: str | Workload,
    *,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
) -> Workload:
    """Return the workload that a user names.

    Args:
        spec: a built-in's name, ``module:attribute``, ``path/to/file.py:attribute``, where the
            attribute is a Workload or a function without arguments that returns one; or a
            Workload, which only gets the overrides.
        data: folder of the built-ins that read files; else the environment variable
            ``NOISESCALE_DATA``.
        overrides: recipe keys to replace, as a mapping or as ``key=value`` texts.

    Raises:
        InvalidInputError: nothing of that name, or not a workload, or an override that cannot
            be used.
    """
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides or ())
    if isinstance(spec, Workload):
        return _with_overrides(spec, given)
    if ":" in spec:
        return _with_overrides(_from_python(spec), given)
    if spec not in BUILT_INS:
        raise _unknown(spec)
    options = {key: str(given[key]) for key in BUILT_INS[spec].options if key in given}
    workload = build(spec, data=_data_folder(data), **options)
    return _with_overrides(workload, {k: v for k, v in given.items() if k not in options})


def find_target(workload: Workload, text: str | None) -> Target | None:
    """Return the target that a user asks for, or the workload's own.

    Raises:
        InvalidInputError: the text is not a target.
    """
    return workload.target if text is None else Target.parse(text)


def _with_overrides(workload: Workload, given: Mapping[str, Any]) -> Workload:
    if given:
        workload = workload.with_recipe(workload.recipe.with_changes(**recipe_changes(given)))
    return in_sequences(workload) if workload.recipe.unit == "tokens" else workload


def in_sequences(workload: Workload) -> Workload:
    """Restate a recipe counted in tokens in sequences, which are the rows of the data.

    Raises:
        InvalidInputError: the recipe has no sequence length, or its batch is not whole.
    """
    recipe, length = workload.recipe, workload.recipe.sequence_length
    if length is None or recipe.batch_size % length:
        raise InvalidInputError(
            f"batch size {recipe.batch_size} tokens",
            f"a multiple of the recipe's sequence_length ({length}) is required",
            "give sequence_length and a whole number of sequences",
        )
    counts = {
        name: max(1, getattr(recipe, name) // length)
        for name in ("batch_size", "total_examples", "warmup_examples")
        if getattr(recipe, name) is not None
    }
    return workload.with_recipe(recipe.with_changes(unit="sequences", **counts))


def _data_folder(data: str | os.PathLike[str] | None) -> Path | None:
    folder = data if data is not None else os.environ.get(DATA_VARIABLE) or None
    return None if folder is None else Path(folder).expanduser()


def _unknown(spec: str) -> InvalidInputError:
    if spec.endswith(".py"):
        return InvalidInputError(
            f"workload {spec!r}",
            "the attribute that holds the Workload is required",
            f"write {spec}:NAME",
        )
    return InvalidInputError(
        f"workload {spec!r}",
        "a built-in name, module:attribute or path/to/file.py:attribute is required",
        nearest(spec, BUILT_INS),
    )


def _from_python(spec: str) -> Workload:
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise InvalidInputError(
            f"workload {spec!r}",
            "both sides of the colon are required",
            "write module:attribute or path/to/file.py:attribute",
        )
    is_file = place.endswith(".py") or os.sep in place
    module = _load_file(spec, place) if is_file else _load_module(spec, place)
    return _as_workload(spec, _attribute(spec, module, attribute))


def _load_file(spec: str, place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise InvalidInputError(
            f"workload {spec!r}", f"the file {place} does not exist", _files_beside(path)
        )
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"noisescale_workload_{name}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InvalidInputError(
            f"workload {spec!r}", f"{place} is not a Python file", "name a file that ends in .py"
        )
    module = importlib.util.module_from_spec(found)
    # Registered before it runs, as an import would do: dataclasses and pickle look it up.
    sys.modules[name] = module
    _put_on_path(path.parent)
    try:
        with blame_user(f"workload {spec!r}: running the file"):
            found.loader.exec_module(module)
    except NoisescaleError:
        del sys.modules[name]
        raise
    return module


def _files_beside(path: Path) -> str:
    names = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
    return nearest(path.name, names) if names else "check the path"


def _load_module(spec: str, place: str) -> ModuleType:
    _put_on_path(Path.cwd())
    with blame_user(f"workload {spec!r}: importing {place}"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as problem:
            # Only when the named module itself is the missing one; else its import is at fault.
            if problem.name is None or not f"{place}.".startswith(f"{problem.name}."):
                raise
            raise InvalidInputError(
                f"workload {spec!r}",
                f"there is no module {problem.name!r}",
                "name a module that Python can import from here, or a path that ends in .py",
            ) from None


def _put_on_path(folder: Path) -> None:
    """Let imports find a folder's modules, as ``python file.py`` there would.

    The folder stays on the path: a workload may import within its functions.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(spec: str, module: ModuleType, attribute: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        own = [name for name in vars(module) if not name.startswith("_")]
        remedy = nearest(attribute, _likely(module, own) or own) if own else "add it"
        raise InvalidInputError(
            f"workload {spec!r}", f"there is no attribute {attribute!r}", remedy
        ) from None


def _likely(module: ModuleType, names: list[str]) -> list[str]:
    """Keep the names that could be meant: workloads, and functions written in that module."""
    return [
        name
        for name in names
        if isinstance(getattr(module, name), Workload)
        or getattr(getattr(module, name), "__module__", None) == module.__name__
    ]


def _as_workload(spec: str, thing: Any) -> Workload:
    made = thing
    if inspect.isfunction(thing) or inspect.isbuiltin(thing):
        _require_no_arguments(spec, thing)
        with blame_user(f"workload {spec!r}: calling it"):
            made = thing()
    if isinstance(made, Workload):
        return made
    got = "a class" if inspect.isclass(made) else f"a {type(made).__name__}"
    raise InvalidInputError(
        f"workload {spec!r}",
        f"a noisescale.Workload is required, got {got}{_missing_parts(made)}",
        "return Workload(name=..., model=..., loss=..., train=..., recipe=Recipe(...))",
    )


def _missing_parts(made: Any) -> str:
    """Say what a thing that resembles a workload lacks."""
    parts = ("name", "model", "loss", "train", "recipe")
    keys = set(made) if isinstance(made, Mapping) else {p for p in parts if hasattr(made, p)}
    missing = [part for part in parts if part not in keys]
    return f" without {', '.join(missing)}" if len(missing) < len(parts) and missing else ""


def _require_no_arguments(spec: str, function: Any) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as problem:
        raise InvalidInputError(
            f"workload {spec!r}",
            f"a function that can be called without arguments is required ({problem})",
            "give its arguments defaults",
        ) from None
    except ValueError:  # no signature is known: calling it will tell
        return
