"""The trainable parameters of a model, and which of them are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisescale.errors import InvalidInputError
from noisescale.measure.compiled import plain_name
from noisescale.measure.grouping import Grouping, group_function
from noisescale.records import ParametersSeen


@dataclass
class Slot:
    """One trainable parameter.

    Attributes:
        name: its name in ``model.named_parameters()``.
        tensor: the parameter.
        group: the group it is reported under.
        asked: whether it is to be measured at all.
        missing: why it is not seen; None while it is.
    """

    name: str
    tensor: nn.Parameter
    group: str
    asked: bool = True
    missing: str | None = None


class Inventory:
    """The trainable parameters of a model, and which of them are seen."""

    def __init__(
        self,
        model: nn.Module,
        groups: Grouping = None,
        parameters: Callable[[str], bool] | None = None,
    ) -> None:
        named = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise InvalidInputError(
                f"model {type(model).__name__}",
                "at least one trainable parameter is required",
                "pass the model that is trained, or unfreeze some of it",
            )
        for name, parameter in named:
            if nn.parameter.is_lazy(parameter):
                raise InvalidInputError(
                    f"parameter {name!r} of a lazy module",
                    "a parameter with a shape is required",
                    "call the model once on a batch before",
                )
        group_of = group_function([name for name, _ in named], groups)
        self.slots = [
            Slot(name=name, tensor=parameter, group=group_of(name)) for name, parameter in named
        ]
        if parameters is not None and not callable(parameters):
            raise InvalidInputError(
                f"parameters {parameters!r}",
                "a function of a parameter's name is required",
                "give parameters=norm_layers(model), or lambda name: name in names",
            )
        if parameters is not None:
            for slot in self.slots:
                slot.asked = bool(parameters(slot.name))
                slot.missing = None if slot.asked else "not asked for"
        for slot in self.slots:
            if slot.asked and slot.tensor.is_complex():
                slot.missing = "it is complex"
        self.seen = [i for i, slot in enumerate(self.slots) if slot.missing is None]
        """Indices of the parameters that are measured."""
        if not self.seen and any(slot.asked for slot in self.slots):
            raise InvalidInputError(
                f"model {type(model).__name__}",
                "at least one parameter of real numbers is required",
                "hold real and imaginary parts as two parameters",
            )
        if not any(slot.asked for slot in self.slots):
            raise InvalidInputError(
                "parameters",
                "a function that is true for the name of some trainable parameter is required",
                f"the first one is named {named[0][0]!r}",
            )

    @property
    def missing(self) -> dict[str, str]:
        """Names of the parameters left out though asked for, with the reason of each."""
        return {s.name: s.missing for s in self.slots if s.asked and s.missing is not None}

    def drop(self, index: int, reason: str) -> None:
        """Leave a parameter out from now on; the first reason stays."""
        if self.slots[index].missing is None:
            self.slots[index].missing = reason
            self.seen = [i for i in self.seen if i != index]

    def parameters_seen(self, group: str | None = None) -> ParametersSeen:
        """Count what is seen, of the whole model or of one group."""
        slots = [s for s in self.slots if group is None or s.group == group]
        return ParametersSeen(
            seen=sum(s.tensor.numel() for s in slots if s.missing is None),
            total=sum(s.tensor.numel() for s in slots),
            missing=tuple(s.name for s in slots if s.missing is not None),
        )

    def pack(self, values: Mapping[int, Tensor]) -> Tensor:
        """Stack 0-d tensors to shape (parameters,), zero where not seen or no gradient came."""
        return self.pack_all(values)[0]

    def pack_all(self, *several: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """:meth:`pack` of each."""
        first = next(iter(several[0].values()))
        missing = [slot.missing is not None for slot in self.slots]
        zero: Tensor | None = None
        row: list[Tensor] = []
        # One stack for all: each call is dear where caches are cold.
        for values in several:
            for index, unseen in enumerate(missing):
                value = None if unseen else values.get(index)
                if value is None:
                    zero = first.new_zeros(()) if zero is None else zero
                    value = zero
                elif value.device != first.device or value.dtype != first.dtype:
                    value = value.to(first.device, first.dtype)
                row.append(value)
        packed: tuple[Tensor, ...] = torch.stack(row).view(len(several), -1).unbind()
        return packed
