"""The squared norms and the sum of the gradients that calls of layers account for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisescale.measure.metric import Metric
from noisescale.measure.rules.parts import Outer, Part, check, total
from noisescale.measure.rules.registry import Call, Rule


@dataclass(eq=False, slots=True)
class Use:
    """One use of a parameter: a call of a module that holds it, under this name."""

    rule: Rule
    call: Call
    key: str


def square_sums(
    uses: Mapping[int, Sequence[Use]], shapes: Mapping[int, torch.Size], metric: Metric
) -> dict[int, Tensor]:
    """Sum over the examples of each parameter's squared gradient norm.

    Args:
        uses: all the uses of each parameter in one forward pass; the gradient of an example is
            their sum.
        shapes: of the parameters.
        metric: the norm.

    Returns:
        0-d tensors; none for a parameter that a rule says nothing of.
    """
    sums: dict[int, Tensor] = {}
    for found in _by_chunks(_drawn(uses, metric)):
        for index, parts in found.items():
            value = metric.square_sum(index, parts, shapes[index])
            sums[index] = sums[index] + value if index in sums else value
    return sums


def lone_square_sums(
    rule: Rule,
    call: Call,
    slots: Mapping[str, int],
    shapes: Mapping[int, torch.Size],
    metric: Metric,
) -> dict[int, Tensor]:
    """:func:`square_sums` of parameters that this call alone uses.

    Args:
        rule: of the call's layer.
        call: the call.
        slots: index of each parameter, by its name in the layer.
        shapes: of the parameters, by index.
        metric: the norm.
    """
    if rule.norms is not None and metric.plain:
        norms = rule.norms(call.layer, call.tensors[0], call.gradient)
        if norms is not None:
            return {
                slots[key]: norm.sum() if norm.dim() else norm
                for key, norm in norms.items()
                if key in slots
            }
    if rule.step(call) >= call.size:
        drawn = metric.sample([call])
        call = call if drawn is None else drawn.take(call)
        return {
            slots[key]: metric.square_sum(slots[key], [part], shapes[slots[key]])
            for key, part in rule.parts(call, slice(0, call.size)).items()
            if key in slots
        }
    return square_sums({i: [Use(rule, call, key)] for key, i in slots.items()}, shapes, metric)


def _drawn(uses: Mapping[int, Sequence[Use]], metric: Metric) -> Mapping[int, Sequence[Use]]:
    """The uses by the examples that the metric draws, the same ones in every call."""
    calls = {id(use.call): use.call for several in uses.values() for use in several}
    drawn = metric.sample(list(calls.values()))
    if drawn is None:
        return uses
    fewer = {name: drawn.take(call) for name, call in calls.items()}
    return {
        index: [Use(use.rule, fewer[id(use.call)], use.key) for use in several]
        for index, several in uses.items()
    }


def own_gradients(
    uses: Mapping[int, Sequence[Use]], shapes: Mapping[int, torch.Size]
) -> dict[int, Tensor]:
    """Sum over the examples and the uses of each parameter's gradient."""
    sums: dict[int, Tensor] = {}
    for found in _by_chunks(uses):
        for index, parts in found.items():
            for part in parts:
                check(part, shapes[index])
                value = total(part, shapes[index])
                sums[index] = sums[index] + value if index in sums else value
    return sums


def _by_chunks(uses: Mapping[int, Sequence[Use]]) -> Iterator[dict[int, list[Part]]]:
    """Evaluate every call once per chunk of examples, whatever it holds."""
    calls = {id(use.call): use for several in uses.values() for use in several}
    size = next(iter(calls.values())).call.size
    step = min(use.rule.step(use.call) for use in calls.values())
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        parts = {name: use.rule.parts(use.call, rows) for name, use in calls.items()}
        found = {
            index: [_known(parts[id(u.call)].get(u.key), u, step >= size) for u in several]
            for index, several in uses.items()
        }
        yield {i: [p for p in ps if p is not None] for i, ps in found.items() if None not in ps}


def _known(part: Part | None, use: Use, whole: bool) -> Part | None:
    """Tell a part of all examples its own squared norm, if it is known."""
    known = use.call.known.get(use.key)
    if known is None or not whole or not isinstance(part, Outer):
        return part
    return replace(part, known=known)
