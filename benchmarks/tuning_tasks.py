"""The workloads whose steps to target are tuned: the judged ones, and others to calibrate on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from stacked import Task
from torch import Tensor, nn


def dense(*widths: int) -> Callable[[], nn.Sequential]:
    """Return a maker of Linear layers with ReLU between them."""

    def make() -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def small_cnn(channels: int, side: int, classes: int = 10) -> Callable[[], nn.Sequential]:
    """Return a maker of conv to 8 and to 16 (3x3, pad 1, ReLU each), max-pool 2, linear."""
    return lambda: nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 2) ** 2, classes),
    )


def split_task(
    name: str, model: Callable[[], nn.Sequential], x: Tensor, y: Tensor, train: int
) -> Task:
    """Return a task whose first ``train`` examples are for training, the rest for validation."""
    x, y = x.to(torch.float32), y.to(torch.long)
    return Task(
        name=name,
        model=model,
        x_train=x[:train].contiguous(),
        y_train=y[:train],
        x_val=x[train:].contiguous(),
        y_val=y[train:],
    )


def load_digits(name: str, _data: Path | None) -> Task:
    """scikit-learn's digits, as an MLP 64-64-10 or as a CNN on 8x8 images."""
    from sklearn.datasets import load_digits as load

    raw = load()
    order = np.random.default_rng(0).permutation(1797)
    x = torch.from_numpy(raw.data[order] / 16.0)
    y = torch.from_numpy(raw.target[order])
    if name == "digits-cnn":
        return split_task(name, small_cnn(1, 8), x.view(-1, 1, 8, 8), y, 1437)
    return split_task(name, dense(64, 64, 10), x, y, 1437)


def load_cancer(name: str, _data: Path | None) -> Task:
    """scikit-learn's breast cancer, standardised, MLP 30-32-2."""
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer()
    order = np.random.default_rng(0).permutation(569)
    x = (raw.data - raw.data.mean(0)) / raw.data.std(0)
    x, y = torch.from_numpy(x[order]), torch.from_numpy(raw.target[order])
    return split_task(name, dense(30, 32, 2), x, y, 455)


def archive(data: Path | None, file: str) -> dict[str, Tensor]:
    """Return the arrays of an npz file in the data folder."""
    folder = data or Path(os.environ.get("NOISESCALE_DATA", ""))
    if not (folder / file).is_file():
        raise SystemExit(f"{file}: not in {folder}; pass --data DIR or set NOISESCALE_DATA")
    with np.load(folder / file) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in ("x_train", "y_train")}


def load_mnist(name: str, data: Path | None) -> Task:
    """MNIST, last 2,000 training images for validation: MLP, or CNN on 28x28 or 14x14 images."""
    arrays = archive(data, "mnist.npz")
    x, y = arrays["x_train"].to(torch.float32) / 255, arrays["y_train"]
    train = len(x) - 2000
    if name == "mnist":
        return split_task(name, dense(784, 100, 10), x.flatten(1), y, train)
    x = x.unsqueeze(1)
    if name == "mnist14-cnn":  # 2x2 averages: a quarter of the work
        return split_task(name, small_cnn(1, 14), nn.functional.avg_pool2d(x, 2), y, train)
    return split_task(name, small_cnn(1, 28), x, y, train)


def load_cifar(name: str, data: Path | None) -> Task:
    """CIFAR-10 (10,000 images, 1,000 of them for validation) averaged down to 16x16 or 8x8."""
    arrays = archive(data, "cifar10-subset.npz")
    x = arrays["x_train"].to(torch.float32).permute(0, 3, 1, 2) / 255 - 0.5
    if name.startswith("cifar8"):
        x = nn.functional.avg_pool2d(x, 4)
        model = dense(192, 64, 10) if name == "cifar8-mlp" else small_cnn(3, 8)
        x = x.flatten(1) if name == "cifar8-mlp" else x
        return split_task(name, model, x, arrays["y_train"], 9000)
    x = nn.functional.avg_pool2d(x, 2)
    return split_task(name, small_cnn(3, 16), x, arrays["y_train"], 9000)


def make_teacher(name: str, _data: Path | None) -> Task:
    """Classes chosen by a random two-layer teacher on Gaussian inputs; student 20-64-5."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5000, 20)) * np.arange(1, 21) ** -0.3
    hidden = np.maximum(x @ rng.standard_normal((20, 12)), 0.0)
    scores = hidden @ rng.standard_normal((12, 5))
    y = (scores - scores.mean(0)).argmax(1)
    return split_task(name, dense(20, 64, 5), torch.from_numpy(x), torch.from_numpy(y), 4000)


def make_patches(name: str, _data: Path | None) -> Task:
    """One of ten random 5x5 patterns, shifted by up to 3 in a noisy 8x8 image; CNN."""
    rng = np.random.default_rng(11)
    patterns = np.sign(rng.standard_normal((10, 5, 5)))
    y = rng.integers(0, 10, 5000)
    x = 0.5 * rng.standard_normal((5000, 1, 8, 8))
    for image, label, (i, j) in zip(x, y, rng.integers(0, 4, (5000, 2)), strict=True):
        image[0, i : i + 5, j : j + 5] += patterns[label]
    return split_task(name, small_cnn(1, 8), torch.from_numpy(x), torch.from_numpy(y), 4000)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How a workload is tuned.

    Attributes:
        load: makes the task from its name and the data folder.
        goals: validation errors to get below.
        batch_sizes: bracket the critical batch size.
        guess: first guess of the best rate of SGD at the smallest batch size; a tenth of it
            serves momentum 0.9.
        seeds: number of them.
        max_examples: no trial sees more.
    """

    load: Callable[[str, Path | None], Task]
    goals: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    guess: float
    seeds: int = 4
    max_examples: int = 400_000


SPECS = {
    "digits": Spec(
        load=load_digits, goals=(0.05,), batch_sizes=(8, 16, 32, 64, 128, 256), guess=0.2, seeds=8
    ),
    "digits-cnn": Spec(
        load=load_digits, goals=(0.05,), batch_sizes=(8, 16, 32, 64, 128, 256), guess=0.1, seeds=6
    ),
    "mnist": Spec(
        load=load_mnist, goals=(0.1, 0.07, 0.05), batch_sizes=(8, 32, 128, 512), guess=0.15
    ),
    "mnist-cnn": Spec(
        load=load_mnist, goals=(0.1, 0.05), batch_sizes=(8, 32, 128, 512), guess=0.1, seeds=3
    ),
    "mnist14-cnn": Spec(
        load=load_mnist, goals=(0.1, 0.05), batch_sizes=(8, 32, 128, 512), guess=0.12, seeds=3
    ),
    "cifar8-mlp": Spec(
        load=load_cifar, goals=(0.65, 0.6), batch_sizes=(2, 8, 32, 128, 512), guess=0.1
    ),
    "cifar8-cnn": Spec(
        load=load_cifar, goals=(0.7, 0.65), batch_sizes=(8, 32, 128, 512), guess=0.1
    ),
    "cifar16-cnn": Spec(
        load=load_cifar, goals=(0.65, 0.6), batch_sizes=(8, 32, 128, 512, 2048), guess=0.05
    ),
    "cancer": Spec(
        load=load_cancer, goals=(0.05,), batch_sizes=(2, 8, 32, 128, 455), guess=0.1, seeds=12
    ),
    "teacher": Spec(
        load=make_teacher, goals=(0.2, 0.15), batch_sizes=(2, 8, 32, 128, 512), guess=0.1, seeds=6
    ),
    "patches-cnn": Spec(
        load=make_patches, goals=(0.2, 0.05), batch_sizes=(8, 32, 128, 512), guess=0.15
    ),
}


def load_task(name: str, data: Path | None = None) -> Task:
    """Return a workload by name."""
    if name not in SPECS:
        raise SystemExit(f"{name}: no such workload; one of {', '.join(SPECS)}")
    return SPECS[name].load(name, data)
