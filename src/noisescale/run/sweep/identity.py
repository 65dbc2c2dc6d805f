"""A workload's name and fingerprint: trials of another workload must not count."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from noisescale.measure.batches import take
from noisescale.run.dry_run import fresh_model
from noisescale.workload import Workload, data_size

EXAMPLES = 16
"""Examples of each part of the data that the fingerprint looks at. (assumed: enough to tell data
sets, splits and scalings apart)"""


def fingerprint(workload: Workload) -> str:
    """Return ``NAME-HASH``, the hash over the model's layers and parts of the data.

    The recipe is not in it (every plan holds its own), nor is the code of the loss. Weights are
    not either: they differ between processors.

    Args:
        workload: what trials are of.

    Raises:
        InvalidInputError: the model cannot be made.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(workload)
        words = [repr(model)]
        words += [f"{n} {tuple(p.shape)} {p.dtype}" for n, p in model.named_parameters()]
        words += [_data(workload, part) for part in (workload.train, workload.evaluate)]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    return f"{workload.name}-{digest[:12]}"


def _data(workload: Workload, part: Any) -> str:
    if part is None:
        return "none"
    size = data_size(part)
    parts = part if isinstance(part, list | tuple) else (part,)
    if not all(hasattr(each, "shape") for each in parts):
        # What a dataset returns may be drawn anew at every look.
        return f"{size} {type(part).__name__}"
    index = torch.arange(min(EXAMPLES, size)) * max(1, size // EXAMPLES)
    return f"{size} {_digest(take(part, index.clamp(max=size - 1), workload.collate))}"


def _digest(batch: Any) -> str:
    if not isinstance(batch, torch.Tensor):
        return " ".join(map(_digest, batch))
    plain = batch.detach().cpu()
    plain = plain.float() if plain.is_floating_point() else plain
    content = plain.contiguous().numpy().tobytes()
    return f"{tuple(plain.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
