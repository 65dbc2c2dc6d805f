"""Hooks on the nodes where parameters that a module uses by itself meet the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noisescale.measure.gradients import Forward
from noisescale.measure.kept import OverwrittenError, Take
from noisescale.measure.layers import Layer
from noisescale.measure.rules.direct import DirectUse

if TYPE_CHECKING:
    from noisescale.measure.layer_calls import LayerCalls

TWICE = "its module was differentiated twice in one forward pass"
OVERWRITTEN = "the input of its module was changed in place after the call"


def hook_uses(
    calls: LayerCalls,
    layer: Layer,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: list[Tensor],
) -> bool:
    """Hook every use of a module's own parameters in one call.

    Returns:
        Whether the uses are known; the module has to be run again where they are not.
    """
    if layer.direct is None:
        return False
    # What half a batch calls is no part of this pass.
    held, calls.forward = calls.forward, None
    try:
        uses = layer.direct.of(forward.size, args, kwargs, outputs)
    finally:
        calls.forward = held
    if uses is None:
        return False
    live = calls.live(layer)
    for node, kept, use in uses:
        index = layer.slots.get(use.key, -1)
        if index in live:
            forward.expected[index] = forward.expected.get(index, 0) + 1
            lone = Layer(layer.module, layer.index, use.rule, {use.key: index})
            node.register_prehook(_hook(calls, lone, forward, use, [kept]))
    return True


def _hook(
    calls: LayerCalls, layer: Layer, forward: Forward, use: DirectUse, once: list[Take]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    # The hook lives as long as the node, which it must not hold: nothing would end the circle.
    def answer(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is None or calls.ignored(layer, forward):
            return
        if not once:
            calls.drop(layer, TWICE)
            return
        try:
            kept, careful = once.pop()(), calls.careful()
            call = use.call(layer.module, kept, gradient.detach(), careful=careful)
        except OverwrittenError:
            calls.drop(layer, OVERWRITTEN)
        except Exception as error:  # noqa: BLE001 - a measurement must not kill the training
            calls.drop(layer, failed(error))
        else:
            calls.complete(layer, forward, call)

    return answer


def failed(error: Exception) -> str:
    """Say that a rule failed."""
    return f"its rule failed ({type(error).__name__}: {error})"
