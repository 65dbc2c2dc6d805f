"""Synthetic response surfaces: steps to target of made-up trials, the truth known.

log steps(B, lr, seed) = log law(B) + bowl(log lr/lr*(B)) + noise of the seed + noise of the
trial; trials above a stability limit diverge, a budget censors, a race stops what is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from noisescale.records import TrialOutcome, TrialRow

HOPELESS, STRAGGLER, LUCKY, MANY = 1.3, 4.0, 1.3, 4  # as the race of a sweep has them


def hyperbola(*, steps_min: float = 100.0, critical: float = 64.0) -> Callable[[float], float]:
    """McCandlish et al. 2018, eq. 2.11."""
    return lambda batch_size: steps_min * (1 + critical / batch_size)


def three_pieces(
    *, plateau: float = 100.0, perfect_end: float = 16.0, useful_end: float = 256.0, slope=-0.5
) -> Callable[[float], float]:
    """Slope -1, ``slope``, 0."""

    def law(batch_size: float) -> float:
        steps = plateau * (min(batch_size, useful_end) / useful_end) ** slope
        if batch_size >= perfect_end:
            return float(steps)
        return float(plateau * (perfect_end / useful_end) ** slope * perfect_end / batch_size)

    return law


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A made-up workload.

    Attributes:
        law: steps at the best rate, by batch size.
        steepness: k of the bowl (k/r + r^k)/(k + 1) in r = lr/lr*; 1 is symmetric in log r.
        noise: standard deviation of log steps over seeds.
        shared: share of its variance that a seed's trials of one batch size have in common.
        everywhere: share that a seed's trials have in common at all batch sizes.
        stability: lr/lr* above which trials diverge (varies by 10 % from trial to trial).
        rate_max, rate_batch, rate_power: lr* = rate_max/(1 + rate_batch/B)^rate_power.
        budget: most steps; infinite for none.
    """

    law: Callable[[float], float] = field(default_factory=hyperbola)
    steepness: float = 1.5
    noise: float = 0.08
    shared: float = 0.4
    everywhere: float = 0.0
    stability: float = 2.5
    rate_max: float = 1.0
    rate_batch: float = 32.0
    rate_power: float = 1.0
    budget: float = np.inf

    def best_rate(self, batch_size: float) -> float:
        return float(self.rate_max / (1 + self.rate_batch / batch_size) ** self.rate_power)

    def noiseless(self, batch_size: float, rate: np.ndarray) -> np.ndarray:
        """Log of the median steps, divergence aside."""
        r = rate / self.best_rate(batch_size)
        bowl = np.log((self.steepness / r + r**self.steepness) / (self.steepness + 1))
        return np.log(self.law(batch_size)) + bowl

    def logs(
        self, batch_size: int, rates: np.ndarray, seeds: int, rng: np.random.Generator, common
    ) -> np.ndarray:
        """Log steps of each rate and seed, infinite where diverged; ``common``: shape (seeds,)."""
        own = 1 - self.shared - self.everywhere
        spread = self.noise * np.sqrt([self.everywhere, self.shared, own])
        noise = spread[0] * common + spread[1] * rng.standard_normal(seeds)
        noise = noise + spread[2] * rng.standard_normal((len(rates), seeds))
        limit = self.stability * np.exp(0.1 * rng.standard_normal((len(rates), seeds)))
        lost = (rates / self.best_rate(batch_size))[:, None] > limit
        return np.where(lost, np.inf, self.noiseless(batch_size, rates)[:, None] + noise)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which rates and seeds are run at one batch size.

    Attributes:
        kind: ``grid`` (all rates, all seeds), ``scouts`` (two seeds everywhere, the others at
            the best and its neighbours) or ``draws`` (log-uniform rates; two seeds everywhere,
            the others at the best three).
        rates: number of rates.
        factor: between neighbours of a grid; draws fill as wide a range.
        seeds: number of seeds.
        race: whether hopeless trials are stopped.
    """

    kind: str = "grid"
    rates: int = 9
    factor: float = 1.6
    seeds: int = 5
    race: bool = True


def trials(
    surface: Surface,
    search: Search,
    batch_size: int,
    rng: np.random.Generator,
    common: np.ndarray | None = None,
) -> list[TrialRow]:
    """Run a search on a surface."""
    common = np.zeros(search.seeds) if common is None else common
    # The search does not know where the best is: its grid lies anyhow about it.
    centre = surface.best_rate(batch_size) * np.exp(0.5 * rng.uniform(-1, 1))
    half = search.factor ** ((search.rates - 1) / 2)
    if search.kind == "draws":
        # Quasi-random: a shifted lattice in random order.
        share = (np.arange(search.rates) + rng.uniform(0, 1, search.rates)) / search.rates
        rates = centre * half ** (2 * share - 1)
    else:
        rates = centre * np.geomspace(1 / half, half, search.rates)
    logs = surface.logs(batch_size, rates, search.seeds, rng, common)
    steps = np.exp(logs)
    run = np.ones(steps.shape, dtype=bool)
    if search.kind != "grid":
        run[:, 2:] = False
        scores = np.where(steps[:, :2] <= surface.budget, steps[:, :2], np.inf).max(axis=1)
        run[_leaders(search.kind, scores)] = True
    stopped = _race(steps, run, surface.budget) if search.race else np.full(len(steps), np.inf)
    rows = []
    for i, j in zip(*np.nonzero(run), strict=True):
        limit = min(surface.budget, stopped[i])
        outcome, at = TrialOutcome.REACHED, steps[i, j]
        if np.isinf(at):
            outcome, at = TrialOutcome.DIVERGED, 10.0
        elif at > limit:
            outcome, at = TrialOutcome.NOT_REACHED, limit
        rows.append(
            TrialRow(
                batch_size=batch_size,
                values={"lr": float(rates[i])},
                seed=str(j),
                outcome=outcome,
                steps=float(at),
            )
        )
    return rows


def _leaders(kind: str, scores: np.ndarray) -> np.ndarray:
    """Points that run all seeds: the best and its neighbours, or the best three."""
    if not np.isfinite(scores).any():
        return np.zeros(0, dtype=int)
    if kind == "draws":
        order = np.argsort(scores)[:3]
        return order[np.isfinite(scores[order])]
    best = int(np.argmin(scores))
    return np.arange(max(best - 1, 0), min(best + 2, len(scores)))


def _race(steps: np.ndarray, run: np.ndarray, budget: float) -> np.ndarray:
    """Steps at which each rate's trials are stopped, as the race of a sweep does it."""
    passed = np.where(run & (steps <= budget), steps, np.inf)
    medians, counts = np.full(len(steps), np.inf), run.sum(axis=1)
    for i in range(len(steps)):
        medians[i] = np.sort(passed[i, run[i]])[counts[i] // 2]
    best = (medians * np.where(counts < MANY, LUCKY, 1.0)).min()
    return np.where(medians > HOPELESS * best, HOPELESS, STRAGGLER) * best


def truth(surface: Surface, sizes: Sequence[float]) -> np.ndarray:
    """Steps at the best rate."""
    return np.array([surface.law(size) for size in sizes])
