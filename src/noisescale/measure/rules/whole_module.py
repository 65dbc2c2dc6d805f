"""The fallback: a module is run again, one example at a time, all of them side by side.

Exact where the module maps the examples of a batch one by one and draws no random numbers;
what it is given and gives back must be tensors in nested tuples, lists and mappings. It costs
the module's own passes again, and per-example gradients of its parameters in chunks.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy as copied
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.modules.dropout import _DropoutNd

from noisescale.measure.compiled import plain, plain_name
from noisescale.measure.gradients import tensors_in
from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.parts import Part, wide
from noisescale.measure.rules.registry import (
    NOT_BATCHED,
    RULES,
    WHOLE,
    Call,
    Dims,
    Rule,
    held_parameters,
    never_called,
    replaced,
)

# Activations that a module keeps per element of its inputs and outputs. (assumed)
_KEPT = 8


_COLLECTING = (list, dict, set)


def twin(module: nn.Module, parameters: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """A copy without hooks that computes with other parameters and its own buffers."""
    inner = plain(module)
    if inner is not module:
        return twin(inner, {plain_name(k): v for k, v in parameters.items()}, plain_name(prefix))
    copy: nn.Module = object.__new__(type(module))
    # What a forward pass collects on the way must not show in the module itself.
    state = {k: copied(v) if type(v) in _COLLECTING else v for k, v in vars(module).items()}
    state.update({k: OrderedDict() for k, v in state.items() if k.endswith("_hooks") and v})
    state["_compiled_call_impl"] = None
    state["_parameters"] = {
        key: None if p is None else parameters.get(prefix + key, _wide(p))
        for key, p in module._parameters.items()
    }
    state["_buffers"] = {
        k: None if b is None else _wide(b).clone() for k, b in module._buffers.items()
    }
    state["_modules"] = {
        key: None if child is None else twin(child, parameters, f"{prefix}{key}.")
        for key, child in module._modules.items()
    }
    vars(copy).update(state)
    return copy


def _wide(tensor: Tensor) -> Tensor:
    return wide(tensor.detach()) if tensor.is_floating_point() else tensor.detach()


def _gradients(call: Call, rows: slice) -> Mapping[str, Part]:
    layer, count = call.layer, rows.stop - rows.start
    named = _wanted(layer).items()
    parameters = {key: wide(p.detach()) for key, p in named if p is not None and p.requires_grad}
    dtype = next(iter(parameters.values())).dtype
    live = [i for i, g in enumerate(call.gradients) if g is not None]
    cotangents = [g for g in call.gradients if g is not None]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in call.tensors]
    dims = [*call.dims, *(call.outputs[i] for i in live)]
    flat = [
        t if d is None else t.narrow(d, rows.start, count)
        for t, d in zip([*tensors, *cotangents], dims, strict=True)
    ]

    def one(*example: Any) -> dict[str, Tensor]:
        rows_of_one = [
            t if d is None else t.unsqueeze(d) for t, d in zip(example, dims, strict=True)
        ]
        given, wanted = rows_of_one[: len(tensors)], rows_of_one[len(tensors) :]

        def run(values: dict[str, Tensor]) -> list[Tensor]:
            parts = iter(given)
            args, kwargs = replaced(call.arguments, lambda _: next(parts))
            outputs = tensors_in(twin(layer, values)(*args, **kwargs))
            return [outputs[i] for i in live]

        outputs, pull = vjp(run, parameters)[:2]
        found = pull([g.to(o.dtype) for g, o in zip(wanted, outputs, strict=True)])[0]
        assert isinstance(found, dict)
        return found

    with torch.autocast(flat[0].device.type, enabled=False), warnings.catch_warnings():
        # Of operations that run one example after the other: slow, and as exact.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        result = vmap(one, in_dims=tuple(dims), randomness="error")(*flat)
    assert isinstance(result, dict)
    return result


def _step(call: Call) -> int:
    parameters = sum(p.numel() for p in _wanted(call.layer).values() if p is not None)
    given = [t.numel() for t, d in zip(call.tensors, call.dims, strict=True) if d is not None]
    activity = sum(given) + sum(g.numel() for g in call.gradients if g is not None)
    per_example = max(parameters, _KEPT * activity // max(1, call.size))
    return max(1, _parts.CHUNK_ELEMENTS // max(1, per_example))


def _inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> Dims | str:
    del layer
    tensors = tensors_in([*args, *kwargs.values()])
    dims: Dims = [
        0 if t.dim() and t.shape[0] == size and not isinstance(t, nn.Parameter) else None
        for t in tensors
    ]
    return dims if 0 in dims else NOT_BATCHED


def _outputs(layer: nn.Module, outputs: list[Tensor], size: int) -> list[int] | str:
    del layer
    if any(t.requires_grad and (not t.dim() or t.shape[0] != size) for t in outputs):
        return "its output does not start with the batch dimension"
    return [0] * len(outputs)


def _called(layer: nn.Module) -> str | None:
    return f"{type(layer).__name__} is never called" if never_called(layer) else None


def _usable(layer: nn.Module) -> str | None:
    kind = f"{type(layer).__name__} has no rule"
    for module in layer.modules():
        if module.training and _draws(module):
            return f"{kind}, and random numbers inside it (dropout) cannot be drawn again"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return f"{kind}, and {type(module).__name__} inside it cannot be run side by side"
        if getattr(module, "max_norm", None) is not None:
            return f"{kind}, and max_norm inside it changes a weight during the forward pass"
    return None


def _draws(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RReLU) or (
        isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    )


def _wanted(layer: nn.Module) -> Mapping[str, nn.Parameter | None]:
    if isinstance(layer, nn.MultiheadAttention):
        # It uses its output projection's parameters without calling it.
        return dict(layer.named_parameters())
    return held_parameters(layer)


_ATTENTION = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


def _attention_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> Dims | str:
    assert isinstance(layer, nn.MultiheadAttention)
    names = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs)
    batch = 0 if layer.batch_first else 1
    dims: Dims = []
    for name, value in names.items():
        if not isinstance(value, Tensor):
            continue
        if name == "attn_mask":
            if value.dim() > 2:
                return "an attention mask of its own for every example has no rule"
            dims.append(None)
            continue
        padding = name == "key_padding_mask"
        dim = 0 if padding else batch
        if value.dim() != (2 if padding else 3) or value.shape[dim] != size:
            return "its input has no batch dimension where batch_first says"
        dims.append(dim)
    return dims


def _attention_outputs(layer: nn.Module, outputs: list[Tensor], size: int) -> list[int] | str:
    del size
    assert isinstance(layer, nn.MultiheadAttention)
    return [0 if layer.batch_first else 1, *[0] * (len(outputs) - 1)]


WHOLE.append(
    Rule(
        _gradients,
        _step,
        _inputs,
        _outputs,
        _wanted,
        _called,
        repeats=True,
        direct=True,
        again=_usable,
    )
)
RULES[nn.MultiheadAttention] = Rule(
    _gradients,
    _step,
    _attention_inputs,
    _attention_outputs,
    _wanted,
    _usable,
    repeats=True,
)
