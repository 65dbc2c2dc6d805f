"""The values that a trial's targets are about, in one pass over the evaluation data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from noisescale.records import Target
from noisescale.run.evaluation import Evaluator, evaluating
from noisescale.workload import Workload


@contextmanager
def answers_kept(model: nn.Module) -> Iterator[None]:
    """Let a model compute once what it is asked for again: same inputs, same weights.

    It stays the model itself, so that losses and metrics may take of it what they like.

    Args:
        model: without gradients and in ``eval()`` mode.

    >>> model, inputs = nn.Linear(2, 1), torch.ones(3, 2)
    >>> with answers_kept(model):
    ...     model(inputs) is model(inputs)
    True
    """
    ordinary: Any = model.forward
    own = model.__dict__.get("forward")
    asked: list[Any] = []
    answer: Any = None

    def forward(*inputs: Any, **named: Any) -> Any:
        nonlocal answer
        # Weights may be exchanged or moved between two looks at the same batch.
        tensors = [t for p in model.parameters() for t in (p, p._version)]
        now = [*inputs, *tensors]
        if named or not inputs or not _same(now, asked):
            answer = ordinary(*inputs, **named)
            asked[:] = [] if named else now
        return answer

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(ones) == len(others) and all(
        a is b or (type(a) is int and a == b) for a, b in zip(ones, others, strict=True)
    )


class TrialEvaluator(Evaluator):
    """Evaluates all quantities of a trial's targets, and the loss, in one pass per split.

    Attributes:
        splits: by split, the metrics to evaluate.
        loss_name: the quantity that tells divergence.
        prepared: what stacks made of a split's data, once for all of them.

    Args:
        workload: its loss, metrics and data are used.
        device: where the model lies.
        names: the quantities; the first one's split gives the loss that tells divergence.
    """

    def __init__(self, workload: Workload, device: torch.device, names: Sequence[str]) -> None:
        super().__init__(workload, device)
        targets = [Target.parse(f"{name}<0") for name in names or ("train_loss",)]
        self.splits: dict[str, list[str]] = {targets[0].split: ["loss"]}
        for target in targets:
            metrics = self.splits.setdefault(target.split, [])
            if target.metric not in metrics:
                metrics.append(target.metric)
        self.prepared: dict[str, Any] = {}
        self.loss_name = f"{targets[0].split}_loss"

    def all_values(self, model: nn.Module) -> tuple[dict[str, float], float]:
        """Return the quantities by name, and the loss that tells divergence."""
        values: dict[str, float] = {}
        with evaluating(model):
            for split, names in self.splits.items():
                means = self._means(model, split, names)
                values.update({f"{split}_{n}": v for n, v in zip(names, means, strict=True)})
        return values, values[self.loss_name]

    def total(self, model: Any, batch: Any, metric: str, size: int) -> torch.Tensor:
        """Return a quantity's sum over a batch's examples, a scalar.

        Sums of counts are exact, so that a value that lies right on a target does not pass it by
        rounding, whatever the batches.
        """
        if metric == "loss":
            return size * self.mean(model, batch, metric).double()
        assert self._workload.metrics is not None
        values: torch.Tensor = self._workload.metrics(model, batch)[metric]
        return values.double().sum()

    def _means(self, model: nn.Module, split: str, names: Sequence[str]) -> list[float]:
        sums, count = torch.zeros(len(names), dtype=torch.float64), 0
        for size, batch in self.batches(split):
            with answers_kept(model):
                sums += torch.stack([self.total(model, batch, name, size).cpu() for name in names])
            count += size
        return (sums / count).tolist()
