"""What a scaling rule is: a law with its source, its assumption and how far it holds."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.scaling.stability import stability_warnings

SMALLEST_EPS = 2.0**-126
"""Smallest normal number of float32: an eps below it is lost. (paper: IEEE 754)"""

HOW_TO_GIVE = {
    "noise_scale": "give --noise-scale X, as noisescale measure reports it",
    "curvature": "give --curvature X, as noisescale measure reports it",
    "pass_growth": "give new over old examples of one device's pass",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was measured on the training, or is known of it otherwise.

    Attributes:
        noise_scale: B_n, the online B_simple at the old batch size, in the recipe's unit.
        curvature: upper quantile along the run of the largest eigenvalue of the Hessian H; for
            Adam and RMSProp of P^-1/2 H P^-1/2 with P = sqrt(v) + eps, at the old batch size.
        pass_growth: examples of one device's pass, which are BatchNorm's batch, over those of the
            old run; unless known, they are taken to grow as the global batch does.
    """

    noise_scale: float | None = None
    curvature: float | None = None
    pass_growth: float | None = None

    def __post_init__(self) -> None:
        for name in ("noise_scale", "curvature", "pass_growth"):
            value = getattr(self, name)
            if value is None:
                continue
            # Real: numpy's numbers too, as they come out of measurements.
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise InvalidInputError(
                    f"{name} {value!r}",
                    "a positive finite number is required",
                    HOW_TO_GIVE[name],
                )
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A recipe by one rule.

    Attributes:
        recipe: batch_size and what the rule sets: lr, momentum, dampening, betas, alpha, eps.
        factor: new learning rate over the old one.
        why: one sentence, with numbers.
        warnings: one sentence each.
    """

    recipe: Recipe
    factor: float
    why: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """What a law answers: the keys to change besides the batch size, and why."""

    keys: dict[str, Any]
    why: str
    warnings: tuple[str, ...] = ()


Law = Callable[[Recipe, int, Facts], Change]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the learning rate and the averages of an optimizer follow the batch size.

    Attributes:
        name: as ``--rule`` takes it.
        optimizers: kinds that it is for (:attr:`~noisescale.records.Recipe.optimizer_kind`).
        source: paper with section, or the derivation.
        status: ``paper``, ``measured`` or ``assumed``.
        assumption: what must hold for the rule to preserve what it says.
        validity: where it holds, and where it was seen to fail.
        preserves: what stays the same.
        exact: from A to B to C is from A to C, and from A to A changes nothing, with the same
            facts.
        needs: names of the facts without which it has no answer.
        spoken: by kind of optimizer, what is said of it alone: other words, or another status,
            for some of the texts above.
        law: the formula.
    """

    name: str
    optimizers: tuple[str, ...]
    source: str
    status: str
    assumption: str
    validity: str
    preserves: str
    exact: bool
    needs: tuple[str, ...] = ()
    spoken: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)
    law: Law = field(repr=False, compare=False)

    def of(self, kind: str) -> Rule:
        """Return the rule in the words that are meant for one kind of optimizer.

        Args:
            kind: :attr:`~noisescale.records.Recipe.optimizer_kind`.
        """
        words: dict[str, Any] = dict(self.spoken.get(kind, {}))
        return replace(self, **words) if words else self

    def scale(self, recipe: Recipe, batch_size: int, facts: Facts | None = None) -> Scaled:
        """Restate the rate and the averages of a recipe at another batch size.

        Args:
            recipe: at the old batch size.
            batch_size: the new one, in the recipe's unit.
            facts: what is known besides; see ``needs``.

        Returns:
            The recipe with its batch size, rate and averages changed, nothing else; the same
            numbers where the batch size is the same.

        Raises:
            InvalidInputError: the rule is not for this optimizer, lacks a fact, or has no answer
                here.
        """
        facts = facts or Facts()
        self._check(recipe, batch_size, facts)
        if batch_size == recipe.batch_size:
            why = f"the global batch stays at {batch_size}: nothing changes"
            return Scaled(recipe=recipe, factor=1.0, why=why)
        change = self.law(recipe, batch_size, facts)
        _check_eps(recipe, change.keys.get("eps"))
        new = recipe.with_changes(batch_size=batch_size, **change.keys)
        return Scaled(
            recipe=new,
            factor=new.lr / recipe.lr,
            why=change.why,
            warnings=change.warnings
            + stability_warnings(recipe, new, facts.curvature, facts.noise_scale),
        )

    def _check(self, recipe: Recipe, batch_size: int, facts: Facts) -> None:
        if recipe.optimizer_kind not in self.optimizers:
            raise InvalidInputError(
                f"rule {self.name} with {recipe.optimizer_kind}",
                f"it is for {', '.join(self.optimizers)}",
                "choose another rule",
            )
        for name in self.needs:
            if getattr(facts, name) is None:
                raise InvalidInputError(
                    f"rule {self.name}", f"needs the {name.replace('_', ' ')}", HOW_TO_GIVE[name]
                )
        check_batch_size(recipe, batch_size)


def check_batch_size(recipe: Recipe, batch_size: int) -> None:
    """Refuse a batch size that is none, or one of more examples than there are.

    Args:
        recipe: its ``dataset_size`` is used where its unit is examples.
        batch_size: in the recipe's unit.

    Raises:
        InvalidInputError: it cannot be used.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InvalidInputError(
            f"batch_size {batch_size!r}", "a whole number of at least 1 is required", "change it"
        )
    size = recipe.dataset_size
    if recipe.unit == "examples" and size is not None and batch_size > size:
        raise InvalidInputError(
            f"batch_size {batch_size}",
            f"the data has {size} examples (dataset_size)",
            f"give at most {size}",
        )


def _check_eps(recipe: Recipe, eps: float | None) -> None:
    if eps is not None and recipe.eps and eps < min(SMALLEST_EPS, recipe.eps):
        keeps = "square-root" if recipe.optimizer_kind == "lamb" else "adam-rate-only"
        raise InvalidInputError(
            f"eps {eps:g}",
            f"below {SMALLEST_EPS:.3g} it would underflow in float32",
            f"give a larger eps, or a rule that keeps it ({keeps})",
        )


def shown(value: float) -> str:
    """Write a number for a sentence: four digits, and every digit of a count's whole part.

    >>> shown(0.1 + 0.2), shown(1e-8), shown(51_200)
    ('0.3', '1e-08', '51,200')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
