"""Evaluating many trials at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from noisescale.run.trials.quantities import TrialEvaluator, answers_kept
from noisescale.run.trials.stacked.anatomy import Anatomy, StandIn
from noisescale.run.trials.stacked.general import GeneralNetwork
from noisescale.run.trials.stacked.heads import CrossEntropy, Head
from noisescale.run.trials.stacked.pieces import Cut, cut, cut_sorted, joined
from noisescale.workload import Workload

NUMBERS_TOGETHER = 1 << 20
"""Numbers of the widest activation that one pass holds, of all its trials. (measured: from 2^18
to 2^21 alike on digits and MNIST)"""

VMAPPED_TOGETHER = 8
"""Trials in one pass where nothing is known of the model. (assumed)"""

Metrics = Callable[[Any, Any], Mapping[str, Any]]
Values = list[tuple[dict[str, float], float]]
"""Of each trial, its quantities by name and the loss that tells divergence."""


class Outputs(Protocol):
    """A network whose outputs on a shared batch can be had."""

    input: int
    head: Head
    together: int
    """Examples in one pass, at most."""
    multiplies: int | None
    """Place of the weights that multiply the flattened input, if that is what comes first."""

    def outputs(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Return outputs, shape (trials, classes, examples).

        Inputs to be multiplied may lack their last columns, which are zero then.
        """


class Appraiser:
    """Evaluates what trials' targets are about from their outputs.

    Args:
        workload: its metrics and data are used.
        evaluator: knows the quantities and holds the evaluation data.
        anatomy: of the model.
        network: gives outputs.

    Attributes:
        place: where each column of the first weights lies; None where it belongs.
    """

    def __init__(
        self, workload: Workload, evaluator: TrialEvaluator, anatomy: Anatomy, network: Outputs
    ) -> None:
        self._workload, self._evaluator = workload, evaluator
        self._anatomy, self._network = anatomy, network
        self._picked = torch.empty(0)
        self.place: Tensor | None = None

    def values(self, weights: Sequence[Tensor]) -> Values:
        """Evaluate trials; ``weights`` holds per parameter (trials, ...)."""
        return _collect(self._evaluator, len(weights[0]), lambda s, m: self._means(weights, s, m))

    def _means(self, weights: Sequence[Tensor], split: str, metrics: Sequence[str]) -> Tensor:
        """Return means over a split's data, shape (metrics, trials), float64."""
        trials, count = len(weights[0]), 0
        total = torch.zeros(len(metrics), trials, dtype=torch.float64)
        for part in self._cuts(split):
            numbers = len(part.inputs[0]) * self._anatomy.widest
            numbers = max(numbers, part.count * self._anatomy.output[0].numel())
            for rows in _chunks(trials, max(1, NUMBERS_TOGETHER // numbers)):
                own = self._sorted([weight[rows] for weight in weights], part.columns)
                pieces = [self._network.outputs(own, inputs) for inputs in part.inputs]
                outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
                for k, metric in enumerate(metrics):
                    total[k, rows] += self._sums(outputs, part, metric).double().cpu()
            count += part.count
        return total / count

    def _cuts(self, split: str) -> Iterable[Cut]:
        place, together = self._network.input, self._network.together
        batches = self._evaluator.batches(split)
        if not isinstance(batches, list):  # too many to keep
            return (cut(batch, place, together) for _, batch in batches)
        kept: dict[str, list[Cut]] = self._evaluator.prepared
        if split not in kept:
            way = cut if self._network.multiplies is None else cut_sorted
            whole = [batch for _, batch in batches]
            if isinstance(self._network.head, CrossEntropy):  # another may divide by the batch's
                whole = joined(whole)
            kept[split] = [way(batch, place, together) for batch in whole]
        return kept[split]

    def _sorted(self, weights: Sequence[Tensor], columns: Tensor | None) -> Sequence[Tensor]:
        first = self._network.multiplies
        if self.place is not None:
            columns = self.place if columns is None else self.place.index_select(0, columns)
        if first is None or columns is None:
            return weights
        weight = weights[first].flatten(0, 1)  # torch picks columns of matrices fastest
        if self._picked.shape != weight.shape or self._picked.dtype != weight.dtype:
            self._picked = torch.empty_like(weight)
        torch.index_select(weight, 1, columns, out=self._picked)
        return [*weights[:first], self._picked.view_as(weights[first]), *weights[first + 1 :]]

    def _sums(self, outputs: Tensor, part: Cut, metric: str) -> Tensor:
        """Return sums over examples, shape (trials,)."""
        batch, leaves = part.batch, part.leaves
        if metric == "loss":
            return outputs.shape[2] * self._network.head.losses(outputs, leaves).double()
        place = self._anatomy.input
        if metric not in part.labels:
            # Of every batch: what holds for one need not for the next.
            part.labels[metric] = _labels_of_error(
                self._metrics, metric, outputs[0].T, batch, leaves[place]
            )
        labels = part.labels[metric]
        if labels is not None:
            return wrong(outputs, leaves[labels])
        stand_ins = [StandIn(one.T, to=leaves[place]) for one in outputs]
        return torch.stack(
            [self._metrics(each, batch)[metric].double().sum() for each in stand_ins]
        )

    @property
    def _metrics(self) -> Metrics:
        assert self._workload.metrics is not None
        return self._workload.metrics


class GeneralAppraiser:
    """Evaluates trials of any model, vectorised.

    Args:
        workload: its loss, metrics and data are used.
        evaluator: knows the quantities and holds the evaluation data.
        network: holds the model.
    """

    def __init__(
        self, workload: Workload, evaluator: TrialEvaluator, network: GeneralNetwork
    ) -> None:
        self._workload, self._evaluator, self._network = workload, evaluator, network

    def values(self, weights: Sequence[Tensor]) -> Values:
        """Evaluate trials; ``weights`` holds per parameter (trials, ...)."""
        return _collect(self._evaluator, len(weights[0]), lambda s, m: self._means(weights, s, m))

    def _means(self, weights: Sequence[Tensor], split: str, metrics: Sequence[str]) -> Tensor:
        trials, count = len(weights[0]), 0
        total = torch.zeros(len(metrics), trials, dtype=torch.float64)

        for size, batch in self._evaluator.batches(split):

            def sums(model: Any, batch: Any, size: int = size) -> list[Tensor]:
                with answers_kept(model):
                    return [self._evaluator.total(model, batch, name, size) for name in metrics]

            for rows in _chunks(trials, VMAPPED_TOGETHER):
                part = [weight[rows] for weight in weights]
                with torch.no_grad():
                    found = self._network.apply(sums, part, batch)
                total[:, rows] += torch.stack([each.cpu() for each in found])
            count += size
        return total / count


def wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return how many examples of each trial have their largest output elsewhere than the label.

    Equal to ``(outputs.argmax(1) != labels).sum(1)``, many times faster.

    Args:
        outputs: shape (trials, classes, examples).
        labels: shape (examples,).
    """
    top = outputs.amax(1, keepdim=True)
    # Compared as numbers: four times as fast as booleans are made and summed.
    equal = torch.eq(outputs, top, out=torch.empty_like(outputs)).sum(1)
    if not bool((equal == 1).all()):  # ties or NaN: argmax knows what to do
        return (outputs.argmax(1) != labels).sum(1)
    own = outputs.gather(1, labels.expand(len(outputs), 1, -1))
    return (own < top).sum((1, 2))


def _labels_of_error(
    metrics: Metrics, name: str, output: Tensor, batch: Any, inputs: Tensor
) -> int | None:
    """Return which tensor of the batch holds the classes if a metric is the error, else None."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, *output.shape, generator=generator).to(output)
    try:
        theirs = [metrics(StandIn(one, to=inputs), batch)[name].double() for one in drawn]
    except Exception:  # noqa: BLE001  then it is asked trial by trial, which says why
        return None
    for place, leaf in enumerate(tree_leaves(batch)):
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.int64 or leaf.dim() != 1:
            continue
        if int(leaf.min()) < 0 or int(leaf.max()) >= output.shape[1]:
            continue
        ours = [(one.argmax(1) != leaf).double() for one in drawn]
        if all(
            a.shape == b.shape and bool((a == b).all()) for a, b in zip(ours, theirs, strict=True)
        ):
            return place
    return None


def _chunks(trials: int, each: int) -> Iterator[slice]:
    for start in range(0, trials, each):
        yield slice(start, min(start + each, trials))


def _collect(
    evaluator: TrialEvaluator, trials: int, means: Callable[[str, Sequence[str]], Tensor]
) -> Values:
    named: list[dict[str, float]] = [{} for _ in range(trials)]
    for split, metrics in evaluator.splits.items():
        for metric, row in zip(metrics, means(split, metrics).tolist(), strict=True):
            for values, value in zip(named, row, strict=True):
                values[f"{split}_{metric}"] = value
    return [(values, values[evaluator.loss_name]) for values in named]
