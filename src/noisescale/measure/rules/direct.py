"""Parameters that a module uses without a layer, measured where they meet the batch.

Exact like the fallback that runs the module again, and as cheap as a bias: a hook on the one
node of autograd's graph sees the gradient of every example there. Modules whose graph is not
understood are left to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from noisescale.measure.gradients import tensors_in
from noisescale.measure.kept import Take, hooks_active
from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.nodes import (
    Back,
    Meeting,
    Node,
    UnknownError,
    back_through,
    keeps_norm,
    meets,
)
from noisescale.measure.rules.parts import Outer, Part, Rows
from noisescale.measure.rules.paths import Path, Paths
from noisescale.measure.rules.registry import Call, Rule, held_parameters
from noisescale.measure.rules.rerun import Rerun
from noisescale.measure.squares import squared_norm

# Largest number that a bound of rounding errors may hold in float16.
_LARGE = 6e4


@dataclass(frozen=True, eq=False)
class DirectUse:
    """One use of a parameter; it does not hold the node where that meets the batch.

    Attributes:
        key: the parameter's name in its module.
        meeting: what happens at the node.
        rule: how a call that :meth:`call` made is measured.
    """

    key: str
    meeting: Meeting
    rule: Rule

    def call(
        self, layer: nn.Module, kept: list[Tensor], gradient: Tensor, *, careful: bool
    ) -> Call:
        """Return the use as a call of the module.

        Args:
            layer: the module.
            kept: what the meeting needs of the forward pass.
            gradient: of the node's output.
            careful: whether rounding errors of sums matter.
        """
        part = self.meeting.part(gradient, kept)
        if isinstance(part, Outer):
            return _call(layer, part.left.squeeze(1), part.right.squeeze(1))
        if isinstance(part, Rows):
            return _call(layer, part.ids, part.rows)
        assert isinstance(part, Tensor)
        bound = _rounding(gradient, kept, self.meeting.terms) if careful else part
        return _call(layer, part, bound)


def _call(layer: nn.Module, tensor: Tensor, gradient: Tensor) -> Call:
    return Call(layer, [0], tensors=[tensor], gradients=[gradient])


def _rounding(gradient: Tensor, kept: list[Tensor], terms: int) -> Tensor:
    """Per example, what a sum of as many terms can be at most."""
    sizes = gradient.flatten(1).abs().amax(1, keepdim=True).float()
    for tensor in kept:
        sizes = sizes * tensor.abs().amax() if tensor.is_floating_point() else sizes
    return (sizes * terms).clamp(max=_LARGE).to(gradient.dtype)


class DirectUses:
    """The uses of one module's own parameters, call by call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._paths = Paths()

    def of(
        self,
        size: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: list[Tensor],
    ) -> list[tuple[Node, Take, DirectUse]] | None:
        """List the uses of a call, or None where it must be run again.

        Each comes with the node where the parameter meets the batch, and with what is kept of
        the forward pass for it.

        Args:
            size: number of examples.
            args: of the call.
            kwargs: of the call.
            outputs: its tensors.
        """
        if hooks_active():
            return None
        named = {p: k for k, p in held_parameters(self._module).items() if p is not None}
        parameters = {k: p for p, k in named.items() if p.requires_grad}
        inputs = tensors_in((args, kwargs))

        def half() -> tuple[int, list[Tensor], list[Tensor]]:
            return Rerun(self._module, size, args, kwargs).half(outputs)

        paths = self._paths.find(parameters, size, (outputs, inputs), half)
        if paths is None:
            return None
        try:
            return [_use(path) for path in paths]
        except UnknownError:
            return None


def _use(path: Path) -> tuple[Node, Take, DirectUse]:
    node, _, shape = path.meeting
    nodes = [link[0] for link in path.chain]
    form: Callable[[Tensor, Tensor], Part]
    if node.name() == "MmBackward0":
        # Of the parameter itself or of its transpose.
        if any(n.name() != "TBackward0" for n in nodes) or len(nodes) > 1:
            raise UnknownError
        form = (lambda x, g: Outer(g, x)) if nodes else Outer
        rule = _rule(path.key, lambda x, g: form(x.unsqueeze(1), g.unsqueeze(1)))
    elif node.name() in ("EmbeddingBackward0", "IndexBackward0"):
        if nodes:
            raise UnknownError
        rule = _rule(path.key, lambda x, g: Rows(x, g, shape[0]))
    else:
        steps = [back_through(*link) for link in reversed(path.chain)]
        rule = _rule(
            path.key, lambda x, _: _through(steps, x), alone=all(keeps_norm(n) for n in nodes)
        )
    kept, meeting = meets(*path.meeting)
    return node, kept, DirectUse(path.key, meeting, rule)


def _through(steps: list[Back], gradients: Tensor) -> Tensor:
    for step in steps:
        gradients = step(gradients)
    return gradients


def _rule(key: str, form: Callable[[Tensor, Tensor], Part], *, alone: bool = False) -> Rule:
    """The rule of one use.

    Args:
        key: the parameter.
        form: its part, from some examples of the call's tensor and gradient.
        alone: whether the tensor has the same norm.
    """

    def parts(call: Call, rows: slice) -> Mapping[str, Part]:
        return {key: form(call.tensors[0][rows], call.gradient[rows])}

    def norms(layer: nn.Module, x: Tensor, g: Tensor) -> Mapping[str, Tensor]:
        del layer, g
        return {key: squared_norm(x)}

    def step(call: Call) -> int:
        parameter = held_parameters(call.layer)[key]
        assert parameter is not None
        several = max(parameter.numel(), call.tensors[0][0].numel())
        return max(1, _parts.CHUNK_ELEMENTS // max(1, several))

    return Rule(
        parts, step, _none, _none, held_parameters, lambda _: None, norms if alone else None
    )


def _none(*_: Any) -> Any:
    raise NotImplementedError  # its calls are made here
