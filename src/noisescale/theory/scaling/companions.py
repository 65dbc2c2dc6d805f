"""What goes with the rate: decay, averages and clipping, each by a rule of its own.

Every function takes the old recipe and the new one as the rate's rule left it, and returns the
changes of the keys that the recipe has: none for an absent key, and an unchanged value where the
rule looked and left it alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from noisescale.records import Change, Recipe
from noisescale.theory.averages import BELOW_ONE, decay_of_forgetting, forgetting
from noisescale.theory.clipping import clip_at, clip_per_example
from noisescale.theory.per_example import shrinkage_ratio, shrinkage_unit
from noisescale.theory.scaling.lengths import cadence, length, schedule, warmup
from noisescale.theory.scaling.rule import Facts, Rule, shown
from noisescale.theory.scaling.stability import noise_factor

COUPLED = ("sgd", "adam", "rmsprop", "lars")
"""Optimizers whose weight decay is added to the gradient. (paper: torch's documentation)"""


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A rule of one key.

    Attributes:
        rule: its name.
        source: paper and section.
        status: ``paper``, ``measured`` or ``assumed``.
        validity: where it holds.
    """

    rule: str
    source: str
    status: str
    validity: str

    def change(self, name: str, old: float, new: float, why: str) -> Change:
        """Return the change of a key by this rule."""
        return Change(
            name=name,
            old=old,
            new=new,
            rule=self.rule,
            source=self.source,
            validity=self.validity,
            why=why,
            status=self.status,
        )


DECOUPLED_DECAY = Companion(
    rule="weight-decay-timescale",
    source="Wang and Aitchison 2024 (arXiv:2405.13698), sec. 3",
    status="paper",
    validity="decay beside the gradient (AdamW, Lion, LAMB); any batch size",
)
COUPLED_DECAY = Companion(
    rule="weight-decay-timescale",
    source="Li, Lyu and Arora 2020 (arXiv:2010.02916), sec. 3; SGD as in Goyal et al. 2017, sec. 3",
    status="paper",
    validity=(
        "weights before a normalisation layer, whose decay sets their effective rate; for others"
        " the decay is part of the loss, whose minimum moves where the value does: keep it there"
    ),
)
EMA = Companion(
    rule="ema-half-life",
    source="Busbridge et al. 2023 (arXiv:2307.13813), sec. 3",
    status="paper",
    validity="while the rate follows its own rule and the average is short beside the training",
)
BATCH_NORM = Companion(
    rule="batchnorm-half-life",
    source="the EMA rule of Busbridge et al. 2023 (arXiv:2307.13813), for running statistics",
    status="assumed",
    validity=(
        "where one device's pass grows as the global batch does; with more passes or devices of"
        " the same size keep the old value"
    ),
)
CLIPPING = Companion(
    rule="clip-share",
    source="McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.10",
    status="assumed",
    validity="while |g_B| varies little about its root mean square |G| sqrt(1 + Bn/B)",
)


def weight_decay(
    old: Recipe, new: Recipe, facts: Facts, clock: float | None = None
) -> tuple[Change, ...]:
    """Keep the share of the weights that decay takes per example: wd' = wd u(old)/u(new).

    u is lr (1 - d)/((1 - m) B) for SGD, so wd stays under the linear rule and grows by sqrt(kappa)
    under the square root; lr/B for AdamW, so wd grows by sqrt(kappa) under the square root and by
    kappa at a fixed rate; Adam's coupled decay stays under the square root. Under AdaScale the
    share per old step is kept.

    Args:
        old: the recipe before.
        new: the one that the rate's rule made.
        facts: not used.
        clock: old steps that a new one counts for; the new batch over the old one by default.
    """
    del facts
    if old.weight_decay is None:
        return ()
    ratio = new.batch_size / old.batch_size
    faster = 1.0 if clock is None else clock / ratio
    # The order keeps a ratio of equals at exactly 1.
    value = old.weight_decay * shrinkage_ratio(old, new) * faster
    share = old.weight_decay * shrinkage_unit(old)
    rule = COUPLED_DECAY if old.optimizer in COUPLED else DECOUPLED_DECAY
    why = f"the share of the weights that decay takes per {_one(old)} stays {shown(share)}"
    if faster != 1.0:
        why = "the share of the weights that decay takes per old step's worth stays"
    return (rule.change("weight_decay", old.weight_decay, value, why),)


def ema_decay(
    old: Recipe, new: Recipe, facts: Facts, clock: float | None = None
) -> tuple[Change, ...]:
    """Keep the half-life of the average of the weights: rho' = rho^kappa, rho^gain by AdaScale.

    Args:
        old: the recipe before.
        new: its batch size is used.
        facts: not used.
        clock: old steps that a new one counts for; the new batch over the old one by default.
    """
    del facts
    rho = old.ema_decay
    if rho is None:
        return ()
    ratio = new.batch_size / old.batch_size
    power = ratio if clock is None else clock
    value = decay_of_forgetting(rate=forgetting(decay=rho, batch_size=1), batch_size=power)
    why = f"{rho:.6g} to the power {shown(power)}"
    if rho and math.isclose(power, ratio):
        half_life = old.batch_size * math.log(0.5) / math.log(rho)
        why += f": the half-life stays {shown(half_life)} {old.unit}"
    return (EMA.change("ema_decay", rho, value, why),)


def batchnorm_momentum(old: Recipe, new: Recipe, facts: Facts) -> tuple[Change, ...]:
    """Keep the half-life of BatchNorm's statistics: p' = 1 - (1 - p)^kappa.

    torch's momentum p is the weight of the new value.

    Args:
        old: the recipe before.
        new: its batch size is used.
        facts: how one device's pass grows, where that is known.
    """
    p = old.batchnorm_momentum
    if p is None:
        return ()
    factor = facts.pass_growth or new.batch_size / old.batch_size
    if factor == 1:
        why = "kept: a pass of one device, over which BatchNorm averages, stays as long"
        return (BATCH_NORM.change("batchnorm_momentum", p, p, why),)
    value = min(-math.expm1(factor * math.log1p(-p)), BELOW_ONE)
    why = f"1 - (1 - {shown(p)})^{shown(factor)}, since torch's momentum is the new value's weight"
    return (BATCH_NORM.change("batchnorm_momentum", p, value, why),)


def clip_norm(old: Recipe, new: Recipe, facts: Facts) -> tuple[Change, ...]:
    """Keep the share of clipped steps: clip' = clip sqrt((1 + Bn/B')/(1 + Bn/B)).

    Args:
        old: the recipe before.
        new: its batch size is used.
        facts: without a noise scale the threshold is left alone.
    """
    clip, scale = old.clip_norm, facts.noise_scale
    if clip is None:
        return ()
    if scale is None:
        factor = math.sqrt(old.batch_size / new.batch_size)
        why = (
            "kept: how the norm of the gradient changes is known only with a noise scale; up to"
            f" {shown(factor)} times, which it is where noise dominates"
        )
        return (CLIPPING.change("clip_norm", clip, clip, why),)
    each = clip_per_example(clip_norm=clip, batch_size=old.batch_size, noise_scale=scale)
    value = clip_at(per_example=each, batch_size=new.batch_size, noise_scale=scale)
    why = (
        f"with noise scale {shown(scale)} the gradient of a batch is {shown(value / clip)} times"
        " as long"
    )
    return (CLIPPING.change("clip_norm", clip, value, why),)


def clock_of(rule: Rule, old: Recipe, new: Recipe, facts: Facts) -> float:
    """Return how many old steps one new step counts for.

    The new batch over the old one: schedules count examples. Under AdaScale its gain
    (1 + Bn/B)/(1 + Bn/B'), so that the gains of all steps sum up to the old steps.

    Args:
        rule: of the rate.
        old: the recipe before.
        new: its batch size is used.
        facts: AdaScale's noise scale.

    Source: Johnson et al. 2020 (arXiv:2007.05105), algorithm 1.
    """
    if rule.name == "adascale" and facts.noise_scale is not None:
        return noise_factor(noise_scale=facts.noise_scale, old=old.batch_size, new=new.batch_size)
    return new.batch_size / old.batch_size


def companions(
    old: Recipe, new: Recipe, facts: Facts | None = None, clock: float | None = None
) -> tuple[Change, ...]:
    """Return what goes with a rate that a rule has restated.

    Args:
        old: the recipe before.
        new: the one that the rate's rule made: batch size, rate and averages.
        facts: what is known besides.
        clock: old steps that a new one counts for (:func:`clock_of`); the new batch over the old
            one by default.

    Returns:
        One change for each key that the recipe has; ``old == new`` where it stays.
    """
    facts = facts or Facts()
    counted = new.batch_size / old.batch_size if clock is None else clock
    return (
        *weight_decay(old, new, facts, clock),
        *ema_decay(old, new, facts, clock),
        *batchnorm_momentum(old, new, facts),
        *clip_norm(old, new, facts),
        *warmup(old, new, counted),
        *length(old, new, counted),
        *schedule(old, new, counted),
        *cadence(old, new),
    )


def _one(recipe: Recipe) -> str:
    return recipe.unit.removesuffix("s")
