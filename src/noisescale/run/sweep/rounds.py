"""Which trials one batch size needs, round by round, decided by results alone.

The same results always ask for the same trials: after a kill the search goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from noisescale.records import Recipe, TrialOutcome, TrialPlan, TrialResult
from noisescale.run.sweep.space import Dimension, Point, recipe_at
from noisescale.run.sweep.standing import CROSSINGS, Standing, standing

FACTOR = 1.6
"""Between neighbouring rates of a grid of few. (measured: 1.41 to 2 find the same minimum)"""

WIDEST = 256.0
"""Highest over lowest rate of the first grid; grids of many are finer. (assumed)"""

WIDENINGS = 5
"""Most times that a search is widened at its edges. (assumed)"""

BEYOND = 2
"""Rates beyond an edge of the grid that holds a best. (assumed)"""

SCOUTS = 2
"""Seeds that look for the best setting; the others run it and its neighbours. (measured)"""

FILLS = 3
"""Most rounds of filling: the best of all seeds may lie beside the scouts' best. (measured)"""

LEADERS = 3
"""Settings of a quasi-random search that run all seeds, for each target. (assumed)"""

EDGE_SHARE = 0.1
"""A best within this share of a box's end counts as on its edge. (assumed)"""

NOTHING_TOLD = (TrialOutcome.CRASHED, TrialOutcome.INFEASIBLE_MEMORY)
"""Outcomes that say nothing about a setting."""

Results = Mapping[str, TrialResult]
"""Results by the key of their plan."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a batch size is searched.

    Attributes:
        kind: ``grid`` (of rates alone) or ``quasi-random`` (Sobol points in the box).
        trials: settings at first; widening adds to them.
        seeds: runs of the settings that matter.
        full: every setting runs every seed.
        scouts: seeds that every setting runs.
    """

    kind: str = "grid"
    trials: int = 5
    seeds: int = 4
    full: bool = False
    scouts: int = SCOUTS

    @property
    def first_seeds(self) -> int:
        """Seeds that every setting runs."""
        return self.seeds if self.full else min(self.seeds, self.scouts)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The search at one batch size.

    Attributes:
        workload: name and fingerprint, part of every plan.
        recipe: what the search changes.
        batch_size: examples per step.
        centre: the rate's coordinate to start from.
        dimensions: the box; the first is the rate's, whose middle the centre replaces.
        search: how.
        targets: goals, raced for together.
        max_steps: budget of a trial.
        seed: of the first run; the others count up from it.
    """

    workload: str
    recipe: Recipe
    batch_size: int
    centre: float
    dimensions: tuple[Dimension, ...]
    search: Search
    targets: tuple[str, ...]
    max_steps: int
    seed: int = 0
    _made: dict[tuple[str, int], TrialPlan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def plan(self, point: Point, number: int) -> TrialPlan:
        """Return the trial of a point and of the seed of that number, from 0."""
        made = self._made.get((_name(point), number))
        if made is None:
            # Asked for again at every look at the rounds.
            seed = self.seed + number
            made = self._made[_name(point), number] = TrialPlan(
                workload=self.workload,
                recipe=recipe_at(self.recipe, point, self.batch_size),
                seed=seed,
                order_seed=seed,
                targets=self.targets,
                max_steps=self.max_steps,
            )
        return made

    def next_plans(self, done: Results) -> list[TrialPlan]:
        """Return the trials to run next; none when the search is over.

        Args:
            done: results so far, of other searches too; interrupted trials run again.
        """
        for plans in self.rounds(done):
            missing = [plan for plan in plans if not finished(done.get(plan.key))]
            if missing:
                return missing
        return []

    def plans(self, done: Results) -> list[TrialPlan]:
        """Return every trial that the search has asked for so far, each once."""
        found: dict[str, TrialPlan] = {}
        for plans in self.rounds(done):
            found.update((plan.key, plan) for plan in plans)
            if not all(finished(done.get(plan.key)) for plan in plans):
                break
        return list(found.values())

    def best_rate(self, done: Results) -> float | None:
        """Return the best settings' rate coordinate, geometric mean over targets.

        Args:
            done: results of all that was asked for.

        Returns:
            None where no target was reached.
        """
        field_ = _Field(tuning=self, done=done)
        for plans in self._rounds(field_):
            if not all(finished(done.get(plan.key)) for plan in plans):
                return None
        bests = [
            field_.standings(target, "first", seeds=self.search.first_seeds)[0]
            for target in self.targets
        ]
        logs = [math.log(point["lr"]) for score, point in bests if score.reached]
        return math.exp(statistics.fmean(logs)) if logs else None

    def rounds(self, done: Results) -> Iterator[list[TrialPlan]]:
        """Yield the trials of each round; a round is asked for once those before are done."""
        return self._rounds(_Field(tuning=self, done=done))

    def _rounds(self, field_: _Field) -> Iterator[list[TrialPlan]]:
        scouts = range(self.search.first_seeds)
        yield field_.enter(field_.first_points(), scouts)
        for widening in range(WIDENINGS):
            beyond = field_.beyond(widening, seeds=len(scouts))
            if not beyond:
                break
            yield field_.enter(beyond, scouts)
        for filling in range(FILLS):
            rest = field_.unfilled()
            if not rest:
                break
            yield rest
            beyond = field_.beyond(WIDENINGS + filling, seeds=self.search.seeds)
            if beyond:
                yield field_.enter(beyond, range(self.search.seeds))


def finished(result: TrialResult | None) -> bool:
    """Whether a trial needs no further run."""
    return result is not None and result.outcome is not TrialOutcome.INTERRUPTED


@dataclass(kw_only=True)
class _Field:
    """The points tried, and how they stand.

    Only trials of rounds that were asked for count: what a later round has done already, before
    a kill, must not change what it is.
    """

    tuning: Tuning
    done: Results
    points: list[Point] = field(default_factory=list)
    asked: dict[str, list[TrialPlan]] = field(default_factory=dict)
    box: tuple[Dimension, ...] = ()

    def first_points(self) -> list[Point]:
        tuning, search = self.tuning, self.tuning.search
        rate, *others = tuning.dimensions
        width = (rate.high / rate.low) ** 0.5
        low, high = tuning.centre / width, tuning.centre * width
        self.box = (Dimension(name=rate.name, low=low, high=high), *others)
        if search.kind == "quasi-random":
            return self._sobol(self.box, search.trials, stream=0)
        factor = min(FACTOR, WIDEST ** (1 / max(search.trials - 1, 1)))
        middle = search.trials // 2
        return [{"lr": tuning.centre * factor ** (i - middle)} for i in range(search.trials)]

    def enter(self, points: Sequence[Point], seeds: range) -> list[TrialPlan]:
        """Add points, and return the trials of these seeds that were not asked for yet."""
        self.points += [point for point in points if point not in self.points]
        new = []
        for number in seeds:
            for point in points:
                plan = self.tuning.plan(point, number)
                asked = self.asked.setdefault(_name(point), [])
                if plan not in asked:
                    asked.append(plan)
                    new.append(plan)
        return new

    def standings(self, target: str, crossing: str, *, seeds: int) -> list[tuple[Standing, Point]]:
        """Settings with at least that many results, the best first, low rates before high."""
        found = []
        for point in self.points:
            results = [self.done[plan.key] for plan in self.asked[_name(point)]]
            if len(results) >= seeds:
                found.append((standing(results, target, crossing), point))
        return sorted(found, key=lambda pair: (pair[0], pair[1]["lr"]))

    def bests(self, *, seeds: int) -> list[tuple[Standing, Point]]:
        """The best setting of each target and kind of crossing.

        Where nothing got there it is the one that came closest; crossings for good are then
        left aside. Where everything crashed or found no memory there is none: more of the
        same would end alike.
        """
        found: list[tuple[Standing, Point]] = []
        if all(self.done[p.key].outcome in NOTHING_TOLD for of in self.asked.values() for p in of):
            return found
        for target in self.tuning.targets:
            for crossing in CROSSINGS:
                best = self.standings(target, crossing, seeds=seeds)[0]
                if best[0].reached or crossing == "first":
                    found.append(best)
        return found

    def beyond(self, widening: int, *, seeds: int) -> list[Point]:
        """Points beyond the edges that hold some best."""
        bests = [point for _, point in self.bests(seeds=seeds)]
        if not bests:
            return []
        if self.tuning.search.kind == "quasi-random":
            return self._beyond_box(bests, stream=1 + widening)
        rates = sorted(point["lr"] for point in self.points)
        step = rates[1] / rates[0] if len(rates) > 1 else FACTOR
        low = any(point["lr"] == rates[0] for point in bests)
        high = any(point["lr"] == rates[-1] for point in bests)
        new = [rates[0] / step**i for i in range(1, BEYOND + 1) if low]
        new += [rates[-1] * step**i for i in range(1, BEYOND + 1) if high]
        return [{"lr": rate} for rate in sorted(new)]

    def _beyond_box(self, bests: Sequence[Point], *, stream: int) -> list[Point]:
        """Grow the box where a best is near its end; points fill what is new."""
        new: list[Point] = []
        count = max(2, self.tuning.search.trials // 2)
        for at, side in enumerate(self.box):
            shares = [side.share(point[side.name]) for point in bests]
            for end, near in ((0, min(shares) < EDGE_SHARE), (1, max(shares) > 1 - EDGE_SHARE)):
                if not near:
                    continue
                slab = Dimension(
                    name=side.name, low=side.at(end - 0.5 * (1 - end)), high=side.at(end * 1.5)
                )
                part = (*self.box[:at], slab, *self.box[at + 1 :])
                new += self._sobol(part, count, stream=2 * (stream * len(self.box) + at) + end)
                grown = Dimension(
                    name=side.name,
                    low=min(self.box[at].low, slab.low),
                    high=max(self.box[at].high, slab.high),
                )
                self.box = (*self.box[:at], grown, *self.box[at + 1 :])
        return new

    def _sobol(self, box: Sequence[Dimension], count: int, *, stream: int) -> list[Point]:
        seed = 1000 * self.tuning.seed + stream
        engine = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        rows = engine.draw(count, dtype=torch.float64).tolist()
        return [
            {side.name: side.at(share) for side, share in zip(box, row, strict=True)}
            for row in rows
        ]

    def unfilled(self) -> list[TrialPlan]:
        """Seeds not run yet of the best settings and of those next to them."""
        wanted = {_name(point): point for point in self._leaders()}
        return self.enter(list(wanted.values()), range(self.tuning.search.seeds))

    def _leaders(self) -> Iterator[Point]:
        search = self.tuning.search
        for target in self.tuning.targets:
            for crossing in CROSSINGS:
                table = self.standings(target, crossing, seeds=search.first_seeds)
                reached = [point for score, point in table if score.reached]
                if search.kind == "quasi-random":
                    yield from reached[:LEADERS]
                elif reached:
                    rates = sorted(self.points, key=lambda point: point["lr"])
                    at = rates.index(reached[0])
                    yield from rates[max(at - 1, 0) : at + 2]


def _name(point: Point) -> str:
    return repr(sorted(point.items()))
