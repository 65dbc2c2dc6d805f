"""What looks on while a workload trains: the meter, the curvature, the progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisescale.measure.noise_scale import NoiseMeter
from noisescale.run.curvature_along import CurvatureAlong

Progress = Callable[[str, float | None], None]
"""``on_progress(what, share)``: what is being done, and the share done if it is known."""

MICRO_BATCHES = 8
"""Micro-batches of a split pass: more are noisier passes, fewer a wider interval. (assumed)"""


class Share:
    """Tells how much of a run is done: by steps or by time, whichever is further."""

    def __init__(
        self, max_steps: int, max_seconds: float | None, on_progress: Progress | None
    ) -> None:
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._on_progress = on_progress
        self._began = time.perf_counter()

    def tell(self, step: int, loss: float) -> None:
        """Pass on what share is done."""
        if self._on_progress is None:
            return
        share = step / self._max_steps
        if self._max_seconds is not None:
            share = max(share, (time.perf_counter() - self._began) / self._max_seconds)
        self._on_progress(f"measuring: step {step}, loss {loss:.4g}", min(1.0, share))


class NoiseWatch:
    """Puts a meter on a run; for micro-batches, splits every batch by an extra pass."""

    def __init__(
        self,
        meter: NoiseMeter,
        loss: Callable[[Any, Any], Any],
        batch_size: int,
        share: Share,
        looks: CurvatureAlong | None,
    ) -> None:
        self.meter, self.looks = meter, looks
        self._loss = loss
        self._micro = micro_batch_size(meter.model, batch_size)
        self._share = share

    def __enter__(self) -> NoiseWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.detach()

    def before_step(self, step: int, batch: Any) -> None:
        """Look at the curvature, split the batch, where that is due."""
        if self.looks is not None:
            with self.meter.paused():
                self.looks.before_step(step - 1)
        if self.meter.source == "microbatches":
            self.meter.split_pass(self._loss, batch, micro_batch_size=self._micro)

    def after_step(self, step: int, loss: float) -> None:
        """Tell how far the run is."""
        self._share.tell(step, loss)


def micro_batch_size(model: nn.Module, batch_size: int) -> int:
    """Return an eighth of the batch, rounded up.

    With batch statistics no micro-batch, the last one neither, may be of a single example.
    """
    size = max(1, -(-batch_size // MICRO_BATCHES))
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        size = max(2, size)
        while batch_size % size == 1 and size < batch_size:
            size += 1
    return size
