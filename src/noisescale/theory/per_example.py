"""A whole recipe stated per example, and restated at another batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from noisescale.records import Recipe
from noisescale.theory import temperature as per


@dataclass(frozen=True, kw_only=True)
class PerExample:
    """What of a recipe does not depend on the batch size.

    Restating is exact algebra: from A to B to C is from A to C, and from A to A changes nothing.
    Which training it preserves is another matter: plain SGD while the noise dominates and the
    rate is far from stability's edge; momentum going down in batch size (going up, the rate
    leaves stability); Adam while noise dominates its second moments.

    Attributes:
        recipe: the source; keys that no rule touches are taken from it.
        tau: :func:`~noisescale.theory.temperature.temperature`, or Adam's rate per example.
        decays: decay per example of ``momentum``, ``beta1``, ``beta2`` and ``ema_decay``, where
            the recipe has them.
        eps: Adam's eps in the unit of one example's gradient.
        shrinkage: share of the weights that weight decay takes per example.
        warmup: examples of warm-up.
        total: examples in all.
        milestones: of a step schedule, in examples.
    """

    recipe: Recipe
    tau: float
    decays: dict[str, float]
    eps: float | None = None
    shrinkage: float | None = None
    warmup: float | None = None
    total: float | None = None
    milestones: tuple[float, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """State a recipe per example."""
        B, m = recipe.batch_size, recipe.momentum or 0.0
        return cls(
            recipe=recipe,
            tau=rate_coordinate(recipe),
            decays={
                name: per.decay_per_example(decay=decay, batch_size=B)
                for name, decay in _decays(recipe).items()
            },
            eps=(
                None
                if recipe.eps is None
                else per.adam_eps_per_example(eps=recipe.eps, batch_size=B)
            ),
            shrinkage=(
                None
                if recipe.weight_decay is None
                else per.shrinkage_per_example(
                    lr=recipe.lr, weight_decay=recipe.weight_decay, batch_size=B, momentum=m
                )
            ),
            warmup=_examples(recipe.warmup_steps, recipe.warmup_examples, B),
            total=_examples(recipe.total_steps, recipe.total_examples, B),
            milestones=tuple(step * B for step in (recipe.schedule or {}).get("milestones") or ()),
        )

    def at(self, batch_size: int) -> Recipe:
        """Restate at a batch size; only counts of whole steps or examples are rounded.

        Args:
            batch_size: examples per step.

        Returns:
            The recipe, warm-up and length in examples.
        """
        kept = {
            name: per.decay_per_step(mu=mu, batch_size=batch_size)
            for name, mu in self.decays.items()
        }
        m = kept.get("momentum", 0.0)
        changes: dict[str, Any] = {"batch_size": batch_size, **_keys(kept)}
        changes["lr"] = lr = rate_of(self.recipe.with_changes(**changes), self.tau)
        if self.eps is not None:
            changes["eps"] = per.adam_eps(per_example=self.eps, batch_size=batch_size)
        if self.shrinkage is not None:
            changes["weight_decay"] = per.weight_decay_of_shrinkage(
                shrinkage=self.shrinkage, lr=lr, batch_size=batch_size, momentum=m
            )
        return self.recipe.with_changes(**changes, **self._lengths(batch_size))

    def _lengths(self, batch_size: int) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for name, examples in (("warmup", self.warmup), ("total", self.total)):
            if examples is not None:
                changes |= {f"{name}_steps": None, f"{name}_examples": max(1, round(examples))}
        if self.milestones:
            steps = [max(1, round(examples / batch_size)) for examples in self.milestones]
            changes["schedule"] = {**(self.recipe.schedule or {}), "milestones": steps}
        return changes


SQUARE_ROOT = ("adam", "lamb")
"""Kinds of optimizer whose rate goes with the square root of the batch size while noise
dominates; the others' goes in proportion. (paper: Malladi et al. 2022, sec. 5; You et al. 2020)"""


def rate_coordinate(recipe: Recipe) -> float:
    """Return a recipe's rate per example, as its optimizer means it.

    Args:
        recipe: its optimizer, rate, batch size and momentum are used.
    """
    if recipe.optimizer_kind in SQUARE_ROOT:
        return per.adam_temperature(lr=recipe.lr, batch_size=recipe.batch_size)
    return per.temperature(
        lr=recipe.lr, batch_size=recipe.batch_size, momentum=recipe.momentum or 0.0
    )


def rate_of(recipe: Recipe, tau: float) -> float:
    """Return the learning rate of a rate per example: the inverse of :func:`rate_coordinate`.

    Args:
        recipe: its optimizer, batch size and momentum are used, its own rate is not.
        tau: rate per example.
    """
    if recipe.optimizer_kind in SQUARE_ROOT:
        return per.adam_rate(tau=tau, batch_size=recipe.batch_size)
    return per.rate_at_temperature(
        tau=tau, batch_size=recipe.batch_size, momentum=recipe.momentum or 0.0
    )


def _decays(recipe: Recipe) -> dict[str, float]:
    found = {"momentum": recipe.momentum, "ema_decay": recipe.ema_decay}
    if recipe.betas is not None:
        found |= {"beta1": recipe.betas[0], "beta2": recipe.betas[1]}
    return {name: decay for name, decay in found.items() if decay is not None}


def _keys(kept: dict[str, float]) -> dict[str, Any]:
    """Put Adam's two decays back into one key."""
    keys: dict[str, Any] = {k: v for k, v in kept.items() if not k.startswith("beta")}
    if "beta1" in kept:
        keys["betas"] = (kept["beta1"], kept["beta2"])
    return keys


def _examples(steps: int | None, examples: int | None, batch_size: int) -> float | None:
    if steps is not None:
        return float(steps * batch_size)
    return None if examples is None else float(examples)
