"""Images read from a data folder: MNIST and a subset of CIFAR-10, as NumPy archives."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, Target
from noisescale.run.builtins.classification import Batch, cross_entropy, error, small_cnn
from noisescale.workload import Workload

VALIDATION_IMAGES = 2000
"""The last training images validate; the test images stay untouched."""


def mnist(file: Path) -> Workload:
    """MNIST on an MLP 784-100-10, trained by plain SGD to 5 % validation error."""
    train, evaluate = _split(file, shape=(28, 28))
    return Workload(
        name="mnist",
        model=_mlp,
        loss=cross_entropy,
        metrics=error,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(optimizer="sgd", lr=0.4, batch_size=32, dataset_size=len(train[0])),
        target=Target.parse("validation_error<0.05"),
    )


def mnist_cnn(file: Path) -> Workload:
    """MNIST on convolutions 1-8-16, trained by SGD with momentum to 3 % validation error."""
    train, evaluate = _split(file, shape=(28, 28))
    return Workload(
        name="mnist-cnn",
        model=partial(small_cnn, channels=(1, 8, 16), features=16 * 14 * 14),
        loss=cross_entropy,
        metrics=error,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(
            optimizer="sgd", lr=0.02, momentum=0.9, batch_size=32, dataset_size=len(train[0])
        ),
        target=Target.parse("validation_error<0.03"),
    )


def cifar10(file: Path) -> Workload:
    """CIFAR-10 on three convolutions without BatchNorm, by momentum to 50 % validation error.

    Pixels are divided by 255 and shifted to mean about 0 and deviation about 1 by the round
    figures 0.5 and 0.25, the same for each channel.
    """
    train, evaluate = _split(file, shape=(32, 32, 3))
    return Workload(
        name="cifar10",
        model=_cifar_cnn,
        loss=cross_entropy,
        metrics=error,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(
            optimizer="sgd", lr=0.02, momentum=0.9, batch_size=32, dataset_size=len(train[0])
        ),
        target=Target.parse("validation_error<0.5"),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def _cifar_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _split(file: Path, *, shape: tuple[int, ...]) -> tuple[Batch, Batch]:
    pixels, labels = _read(file, shape=shape)
    inputs = torch.from_numpy(pixels).to(torch.float32).div_(255)
    if len(shape) == 3:
        inputs = inputs.permute(0, 3, 1, 2).sub_(0.5).div_(0.25).contiguous()
    else:
        inputs = inputs.unsqueeze(1)
    classes = torch.from_numpy(labels.astype(np.int64))
    cut = len(inputs) - VALIDATION_IMAGES
    return (inputs[:cut], classes[:cut]), (inputs[cut:], classes[cut:])


def _read(file: Path, *, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return x_train (images, *shape) as uint8 and y_train (images,) from an archive.

    Pickled content is refused: data files are data.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            pixels, labels = archive["x_train"], archive["y_train"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise InvalidInputError(
            f"data file {str(file)!r}",
            "a NumPy archive with the arrays x_train and y_train is required",
            f"fetch or write it again ({type(problem).__name__})",
        ) from None
    labels = labels.reshape(-1)
    fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), *shape)
    if not fits or len(labels) <= VALIDATION_IMAGES or not np.isin(labels, range(10)).all():
        raise InvalidInputError(
            f"data file {str(file)!r} with x_train {pixels.dtype}{pixels.shape}",
            f"more than {VALIDATION_IMAGES} uint8 images of shape {shape} with labels 0 to 9"
            " are required",
            "fetch or write it again",
        )
    return pixels, labels
