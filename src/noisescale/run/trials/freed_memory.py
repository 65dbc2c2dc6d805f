"""What the C library does with memory that is freed."""

from __future__ import annotations

import torch

REUSED_BYTES = 31 << 20
"""Blocks up to this size are kept by the process when they are freed. (glibc's own limit is 32 MB)
"""


def reuse_freed_memory() -> None:
    """Let the C library keep what is freed, up to a limit, for the next step's activations.

    glibc hands blocks above a threshold back to the system at once, whose return as fresh zeroed
    pages takes up to half of a step. The threshold follows the largest block freed so far, so
    that one which is never touched raises it. Elsewhere this does nothing.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)
