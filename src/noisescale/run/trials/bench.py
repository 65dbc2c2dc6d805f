"""What the trials of one workload are trained with, and how they are put together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from noisescale.errors import InvalidInputError
from noisescale.records.trial import TrialPlan
from noisescale.run.dry_run import fresh_model
from noisescale.run.trials.choice import NARROWEST, Choice, alone_seconds, choose
from noisescale.run.trials.passages import quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.routes import Route, draws, named_route, sound_routes
from noisescale.run.trials.stacked.stack import Stack, stack_kind
from noisescale.run.trials.units import LoneUnit, RunningTrial
from noisescale.run.trials.workers import Slot
from noisescale.workload import Workload

KEPT_WEIGHTS = 5
"""A trial by itself keeps so many times its weights: gradients, memories. (assumed)"""


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Trials that are to be one unit; says it to another process as well.

    Attributes:
        places: of the trials among all that were given.
        route: name of how they are stacked; None for a trial by itself.
        width: most trials that the unit may hold.
        sorts: whether it leaves out zeros of the inputs.
        trial_bytes: memory that each takes.
    """

    places: tuple[int, ...]
    route: str | None
    width: int
    trial_bytes: int
    sorts: bool = False


def only(slots: Iterable[SlotPlan], places: Collection[int]) -> list[SlotPlan]:
    """Return the same units with some trials only, without those that have none left."""
    own = [(slot, tuple(p for p in slot.places if p in places)) for slot in slots]
    return [replace(slot, places=kept) for slot, kept in own if kept]


def restricted(slots: Iterable[SlotPlan], places: Sequence[int]) -> list[SlotPlan]:
    """Return the same units with only some trials, their places now those in ``places``.

    >>> slot = SlotPlan(places=(4, 7, 9), route="products", width=3, trial_bytes=1)
    >>> restricted([slot], [7, 8, 9])[0].places
    (0, 2)
    """
    number = {place: i for i, place in enumerate(places)}
    return [
        replace(slot, places=tuple(number[place] for place in slot.places))
        for slot in only(slots, number)
    ]


class Bench:
    """Everything that does not depend on the batch size, made once.

    Attributes:
        workload: model, loss and data.
        device: where its models lie.
        feed: makes batches.

    Args:
        workload: as above.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        with torch.random.fork_rng():
            model = fresh_model(workload)
        self.device = next(model.parameters()).device
        self._kept = KEPT_WEIGHTS * sum(p.numel() * p.element_size() for p in model.parameters())
        self.feed = Feed(workload, self.device)
        self._evaluators: dict[tuple[str, ...], TrialEvaluator] = {}
        self._sound: dict[tuple[str, ...], Route | None] = {}
        self._named: dict[str, Route] = {}

    @cached_property
    def draws(self) -> bool:
        """Whether training steps draw from torch's random state."""
        with torch.random.fork_rng():
            return draws(self.workload, fresh_model(self.workload))

    @property
    def isolated(self) -> bool:
        """Whether a process must train one trial at a time."""
        return self.device.type != "cpu" or self.draws

    def plan_slots(
        self,
        trials: Sequence[RunningTrial],
        *,
        engine: str,
        capacity: int,
        workers: int,
        timed: bool = False,
    ) -> tuple[list[SlotPlan], float]:
        """Say which trials form units.

        Args:
            trials: of one batch size.
            engine: see :func:`~noisescale.run.trials.train_trials`.
            capacity: bytes that all units may take together.
            workers: that train at the same time.
            timed: whether the time is wanted.

        Returns:
            The units, and the seconds that all trials would take one worker if each used up its
            budget; 0 if not wanted.

        Raises:
            InvalidInputError: ``engine="stacked"`` and the trials cannot be stacked.
        """
        kinds: dict[tuple[object, ...], list[RunningTrial]] = {}
        for trial in trials:
            kinds.setdefault(stack_kind(trial.plan), []).append(trial)
        slots: list[SlotPlan] = []
        seconds = 0.0
        for alike in kinds.values():
            choice = self._choice([trial.plan for trial in alike], engine, capacity, workers)
            slots += self._units(alike, choice)
            if timed:
                steps = sum(trial.plan.max_steps for trial in alike)
                seconds += steps * self._seconds(choice, alike[0].plan)
        return slots, seconds

    def slots(
        self, planned: Sequence[SlotPlan], trials: Sequence[RunningTrial], *, isolated: bool
    ) -> list[Slot]:
        """Return the units to be.

        Args:
            planned: what forms units; their places are those in ``trials``.
            trials: all of them.
            isolated: whether a trial by itself gets torch's random state.
        """
        return [self._slot(each, [trials[i] for i in each.places], isolated) for each in planned]

    def _slot(self, planned: SlotPlan, own: Sequence[RunningTrial], isolated: bool) -> Slot:
        size = planned.trial_bytes
        if planned.route is None:
            (trial,) = own
            return self._lone(trial, size, isolated=isolated)
        route = self._route(own[0].plan, planned.route)
        evaluator = self._evaluator(own[0].plan)
        return Slot(
            own,
            trial_bytes=size,
            make=partial(
                Stack, route, self.workload, self.feed, evaluator, own, sorts=planned.sorts
            ),
            again=partial(self._again, size),
            width=planned.width,
        )

    def _lone(self, trial: RunningTrial, size: int, *, isolated: bool) -> Slot:
        make = partial(LoneUnit, self.workload, trial, isolated=isolated)
        return Slot([trial], trial_bytes=size, make=make)

    def _again(self, size: int, trial: RunningTrial) -> Slot:
        """Begin a trial anew, one by one."""
        trial.passages = trial.passages.afresh()
        trial.engine, trial.steps = "alone", 0
        return self._lone(trial, size, isolated=False)

    def _units(self, trials: Sequence[RunningTrial], choice: Choice) -> Iterator[SlotPlan]:
        route = choice.route
        if route is None:
            for trial in trials:
                yield SlotPlan(places=(trial.place,), route=None, width=1, trial_bytes=self._kept)
            return
        size = route.bytes_per_trial(trials[0].plan.recipe.batch_size)
        ordered = sorted(trials, key=lambda trial: trial.plan.order_seed)
        runs = [ordered]
        if not route.joins_orders:
            orders = dict.fromkeys(trial.plan.order_seed for trial in ordered)
            runs = [[t for t in ordered if t.plan.order_seed == order] for order in orders]
        for run in runs:
            parts = -(-len(run) // choice.width)
            for part in range(parts):
                # as equal as they can be
                own = run[part * len(run) // parts : (part + 1) * len(run) // parts]
                yield SlotPlan(
                    places=tuple(trial.place for trial in own),
                    route=route.name,
                    width=choice.width,
                    trial_bytes=size,
                    sorts=choice.sorts,
                )

    def _choice(
        self, plans: Sequence[TrialPlan], engine: str, capacity: int, workers: int
    ) -> Choice:
        unknown = any(map(_only_alone, plans))
        if unknown and engine == "stacked":
            raise InvalidInputError(
                "clip_norm or ema_decay with engine='stacked'",
                "stacks know neither",
                "use engine='auto'",
            )
        if unknown or engine == "alone":
            return Choice(route=None, width=1)
        route = self._sound_route(plans[0])
        if route is None and engine == "stacked":
            raise InvalidInputError(
                f"workload {self.workload.name!r} with engine='stacked'",
                "a model that can be stacked is required: parameters only, all trained, no random"
                " numbers in its steps",
                "use engine='auto'",
            )
        if route is None:
            return Choice(route=None, width=1)
        fits = capacity // (workers * route.bytes_per_trial(plans[0].recipe.batch_size))
        widest = max(1, min(fits, -(-len(plans) // workers)))
        evaluator = self._evaluator(plans[0])
        forced = engine == "stacked"
        try:
            return choose(
                self.workload, plans, route, self.feed, evaluator, widest=widest, forced=forced
            )
        except Exception:  # noqa: BLE001  whether it ends a trial is for its training to tell
            return Choice(route=route if forced else None, width=min(widest, NARROWEST))

    def _seconds(self, choice: Choice, plan: TrialPlan) -> float:
        """Return seconds per step and trial."""
        known = choice.alone_seconds if choice.route is None else choice.stacked_seconds
        return alone_seconds(self.workload, plan) if known is None else known

    def _evaluator(self, plan: TrialPlan) -> TrialEvaluator:
        names = quantities(plan)
        if names not in self._evaluators:
            self._evaluators[names] = TrialEvaluator(self.workload, self.device, names)
        return self._evaluators[names]

    def _sound_route(self, plan: TrialPlan) -> Route | None:
        """Return the fastest sound route; None where there is none, or the search itself fails.

        It runs the workload's code on a few examples and on what stands in for the model. Whether
        that code fails in training is for the trials to tell, which is one of their outcomes.
        """
        names = quantities(plan)
        if names not in self._sound:
            try:
                self._sound[names] = next(sound_routes(self.workload, plan), None)
            except InvalidInputError:
                raise
            except Exception:  # noqa: BLE001  the workload's code may raise anything
                self._sound[names] = None
        return self._sound[names]

    def _route(self, plan: TrialPlan, name: str) -> Route:
        for found in self._sound.values():
            if found is not None and found.name == name:
                return found
        if name not in self._named:
            self._named[name] = named_route(self.workload, plan, name)
        return self._named[name]


def _only_alone(plan: TrialPlan) -> bool:
    """Whether a recipe has keys that stacks do not know."""
    return plan.recipe.clip_norm is not None or plan.recipe.ema_decay is not None
