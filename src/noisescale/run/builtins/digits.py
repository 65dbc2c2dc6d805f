"""scikit-learn's 8x8 digits: 1,797 real images that ship with the library."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from noisescale.errors import MissingExtraError
from noisescale.records import Recipe, Target
from noisescale.run.builtins.classification import Batch, cross_entropy, error, small_cnn
from noisescale.workload import Workload

TRAIN_EXAMPLES = 1437
"""Training examples; the other 360 validate."""


def digits() -> Workload:
    """Digits on an MLP 64-64-10, trained by plain SGD to 5 % validation error.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    train, evaluate = _split(image=False)
    return Workload(
        name="digits",
        model=_mlp,
        loss=cross_entropy,
        metrics=error,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(optimizer="sgd", lr=0.5, batch_size=32, dataset_size=TRAIN_EXAMPLES),
        target=Target.parse("validation_error<0.05"),
    )


def digits_cnn() -> Workload:
    """Digits on convolutions 1-8-16, trained by SGD with momentum to 5 % validation error.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    train, evaluate = _split(image=True)
    return Workload(
        name="digits-cnn",
        model=partial(small_cnn, channels=(1, 8, 16), features=256),
        loss=cross_entropy,
        metrics=error,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(
            optimizer="sgd", lr=0.05, momentum=0.9, batch_size=32, dataset_size=TRAIN_EXAMPLES
        ),
        target=Target.parse("validation_error<0.05"),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _split(*, image: bool) -> tuple[Batch, Batch]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError(
            "workload 'digits'", package="scikit-learn", extra="examples"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy((pixels / 16).astype(np.float32))
    if image:
        inputs = inputs.reshape(-1, 1, 8, 8)
    classes = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(inputs)))
    train, rest = order[:TRAIN_EXAMPLES], order[TRAIN_EXAMPLES:]
    return (inputs[train], classes[train]), (inputs[rest], classes[rest])
