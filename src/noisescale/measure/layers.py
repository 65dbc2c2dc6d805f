"""The modules of a model that own measured parameters, each with its rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from noisescale.measure.example_rules import Rule, rule_for
from noisescale.measure.gradients import Forward, Inventory
from noisescale.measure.rules.direct import DirectUses


@dataclass(eq=False)
class Layer:
    """A module whose rule is known.

    Attributes:
        module: the layer.
        index: its place among the layers.
        rule: how it is measured.
        slots: own parameter name -> index in the inventory.
        pending: calls under hooks on saved tensors whose gradients did not come yet, by
            forward pass.
        direct: follows its own parameters through autograd's graph.
    """

    module: nn.Module
    index: int
    rule: Rule
    slots: dict[str, int]
    pending: dict[Forward, int] = field(default_factory=dict)
    direct: DirectUses | None = None


def find_layers(model: nn.Module, inventory: Inventory) -> list[Layer]:
    """List the layers that own measured parameters; what cannot be measured is dropped."""
    indices = {id(slot.tensor): i for i, slot in enumerate(inventory.slots)}
    layers: list[Layer] = []
    refused: list[tuple[nn.Module, list[int], str]] = []
    answered_for: set[nn.Module] = set()
    for module in model.modules():
        rule = rule_for(module)
        named = module._parameters if isinstance(rule, str) else rule.parameters(module)
        slots = {key: indices[id(p)] for key, p in named.items() if id(p) in indices}
        if module in answered_for or not slots:
            continue
        if isinstance(rule, str):
            refused.append((module, list(slots.values()), rule))
            continue
        layers.append(Layer(module, len(layers), rule, slots))
        holders = {key.rpartition(".")[0] for key in slots if "." in key}
        answered_for.update(module.get_submodule(holder) for holder in holders)
    for module, several, reason in refused:
        # Another module that holds it may have come later.
        for index in several if module not in answered_for else ():
            inventory.drop(index, reason)
    for layer in layers:
        others = {i for other in layers if other is not layer for i in other.slots.values()}
        # The graph of a module holds that of its children: what they share would count twice.
        if layer.rule.direct and others.isdisjoint(layer.slots.values()):
            layer.direct = DirectUses(layer.module)
    return layers
