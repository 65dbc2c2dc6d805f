"""How a recipe follows its batch size: rules with their sources, and their companions."""

from noisescale.theory.scaling.registry import (
    RULES,
    named,
    recommended,
    rules_for,
    scale_or_fall_back,
    why_recommended,
)
from noisescale.theory.scaling.rule import Facts, Rule, Scaled

__all__ = [
    "RULES",
    "Facts",
    "Rule",
    "Scaled",
    "named",
    "recommended",
    "rules_for",
    "scale_or_fall_back",
    "why_recommended",
]
