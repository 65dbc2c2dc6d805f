"""Where the parameters of a module meet the batch, out of the graph that autograd recorded.

What the graph does not say is which dimensions are the batch's: a table of as many rows as the
batch has examples looks like it. A second graph of half the batch tells: what meets the batch
has another shape there, and what holds no batch has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from noisescale.measure.rules.nodes import Node, UnknownError, shape_of

# Uses of one module's parameters in one call that are followed. (assumed; loops that use a
# parameter more often are better run again as a whole)
_MOST_USES = 256

# Graphs of half a batch for one module. (assumed; a module whose graph keeps changing is run
# again as a whole)
_MOST_PROBES = 4

Step = tuple[int, str, int, int]
"""Which of several consumers, its name, as which operand, and the dimensions of its output."""

Trail = tuple[Step, ...]
"""Steps from a parameter on."""

Link = tuple[Node, int, torch.Size]
"""A node, the operand that is on the way, and the operand's shape."""

Half = Callable[[], tuple[int, Iterable[Tensor], Iterable[Tensor]]]
"""Runs half a batch: its size, outputs and inputs."""


@dataclass(frozen=True, eq=False)
class Path:
    """One way from a parameter to the batch.

    Attributes:
        key: the parameter's name in its module.
        chain: nodes without batch, from the parameter on.
        meeting: the node where it meets the batch.
    """

    key: str
    chain: tuple[Link, ...]
    meeting: Link


Consumers = Mapping[Node, list[tuple[Node, int]]]


def consumers_of(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> Consumers:
    """Which nodes use the result of each node, as which operand, between two sets of tensors.

    Raises:
        UnknownError: part of the graph is hidden in an activation checkpoint.
    """
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = {t.grad_fn for t in inputs if t.grad_fn is not None}
    found: dict[Node, list[tuple[Node, int]]] = {}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UnknownError
        for operand, (source, _) in enumerate(node.next_functions):
            if source is not None:
                found.setdefault(source, []).append((node, operand))
                waiting.append(source)
    return found


class Paths:
    """Finds the paths of one module's parameters, call by call."""

    def __init__(self) -> None:
        self._meets: dict[tuple[str, Trail], bool] = {}
        self._probes = 0

    def find(
        self,
        parameters: Mapping[str, Tensor],
        size: int,
        graph: tuple[Iterable[Tensor], Iterable[Tensor]],
        half: Half,
    ) -> list[Path] | None:
        """List every path, or None if they cannot be followed.

        Args:
            parameters: by name.
            size: number of examples.
            graph: the outputs and inputs of the call.
            half: runs half the batch, where that is needed.
        """
        try:
            consumers = consumers_of(*graph)
            try:
                return self._paths(parameters, size, consumers)
            except _Unsure:
                self._probe(parameters, size, consumers, half)
            return self._paths(parameters, size, consumers)
        except (UnknownError, _Unsure):
            return None

    def _paths(
        self, parameters: Mapping[str, Tensor], size: int, consumers: Consumers
    ) -> list[Path]:
        found: list[Path] = []
        # No function that calls itself: it would keep the graph alive until the next collection.
        waiting: list[tuple[str, Node, Trail, tuple[Link, ...]]] = [
            (key, _leaf(parameter), (), ()) for key, parameter in parameters.items()
        ]
        while waiting:
            key, node, trail, chain = waiting.pop()
            shape = shape_of(node)
            for step, after, operand in _steps(node, consumers):
                meets = self._meets.get((key, (*trail, step)))
                if meets is None:
                    raise _Unsure
                link = (after, operand, shape)
                if not meets:
                    waiting.append((key, after, (*trail, step), (*chain, link)))
                    continue
                if shape_of(after)[:1] != (size,) or len(found) == _MOST_USES:
                    raise UnknownError
                found.append(Path(key, chain, link))
        return found

    def _probe(
        self, parameters: Mapping[str, Tensor], size: int, consumers: Consumers, half: Half
    ) -> None:
        if size < 2 or self._probes == _MOST_PROBES:
            raise UnknownError
        self._probes += 1
        fewer, outputs, inputs = half()
        others = consumers_of(outputs, inputs)
        learnt: dict[tuple[str, Trail], bool] = {}
        waiting: list[tuple[str, Node, Node, Trail]] = [
            (key, _leaf(parameter), _leaf(parameter), ()) for key, parameter in parameters.items()
        ]
        while waiting:
            key, node, other, trail = waiting.pop()
            pairs = _steps(node, consumers), _steps(other, others)
            if [step for step, _, _ in pairs[0]] != [step for step, _, _ in pairs[1]]:
                raise UnknownError
            for (step, a, _), (_, b, _) in zip(*pairs, strict=True):
                meets = _meets(shape_of(a), shape_of(b), size, fewer)
                learnt[key, (*trail, step)] = meets
                if not meets:
                    waiting.append((key, a, b, (*trail, step)))
            if len(learnt) > _MOST_USES:
                raise UnknownError
        self._meets.update(learnt)


def _steps(node: Node, consumers: Consumers) -> list[tuple[Step, Node, int]]:
    return [
        ((number, after.name(), operand, len(shape_of(after))), after, operand)
        for number, (after, operand) in enumerate(consumers.get(node, ()))
    ]


def _meets(shape: torch.Size, fewer_shape: torch.Size, size: int, fewer: int) -> bool:
    """Whether an output holds the batch, given its shapes for two numbers of examples."""
    if shape == fewer_shape:
        return False
    if (shape[:1], fewer_shape[:1]) != ((size,), (fewer,)) or shape[1:] != fewer_shape[1:]:
        raise UnknownError
    return True


class _Unsure(Exception):  # noqa: N818 - no error: half a batch will tell
    pass


def _leaf(parameter: Tensor) -> Node:
    return get_gradient_edge(parameter).node
