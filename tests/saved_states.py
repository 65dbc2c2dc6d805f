"""States as a checkpoint holds them."""

from __future__ import annotations

import io

import torch


def through_a_file(state):
    """Save a state and load it as data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
