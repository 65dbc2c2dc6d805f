"""AdaScale: the rate, and the schedule's clock, follow what a larger batch is worth now."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from noisescale.errors import InvalidInputError
from noisescale.records import NoiseScale, Outcome
from noisescale.theory import adascale
from noisescale.train.arguments import take_state


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """Unbiased estimates of one step; either may be negative by itself.

    Attributes:
        trace_cov: tr(Sigma) of one example's gradient.
        grad_sq: |G|^2.
    """

    trace_cov: float
    grad_sq: float


Noise = NoiseScale | GradientMoments | float | None
"""What the gain can be had from; a bare number is the noise scale B_simple."""

KEYS = (
    "clock",
    "noise_scale",
    "batch_size",
    "base_batch_size",
    "trace_cov",
    "grad_sq",
    "count",
    "held",
)


LARGEST = 1e300
"""Where a quotient of finite averages would be infinite: the gain is S all the same. (assumed)"""


@final
class AdaScale:
    """Multiplies the rate by AdaScale's gain for each step, and counts time in base steps.

    A thin controller: call its ``step`` in place of the optimizer's; the rates that are in the
    optimizer between steps stay the base batch's own, and schedulers act on them::

        controller = AdaScale(optimizer, base_batch_size=32, batch_size=512, scheduler=scheduler)
        while controller.clock < total_steps_at_the_base_batch:
            ...backward()
            controller.observe(GradientMoments(trace_cov=..., grad_sq=...))
            controller.step()

    With ``torch.amp.GradScaler`` give the controller to ``unscale_`` and ``step``: a skipped step
    moves no clock.

    The gain is computed from averages of the two estimates, each apart, as in the paper. Where an
    average is not positive, or a measurement is not determined, the last noise scale stands (a
    gain of 1 before the first) and the observation is counted in ``held``; the paper raises such
    averages to 1e-6 and 0 instead, which makes the gain S.

    Args:
        optimizer: any torch optimizer; its rates are those tuned at the base batch size.
        base_batch_size: b, positive, in ``unit``.
        batch_size: of the steps to come; see :meth:`set_batch_size`.
        noise: a noise scale known beforehand, or a function without arguments that is asked
            before every step and may return None.
        scheduler: made at the base batch size; it is stepped once per unit of the clock.
        power: of the gain in the rate. 1 is the paper's, for SGD. 0.5 is AdaptDL's for Adam, not
            in the paper, with moments measured in Adam's norm. The clock advances by the gain.
        smoothing: weight of the past in the averages, in [0, 1); default max(1 - S/1000, 0).
        unit: of batch sizes and noise scales: examples, sequences or tokens.

    Attributes:
        clock: base steps done so far, the paper's scale-invariant iterations: sum of the gains.
        noise_scale: tr(Sigma) / |G|^2 that the gain comes from, in ``unit``; None before the
            first.
        held: observations that left the gain as it was.

    Raises:
        InvalidInputError: a setting is out of its range.

    Source: Johnson et al. 2020 (arXiv:2007.05105), algorithm 1 and app. B.3; the power 0.5:
    Qiao et al. 2021 (arXiv:2008.12260), whose code is AdaptDL.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> controller = AdaScale(optimizer, base_batch_size=32, batch_size=128, noise=32.0)
    >>> weight.grad = torch.ones(1)
    >>> controller.step()
    >>> controller.gain, round(weight.item(), 6)  # moved by 1.6 x 0.1
    (1.6, 0.84)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        base_batch_size: float,
        batch_size: float,
        noise: Noise | Callable[[], Noise] = None,
        scheduler: LRScheduler | None = None,
        power: float = 1.0,
        smoothing: float | None = None,
        unit: str = "examples",
    ) -> None:
        _check(optimizer, scheduler, power, smoothing)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.power = power
        self.unit = unit
        self.base_batch_size = _size("base_batch_size", base_batch_size)
        self.batch_size = _size("batch_size", batch_size)
        self.clock = 0.0
        self.noise_scale: float | None = None
        self.held = 0
        self._smoothing = smoothing
        self._moments = GradientMoments(trace_cov=0.0, grad_sq=0.0)
        self._count = 0
        self._ask = noise if callable(noise) else None
        if noise is not None and not callable(noise):
            self.observe(noise)

    @property
    def scale(self) -> float:
        """S, the batch size over the base batch size."""
        return self.batch_size / self.base_batch_size

    @property
    def gain(self) -> float:
        """The gain r of the step to come, between 1 and S."""
        if self.noise_scale is None:
            return 1.0
        return adascale.gain(
            trace_cov=self.noise_scale,
            grad_sq=1.0,
            base_batch_size=self.base_batch_size,
            batch_size=self.batch_size,
        )

    @property
    def smoothing(self) -> float:
        """Weight of the past in the averages at the present batch size."""
        return adascale.smoothing(scale=self.scale) if self._smoothing is None else self._smoothing

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own groups, for ``GradScaler.unscale_``."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the optimizer's gradients."""
        self.optimizer.zero_grad(set_to_none)

    def set_batch_size(self, batch_size: float) -> None:
        """State the batch size of the steps to come; the noise scale stands.

        Raises:
            InvalidInputError: it is not a positive number.
        """
        self.batch_size = _size("batch_size", batch_size)

    def observe(self, noise: Noise) -> None:
        """Take one measurement into the gain.

        Args:
            noise: moments of one step, which are averaged; or a noise scale, as a determined
                record or a number, which replaces the averages, being one already. None, other
                outcomes and numbers that are not positive and finite leave the gain as it is.

        Raises:
            InvalidInputError: it is none of these, or in another unit than the batch sizes.
        """
        found = self._read(noise)
        if found is None:
            self.held += 1
            return
        if isinstance(noise, GradientMoments):
            self._count += 1
            # A plain mean of the first 1/(1 - theta), then an exponential average.
            share = max(1 / self._count, 1 - self.smoothing)
            old = self._moments
            found = GradientMoments(
                trace_cov=(1 - share) * old.trace_cov + share * found.trace_cov,
                grad_sq=(1 - share) * old.grad_sq + share * found.grad_sq,
            )
        else:
            self._count = 0  # a ratio has no scale: moments that follow start anew
        self._moments = found
        if found.trace_cov > 0 and found.grad_sq > 0:
            self.noise_scale = min(found.trace_cov / found.grad_sq, LARGEST)
        else:
            self.held += 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer with its rates times the gain, then the clock and the scheduler.

        Args:
            closure: handed to the optimizer.

        Returns:
            What the optimizer's step returns.
        """
        if self._ask is not None:
            self.observe(self._ask())
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = self.gain**self.power
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            # torch's wrapper of a scheduled step may not know a closure of None.
            result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self._advance()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return clock, noise scale and averages; optimizer and scheduler save their own."""
        return {
            "version": 1,
            "clock": self.clock,
            "noise_scale": self.noise_scale,
            "batch_size": self.batch_size,
            "base_batch_size": self.base_batch_size,
            "trace_cov": self._moments.trace_cov,
            "grad_sq": self._moments.grad_sq,
            "count": self._count,
            "held": self.held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            InvalidInputError: it is not of this kind, or the base batch size is another.
        """
        take_state(state, "AdaScale", KEYS, {"base_batch_size": self.base_batch_size})
        self.clock, self.held = state["clock"], state["held"]
        self.noise_scale = state["noise_scale"]
        self.batch_size, self._count = state["batch_size"], state["count"]
        self._moments = GradientMoments(trace_cov=state["trace_cov"], grad_sq=state["grad_sq"])

    def _advance(self) -> None:
        before = math.floor(self.clock)
        self.clock += self.gain
        for _ in range(math.floor(self.clock) - before if self.scheduler is not None else 0):
            assert self.scheduler is not None
            self.scheduler.step()

    def _read(self, noise: Noise) -> GradientMoments | None:
        if isinstance(noise, NoiseScale):
            noise = self._read_record(noise)
        if isinstance(noise, numbers.Real) and not isinstance(noise, bool):
            noise = GradientMoments(trace_cov=float(noise), grad_sq=1.0) if noise > 0 else None
        if noise is None:
            return None
        if not isinstance(noise, GradientMoments):
            raise InvalidInputError(
                f"noise of type {type(noise).__name__}",
                "a NoiseScale, GradientMoments, a number or None is required",
                "hand over the record that the meter returns",
            )
        trace, square = float(noise.trace_cov), float(noise.grad_sq)
        if not (math.isfinite(trace) and math.isfinite(square)):
            return None
        return GradientMoments(trace_cov=trace, grad_sq=square)

    def _read_record(self, record: NoiseScale) -> float | None:
        if record.unit != self.unit:
            raise InvalidInputError(
                f"a noise scale in {record.unit}",
                f"the unit of the batch sizes, {self.unit}, is required",
                "give AdaScale batch sizes and unit=... of the measurement",
            )
        return record.b_simple if record.outcome == Outcome.DETERMINED else None


def _size(name: str, value: float) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise InvalidInputError(f"{name} {value!r}", "a positive number is required", "change it")
    return float(value)


def _check(optimizer: Any, scheduler: Any, power: float, smoothing: float | None) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInputError(
            f"optimizer of type {type(optimizer).__name__}",
            "a torch.optim.Optimizer is required",
            "hand over the optimizer itself",
        )
    if scheduler is not None and (
        not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau)
    ):
        raise InvalidInputError(
            f"scheduler of type {type(scheduler).__name__}",
            "a scheduler of torch that counts steps is required",
            "step it by yourself where controller.clock says so",
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise InvalidInputError(
            "scheduler of another optimizer", "one optimizer is required", "make it with this one"
        )
    if not 0 < power <= 1:
        raise InvalidInputError(
            f"power {power!r}", "a number in (0, 1] is required", "use 1 or 0.5"
        )
    if smoothing is not None and not 0 <= smoothing < 1:
        raise InvalidInputError(
            f"smoothing {smoothing!r}", "a number in [0, 1) is required", "leave it out"
        )
