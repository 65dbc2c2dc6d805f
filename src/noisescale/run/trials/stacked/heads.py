"""From the outputs of many trials to the gradients of their losses by them.

Outputs of stacked trials lie as (trials, classes, examples); a group is the trials that see the
same batch, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from noisescale.run.trials.stacked.anatomy import Anatomy, Loss, StandIn
from noisescale.run.trials.stacked.groups import Groups

EXACT = 1e-6
"""Relative difference that rounding explains when a loss is recognised in float64. (assumed:
a loss that goes through float32 inside shows up to 1e-7)"""

MOST_ROUNDS = 16
"""Batches of made-up labels on which cross-entropy is recognised, so that every class occurs.
(assumed)"""

RANDOM_ROUNDS = 4
"""Batches of random labels beside them. (assumed: that weights of classes have equal sums in the
halves of each is unlikely)"""

_SPREAD = 3.0
"""Standard deviation of the outputs drawn to recognise a loss. (assumed)"""


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
    """Any loss that is a mean over examples: one call of it for all trials' examples together.

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
        trials, classes, examples = outputs.shape
        flat = outputs.detach().transpose(1, 2).reshape(trials * examples, classes)
        flat.requires_grad_()
        every = [leaf.index_select(0, groups.owner).flatten(0, 1) for leaf in self._others(leaves)]
        with torch.enable_grad():
            loss = self._loss(StandIn(flat), self._batch(every, len(flat)))
            (slope,) = torch.autograd.grad(loss, flat)
        return slope.mul_(trials).view(trials, examples, classes).transpose(1, 2)

    def losses(self, outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.losses`: one call for each trial."""
        batch = self._batch(self._others(leaves), outputs.shape[2])
        return torch.stack([self._loss(StandIn(one.T), batch).reshape(()) for one in outputs])

    def _others(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [leaf for place, leaf in enumerate(leaves) if place != self._anatomy.input]

    def _batch(self, others: Sequence[Tensor], examples: int) -> Any:
        """Put a batch together whose inputs only have their length."""
        leaves = list(others)
        leaves.insert(self._anatomy.input, torch.empty(1).expand(examples))
        return self._anatomy.batch(leaves)


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
    shape = (2, len(leaves[anatomy.input]), *anatomy.output.shape[1:])
    drawn = _SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        for place in range(len(leaves)):
            if _is_cross_entropy(anatomy, loss, leaves, place, drawn):
                return CrossEntropy(place)
        head = Mean(anatomy, loss)
        return head if _is_mean(anatomy, head, loss, leaves, drawn) else None
    except Exception:  # noqa: BLE001  what fails on a stand-in is not taken apart
        return None


def _slope(anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], output: Tensor) -> Tensor:
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(StandIn(output), anatomy.batch(leaves))
        return torch.autograd.grad(value.reshape(()), output)[0]


def _is_cross_entropy(
    anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], place: int, drawn: Tensor
) -> bool:
    return _may_be_labels(leaves[place], drawn) and all(
        _equals_cross_entropy(anatomy, loss, other, other[place], output)
        for other in _other_labels(leaves, place, drawn)
        for output in drawn
    )


def _may_be_labels(leaf: Tensor, drawn: Tensor) -> bool:
    _, examples, classes = drawn.shape
    known = leaf.dtype == torch.int64 and leaf.shape == (examples,)
    return known and int(leaf.min()) >= 0 and int(leaf.max()) < classes


def _other_labels(
    leaves: Sequence[Tensor], place: int, drawn: Tensor
) -> Iterator[Sequence[Tensor]]:
    """Yield the batch as it is, and with made-up labels: every class, and some at random.

    A weight of a class, or one that is left out, shows only where it occurs.
    """
    yield leaves
    _, examples, classes = drawn.shape
    rounds = min(MOST_ROUNDS, -(-classes // examples))
    every = torch.arange(rounds * examples) * classes // (rounds * examples)
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(classes, (RANDOM_ROUNDS * examples,), generator=generator)
    for labels in torch.cat([every, some]).chunk(rounds + RANDOM_ROUNDS):
        yield [labels.to(x.device) if i == place else x for i, x in enumerate(leaves)]


def _equals_cross_entropy(
    anatomy: Anatomy, loss: Loss, leaves: Sequence[Tensor], labels: Tensor, output: Tensor
) -> bool:
    def plain(model: Any, _: Any) -> Tensor:
        return F.cross_entropy(model(), labels)

    ours, theirs = plain(StandIn(output), None), loss(StandIn(output), anatomy.batch(leaves))
    if not close(ours, theirs.detach(), EXACT):
        return False
    ours, theirs = (_slope(anatomy, each, leaves, output) for each in (plain, loss))
    return close(ours, theirs, EXACT)


def _is_mean(
    anatomy: Anatomy, head: Mean, loss: Loss, leaves: Sequence[Tensor], drawn: Tensor
) -> bool:
    places = [place for place, leaf in enumerate(leaves) if _may_be_labels(leaf, drawn)]
    batches = [each for place in places for each in _other_labels(leaves, place, drawn)]
    return all(_halves_are(anatomy, head, loss, own, drawn) for own in batches or [leaves])


def _halves_are(
    anatomy: Anatomy, head: Mean, loss: Loss, leaves: Sequence[Tensor], drawn: Tensor
) -> bool:
    """Whether the gradients of two halves follow from those of the whole.

    Of different examples: weights that are divided by their sum cancel where they are the same.
    """
    half = drawn.shape[1] // 2
    if not half:
        return False
    parts = [[leaf[i * half : (i + 1) * half] for leaf in leaves] for i in range(2)]
    outputs = drawn[:, :half]
    single = torch.stack(
        [_slope(anatomy, loss, own, output) for own, output in zip(parts, outputs, strict=True)]
    )
    grouped = [torch.stack(same) for same in zip(*parts, strict=True)]
    joint = head.slope(outputs.transpose(1, 2), grouped, Groups([0, 1])).transpose(1, 2)
    return close(joint, single, EXACT)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the second one's norm."""
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return False
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-300)
