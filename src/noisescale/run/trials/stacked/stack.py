"""Trials of one batch size that are trained in step, as one stacked model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from noisescale.measure.batches import EpochBatches
from noisescale.records.trial import TrialPlan
from noisescale.run.dry_run import fresh_model
from noisescale.run.trials.passages import quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.appraisal import Appraiser, Values
from noisescale.run.trials.stacked.columns import Columns
from noisescale.run.trials.stacked.dense import DenseNetwork
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.groups import Groups
from noisescale.run.trials.stacked.optimizers import make_update, update_kind
from noisescale.run.trials.stacked.routes import Network, Route
from noisescale.run.trials.stacked.shelf import Shelf
from noisescale.run.trials.units import RunningTrial, ShouldStop
from noisescale.workload import Workload


class Stack:
    """Trials that share a batch size and a kind of optimizer, and how far they are.

    Attributes:
        trials: sorted by the order of their data.
        steps: optimizer steps done.

    Args:
        route: how they are stacked.
        workload: model and data.
        feed: makes batches.
        evaluator: holds the evaluation data.
        trials: none of them begun.
        sorts: leave out zeros of the inputs, if the route can.
    """

    def __init__(
        self,
        route: Route,
        workload: Workload,
        feed: Feed,
        evaluator: TrialEvaluator,
        trials: Sequence[RunningTrial],
        *,
        sorts: bool = False,
    ) -> None:
        self.route, self._feed = route, feed
        self.trials = sorted(trials, key=lambda trial: trial.plan.order_seed)
        self.steps = 0
        for trial in self.trials:
            trial.engine = "stacked"
        self._network, self._appraiser = route.make(evaluator)
        recipes = [trial.plan.recipe for trial in self.trials]
        self._batch_size = recipes[0].batch_size
        weights = initial_weights(workload, [trial.plan.seed for trial in self.trials])
        self._columns = sortable_columns(self._network, feed) if sorts else None
        if self._columns is not None:
            weights = self._exchanged(weights.parts, self._columns.order)
            assert isinstance(self._appraiser, Appraiser)
            self._appraiser.place = self._columns.place
        self._update = make_update(weights, recipes)
        self._orders: dict[int, EpochBatches] = {}
        self._regroup()

    @property
    def next_step(self) -> int:
        """Steps done at which some trial is to be evaluated next."""
        return min(trial.passages.next_step for trial in self.trials)

    @property
    def weights(self) -> list[Tensor]:
        """Per parameter, shape (trials, ...)."""
        parts = self._update.weights.parts
        return parts if self._columns is None else self._exchanged(parts, self._columns.place).parts

    def advance(self, should_stop: ShouldStop | None = None) -> None:
        """Train to the next evaluation and evaluate the trials whose turn it is."""
        began = time.perf_counter()
        with torch.no_grad():
            due = self.next_step
            while self.steps < due:
                if should_stop is not None and should_stop():
                    for trial in self.trials:
                        trial.stopped_by = "interruption"
                    break
                self.step()
            else:
                self._evaluate()
        share = (time.perf_counter() - began) / len(self.trials)
        for trial in self.trials:
            trial.seconds += share
            trial.steps = self.steps

    def step(self) -> None:
        """Take one optimizer step of every trial."""
        indices = [next(self._orders[seed]) for seed in self._groups.orders]
        self._update.begin(self.steps)
        if self._columns is None:
            self._network.step(self._update, self._feed.leaves(indices), self._groups)
        else:
            self._sorted_step(indices, self._columns)
        self._update.finish()
        self.steps += 1

    def _sorted_step(self, indices: Sequence[Tensor], columns: Columns) -> None:
        assert isinstance(self._network, DenseNetwork)
        arranged = [columns.arranged(each) for each in indices]
        leaves = self._feed.leaves([order for order, _ in arranged])
        inputs = leaves[self._network.input].flatten(2)
        leaves[self._network.input] = inputs.index_select(2, columns.order)
        pieces = [own for _, own in arranged]
        self._network.step(self._update, leaves, self._groups, pieces)

    def _exchanged(self, parts: Sequence[Tensor], order: Tensor) -> Shelf:
        """Return weights whose first matrices have their columns in another order."""
        assert isinstance(self._network, DenseNetwork)
        j = self._network.multiplies
        return Shelf([p.index_select(2, order) if i == j else p for i, p in enumerate(parts)])

    def drop_ended(self) -> list[RunningTrial]:
        """Compact the trials that have ended away, and return them."""
        ended = [trial for trial in self.trials if not trial.goes_on]
        if ended:
            rows = [i for i, trial in enumerate(self.trials) if trial.goes_on]
            self.trials = [self.trials[i] for i in rows]
            if rows:
                self._update = self._update.rows(torch.tensor(rows))
                self._regroup()
        return ended

    def may_join(self, other: Stack) -> bool:
        """Whether another stack can be taken over: same kind, equally far, orders allowed."""
        orders = {trial.plan.order_seed for trial in self.trials + other.trials}
        alike = stack_kind(self.trials[0].plan) == stack_kind(other.trials[0].plan)
        fit = self.route.joins_orders or len(orders) == 1
        fit = fit and (self._columns is None) == (other._columns is None)
        fit = fit and type(self._update) is type(other._update)
        return alike and fit and self.route is other.route and self.steps == other.steps

    def join(self, other: Stack) -> None:
        """Take over the trials of a stack of the same kind that is equally far."""
        together = self.trials + other.trials
        self._update = self._update.joined(other._update)
        self._orders = {**other._orders, **self._orders}
        rows = sorted(range(len(together)), key=lambda i: together[i].plan.order_seed)
        self.trials = [together[i] for i in rows]
        self._update = self._update.rows(torch.tensor(rows))
        self._regroup()

    def values(self) -> Values:
        """Evaluate every trial."""
        return self._appraiser.values(self._update.weights.parts)

    def _evaluate(self) -> None:
        rows = [i for i, t in enumerate(self.trials) if t.passages.next_step <= self.steps]
        if len(rows) == len(self.trials):
            found = self.values()
        else:
            picked = torch.tensor(rows)
            found = self._appraiser.values(
                [w.index_select(0, picked) for w in self._update.weights.parts]
            )
        for i, (values, loss) in zip(rows, found, strict=True):
            self.trials[i].passages.note(self.steps, values, loss)

    def _regroup(self) -> None:
        self._groups = Groups([trial.plan.order_seed for trial in self.trials])
        # An order that nobody follows here stands still: another stack's goes on.
        live = self._groups.orders
        self._orders = {seed: self._orders[seed] for seed in live if seed in self._orders}
        for seed in self._groups.orders:
            if seed not in self._orders:
                self._orders[seed] = self._feed.order(self._batch_size, seed)


def sortable_columns(network: Network, feed: Feed) -> Columns | None:
    """Return how often inputs are used where a network can leave out the others."""
    return feed.columns(network.input) if isinstance(network, DenseNetwork) else None


def stack_kind(plan: TrialPlan) -> tuple[object, ...]:
    """Return what must be equal for two trials to be in one stack."""
    return (plan.recipe.batch_size, quantities(plan), *update_kind(plan.recipe))


def initial_weights(workload: Workload, seeds: Sequence[int]) -> Shelf:
    """Return the weights that models of these seeds start from."""
    models: dict[int, list[Tensor]] = {}
    with torch.random.fork_rng():
        for seed in dict.fromkeys(seeds):
            torch.manual_seed(seed)
            models[seed] = [p.detach() for p in fresh_model(workload).parameters()]
    own = [models[seed] for seed in seeds]
    return Shelf([torch.stack(same) for same in zip(*own, strict=True)])
