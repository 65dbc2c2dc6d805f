"""Gradients of an earlier step that were never zeroed would be taken for this step's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noisescale.measure.tensor_hooks import on_gradient

CHECKED_STEPS = 3
"""Steps that are looked at. The check moves one number to the host; a loop that forgets to
zero does so from its second step on. (assumed)"""

TOLERANCE = 1e-3
"""Relative difference of squared norms that counts as none: float16 sums lose less. (assumed)"""


class Leftovers:
    """Compares one parameter's gradient of a step's first pass with what it accumulated to.

    Attributes:
        found: whether the last step that was looked at began with an old gradient.
    """

    def __init__(self) -> None:
        self.found = False
        self._left = CHECKED_STEPS
        self._own: Tensor | None = None
        self._total: Tensor | None = None
        self._version = -1
        self._handle: RemovableHandle | None = None

    def watch(self, parameter: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        """See the parameter's gradient of each backward pass alone, by its squared norm."""
        if not self._left:
            return

        def hook(gradient: Tensor) -> None:
            # Passes that end before the parameters (torch.autograd.grad) come before the first.
            if self._total is None:
                self._own = square(gradient)

        self._handle = on_gradient(parameter, hook)

    def remove(self) -> None:
        """Look no more, until :meth:`watch` is called again."""
        if self._handle is not None:
            self._handle.remove()

    def accumulated(self, total: Tensor, gradient: Tensor) -> None:
        """Take the accumulated gradient and its squared norm; the first one of a step counts."""
        self._version = gradient._version
        if self._own is not None and self._total is None:
            self._total = total

    def touched(self, gradient: Tensor | None) -> bool:
        """Whether the gradient was changed in place since a backward pass added to it."""
        return gradient is not None and self._version not in (-1, gradient._version)

    def judge(self) -> bool:
        """End a step: whether its gradients held those of an earlier one."""
        own, total, self._own, self._total = self._own, self._total, None, None
        if own is None or total is None:
            return self.found
        before, after = float(own), float(total)
        # NaN compares false: a step that is not finite says nothing.
        self.found = abs(after - before) > TOLERANCE * max(before, after)
        if not self.found:
            self._left -= 1
            if not self._left:
                self.remove()
        return self.found

    def forget(self) -> None:
        """Drop a step that will not be judged."""
        self._own = self._total = None
        self._version = -1
