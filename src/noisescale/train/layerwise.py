"""What LARS and LAMB share: one trust ratio per parameter tensor, and which tensors have none."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT, StateDict

from noisescale.errors import InvalidInputError
from noisescale.train.arguments import require_groups

Exclude = Callable[[str, torch.Tensor], bool]
"""``exclude(name, parameter)``; the name is empty where parameters came without names."""

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]

CHUNK_ELEMENTS = {"cpu": 2**18}
"""Elements that go through all passes together, so that later passes find them in the cache and
temporary tensors reuse the same memory. (measured: benchmarks/large_batch_optimizers.py)"""

CHUNK_ELEMENTS_ELSEWHERE = 2**25
"""The same where kernel launches cost more than they save: it only bounds temporary memory.
(assumed)"""


def biases_and_norms(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a scalar or a vector: biases, scales and shifts of norms.

    They take no decay and no trust ratio: as vectors of few, small or equal entries their norm
    is no measure of how far they may move.

    Args:
        name: not used.
        parameter: any shape.

    Source: You et al. 2017 train biases with plain steps; so do apex, timm and flax's examples.

    >>> biases_and_norms("", torch.ones(3)), biases_and_norms("", torch.ones(3, 2))
    (True, False)
    """
    del name
    return parameter.ndim <= 1


@dataclass(frozen=True)
class Slice:
    """Parameters of one group that go through the same operations together.

    Attributes:
        weights: of one device and dtype.
        gradients: one per weight.
        states: the optimizer's state of each.
        excluded: whether decay and trust ratio are left out.
    """

    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    states: list[dict[str, Any]]
    excluded: bool

    def state(self, key: str) -> list[torch.Tensor]:
        """Return one entry of every state."""
        return [state[key] for state in self.states]


class LayerwiseOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimizer with a trust ratio per parameter tensor.

    Groups may carry their own ``exclude``: a predicate, or True or False for the whole group.
    What it said of each parameter is kept in the group as ``excluded``, a list of booleans, so
    that a state dict holds no code; a loaded state dict brings its own.

    Args:
        params: as torch's optimizers take them; names (``model.named_parameters()``) are
            handed to ``exclude``.
        defaults: the optimizer's own settings.
        exclude: which parameters take plain steps, without decay and trust ratio; False for
            none.

    Raises:
        InvalidInputError: a setting is out of its range or a parameter is complex.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], exclude: Exclude | bool) -> None:
        super().__init__(params, {**defaults, "exclude": exclude})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; ``exclude`` may differ from the other groups'.

        Raises:
            InvalidInputError: a setting is out of its range or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            group["excluded"] = _excluded(group)
        except Exception:
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load settings and state, as in torch.

        Raises:
            InvalidInputError: the state dict is another optimizer's.
        """
        needed = {*self.defaults, "excluded"} - {"exclude"}
        require_groups(state_dict, type(self).__name__, needed)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once.

        Nothing is copied to the host, so no device is waited for.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            InvalidInputError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in self._slices(group):
                self._update(part, group)
        return loss

    @abc.abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise InvalidInputError if a group's settings are out of range."""

    @abc.abstractmethod
    def _begin_step(self, state: dict[str, Any], weight: torch.Tensor) -> int:
        """Make a parameter's state where it is missing.

        Returns:
            What must be equal among parameters that are updated together.
        """

    @abc.abstractmethod
    def _update(self, part: Slice, group: dict[str, Any]) -> None:
        """Move one slice's weights and states, in place."""

    def _slices(self, group: dict[str, Any]) -> Iterator[Slice]:
        alike: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for place, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                raise _sparse(group, place)
            steps = self._begin_step(self.state[weight], weight)
            key = (weight.device, weight.dtype, group["excluded"][place], steps)
            alike.setdefault(key, []).append(weight)
        for (device, _, excluded, _), weights in alike.items():
            limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)
            for chunk in _chunks(weights, limit):
                gradients = [weight.grad for weight in chunk if weight.grad is not None]
                yield Slice(chunk, gradients, [self.state[w] for w in chunk], excluded)


def norms(tensors: Tensors) -> torch.Tensor:
    """Return the Euclidean norm of each tensor, shape (n,), in float32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def add_scaled(
    targets: Tensors,
    sources: Tensors,
    ratios: Tensors | None,
    factor: float,
) -> None:
    """Add ``factor * ratio * source`` to each target in one pass; no ratios means all 1."""
    if ratios is None:
        torch._foreach_add_(targets, sources, alpha=factor)
    else:
        torch._foreach_addcmul_(targets, sources, ratios, value=factor)


def check_setting(name: str, value: Any, *, positive: bool = False, below: float = 1e308) -> None:
    """Refuse a setting that is not a number of its range.

    Raises:
        InvalidInputError: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value > 0 if positive else value >= 0) or not value < below:
        kind = "a positive number" if positive else "a number of at least 0"
        limit = f" below {below:g}" if below < 1e308 else ""
        shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        raise InvalidInputError(f"{name} {shown}", f"{kind}{limit} is required", f"change {name}")


def _excluded(group: dict[str, Any]) -> list[bool]:
    exclude = group.pop("exclude")
    weights = group["params"]
    names = group.get("param_names", [""] * len(weights))
    for name, weight in zip(names, weights, strict=True):
        if weight.is_complex():
            raise InvalidInputError(
                f"complex parameter {name or tuple(weight.shape)}",
                "real parameters are required",
                "train view_as_real of it, or use torch.optim.Adam",
            )
        # Shards of FullyShardedDataParallel are vectors: excluded one and all, or given their
        # own norms, without a word. fully_shard's and ZeRO's know their whole tensors.
        if getattr(weight, "_fsdp_flattened", False):
            raise InvalidInputError(
                f"parameter {name or tuple(weight.shape)} flattened by FullyShardedDataParallel",
                "whole tensors are required, since a norm is taken of each",
                "shard the model by torch.distributed.fsdp.fully_shard, or use"
                " DistributedDataParallel",
            )
    if isinstance(exclude, bool):
        return [exclude] * len(weights)
    return [bool(exclude(name, weight)) for name, weight in zip(names, weights, strict=True)]


def _sparse(group: dict[str, Any], place: int) -> InvalidInputError:
    names = group.get("param_names")
    which = names[place] if names else f"of shape {tuple(group['params'][place].shape)}"
    return InvalidInputError(
        f"sparse gradient of parameter {which}",
        "dense gradients are required, since a norm is taken over the whole tensor",
        "make its embedding with sparse=False, or give it torch.optim.SparseAdam",
    )


def _chunks(weights: list[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    elements = 0
    for weight in weights:
        if chunk and elements + weight.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(weight)
        elements += weight.numel()
    yield chunk
