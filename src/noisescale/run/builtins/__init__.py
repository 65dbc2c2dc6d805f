"""The built-in workloads by name; a family's module is imported when one of it is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from noisescale.errors import InvalidInputError
from noisescale.workload import Workload

DATA_VARIABLE = "NOISESCALE_DATA"
"""Environment variable that names the data folder."""


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """Where a built-in workload is made.

    Attributes:
        module: module below this package.
        function: its function there; ``f()`` or, with a data folder, ``f(folder)``.
        file: the file that it reads from the data folder; None when it needs no folder.
        options: keyword arguments of the function that a user may set, by ``--set``.
        summary: one line for people.
    """

    module: str
    function: str
    file: str | None = None
    options: tuple[str, ...] = ()
    summary: str


BUILT_INS: dict[str, BuiltIn] = {
    "digits": BuiltIn(
        module="digits", function="digits", summary="8x8 digits, MLP 64-64-10, plain SGD"
    ),
    "digits-cnn": BuiltIn(
        module="digits", function="digits_cnn", summary="8x8 digits, small CNN, SGD with momentum"
    ),
    "chars": BuiltIn(
        module="language",
        function="chars",
        options=("text",),
        summary="character GPT on Python's own source (or --set text=FILE), AdamW",
    ),
    "quadratic": BuiltIn(
        module="quadratic",
        function="quadratic",
        summary="linear regression whose noise scale is known exactly",
    ),
    "mnist": BuiltIn(
        module="images", function="mnist", file="mnist.npz", summary="MNIST, MLP 784-100-10, SGD"
    ),
    "mnist-cnn": BuiltIn(
        module="images",
        function="mnist_cnn",
        file="mnist.npz",
        summary="MNIST, small CNN, momentum",
    ),
    "cifar10": BuiltIn(
        module="images",
        function="cifar10",
        file="cifar10-subset.npz",
        summary="CIFAR-10 subset, small CNN without BatchNorm, momentum",
    ),
    "shakespeare": BuiltIn(
        module="language",
        function="shakespeare",
        file="tinyshakespeare.txt",
        summary="character GPT on Shakespeare's plays, AdamW",
    ),
}


def build(name: str, *, data: Path | None = None, **options: str) -> Workload:
    """Make a built-in workload.

    Args:
        name: a key of :data:`BUILT_INS`.
        data: the data folder, for those that read one.
        options: what the built-in lets a user set, see :attr:`BuiltIn.options`.

    Raises:
        InvalidInputError: it needs a data folder that is not given or lacks its file.
        MissingExtraError: it needs a package that is not installed.
    """
    built_in = BUILT_INS[name]
    module = importlib.import_module(f"{__name__}.{built_in.module}")
    make: Callable[..., Workload] = getattr(module, built_in.function)
    if built_in.file is None:
        return make(**options)
    return make(_data_file(name, data, built_in.file), **options)


def _data_file(name: str, folder: Path | None, file: str) -> Path:
    remedy = f"give --data DIR (or set {DATA_VARIABLE}) with DIR holding {file}"
    if folder is None:
        raise InvalidInputError(f"workload {name!r}", "a data folder is required", remedy)
    if not folder.is_dir():
        raise InvalidInputError(f"data folder {str(folder)!r}", "the folder does not exist", remedy)
    if not (folder / file).is_file():
        raise InvalidInputError(
            f"data folder {str(folder)!r}", f"workload {name!r} needs {file} in it", remedy
        )
    return folder / file
