"""The ways to take a step that `overhead.py` compares: plain, with a meter, with a peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from overhead_models import Problem, loss_of
from overhead_peers import CHUNK, PEERS
from torch import nn

from noisescale import NoiseMeter
from noisescale.errors import InvalidInputError

BLOCK = 10
ADAM_STEPS = 10


class UnavailableError(Exception):
    """A method that cannot run here; its text says why."""


class PlainStep:
    """Forward, loss and backward; gradients are None before, and cleared outside the timing.

    Attributes:
        steps: optimizer steps in one call of :meth:`run`.
    """

    def __init__(self, problem: Problem, *, steps: int = 1) -> None:
        self.steps = steps
        self.size = problem.batch_size
        self.model: nn.Module = problem.model()
        self.x, self.y = problem.batch()

    def clear(self) -> None:
        """Set the gradients to None."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def one(self) -> None:
        """Take one step."""
        loss_of(self.model(self.x), self.y).backward()

    def run(self) -> None:
        """Take the steps that are timed together."""
        self.one()
        for _ in range(self.steps - 1):
            self.clear()
            self.one()

    def sum_sq(self) -> float | None:
        """Sum over examples of |g_i|^2 in the last measured step; None if not measured."""
        return None

    def note(self) -> str:
        """What a reader must know about the figures."""
        return ""

    def resident(self) -> int:
        """Bytes that the same training holds between its steps without any method."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)


class HeldAdam(torch.optim.Adam):
    """Adam whose steps change and cost nothing, so that only the meter's hook on them is timed."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""


class MeterStep(PlainStep):
    """A plain step with a :class:`~noisescale.NoiseMeter` attached.

    Args:
        problem: what to train.
        steps: optimizer steps in one call of :meth:`run`.
        adam: attach to an Adam that has taken its first steps at rate 0.
        options: arguments of the meter.
    """

    def __init__(
        self, problem: Problem, *, steps: int = 1, adam: bool = False, **options: Any
    ) -> None:
        super().__init__(problem, steps=steps)
        self.optimizer = self._warm_adam() if adam else None
        try:
            self.meter = NoiseMeter(self.model, self.optimizer, **options)
        except (TypeError, InvalidInputError) as error:
            raise UnavailableError(str(error)) from error

    def _warm_adam(self) -> HeldAdam:
        optimizer = HeldAdam(self.model.parameters(), lr=0.0)
        for _ in range(ADAM_STEPS):
            self.clear()
            super().one()
            torch.optim.Adam.step(optimizer)
        self.clear()
        return optimizer

    def one(self) -> None:
        """Take one step and close it."""
        super().one()
        if self.optimizer is None:
            self.meter.close_step()
        else:
            self.optimizer.step()

    def sum_sq(self) -> float | None:
        """Undo the meter's unbiased moments.

        With S = (W - B m) / (B - 1) and G2 = m - S / B the sum of squared norms is
        W = B (S + G2). See ``noisescale.theory.noise_scale.unbiased_moments``.
        """
        history = self.meter.history
        if self.meter.source != "examples" or not len(history.step):
            return None
        return self.size * float(history.trace_cov[-1] + history.grad_sq[-1])

    def note(self) -> str:
        """Name what the meter did not measure."""
        if self.meter.steps == 0:
            return f"measured nothing: {self.meter.estimate().detail}"
        left = ", ".join(self.meter.missing)
        source = "" if self.meter.source == "examples" else f"source {self.meter.source}; "
        return source + (f"left out {left}" if left else "")

    def resident(self) -> int:
        """Count the optimizer's state too, which its training has anyway."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [v for entry in state for v in entry.values() if isinstance(v, torch.Tensor)]
        return super().resident() + sum(t.numel() * t.element_size() for t in tensors)

    def spread(self, repeats: int) -> float:
        """Relative standard deviation of :meth:`sum_sq` over steps on the same batch."""
        values = []
        for _ in range(repeats):
            self.clear()
            self.run()
            value = self.sum_sq()
            if value is None:
                return math.nan
            values.append(value)
        mean = sum(values) / repeats
        variance = sum((value - mean) ** 2 for value in values) / (repeats - 1)
        return variance**0.5 / mean


class PeerStep(PlainStep):
    """A step in which another library takes per-example squared norms."""

    def __init__(self, problem: Problem, make: Callable[[nn.Module], Any]) -> None:
        super().__init__(problem)
        try:
            self.peer = make(self.model)
        except ImportError as error:
            raise UnavailableError("not installed") from error
        self._squares: torch.Tensor | None = None

    def one(self) -> None:
        """Take one step, gradients and squared norms."""
        self._squares = self.peer.step(self.x, self.y)

    def clear(self) -> None:
        """Drop what the step left on the parameters."""
        super().clear()
        self._squares = None
        self.peer.clear()

    def sum_sq(self) -> float | None:
        """Add the squared norms of the examples up, in float64."""
        return None if self._squares is None else float(self._squares.double().sum())


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: its row.
        kind: ``plain``, ``ours`` or ``peer``.
        make: builds it for a problem.
        steps: plain steps that one call of it is compared with.
        exact: whether its sum of squared norms is held to the bound of the error.
    """

    name: str
    kind: str
    make: Callable[[Problem], PlainStep] = field(repr=False)
    steps: int = 1
    exact: bool = False


def _meter(name: str, *, steps: int = 1, exact: bool = False, **options: Any) -> Method:
    return Method(name, "ours", lambda p: MeterStep(p, steps=steps, **options), steps, exact)


def _peer(name: str, make: Callable[[nn.Module], Any]) -> Method:
    def build(problem: Problem) -> PlainStep:
        if name == f"vmap-{CHUNK}" and problem.batch_size <= CHUNK:
            raise UnavailableError("the same as vmap")
        return PeerStep(problem, make)

    return Method(name, "peer", build)


METHODS = {
    method.name: method
    for method in (
        Method("plain", "plain", PlainStep),
        _meter("exact", exact=True),
        _meter("fused", exact=True, mode="fused"),
        _meter("sketch", mode="sketch"),
        _meter("every-10", steps=BLOCK, every=BLOCK),
        _meter("idle", every=10**9),
        _meter("adam", adam=True, preconditioner="adam"),
        *(_peer(name, make) for name, make in PEERS.items()),
    )
}
