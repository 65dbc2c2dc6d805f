"""Gradient accumulation whose number of micro-batches changes only between updates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from noisescale.errors import InvalidInputError, nearest
from noisescale.plan.split import split_batch
from noisescale.records import BatchSplit
from noisescale.train.arguments import take_state, whole
from noisescale.train.batching import ResizableBatchSampler
from noisescale.train.replicas import replicas_here, sum_over_replicas, synchronised

Batch = TypeVar("Batch")

LAST = ("flush", "drop", "carry")


class GradientAccumulation:
    """Adds up the gradients of micro-batches until they make one batch.

    The micro-batch stays, their number per update changes: no data loader is rebuilt, and memory
    stays as it is. Losses are weighed by the examples (or tokens) that were really in each
    micro-batch, so that an update is the mean over its batch whatever its parts were.

    The forward and the backward pass of each micro-batch belong into :meth:`micro_batch`. Under
    DistributedDataParallel (or FSDP) it leaves out the synchronisation of all but the last.
    With a GradScaler nothing changes: ``scaler.scale(loss * weight).backward()``.

    Attributes:
        is_update: whether the micro-batch at hand completes a batch: step and zero now.
        position: examples in the batches completed, over all replicas.
        updates: batches completed.
        dropped: examples of incomplete batches that were dropped, over all replicas.
        split: how a batch is made of micro-batches and replicas; prints in one line.
        last_batch_size: examples in the last batch completed, over all replicas.

    Args:
        model: whose gradients add up.
        micro_batch_size: examples per pass on one device.
        batch_size: global batch size; micro-batch x accumulation x replicas. One micro-batch
            per update by default.
        sampler: the loader's, if it is a :class:`ResizableBatchSampler` of micro-batches with
            ``last="carry"``; its position is then kept and saved here.
        last: what becomes of a batch that is incomplete when the data end: ``flush`` (update by
            the mean over the examples seen; the default), ``drop`` (the gradients are discarded),
            or ``carry`` (the next epoch completes it: do not zero the gradients between epochs).
        loss_reduction: ``mean`` if the loss is a mean over the micro-batch, ``sum`` if a sum.
        weight_per_example: what an example of full size weighs, where weights are given:
            tokens per sequence. It keeps losses in their usual size and cancels from gradients.
        num_replicas: devices that average their gradients; torch.distributed's world, or 1.
        sum_over_replicas: sums a number over the replicas, called by all of them once per
            update that was given weights; torch.distributed's by default.

    Raises:
        InvalidInputError: an argument is out of its range, or the batch does not divide.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> accumulation = GradientAccumulation(model, micro_batch_size=2, batch_size=4)
    >>> for part in accumulation.over(torch.arange(6.0).view(6, 1).split(2)):
    ...     with accumulation.micro_batch(len(part)) as weight:
    ...         (model(part).mean() * weight).backward()
    ...     if accumulation.is_update:
    ...         print(accumulation.last_batch_size, model.weight.grad.item())
    ...         model.zero_grad()
    4 1.5
    2 4.5
    >>> print(accumulation.split)
    global 4 = micro 2 x accumulation 2 x replicas 1 (examples)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_batch_size: int,
        batch_size: int | None = None,
        sampler: ResizableBatchSampler | None = None,
        last: str | None = None,
        loss_reduction: str = "mean",
        weight_per_example: float = 1.0,
        num_replicas: int | None = None,
        sum_over_replicas: Callable[[float], float] = sum_over_replicas,
    ) -> None:
        self._model = model
        if sampler is not None and num_replicas is None:
            num_replicas = sampler.num_replicas
        self.num_replicas, _ = replicas_here(num_replicas, 0)
        self.micro_batch_size = whole("micro_batch_size", micro_batch_size)
        self.last = _policy(last, sampler)
        if loss_reduction not in ("mean", "sum"):
            raise InvalidInputError(
                f"loss_reduction {loss_reduction!r}", "not a reduction", "choose mean or sum"
            )
        self._mean = loss_reduction == "mean"
        if not 0 < weight_per_example < math.inf:
            raise InvalidInputError(
                f"weight_per_example {weight_per_example}", "a positive number is required",
                "give tokens per sequence, or leave it out",
            )  # fmt: skip
        self._weight_per_example = weight_per_example
        self._sum = sum_over_replicas
        self._sampler = _fitting(sampler, self.micro_batch_size, self.num_replicas)
        self._follows: Callable[[int], int] | None = None
        self.position = self.updates = self.dropped = self.last_batch_size = 0
        self._advanced = 0
        self._saved_sampler = None if sampler is None else sampler.state_dict()
        self._begin_window()
        self.is_update = self._inside = self._at_end = False
        smallest = self.micro_batch_size * self.num_replicas
        self.split: BatchSplit = self._split_of(smallest if batch_size is None else batch_size)

    @property
    def batch_size(self) -> int:
        """Global batch size of the update at hand, in examples; the next one's between two."""
        if not self._passes and self._follows is not None:
            return self._split_of(self._follows(self.position)).global_batch_size
        return self.split.global_batch_size

    # Nothing is drawn ahead, and what the data's end cuts short is known only then.
    last_asked = nominal_batch_size = batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per update on one device."""
        return self.split.accumulation

    @property
    def micro_batches_done(self) -> int:
        """Micro-batches of the batch at hand that were seen already; 0 between updates."""
        return self._passes

    def check_batch_size(self, size: int) -> None:
        """Refuse a global batch size that cannot be made here.

        Raises:
            InvalidInputError: it is no multiple of micro-batch size times replicas.
        """
        self._split_of(size)

    def set_batch_size(self, size: int) -> None:
        """Change the global batch size of the coming updates.

        Args:
            size: a multiple of micro-batch size times replicas.

        Raises:
            InvalidInputError: a batch is incomplete, or the size does not divide; then the
                nearest that do are named.
        """
        if self._passes:
            raise InvalidInputError(
                f"batch_size {size} after {self._passes} of {self.accumulation} micro-batches",
                "the accumulation changes only between updates",
                "set it where is_update is True, or when no micro-batch was seen yet",
            )
        self.split = self._split_of(size)
        self._follows = None

    def follow(self, size_at: Callable[[int], int]) -> None:
        """Take every batch's size from a function of the position where it begins.

        Args:
            size_at: from examples seen to the global batch size.

        Raises:
            InvalidInputError: a batch is incomplete, or the first size does not divide.
        """
        self.set_batch_size(size_at(self.position))
        self._follows = size_at

    def over(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over a loader of micro-batches, knowing when the data end.

        It looks one micro-batch ahead, so that replicas synchronise the last one of the data.

        Args:
            loader: gives as many micro-batches, of equal sizes, on every replica.
        """
        self._inside, self._at_end = True, False
        try:
            ahead = iter(loader)
            for batch in ahead:
                for following in ahead:
                    yield batch
                    batch = following
                self._at_end = True
                yield batch
            if self._passes and self.last == "drop":
                self._drop()
        finally:
            self._inside = self._at_end = False

    @contextlib.contextmanager
    def micro_batch(
        self, size: int | None = None, *, weight: float | None = None
    ) -> Iterator[float]:
        """Enclose the forward and backward pass of one micro-batch.

        Args:
            size: its examples on this replica; ``micro_batch_size`` by default.
            weight: what its loss is a mean over where that is not examples (tokens that count);
                all replicas give one for every micro-batch of an update, or none does.

        Yields:
            What its loss is multiplied by.

        Raises:
            InvalidInputError: the size or weight is out of its range.
        """
        if not self._inside and self.last != "carry":
            raise InvalidInputError(
                f"a micro-batch outside over(loader) with last={self.last!r}",
                "the end of the data must be seen",
                "iterate over accumulation.over(loader), or give last='carry'",
            )
        size = self.micro_batch_size if size is None else whole("size", size)
        if size > self.micro_batch_size:
            raise InvalidInputError(
                f"a micro-batch of {size}",
                f"at most micro_batch_size {self.micro_batch_size} is required",
                "make the loader with this batch size",
            )
        counted = float(size) if weight is None else _weight(weight)
        if self._passes == 0 and self._follows is not None:
            self.split = self._split_of(self._follows(self.position))
        full = self._passes + 1 == self.accumulation
        self.is_update = full or (self._at_end and self.last == "flush")
        unit = 1.0 if weight is None else self._weight_per_example
        expected = self.micro_batch_size * self.accumulation * unit
        try:
            with synchronised(self._model, self.is_update):
                yield (counted if self._mean else 1.0) / expected
        except BaseException:
            self.is_update = False
            raise
        self._count(size, counted, weighted=weight is not None)
        if self.is_update:
            self._finish(expected * self.num_replicas)

    def advance(self) -> None:
        """Check that one optimizer step was made for one batch completed.

        Raises:
            InvalidInputError: no batch was completed since the last call, or more than one.
        """
        if self.updates != self._advanced + 1:
            raise InvalidInputError(
                f"a schedule step after {self.updates - self._advanced} completed batches",
                "one step per optimizer step is required",
                "call it in the branch where accumulation.is_update is True, once",
            )
        self._advanced = self.updates

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values: that of the last completed batch.

        Micro-batches of an incomplete one are not in it, since their gradients are in no
        checkpoint: they are seen again after resuming.
        """
        return {
            "version": 1,
            "position": self.position,
            "updates": self.updates,
            "dropped": self.dropped,
            "batch_size": self.split.global_batch_size,
            "sampler": self._saved_sampler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, under any number of replicas and any micro-batch that divides.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            InvalidInputError: it is not of this kind, or its batch size does not divide here.
        """
        needed = ("position", "updates", "dropped", "batch_size", "sampler")
        take_state(state, "GradientAccumulation", needed)
        if self._sampler is not None:
            if state["sampler"] is None:
                raise InvalidInputError(
                    "state of an accumulation without a sampler",
                    "here a sampler is to go on",
                    "make the accumulation without sampler, or start afresh",
                )
            self._sampler.load_state_dict(state["sampler"])
            self._saved_sampler = self._sampler.state_dict()
        if self._follows is None:
            self.split = self._split_of(state["batch_size"])
        self.position, self.updates = state["position"], state["updates"]
        self.dropped, self._advanced = state["dropped"], state["updates"]
        self._begin_window()
        self.is_update = False

    def _begin_window(self) -> None:
        self._passes = self._examples = 0
        self._weight = 0.0
        self._weighted = False

    def _count(self, size: int, counted: float, *, weighted: bool) -> None:
        if self._passes and weighted != self._weighted:
            raise InvalidInputError(
                "a batch of micro-batches with and without weight",
                "either all or none is required",
                "give weight for every micro-batch",
            )
        self._passes += 1
        self._examples += size
        self._weight += counted
        self._weighted = weighted
        if self._sampler is not None:
            self._sampler.advance()

    def _finish(self, expected: float) -> None:
        """Make the gradient the mean over what was seen, and count it."""
        seen = self._sum(self._weight) if self._weighted else self._weight * self.num_replicas
        if seen not in (0, expected):
            self._multiply_gradients(expected / seen)
        self.last_batch_size = self._examples * self.num_replicas
        self.position += self.last_batch_size
        self.updates += 1
        if self._sampler is not None:
            self._saved_sampler = self._sampler.state_dict()
        self._begin_window()

    @torch.no_grad()
    def _multiply_gradients(self, factor: float) -> None:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        dense = [gradient for gradient in gradients if not gradient.is_sparse]
        if dense:
            torch._foreach_mul_(dense, factor)
        for gradient in gradients:
            if gradient.is_sparse:
                gradient.mul_(factor)

    def _drop(self) -> None:
        self.dropped += self._examples * self.num_replicas
        self._model.zero_grad(set_to_none=True)
        self._begin_window()

    def _split_of(self, size: int) -> BatchSplit:
        return split_batch(
            global_batch_size=size,
            micro_batch_size=self.micro_batch_size,
            replicas=self.num_replicas,
        )


def _policy(last: str | None, sampler: ResizableBatchSampler | None) -> str:
    if last is None:
        return "flush" if sampler is None else "carry"
    if last not in LAST:
        raise InvalidInputError(f"last {last!r}", "not a policy", nearest(str(last), LAST))
    if sampler is not None and last != "carry":
        raise InvalidInputError(
            f"last {last!r} with a ResizableBatchSampler",
            "its epochs flow into one another",
            "leave last out",
        )
    return last


def _fitting(
    sampler: ResizableBatchSampler | None, micro: int, replicas: int
) -> ResizableBatchSampler | None:
    if sampler is None:
        return None
    found = (sampler.last, sampler.micro_batch_size, sampler.num_replicas)
    if found != ("carry", micro, replicas):
        raise InvalidInputError(
            f"a sampler with last={found[0]!r}, micro_batch_size={found[1]},"
            f" num_replicas={found[2]}",
            f"last='carry', micro_batch_size={micro}, num_replicas={replicas} are required",
            "make both with the same values",
        )
    return sampler


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InvalidInputError(
            f"weight {value!r}", "a number of at least 0 is required", "give tokens that count"
        )
    return weight
