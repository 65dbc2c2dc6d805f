"""Batch sizes that were set by hand or decided on the way, by the position from which they hold."""

from __future__ import annotations

import bisect

from noisescale.errors import InvalidInputError


class SizeSteps:
    """Batches that begin at a position have the size set last at or before it.

    Args:
        size: from position 0 on.

    >>> sizes = SizeSteps(8)
    >>> sizes.change(16, 100)
    >>> sizes.at(99), sizes.at(100), sizes.latest, sizes.saved(200)
    (8, 16, 16, [[100, 16]])
    """

    def __init__(self, size: int) -> None:
        self._steps = [(0, size)]

    @classmethod
    def from_saved(cls, saved: list[list[int]]) -> SizeSteps:
        """Return what was saved.

        Raises:
            InvalidInputError: nothing was.
        """
        if not saved:
            raise InvalidInputError(
                "state of a sampler that follows a schedule",
                "this one has a batch size of its own",
                "make its BatchSizeSchedule first and load the schedule's state",
            )
        found = cls(0)
        found._steps = [(position, size) for position, size in saved]
        return found

    @property
    def latest(self) -> int:
        """The size set last."""
        return self._steps[-1][1]

    def at(self, position: int) -> int:
        """Return the size of a batch that begins at a position."""
        found = bisect.bisect_right(self._steps, position, key=lambda step: step[0])
        return self._steps[max(found, 1) - 1][1]

    def change(self, size: int, start: int) -> None:
        """Set the size from a position on, whatever was set from there on before."""
        kept = [step for step in self._steps if step[0] < start]
        self._steps = [*kept, (start, size)]

    def saved(self, position: int) -> list[list[int]]:
        """Return what holds at a position and after it, as plain values."""
        past = [step for step in self._steps if step[0] <= position]
        coming = [step for step in self._steps if step[0] > position]
        return [list(step) for step in [*past[-1:], *coming]]
