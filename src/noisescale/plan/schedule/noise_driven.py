"""Let the measured noise scale drive the batch size."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.sizes import Sizes
from noisescale.records import NoiseScale, Outcome
from noisescale.records.rate_schedule import require_unit
from noisescale.theory import adaptive_batch

HYSTERESIS = 1.8
"""Ratio of wanted to present size from which the size changes. (assumed: doublings and halvings
then do not alternate while the noise scale scatters by less than 1.8^2 / 2 = 1.6 each way, and a
size off by that factor costs at most 9 % more than the best, where r and the noise scale agree)"""

MAX_FACTOR = 2.0
"""Most that the size changes at once. (assumed: measured noise scales scatter by about that)"""


class Rule(Protocol):
    """What batch size a noise scale asks for.

    Attributes:
        hysteresis: ratio of wanted to present size up to which the size is held.
        round_up: whether a size below what is wanted will not do.
    """

    @property
    def hysteresis(self) -> float:
        """Ratio up to which the size is held, where a controller says nothing else."""

    @property
    def round_up(self) -> bool:
        """Whether sizes are rounded up, not to the nearest."""

    def wanted(self, noise_scale: float, batch_size: int) -> float:
        """Return the size wanted, at a noise scale measured while ``batch_size`` is taken."""


@dataclass(frozen=True, kw_only=True)
class CostOptimal:
    """B = sqrt(r B_noise).

    Attributes:
        r: examples that one optimizer step is worth.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), App. D.
    """

    r: float
    hysteresis: ClassVar[float] = HYSTERESIS
    round_up: ClassVar[bool] = False

    def __post_init__(self) -> None:
        adaptive_batch.best_batch_size(r=self.r, noise_scale=1.0)

    def wanted(self, noise_scale: float, batch_size: int) -> float:
        """Return the root, whatever the present size."""
        del batch_size
        return adaptive_batch.best_batch_size(r=self.r, noise_scale=noise_scale)


@dataclass(frozen=True, kw_only=True)
class NormTest:
    """Grow until tr(Sigma) / B <= theta^2 |g_B|^2; it never asks for less than there is.

    |g_B|^2 is taken at its mean, |G|^2 + tr(Sigma) / B: one batch's own scatters.

    Attributes:
        theta: in (0, 1); from 1 on every batch would pass.

    Source: Byrd et al. 2012 (Math. Program. 134); Lau et al. 2024 (AdAdaGrad,
    arXiv:2402.11215).
    """

    theta: float
    hysteresis: ClassVar[float] = 1.0
    round_up: ClassVar[bool] = True

    def __post_init__(self) -> None:
        adaptive_batch.norm_test_rest(noise_scale=1.0, theta=self.theta)

    def wanted(self, noise_scale: float, batch_size: int) -> float:
        """Return the next size of the test, or the present one where it passes."""
        asked = adaptive_batch.norm_test_batch_size(
            trace_cov=noise_scale, mean_gradient_sq=1 + noise_scale / batch_size, theta=self.theta
        )
        return max(float(batch_size), asked)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a controller decided.

    Attributes:
        batch_size: to take from the next step on.
        changed: whether that is another than before.
        wanted: what the rule asks for; None where the noise scale is not known.
        why: one sentence.
    """

    batch_size: int
    changed: bool
    wanted: float | None
    why: str


@dataclass(kw_only=True)
class NoiseDriven:
    """A batch size that follows a rule on the noise scale, slowly and in allowed steps.

    What is not determined is not guessed: the size is held. Measuring is someone else's work, so
    is doing what was decided.

    Attributes:
        rule: :class:`CostOptimal` or :class:`NormTest`, or anything like them.
        batch_size: the present size; the first one at first.
        sizes: what may be taken.
        hysteresis: the size changes where wanted over present is above it or below its inverse;
            the rule's own by default.
        max_factor: most that the size changes at once (one allowed size at least).
        monotone: whether the size never falls.
        unit: what sizes count; noise scales in another unit are refused.

    Source: McCandlish et al. 2018, App. D, for the root; the rest is engineering (assumed).

    >>> driven = NoiseDriven(rule=CostOptimal(r=400), batch_size=64, sizes=Sizes(powers=True))
    >>> driven.update(1600.0).batch_size, driven.update(1600.0).batch_size  # 800 is wanted
    (128, 256)
    >>> driven.update(None).why
    'held: there is no measurement'
    """

    rule: Rule
    batch_size: int
    sizes: Sizes = field(default_factory=Sizes)
    hysteresis: float | None = None
    max_factor: float = MAX_FACTOR
    monotone: bool = True
    unit: str = "examples"

    def __post_init__(self) -> None:
        require_unit(self.unit)
        self._require_allowed(self.batch_size)
        if self.hysteresis is None:
            self.hysteresis = self.rule.hysteresis
        for name in ("hysteresis", "max_factor"):
            value = getattr(self, name)
            if not 1 <= value < math.inf:
                raise InvalidInputError(
                    f"{name} {value!r}", "a factor of at least 1 is required", f"change {name}"
                )

    def update(self, noise: NoiseScale | float | None) -> Decision:
        """Take a measurement, and decide the batch size from the next step on.

        Args:
            noise: what was measured at the present batch size, or a number in ``unit``.

        Raises:
            InvalidInputError: it counts another unit, or is no measurement at all.
        """
        scale, problem = self._read(noise)
        if scale is None:
            return self._hold(None, problem)
        wanted = self.rule.wanted(scale, self.batch_size)
        size = self._next(wanted)
        if size == self.batch_size:
            return self._hold(wanted, f"{_spelt(wanted)} {self.unit} are wanted")
        before, self.batch_size = self.batch_size, size
        why = f"from {before:,}: {_spelt(wanted)} {self.unit} are wanted"
        return Decision(batch_size=size, changed=True, wanted=wanted, why=why)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"batch_size": self.batch_size, "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InvalidInputError: the state counts another unit, or its size may not be taken here.
        """
        if state.get("unit") != self.unit:
            raise InvalidInputError(
                f"a state in {state.get('unit')}", f"contradicts the unit {self.unit}",
                "resume with the unit of the saved run",
            )  # fmt: skip
        self._require_allowed(state.get("batch_size"))
        self.batch_size = state["batch_size"]

    def _next(self, wanted: float) -> int:
        present, sizes = self.batch_size, self.sizes
        band = self.hysteresis or 1.0
        if 1 / band <= wanted / present <= band or (self.monotone and wanted < present):
            return present
        size = sizes.at_least(wanted) if self.rule.round_up else sizes.nearest(wanted)
        if wanted > present:
            most = max(sizes.at_most(present * self.max_factor), sizes.above(present))
            return max(present, min(size, most))
        least = min(sizes.at_least(present / self.max_factor), sizes.below(present))
        return min(present, max(size, least))

    def _read(self, noise: NoiseScale | float | None) -> tuple[float | None, str]:
        """Return the noise scale, or why there is none."""
        if noise is None:
            return None, "there is no measurement"
        if isinstance(noise, NoiseScale):
            if noise.unit != self.unit:
                raise InvalidInputError(
                    f"a noise scale in {noise.unit}", f"contradicts the unit {self.unit}",
                    "measure in the unit of the batch size",
                )  # fmt: skip
            if noise.outcome is not Outcome.DETERMINED:
                return None, f"the noise scale is not determined ({noise.outcome.value})"
            noise = noise.b_simple
        if isinstance(noise, bool) or not isinstance(noise, numbers.Real):
            raise InvalidInputError(
                f"noise {noise!r}", "a NoiseScale or a number is required", "pass what was measured"
            )
        value = float(noise)
        if not 0 < value < math.inf:
            return None, f"{value:g} is no noise scale"
        return value, ""

    def _hold(self, wanted: float | None, why: str) -> Decision:
        size = self.batch_size
        return Decision(batch_size=size, changed=False, wanted=wanted, why=f"held: {why}")

    def _require_allowed(self, size: Any) -> None:
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not whole or self.sizes.nearest(size) != size:
            near = f"give {self.sizes.nearest(size)}" if whole else "give a whole number"
            raise InvalidInputError(f"batch_size {size!r}", "is none of the sizes allowed", near)


def _spelt(size: float) -> str:
    return f"{size:,.0f}" if 100 <= size < 1e15 else f"{size:.3g}"
