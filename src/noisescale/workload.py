"""A workload: what noisescale needs to know of a training in order to measure it.

Standard library only: importing it imports no torch. The callables it holds use torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, Target


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training, as callables, data and a recipe.

    Attributes:
        name: what people call it.
        model: returns a freshly initialised ``torch.nn.Module``; the caller seeds torch.
        loss: ``loss(model, batch)`` returns the mean loss over the batch's examples, a scalar.
        train: training data: a map-style dataset (``len`` and ``[i]``), a tensor, or a tuple of
            tensors with equal first dimension (a batch is then a tuple of their rows). NumPy
            arrays may stand for tensors.
        evaluate: validation data in the same form; None when there is none.
        recipe: how it is trained.
        metrics: ``metrics(model, batch)`` returns per-example values by name, each a tensor of
            shape (examples,); they are averaged over the evaluation data.
        target: the goal that short runs aim for; None means the training loss is watched.
        collate: makes a batch of a list of examples, for datasets that are not tensors.
        worst_case_batch: ``worst_case_batch(size)`` returns the batch that takes most memory.
    """

    name: str
    model: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    train: Any
    evaluate: Any = None
    recipe: Recipe
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None
    target: Target | None = None
    collate: Callable[[list[Any]], Any] | None = None
    worst_case_batch: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        for field in ("model", "loss"):
            if not callable(getattr(self, field)):
                raise InvalidInputError(
                    f"workload {self.name!r}: {field}",
                    "a callable is required",
                    f"pass a function as {field}",
                )
        if not isinstance(self.recipe, Recipe):
            raise InvalidInputError(
                f"workload {self.name!r}: recipe {type(self.recipe).__name__}",
                "a noisescale.Recipe is required",
                "write recipe=Recipe(optimizer='sgd', lr=0.1, batch_size=32)",
            )
        if self.train_size < 2:
            raise InvalidInputError(
                f"workload {self.name!r}: {self.train_size} training examples",
                "at least 2 are required",
                "pass more training data",
            )

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return data_size(self.train)

    def with_recipe(self, recipe: Recipe) -> Self:
        """Return the same workload under another recipe."""
        return replace(self, recipe=recipe)


_STREAMS = {
    "DataLoader": "pass its .dataset, and its collate_fn as collate",
    "IterableDataset": "pass a map-style dataset, with len() and [i]",
}
"""What torch has that holds batches or a stream and no examples by index, and the remedy."""


def data_size(data: Any) -> int:
    """Return the number of examples of a dataset, a tensor or a tuple of tensors.

    Raises:
        InvalidInputError: the data has no length, its tensors differ in length, or it is a
            loader or a stream.
    """
    # By name: torch is not imported here.
    for kind in type(data).__mro__:
        if kind.__module__.startswith("torch.utils.data") and kind.__name__ in _STREAMS:
            raise InvalidInputError(
                f"data of type {type(data).__name__}",
                f"examples by index are required, which a torch {kind.__name__} does not have",
                _STREAMS[kind.__name__],
            )
    try:
        if isinstance(data, tuple | list) and data and hasattr(data[0], "shape"):
            sizes = {len(part) for part in data}
            if len(sizes) > 1:
                raise InvalidInputError(
                    f"data of lengths {sorted(sizes)}",
                    "tensors of equal first dimension are required",
                    "cut them to the same length",
                )
            return sizes.pop()
        return len(data)
    except TypeError:
        raise InvalidInputError(
            f"data of type {type(data).__name__}",
            "a map-style dataset, a tensor or a tuple of tensors is required",
            "pass something with len() and [i]",
        ) from None
