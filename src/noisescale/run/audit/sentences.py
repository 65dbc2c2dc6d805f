"""What was tried and what it gave, in words."""

from __future__ import annotations

from collections.abc import Sequence

from noisescale.run.audit.mixing import Mixers

REMEDIES = {
    "token_mean": (
        "add up the loss of all that counts, and divide by its number (or sum of weights) in the"
        " whole batch, over all micro-batches and replicas"
    ),
    "sum": (
        "return the mean over the examples; if the sum is meant, add micro-batches without"
        " dividing and sum over replicas"
    ),
    "scaled": "return the mean over the examples, whatever the size of the batch",
    "partial_window": (
        "weight every micro-batch by its number of examples, or take a micro-batch size that"
        " divides the batch"
    ),
    "collate": (
        "leave padding out of the loss and of averages (a mask, ignore_index), or pad every batch"
        " to one length"
    ),
    "batch_norm": (
        "keep the number of examples that it normalises over: GroupNorm or LayerNorm, ghost"
        " batches of one size, frozen statistics, or SyncBatchNorm between replicas"
    ),
    "mixing": (
        "a loss that compares examples must see the whole batch: gather over replicas, cache"
        " representations over micro-batches; a root or ratio of means can become a mean over"
        " examples; else count the micro-batch as the batch size of such a loss"
    ),
    "state": "update such buffers once per optimizer step, after the last micro-batch",
    "dropout": "none is needed: on average over masks both are equal; compare several seeds",
    "random": "none is needed: on average over draws both are equal; compare several seeds",
    "random_left": (
        "none is needed where every example draws for itself; what is drawn over the batch (mixup,"
        " random pairs) depends on its size"
    ),
    "replicas": "call the model itself in the loss, so that DistributedDataParallel sees it",
    "unexplained": "compare the groups below, and the passes one by one",
}
_MOST = 6


def summed(kind: str, times: float, count: int) -> str:
    """A loss whose size goes with that of the batch."""
    if kind == "sum":
        return (
            "the gradient of one pass is the sum of its parts', not a mean: averaging them gives"
            f" 1/{count} of it"
        )
    if kind == "sum_and_constant":
        return (
            "the gradient of one pass is the sum of its parts', apart from a term that does not"
            " depend on the batch and that every pass adds anew"
        )
    mean = "with the weights below the" if kind == "rescaled" else "the"
    return (
        f"{mean} mean of the parts' gradients points where that of one pass does, at"
        f" {times:.3g} times its size"
    )


def weighted(weights: Sequence[float], empty: Sequence[int], counted: str | None) -> str:
    """A mean over something else than examples."""
    shown = ", ".join(f"{weight:.3g}" for weight in weights[:_MOST])
    more = ", ..." if len(weights) > _MOST else ""
    text = f"weighted {shown}{more} the parts give the gradient of one pass"
    if counted is not None:
        text += f"; the weights go as {counted}"
    if empty:
        numbers = ", ".join(str(index + 1) for index in empty[:_MOST])
        text += f"; part {numbers} has nothing that counts, and its loss is not finite"
    return text


def partial(lengths: Sequence[int], *, sure: bool) -> str:
    """A last part of another size."""
    times = lengths[0] / lengths[-1]
    text = (
        f"the mean over {len(lengths)} micro-batches gives each of the last"
        f" {lengths[-1]} examples {times:.3g} times the weight of the others"
    )
    return f"{text}; weighted by examples the last one does no harm" if sure else text


def collation() -> str:
    """What collate makes of an example depends on the others, mostly by padding."""
    return (
        "cut out of the batch that was collated whole the parts make up for one pass, collated"
        " anew they do not"
    )


def batch_norm() -> str:
    """BatchNorm, by restoring equality."""
    return "normalising by the statistics of the whole batch makes both equal"


def batch_norm_tried() -> str:
    """BatchNorm, where nothing restores equality."""
    return "its output for an example changes when half of the batch is left out"


def mixing(mixers: Mixers, *, frozen: bool, order_matters: bool) -> str:
    """A loss or model in which examples meet."""
    besides = "with BatchNorm frozen too, " if frozen else ""
    text = f"{besides}no weights of the parts give the gradient of one pass"
    if mixers.modules:
        text += "; modules give an example another output when half of the batch is left out"
    elif mixers.model_keeps_apart:
        text += (
            "; the model's outputs keep examples apart, so the loss mixes them, or what it takes"
            " from the model besides (a balancing term)"
        )
    else:
        text += ": the loss or the model mixes the examples"
    if order_matters:
        text += ", and their order matters"
    return text


def state(moved: Sequence[str]) -> str:
    """Buffers that change from pass to pass."""
    what = "a buffer that changes" if len(moved) == 1 else f"{len(moved)} buffers that change"
    return f"with {what} in every pass put back after each micro-batch both are equal"


def dropout(*, separable: bool) -> str:
    """Dropout, by p = 0."""
    if separable:
        return "with p = 0 another seed changes nothing"
    return "its modules draw random numbers, and another seed changes the gradient"


def random(quiet: str | None, *, seeds: int) -> str:
    """Other random numbers."""
    if quiet == "modes":
        return "in evaluation mode, BatchNorm aside, another seed changes nothing"
    return (
        "another seed changes the gradient, and neither p = 0 nor evaluation mode stops it:"
        f" the rest of the audit rests on means over {seeds} seeds"
    )
