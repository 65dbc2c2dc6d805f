"""What acts on training: LARS and LAMB as ordinary torch optimizers."""

from noisescale.train.ghost_batch_norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    convert_ghost_batch_norm,
)
from noisescale.train.lamb import LAMB
from noisescale.train.lars import LARS
from noisescale.train.layerwise import biases_and_norms

__all__ = [
    "LAMB",
    "LARS",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "biases_and_norms",
    "convert_ghost_batch_norm",
]
