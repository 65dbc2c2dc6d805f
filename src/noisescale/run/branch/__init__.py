"""Short runs at multiples of the batch size from points of a training."""
