"""Per-example gradients of single layers: the registry and every rule that comes with it.

Register one for a layer of your own with :func:`example_rule`.
"""

from __future__ import annotations

from noisescale.measure.rules import (
    convolution,
    embedding,
    linear,
    normalisation,
    recurrent,
    whole_module,
)
from noisescale.measure.rules.parts import Outer, Part, Rows
from noisescale.measure.rules.registry import Call, Rule, example_rule, rule_for

__all__ = ["Call", "Outer", "Part", "Rows", "Rule", "example_rule", "rule_for"]

# Importing a family registers its rules.
FAMILIES = (convolution, embedding, linear, normalisation, recurrent, whole_module)
