"""Where the gradient is clipped: after accumulation, for every micro-batch, before dividing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from noisescale.records import AuditClipping
from noisescale.run.audit.bench import Bench
from noisescale.run.audit.conditions import Condition
from noisescale.run.audit.differences import Gradient, combined, sizes

_TORCH_EPS = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm it divides by."""


def compare_clipping(
    bench: Bench, parts: Sequence[Tensor], clip_norm: float, condition: Condition
) -> AuditClipping:
    """Clip in three places and compare with clipping the gradient of the whole batch.

    Args:
        bench: the batch.
        parts: its micro-batches.
        clip_norm: largest norm.
        condition: without random numbers where possible.
    """
    count = len(parts)
    whole = bench.whole(condition).gradient
    true = _clipped(bench, whole, clip_norm)
    size = sizes(true, bench.inventory)
    added: Gradient = {}
    clipped: Gradient = {}
    norms = []
    for part in parts:  # one gradient at a time: each is as large as the model
        one = bench.split([part], [1.0], condition).gradient
        norms.append(_norm(bench, one))
        added = combined([(1.0, added), (1.0, one)])
        clipped = combined([(1.0, clipped), (1.0, _clipped(bench, one, clip_norm))])
    share = 1 / count

    def apart(found: Gradient) -> float | None:
        return bench.gap(found, true).over(size)[0]

    return AuditClipping(
        clip_norm=clip_norm,
        norm=_norm(bench, whole),
        micro_norms=tuple(norms),
        clipped_micro_batches=sum(norm > clip_norm for norm in norms),
        after=apart(_clipped(bench, combined([(share, added)]), clip_norm)),
        each=apart(combined([(share, clipped)])),
        before_dividing=apart(combined([(share, _clipped(bench, added, clip_norm))])),
    )


def _clipped(bench: Bench, gradient: Gradient, clip_norm: float) -> Gradient:
    factor = min(1.0, clip_norm / (_norm(bench, gradient) + _TORCH_EPS))
    return combined([(factor, gradient)])


def _norm(bench: Bench, gradient: Gradient) -> float:
    return sizes(gradient, bench.inventory).total
