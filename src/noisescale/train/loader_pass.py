"""One iteration over a loader: what it has drawn, and what the loop has trained on."""

from __future__ import annotations

from collections import deque

from noisescale.errors import InvalidInputError
from noisescale.train.global_batch import GlobalBatch, Place

SKIPPED = 4
"""So many batches, or one in so many, may go uncounted: a loop that leaves out a few bad batches is
no loop that counts wrongly. (assumed)"""

GLANCE = 64
"""A loader may draw so many batches ahead when only the first is looked at. (assumed)"""


class LoaderPass:
    """The batches of one iteration, drawn ahead by the loader and counted by the loop.

    Attributes:
        began: where it began.
        settled: sizes of batches that begin below this position can no longer change.
        drawn: batches drawn and not counted, oldest first.
        counted: how many were.
        ended: whether the loader has drawn all.

    Args:
        began: where it begins.
        before: the pass before it.
    """

    def __init__(self, began: Place, before: LoaderPass | None = None) -> None:
        self.began = began
        self._again = before is not None and before.uncounted
        self.settled = began.position
        self.drawn: deque[GlobalBatch] = deque()
        self.counted = 0
        self.ended = False
        self._ahead = 0

    @property
    def is_over(self) -> bool:
        """Whether all is drawn and counted."""
        return self.ended and not self.drawn

    @property
    def uncounted(self) -> bool:
        """Whether all was drawn and nothing counted."""
        return self.ended and not self.counted

    @property
    def was_in_vain(self) -> bool:
        """Whether a loop went through it and counted nothing, rather than glanced at it."""
        return self.uncounted and (self._again or len(self.drawn) > GLANCE)

    def draw(self, batch: GlobalBatch) -> None:
        """Note a batch that the loader asks for."""
        self.drawn.append(batch)
        self.settled = batch.start.position + 1

    def count(self) -> GlobalBatch:
        """Count the oldest batch.

        Raises:
            InvalidInputError: there is none, or too many go uncounted.
        """
        if not self.drawn:
            raise InvalidInputError(
                "advance() without a batch",
                "it counts one batch of this sampler's loader",
                "call it once per optimizer step, inside the loop over the loader",
            )
        self._refuse_uncounted()
        self.counted += 1
        return self.drawn.popleft()

    def _refuse_uncounted(self) -> None:
        # A loader draws one batch per batch that it gives: what is uncounted must not grow.
        if not self.counted:
            self._ahead = len(self.drawn)
        excess = len(self.drawn) - self._ahead
        if excess > max(SKIPPED, self.counted // SKIPPED):
            raise InvalidInputError(
                f"{self.counted} batches counted and {excess} not",
                "every batch of the loader is counted",
                "accumulate by GradientAccumulation; call sampler.advance() for a batch skipped",
            )
