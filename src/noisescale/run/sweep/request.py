"""What is asked of a sweep, checked before anything is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.measure.arguments import check_seed
from noisescale.records import Recipe, Target
from noisescale.run.dry_run import check_workload, fresh_model
from noisescale.run.resolve import resolve_workload
from noisescale.run.sweep.identity import fingerprint
from noisescale.run.sweep.rounds import Search, Tuning
from noisescale.run.sweep.sizes import by_nearness, read_batch_sizes, step_budget
from noisescale.run.sweep.space import Dimension, extrapolated
from noisescale.theory.per_example import SQUARE_ROOT
from noisescale.workload import Workload

SEARCHES = ("grid", "quasi-random")
TRIALS = {"grid": 5, "quasi-random": 24}
"""Settings at first where none are asked for. (measured for grids, assumed for random points)"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sweep that can be run.

    Attributes:
        workload: model, loss and data.
        name: its name and fingerprint.
        targets: goals as they are spelled in plans.
        batch_sizes: in the order in which they are tuned.
        dimensions: the box, the rate first.
        search: how each batch size is searched.
        max_steps: budget of a trial in steps, or None.
        max_examples: budget of a trial in examples, or None.
        seed: of each setting's first run.
    """

    workload: Workload
    name: str
    targets: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    dimensions: tuple[Dimension, ...]
    search: Search
    max_steps: int | None
    max_examples: int | None
    seed: int

    def tuning(self, batch_size: int, tuned: Mapping[int, float]) -> Tuning:
        """Return the search at a batch size.

        Args:
            batch_size: examples per step.
            tuned: the rate's best coordinate at the batch sizes tuned before.
        """
        recipe = self.workload.recipe
        rate = self.dimensions[0]
        # The middle of the box that was asked for; without bounds, the recipe's own rate.
        known = tuned or {recipe.batch_size: math.sqrt(rate.low * rate.high)}
        return Tuning(
            workload=self.name,
            recipe=recipe,
            batch_size=batch_size,
            centre=extrapolated(
                known, batch_size, square_root=recipe.optimizer_kind in SQUARE_ROOT
            ),
            dimensions=self.dimensions,
            search=self.search,
            targets=self.targets,
            max_steps=step_budget(
                batch_size=batch_size,
                train_size=self.workload.train_size,
                max_steps=self.max_steps,
                max_examples=self.max_examples,
            ),
            seed=self.seed,
        )


def make_request(
    workload: str | Workload,
    *,
    targets: str | Sequence[str] | None,
    batch_sizes: str | Sequence[int] | None,
    trials: int | None,
    seeds: int,
    search: str,
    full: bool,
    over: Iterable[str],
    max_steps: int | None,
    max_examples: int | None,
    seed: int,
    data: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | Iterable[str] | None,
) -> Request:
    """Check everything that :func:`noisescale.sweep` is given.

    Raises:
        InvalidInputError: something cannot be used; the text says what and how to mend it.
    """
    found = resolve_workload(workload, data=data, overrides=overrides)
    goals = _goals(found, targets)
    found = _trainable(found)
    for goal in goals:
        check_workload(found, target=goal)
    sizes = read_batch_sizes(
        batch_sizes, train_size=found.train_size, recipe_size=found.recipe.batch_size
    )
    check_seed(seed)
    for name, count in (("trials", trials), ("max_steps", max_steps), ("seeds", seeds),
                        ("max_examples", max_examples)):  # fmt: skip
        _require_count(name, count)
    _refuse_met_at_start(found, goals, seed)
    how = _search(search, trials=trials, seeds=seeds, full=full)
    return Request(
        workload=found,
        name=fingerprint(found),
        targets=tuple(str(goal) for goal in goals),
        batch_sizes=tuple(by_nearness(sizes, found.recipe)),
        dimensions=_dimensions(over, found.recipe, how),
        search=how,
        max_steps=max_steps,
        max_examples=max_examples,
        seed=seed,
    )


def _goals(workload: Workload, targets: str | Sequence[str] | None) -> list[Target]:
    given = [targets] if isinstance(targets, str) else list(targets or ())
    if not given and workload.target is not None:
        return [workload.target]
    if not given:
        raise InvalidInputError(
            f"workload {workload.name!r}",
            "it names no target, and a sweep needs one",
            'give for example --target "train_loss<0.1"',
        )
    goals = [Target.parse(text) for text in given]
    return list({str(goal): goal for goal in goals}.values())


def _trainable(workload: Workload) -> Workload:
    """Bound the recipe's own batch size: it is a start, and may be larger than the data."""
    size = min(workload.recipe.batch_size, workload.train_size)
    return workload.with_recipe(workload.recipe.with_changes(batch_size=size))


def _search(kind: str, *, trials: int | None, seeds: int, full: bool) -> Search:
    if kind not in SEARCHES:
        raise InvalidInputError(
            f"search {kind!r}", "grid or quasi-random is required", nearest(kind, SEARCHES)
        )
    return Search(kind=kind, trials=trials or TRIALS[kind], seeds=seeds, full=full)


def _dimensions(over: Iterable[str], recipe: Recipe, search: Search) -> tuple[Dimension, ...]:
    given = {side.name: (side, text) for text in over for side in [Dimension.parse(text, recipe)]}
    sides = {name: side for name, (side, _) in given.items()}
    if search.kind == "grid" and "lr" in given and "=" in given["lr"][1]:
        raise InvalidInputError(
            f"--over {given['lr'][1]}",
            "a grid starts at the recipe's rate and spaces its rates itself",
            "add --search quasi-random, or start elsewhere with --set lr=...",
        )
    rate = sides.pop("lr", None) or Dimension.parse("lr", recipe)
    if sides and search.kind == "grid":
        raise InvalidInputError(
            f"--over {next(iter(sides))}",
            "a grid searches the rate alone",
            "add --search quasi-random",
        )
    return (rate, *sides.values())


def _refuse_met_at_start(workload: Workload, goals: Sequence[Target], seed: int) -> None:
    """A goal that holds before the first step needs no training at any batch size."""
    import torch

    from noisescale.run.evaluation import Evaluator

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fresh_model(workload)
    evaluator = Evaluator(workload, next(model.parameters()).device)
    for goal in goals:
        value = evaluator.value(model, goal.split, goal.metric)
        if goal.reached(value):
            raise InvalidInputError(
                f"target {goal}",
                f"it is met before the first step ({goal.name} is {value:.4g} at the start)",
                "choose a harder one",
            )


def _require_count(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InvalidInputError(
            f"{name} {value!r}", "a whole number of at least 1 is required", f"change {name}"
        )
