"""The values that a trial's targets are about, in one pass over the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from noisescale.records import Target
from noisescale.run.evaluation import Evaluator, evaluating
from noisescale.workload import Workload


class Once:
    """Stands in for a model: what it answered to the same inputs is not computed again.

    Args:
        model: everything else is its.

    >>> once = Once(nn.Linear(2, 1))
    >>> inputs = torch.ones(3, 2)
    >>> once(inputs) is once(inputs)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._asked: tuple[Any, ...] = ()
        self._answer: Any = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's answer, or the one it gave to these very inputs."""
        same = len(inputs) == len(self._asked) and not named
        if (
            not same
            or not inputs
            or any(a is not b for a, b in zip(inputs, self._asked, strict=True))
        ):
            self._answer = self._model(*inputs, **named)
            self._asked = () if named else inputs
        return self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


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
            once = Once(model)
            sums += torch.stack([self.total(once, batch, name, size).cpu() for name in names])
            count += size
        return (sums / count).tolist()
