"""Rules for Adam and RMSProp, whose step is divided by an average of squared gradients."""

from __future__ import annotations

import math
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.averages import BELOW_ONE
from noisescale.theory.per_example import ADAM_BETAS, RMSPROP_ALPHA
from noisescale.theory.scaling.exact import restated
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown

NOISE_DOMINATES = "noise dominates the second moments: the batch is far below the noise scale"


def stretched(name: str, kept: float, factor: float) -> float:
    """Return what an average keeps per step when it forgets ``factor`` times as fast.

    1 - beta' = factor (1 - beta). Nothing kept stays nothing kept: that is no average.

    Args:
        name: of the key, for the error.
        kept: beta, in [0, 1).
        factor: kappa, new batch size over old.

    Returns:
        beta', in [0, 1).

    Raises:
        InvalidInputError: kappa (1 - beta) is 1 or more.

    Source: Malladi et al. 2022 (arXiv:2205.10287), sec. 5.

    >>> round(stretched("beta1", 0.9, 4), 12)
    0.6
    """
    forgets = factor * (1 - kept)
    if kept == 0:
        return 0.0
    if forgets >= 1 - 1e-9:  # 10 times 1 - 0.9 is 1 but for rounding
        raise InvalidInputError(
            f"rule adam-sde with {name} {kept:.6g} and {factor:.4g} times the batch",
            f"kappa (1 - {name}) = {forgets:.4g} must be below 1",
            "use the half-life form beta^kappa: rule adam-half-life",
        )
    return min(1 - forgets, BELOW_ONE)


def sde_refusal(recipe: Recipe, batch_size: int) -> str | None:
    """Say why the SDE form has no answer; None where it has one.

    Args:
        recipe: at the old batch size.
        batch_size: the new one.
    """
    try:
        _sde(recipe, batch_size, Facts())
    except InvalidInputError as error:
        return f"{error.value}: {error.requirement}"
    return None


def _sde(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    factor = batch_size / recipe.batch_size
    keys: dict[str, Any] = {"lr": recipe.lr * math.sqrt(factor)}
    if recipe.optimizer == "rmsprop":
        alpha = RMSPROP_ALPHA if recipe.alpha is None else recipe.alpha
        keys["alpha"] = stretched("alpha", alpha, factor)
        if recipe.momentum:
            keys["momentum"] = stretched("momentum", recipe.momentum, factor)
            # 1 - m is kappa times as large, and divides the displacement of a gradient.
            keys["lr"] *= factor
    else:
        beta1, beta2 = recipe.betas or ADAM_BETAS
        keys["betas"] = stretched("beta1", beta1, factor), stretched("beta2", beta2, factor)
    if recipe.eps is not None:
        keys["eps"] = recipe.eps / math.sqrt(factor)
    return Change(
        keys,
        f"the rate becomes {shown(keys['lr'])} and averages forget {shown(factor)} times as fast"
        " per step: the stochastic differential equation in examples stays the same",
    )


def _half_life(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    keys = restated(recipe, batch_size)
    factor = batch_size / recipe.batch_size
    return Change(
        keys,
        f"the rate becomes {shown(keys['lr'])}, by the square root of {shown(factor)}, and what an"
        f" average keeps is raised to the power {shown(factor)}: half-lives in examples stay",
    )


def _rate_only(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    factor = batch_size / recipe.batch_size
    lr = recipe.lr * math.sqrt(factor)
    return Change(
        {"lr": lr},
        f"the rate times the square root of {shown(factor)} = {shown(lr)}: noise sets the size"
        " that the step is divided by; averages stay as they are per step",
    )


ADAM_SDE = Rule(
    name="adam-sde",
    optimizers=("adam", "rmsprop"),
    source="Malladi et al. 2022 (arXiv:2205.10287), sec. 5",
    status="paper",
    assumption=NOISE_DOMINATES,
    validity=(
        "kappa (1 - beta) < 1 for every average (beta1 = 0.9: factors below 10), better far below;"
        " downwards always"
    ),
    preserves="the stochastic differential equation in examples, its averages to first order",
    exact=True,
    law=_sde,
)
ADAM_HALF_LIFE = Rule(
    name="adam-half-life",
    optimizers=("adam", "rmsprop"),
    source=(
        "rate: Malladi et al. 2022 (arXiv:2205.10287), sec. 5; averages: Hilton et al. 2022"
        " (arXiv:2110.00641), Busbridge et al. 2023 (arXiv:2307.13813), Marek et al. 2025"
        " (arXiv:2507.07101)"
    ),
    status="paper",
    assumption=NOISE_DOMINATES,
    validity=(
        "downwards; upwards, in runs of 6 to 100 steps, it was worse than leaving the betas; Marek"
        " et al. confirm beta2 and find a rate exponent nearer 0.2 and beta1 nearly constant"
    ),
    preserves="displacement per example's standard deviation, half-lives in examples",
    exact=True,
    law=_half_life,
)
ADAM_RATE_ONLY = Rule(
    name="adam-rate-only",
    optimizers=("adam", "rmsprop", "lion"),
    source=(
        "Malladi et al. 2022 (arXiv:2205.10287), sec. 5, the rate alone; signs: Li et al. 2024"
        " (arXiv:2405.14578)"
    ),
    status="measured",
    assumption=NOISE_DOMINATES + "; averages are short beside the training at both sizes",
    validity=(
        "betas kept were better than betas converted upwards in runs of 6 to 100 steps; upwards"
        " the rate alone failed oftener than no change on a small character GPT"
    ),
    preserves="displacement per example's standard deviation, averages per step",
    exact=True,
    spoken={
        "adam": {"source": "Malladi et al. 2022 (arXiv:2205.10287), sec. 5, the rate alone"},
        "rmsprop": {
            "source": "Malladi et al. 2022 (arXiv:2205.10287), sec. 5, the rate alone",
            "status": "assumed",
            "validity": "as for Adam, whose betas kept were better upwards; no check of our own",
        },
        "lion": {
            "source": "Li et al. 2024 (arXiv:2405.14578)",
            "status": "paper",
            "assumption": "noise dominates the signs: the batch is far below the noise scale",
            "validity": "both batch sizes below the noise scale; no check of our own",
            "preserves": "displacement per example, averages per step",
        },
    },
    law=_rate_only,
)
