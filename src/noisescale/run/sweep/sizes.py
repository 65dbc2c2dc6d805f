"""Batch sizes and budgets of a sweep, as texts and as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe

SMALLEST_SHARE, LARGEST_SHARE = 1 / 16, 32
"""Batch sizes of a sweep that names none, over the recipe's own. (assumed: they span the critical
batch of a recipe within a factor of ten of it)"""

EPOCHS = 40
"""Passes over the data that a trial may take where no budget is named. (assumed)"""

STEPS = 1000
"""Steps that a trial may take at least where no budget is named: at a large batch, passes over
the data are few steps. (assumed)"""


def read_batch_sizes(
    given: str | Sequence[int] | None, *, train_size: int, recipe_size: int
) -> tuple[int, ...]:
    """Return the batch sizes of a sweep, ascending, each once.

    Args:
        given: numbers; or a text of parts with commas between, each a number, ``full`` (all
            training examples) or ``FROM:TO`` (doubled from the first up to the second, either of
            them ``full``); None chooses about the recipe's.
        train_size: training examples.
        recipe_size: the recipe's batch size.

    Raises:
        InvalidInputError: a part cannot be read, or a size is larger than the data.

    >>> read_batch_sizes("2:16", train_size=100, recipe_size=8)
    (2, 4, 8, 16)
    >>> read_batch_sizes("1,3,full", train_size=100, recipe_size=8)
    (1, 3, 100)
    """
    if given is None:
        low, high = max(1, round(recipe_size * SMALLEST_SHARE)), recipe_size * LARGEST_SHARE
        return tuple(_doubled(low, min(high, train_size)))
    if isinstance(given, str):
        found = [size for part in given.split(",") for size in _part(given, part, train_size)]
    else:
        found = list(given)
    for size in found:
        _check(size, train_size)
    if not found:
        raise _unreadable(given)
    return tuple(sorted(set(found)))


def step_budget(
    *, batch_size: int, train_size: int, max_steps: int | None, max_examples: int | None
) -> int:
    """Return the steps that a trial may take at a batch size.

    With one budget, that one; with both, the more generous of them; with none, 40 passes over
    the data or 1,000 steps, whichever is more.

    Args:
        batch_size: examples per step.
        train_size: training examples.
        max_steps: budget in optimizer steps.
        max_examples: budget in examples.

    >>> step_budget(batch_size=10, train_size=100, max_steps=None, max_examples=5000)
    500
    """
    if max_steps is None and max_examples is None:
        max_steps, max_examples = STEPS, EPOCHS * train_size
    return max(max_steps or 1, -(-(max_examples or 0) // batch_size))


def by_nearness(sizes: Sequence[int], recipe: Recipe) -> list[int]:
    """Order batch sizes by how near they are to the recipe's own, where its rate is a start.

    >>> by_nearness([1, 4, 16, 64], Recipe(lr=1.0, batch_size=16))
    [16, 4, 64, 1]
    """
    own = recipe.batch_size
    return sorted(sizes, key=lambda size: (max(size / own, own / size), size))


def _part(given: str, part: str, train_size: int) -> list[int]:
    low, colon, high = part.partition(":")
    first = _number(given, low, train_size)
    if not colon:
        return [first]
    last = _number(given, high, train_size)
    if not 1 <= first <= last:
        raise _unreadable(given)
    return _doubled(first, last)


def _doubled(low: int, high: int) -> list[int]:
    sizes = [low]
    while sizes[-1] * 2 <= high:
        sizes.append(sizes[-1] * 2)
    return sizes


def _number(given: str, text: str, train_size: int) -> int:
    if text.strip() == "full":
        return train_size
    try:
        return int(text)
    except ValueError:
        raise _unreadable(given) from None


def _unreadable(given: object) -> InvalidInputError:
    return InvalidInputError(
        f"batch sizes {given!r}",
        "numbers with commas between, FROM:TO or full are required",
        "write for example 2:1024 or 8,32,128,full",
    )


def _check(size: int, train_size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InvalidInputError(
            f"batch size {size!r}", "a whole number of at least 1 is required", "change it"
        )
    if size > train_size:
        raise InvalidInputError(
            f"batch size {size}",
            f"the workload has {train_size} training examples, and a batch cannot be larger",
            f"choose at most {train_size}, or full",
        )
