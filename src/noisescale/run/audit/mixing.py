"""Which modules give an example another output when other examples are in its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.measure.batches import _map
from noisescale.measure.compiled import plain, plain_name
from noisescale.run.audit.bench import Bench
from noisescale.run.audit.conditions import Condition
from noisescale.run.users_code import blame_user


@dataclass(frozen=True)
class Mixers:
    """Where examples of a batch meet.

    Attributes:
        modules: names of the innermost modules that mix.
        model_keeps_apart: whether the whole model was tried and does not mix.
    """

    modules: tuple[str, ...]
    model_keeps_apart: bool


def find_mixers(bench: Bench, condition: Condition) -> Mixers:
    """Run every module again on half of the examples that it saw.

    Modules whose arguments do not have one row per example cannot be tried.
    """
    model = plain(bench.model)
    calls = _recorded(bench, model, condition)
    names = {module: plain_name(name) or "(model)" for name, module in model.named_modules()}
    found: list[str] = []
    verdicts: dict[str, bool | None] = {}
    for module in reversed(list(calls)):  # inner modules are called, and so recorded, later
        name = names.get(module)
        if name is None:
            continue
        inner = any(name == "(model)" or other.startswith(f"{name}.") for other in found)
        verdicts[name] = True if inner else _mixes(bench, module, calls[module], condition)
        if verdicts[name] and not inner:
            found.append(name)
    return Mixers(tuple(reversed(found)), verdicts.get("(model)") is False)


_Call = tuple[tuple[Any, ...], dict[str, Any], Any]


def _recorded(bench: Bench, model: nn.Module, condition: Condition) -> dict[nn.Module, _Call]:
    """Return the first call of every module, in the order in which they began."""
    began: dict[nn.Module, tuple[Any, Any]] = {}
    ended: dict[nn.Module, Any] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in began:
            began[module] = (_copied(args), _copied(kwargs))

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        if module not in ended:
            ended[module] = _copied(output)

    def watched() -> None:
        handles: list[Any] = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            bench.workload.loss(bench.model, bench.batch(bench.everything()))
        finally:
            for handle in handles:
                handle.remove()

    with blame_user(f"workload {bench.workload.name!r}: a forward pass"):
        _under(bench, condition, watched)
    return {m: (*arguments, ended[m]) for m, arguments in began.items() if m in ended}


def _mixes(bench: Bench, module: nn.Module, call: _Call, condition: Condition) -> bool | None:
    args, kwargs, output = call
    count = bench.examples.count
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
        return None
    tensors = [t for t in _tensors((args, kwargs)) if t.dim()]
    if not tensors or any(len(t) != count for t in tensors):
        return None
    half = count // 2
    few, named = (_map(part, lambda t: t[:half] if t.dim() else t) for part in (args, kwargs))
    try:
        again = _under(bench, condition, lambda: module(*few, **named))
    except Exception:  # noqa: BLE001 - it cannot be tried on half
        return None
    pairs = list(zip(_tensors(output), _tensors(again), strict=False))
    return any(_differ(one, other) for one, other in pairs) if pairs else None


def _differ(whole: Tensor, half: Tensor) -> bool:
    if not whole.dim() or len(whole) == len(half) or not half.is_floating_point():
        return False
    rows = whole[: len(half)].double()
    if rows.shape != half.shape:
        return False
    # Far above rounding, which other kernels for other sizes change.
    bound = torch.finfo(half.dtype).eps ** 0.5 * float(rows.norm())
    return not float((rows - half.double()).norm()) <= bound


def _under(bench: Bench, condition: Condition, run: Callable[[], Any]) -> Any:
    with bench.held(condition, bench.seeds[0]), torch.no_grad():
        return run()


def _copied(thing: Any) -> Any:
    """Copies, since layers that follow may work in place."""
    return _map(thing, lambda tensor: tensor.detach().clone())


def _tensors(thing: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(thing, note)
    return found
