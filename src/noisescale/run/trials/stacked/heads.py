"""From the outputs of many trials to the gradients of their losses by them.

Outputs of stacked trials lie as (trials, classes, examples); a group is the trials that see the
same batch, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from noisescale.run.trials.stacked.anatomy import Anatomy, Loss, StandIn
from noisescale.run.trials.stacked.groups import Groups

EXACT = 1e-6
"""Relative difference that rounding explains when a loss is recognised in float64. (assumed:
a loss that goes through float32 inside shows up to 1e-7)"""

MOST_ROUNDS = 16
"""Batches of made-up labels on which cross-entropy is recognised, so that every class occurs.
(assumed)"""

_SPREADS = (3.0, 0.1, 30.0, 1e3)
"""Standard deviations of the outputs drawn to recognise a loss: trials that diverge have large
ones. (assumed)"""


class Head(Protocol):
    """What a loss makes of the outputs."""

    name: str

    def slope(self, outputs: Tensor, leaves: Sequence[Tensor], groups: Groups) -> Tensor:
        """Return the gradient of each trial's loss by its outputs.

        Args:
            outputs: shape (trials, classes, examples); may be overwritten.
            leaves: the batch's tensors, shape (groups, examples, ...).
            groups: which trials see which batch.
        """

    def losses(self, outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Return each trial's mean loss on one batch, shape (trials,).

        Args:
            outputs: shape (trials, classes, examples).
            leaves: the batch's tensors, shape (examples, ...).
        """


class CrossEntropy:
    """Mean cross-entropy of class numbers, written out.

    Args:
        labels: place of the class numbers among the batch's tensors.
    """

    name = "cross_entropy"

    def __init__(self, labels: int) -> None:
        self.labels = labels
        self._eye = torch.empty(0, 0)

    def slope(self, outputs: Tensor, leaves: Sequence[Tensor], groups: Groups) -> Tensor:
        """See :meth:`Head.slope`: (softmax - one-hot) / examples."""
        labels = leaves[self.labels]
        examples, classes = labels.shape[1], outputs.shape[1]
        slope = torch.softmax(outputs, 1)
        hot = self._rows(classes, outputs).index_select(0, labels.reshape(-1))
        hot = hot.view(groups.count, 1, examples, classes).transpose(2, 3)
        if groups.even:
            slope.view(groups.count, -1, classes, examples).sub_(hot)
        else:
            slope.sub_(hot[:, 0].index_select(0, groups.owner))
        return slope.div_(examples)

    def losses(self, outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.losses`."""
        labels = leaves[self.labels].expand(len(outputs), 1, -1)
        return -torch.log_softmax(outputs, 1).gather(1, labels).mean((1, 2))

    def _rows(self, classes: int, like: Tensor) -> Tensor:
        if self._eye.shape[0] != classes or self._eye.dtype != like.dtype:
            self._eye = torch.eye(classes, dtype=like.dtype, device=like.device)
        return self._eye


class Mean:
    """Any loss that is a mean over examples: one call of it for all trials of a batch together.

    What it divides by may be the batch's own, as with weights of classes: trials with other
    batches are not put into one call.

    Args:
        anatomy: of the model.
        loss: ``loss(model, batch)``, which uses the model's output and the batch's other
            tensors, not the model's input.
    """

    name = "mean"

    def __init__(self, anatomy: Anatomy, loss: Loss) -> None:
        self._anatomy, self._loss = anatomy, loss

    def slope(self, outputs: Tensor, leaves: Sequence[Tensor], groups: Groups) -> Tensor:
        """See :meth:`Head.slope`."""
        others = self._others(leaves)
        parts = [
            self._slope(outputs[rows], [leaf[group] for leaf in others])
            for group, rows in enumerate(groups.rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slope(self, outputs: Tensor, others: Sequence[Tensor]) -> Tensor:
        trials, classes, examples = outputs.shape
        flat = outputs.detach().transpose(1, 2).reshape(trials * examples, classes)
        flat.requires_grad_()
        every = [leaf.repeat(trials, *[1] * (leaf.dim() - 1)) for leaf in others]
        with torch.enable_grad():
            loss = self._called(flat, every)
            (slope,) = torch.autograd.grad(loss, flat)
        return slope.mul_(trials).view(trials, examples, classes).transpose(1, 2)

    def losses(self, outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.losses`: one call for each trial."""
        others = self._others(leaves)
        return torch.stack([self._called(one.T, others).reshape(()) for one in outputs])

    def _others(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [leaf for place, leaf in enumerate(leaves) if place != self._anatomy.input]

    def _called(self, output: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Return the loss of outputs; the batch's inputs only have their length."""
        inputs = torch.empty(1).expand(len(output))
        leaves = list(others)
        leaves.insert(self._anatomy.input, inputs)
        value: Tensor = self._loss(StandIn(output, to=inputs), self._anatomy.batch(leaves))
        return value


def find_head(anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor]) -> Head | None:
    """Recognise a loss by its values; None when it is neither cross-entropy nor a mean.

    Args:
        anatomy: of the model.
        loss: ``loss(model, batch)``.
        leaves: tensors of a batch, shape (examples, ...); more examples than a few show more of
            what a loss makes of rare ones.
    """
    if anatomy.output.dim() != 2 or not anatomy.output.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (len(_SPREADS), len(leaves[anatomy.input]), *anatomy.output.shape[1:])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn *= torch.tensor(_SPREADS, dtype=torch.float64)[:, None, None]
    try:
        # Another tensor may weigh or leave out examples, if only rare ones.
        if len(leaves) == 2:
            labels = 1 - anatomy.input
            if _is_cross_entropy(anatomy, loss, leaves, labels, drawn):
                return CrossEntropy(labels)
        head = Mean(anatomy, loss)
        return head if _is_mean(anatomy, head, loss, leaves, drawn) else None
    except Exception:  # noqa: BLE001  what fails on a stand-in is not taken apart
        return None


def _slope(anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], output: Tensor) -> Tensor:
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(StandIn(output, to=leaves[anatomy.input]), anatomy.batch(leaves))
        return torch.autograd.grad(value.reshape(()), output)[0]


def _is_cross_entropy(
    anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], place: int, drawn: Tensor
) -> bool:
    labels, (_, examples, classes) = leaves[place], drawn.shape
    if labels.dtype != torch.int64 or labels.shape != (examples,):
        return False
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        return False
    # A weight of a class, or one that is left out, shows only where it occurs.
    rounds = min(MOST_ROUNDS, -(-classes // examples))
    every = torch.arange(rounds * examples, device=labels.device) % classes
    for own in (labels, *every.chunk(rounds)):
        other = [own if i == place else leaf for i, leaf in enumerate(leaves)]
        if not all(_equals_cross_entropy(anatomy, loss, other, own, output) for output in drawn):
            return False
    return True


def _equals_cross_entropy(
    anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], labels: Tensor, output: Tensor
) -> bool:
    def plain(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(tree_leaves(batch)[anatomy.input]), labels)

    stand_in, batch = StandIn(output, to=leaves[anatomy.input]), anatomy.batch(leaves)
    if not close(plain(stand_in, batch), loss(stand_in, batch).detach(), EXACT):
        return False
    ours, theirs = (_slope(anatomy, each, leaves, output) for each in (plain, loss))
    return close(ours, theirs, EXACT)


def _is_mean(
    anatomy: Anatomy, head: Mean, loss: Loss, leaves: Sequence[Tensor], drawn: Tensor
) -> bool:
    """Whether the gradients of trials follow from those of all together, far ones beside them."""
    single = [_slope(anatomy, loss, leaves, output) for output in drawn]
    grouped = [leaf.unsqueeze(0) for leaf in leaves]
    joint = head.slope(drawn.transpose(1, 2), grouped, Groups([0] * len(drawn))).transpose(1, 2)
    return all(close(ours, theirs, EXACT) for ours, theirs in zip(joint, single, strict=True))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the second one's norm."""
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return False
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-300)
