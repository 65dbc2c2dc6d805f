"""Small workloads whose trials are trained stacked and one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisescale.records import Recipe
from noisescale.records.trial import TrialPlan
from noisescale.workload import Workload

BATCH = 17


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def smoothed(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def error(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"error": (model(batch[0]).argmax(1) != batch[1]).float()}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 4)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(45, 4),
    )


class Residual(nn.Module):
    """No chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(72, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.norm = nn.LayerNorm(9)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(1)))
        answer: Tensor = self.last(hidden + self.middle(self.norm(hidden)))
        return answer


class Called(nn.Module):
    """A chain of layers, called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.act = nn.Flatten(), nn.Tanh()
        self.first, self.last = nn.Linear(72, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.act(self.first(self.flat(x))))
        return answer


MODELS = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "residual": Residual,
    "called": Called,
}


def small_workload(
    model: Any = perceptron,
    *,
    loss: Any = cross_entropy,
    dtype: torch.dtype = torch.float64,
    examples: int = 200,
    **changes: Any,
) -> Workload:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 2, 6, 6, generator=generator, dtype=dtype)
    y = x.flatten(1)[:, :4].argmax(1)
    settings = {
        "name": "small",
        "model": lambda: model().to(dtype),
        "loss": loss,
        "train": (x[60:], y[60:]),
        "evaluate": (x[:60], y[:60]),
        "metrics": error,
        "recipe": Recipe(lr=0.1, batch_size=BATCH),
    }
    return Workload(**{**settings, **changes})


def plans(
    *,
    rates: tuple[float, ...] = (0.01, 0.03, 0.1),
    seeds: tuple[int, ...] = (0, 1, 2),
    targets: tuple[str, ...] = ("validation_error<0.3",),
    max_steps: int = 60,
    one_order: bool = False,
    batch_size: int = BATCH,
    **keys: Any,
) -> list[TrialPlan]:
    return [
        TrialPlan(
            workload="small",
            recipe=Recipe(lr=lr, batch_size=batch_size, **keys),
            seed=seed,
            order_seed=0 if one_order else seed,
            targets=targets,
            max_steps=max_steps,
        )
        for seed in seeds
        for lr in rates
    ]
