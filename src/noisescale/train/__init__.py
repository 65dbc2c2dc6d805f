"""What acts on training: optimizers for large batches, batch sizes that change, ghost norms."""

from noisescale.train.accumulation import GradientAccumulation
from noisescale.train.adascale import AdaScale, GradientMoments
from noisescale.train.batch_schedule import BatchSizeSchedule
from noisescale.train.batching import ResizableBatchSampler
from noisescale.train.ghost_batch_norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    convert_ghost_batch_norm,
)
from noisescale.train.lamb import LAMB
from noisescale.train.lars import LARS
from noisescale.train.layerwise import biases_and_norms
from noisescale.train.per_example_adamw import PerExampleAdamW
from noisescale.train.per_example_sgd import PerExampleSGD

__all__ = [
    "LAMB",
    "LARS",
    "AdaScale",
    "BatchSizeSchedule",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GradientAccumulation",
    "GradientMoments",
    "PerExampleAdamW",
    "PerExampleSGD",
    "ResizableBatchSampler",
    "biases_and_norms",
    "convert_ghost_batch_norm",
]
