"""Is it really the batch that the input of a layer starts with?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.measure.gradients import tensors_in
from noisescale.measure.rules.registry import NOT_BATCHED, Dims, replaced
from noisescale.measure.untouched import untouched

UNCERTAIN = "whether its input starts with the batch dimension could not be told"


class Alignment:
    """Settles doubts about layers' inputs in the first forward pass, by running half a batch.

    Inputs are doubtful that have another dimension of the batch's length, or that were not
    made of what a layer made of the batch (but of a table, say): those that keep their length
    when the batch is halved hold no batch.

    Attributes:
        settled: whether there is nothing left to find out.
        probing: whether half a batch is running.
    """

    def __init__(self, model: nn.Module) -> None:
        self.settled = False
        self.probing = False
        self._model = model
        self._inputs: set[int] = set()
        self._made: set[Any] = set()
        self._doubts: dict[int, list[list[tuple[int, int]]]] = {}
        self._kept: dict[int, list[bool]] = {}
        self._half = 0

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass of the model starts."""
        given = tensors_in([*args, *kwargs.values()])
        self._inputs = {t.untyped_storage().data_ptr() for t in given}
        self._made.clear()

    def note(
        self, layer: int, size: int, tensors: list[Tensor], dims: Dims, outputs: list[Tensor]
    ) -> None:
        """Look at the inputs of one call."""
        batched = [
            (position, dim, x, self._of_batch(x))
            for position, (x, dim) in enumerate(zip(tensors, dims, strict=True))
            if dim is not None
        ]
        doubtful = [
            (position, dim)
            for position, dim, x, known in batched
            if not known or list(x.shape).count(size) > 1
        ]
        self._doubts.setdefault(layer, []).append(doubtful)
        if all(known for *_, known in batched):
            # An operation in place on a view leaves of its history only the base's.
            made = [*outputs, *(t._base for t in outputs)]
            self._made.update(t.grad_fn for t in made if t is not None and t.grad_fn is not None)

    def _of_batch(self, x: Tensor) -> bool:
        """Whether a tensor was made of the model's inputs, or of what a layer made of them."""
        if x.grad_fn is None:
            return x.untyped_storage().data_ptr() in self._inputs
        if not self._inputs:
            return True  # they came in an object of the user's: half of it cannot be made
        waiting, seen = [x.grad_fn], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in self._made:
                return True
            if node not in seen:
                seen.add(node)
                waiting += [source for source, _ in node.next_functions if source is not None]
        return False

    def note_half(self, layer: int, tensors: list[Tensor]) -> None:
        """Look at the inputs of one call on half a batch."""
        seen = self._kept.setdefault(layer, [])
        calls = self._doubts.get(layer, [])
        doubtful = calls[len(seen)] if len(seen) < len(calls) else []
        seen.append(
            all(p < len(tensors) and self._half in tensors[p].shape[d:][:1] for p, d in doubtful)
        )

    def finish(self, size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, str]:
        """End the first forward pass: the layers that cannot be measured, and why."""
        self.settled = True
        wrong: dict[int, str] = {}
        if any(any(calls) for calls in self._doubts.values()) and size >= 2:
            wrong = self._probe(size, args, kwargs)
        self._doubts.clear()
        self._kept.clear()
        self._made.clear()
        return wrong

    def _probe(self, size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, str]:
        self._half = half = max(1, size // 2)
        self.probing = True
        try:
            with untouched(self._model), torch.no_grad(), warnings.catch_warnings():
                # What it warns of (a checkpoint without gradients) the real pass will tell.
                warnings.simplefilter("ignore")
                cut_args, cut_kwargs = _first_rows((args, kwargs), size, half)
                self._model(*cut_args, **cut_kwargs)
        except Exception:  # noqa: BLE001 - a model that cannot run on half a batch says nothing
            return {i: UNCERTAIN for i, calls in self._doubts.items() if any(calls)}
        finally:
            self.probing = False
        return {i: NOT_BATCHED for i in self._doubts if not all(self._kept.get(i, []))}


class Constants:
    """Arguments that were seen to hold no batch: when a batch is as long, they still do not."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, tuple[int, ...]], Dims] = {}
        self._calls: dict[int, int] = {}

    def begin(self) -> None:
        """A forward pass of the model starts."""
        self._calls.clear()

    def told(self, layer: int, tensors: list[Tensor], dims: Dims) -> Dims:
        """Correct batch dimensions that lengths suggest, by what the same call had before."""
        number = self._calls[layer] = self._calls.get(layer, 0) + 1
        # A call with other arguments is another call.
        call = (layer, number, tuple(t.dim() for t in tensors))
        before = self._seen.get(call, dims)
        pairs = zip(before, dims, strict=True)
        self._seen[call] = told = [None if b is None else d for b, d in pairs]
        return told


def _first_rows(arguments: Any, size: int, rows: int) -> Any:
    """Copy nested arguments with batch-sized tensors cut to their first rows."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:rows].clone() if tensor.dim() and tensor.shape[0] == size else tensor

    return replaced(arguments, cut)
