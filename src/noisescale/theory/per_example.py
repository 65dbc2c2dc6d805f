"""A whole recipe stated per example, and restated at another batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory import temperature as per
from noisescale.theory.averages import (
    BELOW_ONE,
    average_noise,
    decay_of_forgetting,
    forgetting,
)
from noisescale.theory.clipping import clip_at, clip_per_example
from noisescale.theory.schedule_counts import recounted, whole

SQUARE_ROOT = ("adam", "lamb", "lars", "rmsprop", "lion")
"""Kinds of optimizer whose step is divided by a size of the batch gradient, so that the rate goes
with the square root of the batch size while noise dominates; the others' goes in proportion.
(paper: Malladi et al. 2022, sec. 5, for Adam and RMSProp; You et al. 2020 for LAMB; Li et al.
2024, arXiv:2405.14578, for signs, as Lion's; derived for LARS, whose |g| falls as 1/sqrt(B))"""

ADAM_BETAS = (0.9, 0.999)
"""torch's defaults of Adam, where a recipe has none. (paper: Kingma and Ba 2015, algorithm 1)"""

RMSPROP_ALPHA = 0.99
"""torch's default of RMSProp, where a recipe has none. (assumed: torch's documentation)"""


@dataclass(frozen=True, kw_only=True)
class PerExample:
    """What of a recipe does not depend on the batch size.

    Restating is exact algebra: from A to B to C is from A to C, and from A to A changes nothing
    but that lengths are given in examples. Decays are floats: one that comes nearer to 1 than
    1e-16, or nearer to 0 than 1e-308, is lost on the way.

    Which training it preserves is another matter. Plain SGD: while the noise dominates and the
    rate is far from stability's edge. Momentum (heavy ball, Nesterov, dampening): the same,
    going down in batch size; going up, the rate leaves stability. Adam, AdamW, RMSProp: while
    noise dominates their second moments. LAMB: the same, with few weights decayed. LARS: while
    noise dominates the norm of each tensor's gradient and exceeds the decay. Lion: while noise
    dominates its signs, its two betas kept per step, since the sign of an average does not
    shrink with the average's noise.

    Attributes:
        recipe: the source; keys that no rule touches are taken from it.
        tau: :func:`rate_coordinate`, the rate per example.
        decays: :func:`~noisescale.theory.averages.forgetting` per example of ``momentum``,
            ``dampening`` (1 - d is what a gradient adds), ``beta1``, ``beta2``, ``alpha``,
            ``ema_decay`` and ``batchnorm`` (torch's ``batchnorm_momentum`` is the new value's
            weight p: 1 - p is kept), where the recipe has them.
        eps: Adam's eps in the unit of one example's gradient, where the recipe has one; torch's
            default is taken to be negligible.
        shrinkage: share of the weights that weight decay takes per example; where the decay is
            added to the gradient of Adam or RMSProp, times the gradient's standard deviation.
        warmup: examples of warm-up.
        total: examples in all.
        schedule: the recipe's, its counts of steps in examples.
        noise_scale: what clipping is restated with; without one the threshold is kept.
        clip: clipping threshold in units of |G|.
    """

    recipe: Recipe
    tau: float
    decays: dict[str, float]
    eps: float | None = None
    shrinkage: float | None = None
    warmup: int | None = None
    total: int | None = None
    schedule: dict[str, Any] | None = None
    noise_scale: float | None = None
    clip: float | None = None

    @classmethod
    def of(cls, recipe: Recipe, *, noise_scale: float | None = None) -> Self:
        """State a recipe per example.

        Args:
            recipe: at any batch size.
            noise_scale: Bn in the recipe's unit, for ``clip_norm``.

        Raises:
            InvalidInputError: dampening of 1 or more, a noise scale that is not positive, or a
                schedule whose counts are none.
        """
        B, eps, decay = recipe.batch_size, recipe.eps, recipe.weight_decay
        clip = None
        if noise_scale is not None and recipe.clip_norm is not None:
            clip = clip_per_example(
                clip_norm=recipe.clip_norm, batch_size=B, noise_scale=noise_scale
            )
        return cls(
            recipe=recipe,
            tau=rate_coordinate(recipe),
            decays=_decays(recipe),
            eps=None if eps is None else per.adam_eps_per_example(eps=eps, batch_size=B),
            shrinkage=None if decay is None else decay * shrinkage_unit(recipe),
            warmup=_examples(recipe.warmup_steps, recipe.warmup_examples, B),
            total=_examples(recipe.total_steps, recipe.total_examples, B),
            schedule=recounted(recipe.schedule, lambda steps: steps * B),
            noise_scale=noise_scale,
            clip=clip,
        )

    def at(self, batch_size: int) -> Recipe:
        """Restate at a batch size; nothing is rounded.

        Args:
            batch_size: examples per step.

        Returns:
            The recipe, warm-up and length in examples; a schedule's counts in steps, with a
            fraction where they fall between two. ``evaluate_every`` is kept: it is no part of
            training.

        Raises:
            InvalidInputError: the rate is so small that its weight decay has no share.
        """
        new = self.recipe.with_changes(batch_size=batch_size, **_keys(self.decays, batch_size))
        changes: dict[str, Any] = {"lr": rate_of(new, self.tau), **self._lengths(batch_size)}
        if self.eps is not None:
            changes["eps"] = per.adam_eps(per_example=self.eps, batch_size=batch_size)
        if self.clip is not None and self.noise_scale is not None:
            changes["clip_norm"] = clip_at(
                per_example=self.clip, batch_size=batch_size, noise_scale=self.noise_scale
            )
        new = new.with_changes(**changes)
        if self.shrinkage is None:
            return new
        unit = shrinkage_unit(new)
        if not unit:
            raise InvalidInputError(
                f"lr {self.recipe.lr:g} at batch {batch_size}",
                "what it takes of the weights per example is too small for a number",
                "give a larger rate",
            )
        return new.with_changes(weight_decay=self.shrinkage / unit)

    def _lengths(self, batch_size: int) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for name, examples in (("warmup", self.warmup), ("total", self.total)):
            if examples is not None:
                changes |= {f"{name}_steps": None, f"{name}_examples": examples}
        if self.schedule is not None:
            changes["schedule"] = recounted(
                self.schedule, lambda examples: whole(examples / batch_size)
            )
        return changes


def rate_coordinate(recipe: Recipe) -> float:
    """Return a recipe's rate per example, as its optimizer means it.

    Args:
        recipe: its optimizer, rate, batch size and momenta are used.

    Raises:
        InvalidInputError: dampening of 1 or more.
    """
    kind, lr, B = recipe.optimizer_kind, recipe.lr, recipe.batch_size
    if kind not in SQUARE_ROOT:
        return per.temperature(lr=lr, batch_size=B, **_velocity(recipe))
    momentum = _velocity(recipe)["momentum"]
    return per.adam_temperature(lr=lr, batch_size=B, momentum=momentum) / _own_noise(recipe)


def rate_of(recipe: Recipe, tau: float) -> float:
    """Return the learning rate of a rate per example: the inverse of :func:`rate_coordinate`.

    Args:
        recipe: its optimizer, batch size and momenta are used, its own rate is not.
        tau: rate per example.

    Raises:
        InvalidInputError: dampening of 1 or more.
    """
    kind, B = recipe.optimizer_kind, recipe.batch_size
    if kind not in SQUARE_ROOT:
        return per.rate_at_temperature(tau=tau, batch_size=B, **_velocity(recipe))
    momentum = _velocity(recipe)["momentum"]
    return per.adam_rate(tau=tau, batch_size=B, momentum=momentum) * _own_noise(recipe)


def shrinkage_unit(recipe: Recipe) -> float:
    """Return the share of the weights that a weight decay of 1 takes per example.

    Coupled decay is part of the gradient and goes as the rate per example does, so that the rules
    that keep the one keep the other. Decoupled (AdamW, Lion) it is lr/B. LAMB adds it to a
    direction whose signal grows with sqrt(B): tau/sqrt(B).

    Args:
        recipe: its optimizer, rate, batch size and momenta are used.

    Raises:
        InvalidInputError: dampening of 1 or more.
    """
    if recipe.optimizer in ("adamw", "lion"):
        return per.temperature(lr=recipe.lr, batch_size=recipe.batch_size)
    tau = rate_coordinate(recipe)
    return tau / math.sqrt(recipe.batch_size) if recipe.optimizer == "lamb" else tau


def shrinkage_ratio(old: Recipe, new: Recipe) -> float:
    """Return :func:`shrinkage_unit` of one recipe over that of another, at tiny rates too.

    Args:
        old: numerator.
        new: denominator.

    Raises:
        InvalidInputError: dampening of 1 or more.
    """
    # Shares go in proportion to the rate; a power of two changes no digit.
    power = -math.frexp(old.lr)[1]
    units = [
        shrinkage_unit(recipe.with_changes(lr=math.ldexp(recipe.lr, power)))
        for recipe in (old, new)
    ]
    return units[0] / units[1]


def kept_per_step(recipe: Recipe) -> dict[str, float]:
    """Return what each average of a recipe keeps per step, as far as it has a half-life.

    Args:
        recipe: torch's betas and alpha stand where it has none; Lion's betas are left out
            (:class:`PerExample` says why), and so is dampening without momentum.
    """
    betas, alpha = recipe.betas, recipe.alpha
    if recipe.optimizer in ("adam", "adamw", "lamb"):
        betas = betas or ADAM_BETAS
    if recipe.optimizer == "rmsprop" and alpha is None:
        alpha = RMSPROP_ALPHA
    found = {"momentum": recipe.momentum, "alpha": alpha, "ema_decay": recipe.ema_decay}
    if recipe.momentum:
        found["dampening"] = recipe.dampening
    if betas is not None and recipe.optimizer != "lion":
        found |= {"beta1": betas[0], "beta2": betas[1]}
    return {name: kept for name, kept in found.items() if kept is not None}


def _velocity(recipe: Recipe) -> dict[str, float]:
    """Momentum and dampening, of the optimizers that have them."""
    if recipe.optimizer not in ("sgd", "lars", "rmsprop"):
        return {"momentum": 0.0}
    damped = recipe.optimizer == "sgd" and recipe.momentum
    return {
        "momentum": recipe.momentum or 0.0,
        **({"dampening": recipe.dampening or 0.0} if damped else {}),
    }


def _own_noise(recipe: Recipe) -> float:
    """LAMB divides by the norm of its own average, which keeps less noise the longer it is."""
    if recipe.optimizer != "lamb":
        return 1.0
    return average_noise(beta=(recipe.betas or ADAM_BETAS)[0])


def _decays(recipe: Recipe) -> dict[str, float]:
    """What is forgotten per example; BatchNorm by the weight of the new value, with its digits."""
    found = {
        name: forgetting(decay=kept, batch_size=recipe.batch_size)
        for name, kept in kept_per_step(recipe).items()
    }
    if recipe.batchnorm_momentum:
        found["batchnorm"] = -math.log1p(-recipe.batchnorm_momentum) / recipe.batch_size
    return found


def _keys(decays: dict[str, float], batch_size: int) -> dict[str, Any]:
    """Per-step decays under the recipe's keys, Adam's two in one."""
    keys: dict[str, Any] = {
        name: decay_of_forgetting(rate=rate, batch_size=batch_size)
        for name, rate in decays.items()
        if name != "batchnorm"
    }
    if "beta1" in keys:
        keys["betas"] = (keys.pop("beta1"), keys.pop("beta2"))
    if "batchnorm" in decays:
        new = -math.expm1(-decays["batchnorm"] * batch_size)
        keys["batchnorm_momentum"] = min(new, BELOW_ONE)
    return keys


def _examples(steps: int | None, examples: int | None, batch_size: int) -> int | None:
    return examples if steps is None else steps * batch_size
