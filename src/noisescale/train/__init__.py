"""What acts on training: LARS and LAMB as ordinary torch optimizers."""

from noisescale.train.lamb import LAMB
from noisescale.train.lars import LARS
from noisescale.train.layerwise import biases_and_norms

__all__ = ["LAMB", "LARS", "biases_and_norms"]
