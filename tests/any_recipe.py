"""Recipes of every optimizer, drawn at random, and when two of them are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import strategies as st

from noisescale.records import Recipe

KINDS = ("sgd", "momentum", "nesterov", "adam", "adamw", "lars", "lamb", "rmsprop", "lion")
SIZES = st.integers(1, 64)
"""A factor of at most 64 both ways: no decay drawn here leaves the floats on its way."""

_DECAY = st.floats(0.01, 0.9999)
_PRESENT = {
    "momentum": _DECAY,
    "dampening": st.just(0.0) | st.floats(0.01, 0.99),
    "betas": st.tuples(_DECAY, _DECAY),
    "alpha": _DECAY,
    "eps": st.floats(1e-10, 1e-2),
    "weight_decay": st.just(0.0) | st.floats(1e-9, 1),
    "ema_decay": _DECAY,
    "clip_norm": st.floats(1e-3, 1e3),
    "batchnorm_momentum": st.floats(1e-4, 0.1),
    "total_steps": st.integers(1, 10**6),
    "warmup_examples": st.integers(1, 10**6),
    "schedule": st.lists(st.integers(1, 10**5), min_size=1, max_size=3).map(
        lambda steps: {"kind": "step", "milestones": sorted(steps)}
    ),
}
_OF = {
    "sgd": (),
    "momentum": ("momentum", "dampening"),
    "nesterov": ("momentum",),
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps"),
    "lars": ("momentum",),
    "lamb": ("betas", "eps"),
    "rmsprop": ("alpha", "eps", "momentum"),
    "lion": ("betas",),
}
_OPTIONAL = ("dampening", "betas", "alpha", "eps")
_ALL = (
    "weight_decay",
    "ema_decay",
    "clip_norm",
    "batchnorm_momentum",
    "total_steps",
    "warmup_examples",
    "schedule",
)
COUNTS = ("total_examples", "warmup_examples", "total_steps", "warmup_steps", "batch_size")


@st.composite
def any_recipe(draw: st.DrawFn, kind: str) -> Recipe:
    """Draw a recipe of one of :data:`KINDS`; keys that may be absent are absent at times."""
    keys: dict[str, Any] = {"lr": draw(st.floats(1e-5, 10)), "batch_size": draw(SIZES)}
    keys["optimizer"] = "sgd" if kind in ("momentum", "nesterov") else kind
    if kind == "nesterov":
        keys["nesterov"] = True
    for key in (*_OF[kind], *_ALL):
        if key not in (*_OPTIONAL, *_ALL) or draw(st.booleans()):
            keys[key] = draw(_PRESENT[key])
    return Recipe(**keys)


def assert_same(one: Recipe, other: Recipe, rel: float = 1e-7) -> None:
    """Compare two recipes: counts exactly, decays by their logarithms, the rest as floats.

    A decay beta near 1 is held to 1e-16, so its logarithm to 1e-16/(1 - beta); the largest here
    is 1 - 1e-4/64, and a restatement or two multiply that by less than 100.
    """
    ones, others = vars(one), vars(other)
    for name, value in ones.items():
        against = others[name]
        if name in ("momentum", "dampening", "alpha", "ema_decay") and value and against:
            assert math.log(value) == pytest.approx(math.log(against), rel=rel), name
        elif name == "betas" and value is not None:
            logs = [[math.log(beta) for beta in betas if beta] for betas in (value, against)]
            assert logs[0] == pytest.approx(logs[1], rel=rel)
        elif name == "schedule" and value is not None:
            assert value.keys() == against.keys()
            assert value["milestones"] == pytest.approx(against["milestones"], rel=1e-9)
        elif isinstance(value, float) and name not in COUNTS:
            assert value == pytest.approx(against, rel=rel, abs=0), name
        else:
            assert value == against, name
