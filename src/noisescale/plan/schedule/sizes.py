"""Which batch sizes may be taken: multiples, powers, between limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from noisescale.errors import InvalidInputError
from noisescale.records.rate_schedule import FARTHEST

_SLACK = 1e-9
"""Relative; assumed: 128 / 0.1 may come out as 1279.9999999999998 and means 1280."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The batch sizes that may be taken.

    Attributes:
        multiple_of: all are multiples of it: micro-batch times replicas, say.
        powers: whether they are ``multiple_of`` times a power of two.
        smallest: none is below it.
        largest: none is above it.
    """

    multiple_of: int = 1
    powers: bool = False
    smallest: int = 1
    largest: int = FARTHEST

    def __post_init__(self) -> None:
        if not (self.multiple_of >= 1 and 1 <= self.smallest <= self.largest <= FARTHEST):
            raise InvalidInputError(
                f"batch sizes from {self.smallest} to {self.largest} in multiples of"
                f" {self.multiple_of}",
                "positive numbers in order are required",
                "change them",
            )
        if not self.bottom <= self.top:
            raise InvalidInputError(
                f"batch sizes from {self.smallest} to {self.largest}",
                f"none of them is {self._described}",
                "widen the limits",
            )

    @property
    def bottom(self) -> int:
        """The smallest that may be taken."""
        return self._up(self.smallest)

    @property
    def top(self) -> int:
        """The largest that may be taken."""
        return self._down(self.largest)

    def at_most(self, wanted: float) -> int:
        """Return the largest size that is not above ``wanted``, or else the smallest of all.

        >>> Sizes(multiple_of=48).at_most(200), Sizes(multiple_of=48, powers=True).at_most(191)
        (192, 96)
        """
        if not wanted < self.largest:
            return self.top
        slack = 0 if isinstance(wanted, int) else wanted * _SLACK
        return min(self.top, max(self.bottom, self._down(wanted + slack)))

    def at_least(self, wanted: float) -> int:
        """Return the smallest size that is not below ``wanted``, or else the largest of all.

        >>> Sizes(multiple_of=48).at_least(97)
        144
        """
        below = self.at_most(wanted)
        return below if below >= wanted * (1 - _SLACK) else self.above(below)

    def above(self, size: int) -> int:
        """Return the next larger size; the largest has none and stays."""
        return min(self.top, max(self.bottom, self._up(size + 1)))

    def below(self, size: int) -> int:
        """Return the next smaller size; the smallest has none and stays."""
        return self.at_most(size - 1)

    def nearest(self, wanted: float) -> int:
        """Return the size nearest by ratio.

        >>> Sizes(powers=True).nearest(90), Sizes(powers=True).nearest(91)
        (64, 128)
        """
        below = self.at_most(wanted)
        above = self.above(below)
        return below if wanted * wanted <= below * above else above

    def _down(self, size: float) -> int:
        if size < self.multiple_of:
            return 0
        units = int(size) // self.multiple_of
        return self.multiple_of * (1 << (units.bit_length() - 1) if self.powers else units)

    def _up(self, size: int) -> int:
        units = -(-size // self.multiple_of)
        return self.multiple_of * (1 << (units - 1).bit_length() if self.powers else units)

    @property
    def _described(self) -> str:
        power = " times a power of two" if self.powers else ""
        return f"{self.multiple_of}{power}" if power else f"a multiple of {self.multiple_of}"


def require_multiple(size: int, multiple_of: int) -> None:
    """Refuse a batch size that does not divide.

    Raises:
        InvalidInputError: so it is; the nearest sizes are named.
    """
    if size % multiple_of:
        below = size // multiple_of * multiple_of
        near = [str(value) for value in (below, below + multiple_of) if value]
        raise InvalidInputError(
            f"batch size {size}",
            f"a multiple of {multiple_of} is required (micro-batch x replicas, or what is asked)",
            f"the nearest: {' and '.join(near)}",
        )


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sizes a factor apart, from a base on: few changes along a rate that falls all the time.

    Attributes:
        base: the first.
        factor: ratio of neighbours, before they are rounded down to what may be taken.
        sizes: what may be taken.
    """

    base: int
    factor: float
    sizes: Sizes

    def at_most(self, wanted: float) -> int:
        """Return the largest rung that is not above ``wanted``; the top counts as one.

        >>> Ladder(base=32, factor=2.0, sizes=Sizes(largest=100)).at_most(99)
        64
        """
        if wanted >= self.sizes.top:
            return self.sizes.top
        if wanted <= self.base:
            return self.base
        rungs = math.floor(math.log(wanted / self.base) / math.log(self.factor) + _SLACK)
        return max(self.base, self.sizes.at_most(self.base * self.factor**rungs))
