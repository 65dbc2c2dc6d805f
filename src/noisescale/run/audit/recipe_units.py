"""Lengths in a recipe that cannot be in optimizer steps, or contradict one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from noisescale.records import Recipe

MANY_EPOCHS = 10_000
"""More passes over the data than this are not meant. (assumed)"""

EARLY = 0.01
"""A last milestone within this share of the run is not meant in steps. (assumed)"""

LIKE_EPOCHS = (0.25, 0.4)
"""Milestones all before the first share of the run, that as epochs would end between the second
share and the end, are those of a schedule in epochs. (assumed)"""

_SLACK = 1.0
"""Steps by which twins may differ through rounding."""


@dataclass(frozen=True, kw_only=True)
class Counting:
    """What a "step" may have counted by mistake.

    Attributes:
        batch_size: examples per optimizer step.
        micro_batches: passes per optimizer step.
        replicas: processes that take every optimizer step.
        dataset_size: training examples.
    """

    batch_size: int
    micro_batches: int
    replicas: int
    dataset_size: int

    def units(self) -> dict[str, float]:
        """Return how many of each there are in an optimizer step."""
        return {
            "micro-batches": float(self.micro_batches),
            "the steps of all replicas": float(self.replicas),
            "micro-batches of all replicas": float(self.micro_batches * self.replicas),
            "examples": float(self.batch_size),
        }

    def named(self, times: float) -> str | None:
        """Name the unit of which an optimizer step has so many; None if there is none."""
        for name, count in self.units().items():
            if count > 1 and abs(times / count - 1) < 0.01:
                return name
        return None


def unit_warnings(recipe: Recipe, counting: Counting) -> tuple[str, ...]:
    """Return what cannot be right about the units of a recipe's lengths, one sentence each.

    Only what the recipe itself contradicts is told; a schedule that is off by a factor and
    consistent with all else cannot be seen from here.

    >>> recipe = Recipe(lr=0.1, batch_size=32, total_steps=400, total_examples=3200)
    >>> counting = Counting(batch_size=32, micro_batches=4, replicas=1, dataset_size=100)
    >>> print(unit_warnings(recipe, counting)[0])
    total_steps 400 is 4 times total_examples 3200 / batch size 32: it seems to count micro-batches
    """
    return tuple(
        warning
        for find in (_twins, _warm_up, _milestones, _evaluation, _epochs, _other_batch)
        for warning in find(recipe, counting)
    )


def _twins(recipe: Recipe, counting: Counting) -> Iterator[str]:
    own = recipe.batch_size
    for name in ("total", "warmup"):
        steps = getattr(recipe, f"{name}_steps")
        examples = getattr(recipe, f"{name}_examples")
        if steps is None or examples is None or abs(examples / own - steps) <= _SLACK:
            continue
        times = steps * own / examples
        seems = counting.named(times)
        yield (
            f"{name}_steps {steps} is {times:.3g} times {name}_examples {examples} / batch size"
            f" {own}: "
            + (f"it seems to count {seems}" if seems else "the two contradict each other")
        )


def _warm_up(recipe: Recipe, counting: Counting) -> Iterator[str]:
    warm_up, length = _steps(recipe, "warmup"), _steps(recipe, "total")
    if warm_up is not None and length is not None and warm_up >= length:
        yield (
            f"the warm-up of {warm_up:.6g} steps does not end before the training does"
            f" ({length:.6g} steps): the full rate is never reached"
            f"{_perhaps(warm_up, length, counting)}"
        )
    examples = recipe.warmup_examples
    if recipe.warmup_steps is None and examples is not None and examples < recipe.batch_size / 2:
        yield (
            f"warmup_examples {examples} is less than half a batch of {recipe.batch_size}: there"
            " is no warm-up; does it count steps?"
        )


def _milestones(recipe: Recipe, counting: Counting) -> Iterator[str]:
    found = (recipe.schedule or {}).get("milestones") or ()
    length = _steps(recipe, "total")
    numbers = [float(m) for m in found if isinstance(m, int | float)]
    if length is None or not numbers:
        return
    missed = [m for m in numbers if m >= length]
    if missed:
        yield (
            f"milestone {missed[0]:.6g} of the schedule is never reached in {length:.6g} steps"
            f"{_perhaps(max(missed), length, counting)}"
        )
        return
    last, before = max(numbers), max(numbers) / length
    as_epochs = before * counting.dataset_size / recipe.batch_size
    like_epochs = before < LIKE_EPOCHS[0] and LIKE_EPOCHS[1] <= as_epochs <= 1
    if before < EARLY or like_epochs:
        unit = "; do they count epochs?" if as_epochs <= 1 else ""
        yield (
            f"the last milestone {last:.6g} lies in the first {max(before, EARLY):.0%} of"
            f" {length:.6g} steps{unit}"
        )


def _evaluation(recipe: Recipe, counting: Counting) -> Iterator[str]:
    every, length = recipe.evaluate_every, _steps(recipe, "total")
    if every is not None and length is not None and every > length:
        yield (
            f"evaluate_every {every} is longer than the training of {length:.6g} steps"
            f"{_perhaps(every, length, counting)}"
        )


def _epochs(recipe: Recipe, counting: Counting) -> Iterator[str]:
    said = recipe.dataset_size if recipe.unit == "examples" else None
    if said is not None and said != counting.dataset_size:
        yield (
            f"dataset_size {said} of the recipe is not the number of training examples,"
            f" {counting.dataset_size}"
        )
    length = _steps(recipe, "total")
    if length is None:
        return
    epochs = length * recipe.batch_size / counting.dataset_size
    if epochs > MANY_EPOCHS:
        yield (
            f"{length:.6g} steps of {recipe.batch_size} pass {epochs:.6g} times over the data:"
            " do they count optimizer steps?"
        )


def _other_batch(recipe: Recipe, counting: Counting) -> Iterator[str]:
    names = ("total_steps", "warmup_steps", "evaluate_every")
    given = [name for name in names if getattr(recipe, name) is not None]
    if recipe.schedule and recipe.schedule.get("milestones"):
        given.append("the schedule's milestones")
    if counting.batch_size != recipe.batch_size and given:
        yield (
            f"{', '.join(given)} count steps of {recipe.batch_size} {recipe.unit}, and this batch"
            f" has {counting.batch_size}: restate the recipe at that batch size"
        )


def _steps(recipe: Recipe, name: str) -> float | None:
    steps = getattr(recipe, f"{name}_steps")
    if steps is not None:
        return float(steps)
    examples = getattr(recipe, f"{name}_examples")
    return None if examples is None else examples / recipe.batch_size


def _perhaps(steps: float, length: float, counting: Counting) -> str:
    """Ask about the unit that would bring a number into the run."""
    units = counting.units()
    for name in ("micro-batches", "examples"):
        if units[name] > 1 and steps / units[name] < length:
            return f"; does it count {name}?"
    return ""
