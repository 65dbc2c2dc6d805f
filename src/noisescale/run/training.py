"""The one training loop behind the rate check, the measurement and the advice."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from noisescale.measure.batches import EpochBatches, move, take
from noisescale.measure.real_step import RealStep
from noisescale.records import Recipe, Target
from noisescale.run.dry_run import check_batch_size, fresh_model
from noisescale.run.evaluation import Evaluator
from noisescale.run.optimizers import make_optimizer
from noisescale.run.rates import rate_factor, warmup_length
from noisescale.run.users_code import blame_user
from noisescale.workload import Workload

DIVERGED_RISE = 4.0
"""A run has diverged when its smoothed loss lies this many times the initial loss's size above
the initial loss. (assumed: transient spikes at good rates stay below about twice the start)"""

SMOOTHING = 0.2
"""Weight of the newest step in the smoothed loss. (assumed)"""

PATIENCE_NOT_FINITE = 10
"""A run that may go on after a loss that is not finite ends after so many in a row."""


class Observer(Protocol):
    """What may watch a run; it never changes it."""

    def before_step(self, step: int, batch: Any) -> None:
        """See the batch, on the model's device, before step number ``step`` (from 1)."""

    def after_step(self, step: int, loss: float) -> None:
        """See the loss after the weights have moved."""


Watch = Callable[[nn.Module, torch.optim.Optimizer], Observer]
"""Attaches an observer to a run's fresh model and optimizer."""


@dataclass(kw_only=True)
class TrainingRun:
    """What one run did.

    Attributes:
        batch_size: global batch size, in the recipe's unit.
        lr: learning rate.
        seed: seed of the model, of the data order and of what the model draws.
        steps: optimizer steps done.
        losses: training loss of each step's batch, before the step.
        evaluations: (steps done, value of the target's quantity), oldest first.
        steps_to_target: steps until the target was passed, interpolated linearly between
            evaluations; None when it was not.
        initial_loss: loss on a fixed part of the training data before the first step.
        diverged: whether the loss became far larger than at the start, or not finite.
        not_finite_steps: steps whose loss was NaN or infinite.
        stopped: ``target``, ``steps``, ``time`` or ``diverged``.
        seconds: wall time.
    """

    batch_size: int
    lr: float
    seed: int
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    steps_to_target: float | None = None
    initial_loss: float = math.nan
    diverged: bool = False
    not_finite_steps: int = 0
    stopped: str = "steps"
    seconds: float = 0.0

    @property
    def examples(self) -> int:
        """Examples used, in the recipe's unit."""
        return self.steps * self.batch_size

    @property
    def met_at_start(self) -> bool:
        """Whether the goal held before the first step."""
        return self.steps_to_target == 0

    def mean_loss(self, *, end: int, width: int) -> float:
        """Mean training loss over the ``width`` steps that end with step ``end``."""
        window = self.losses[max(0, end - width) : end]
        return sum(window) / len(window) if window else math.nan


def train_run(
    workload: Workload,
    *,
    max_steps: int,
    recipe: Recipe | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    target: Target | None = None,
    stop_at_target: bool = True,
    stop_when_diverged: bool = True,
    evaluate_every: int | None = None,
    watch: Watch | None = None,
) -> TrainingRun:
    """Train a fresh model by a recipe until the target, the steps or the time is reached.

    Two runs with equal arguments are equal; the caller's random state is left as it was.

    Args:
        workload: model, loss and data.
        max_steps: most optimizer steps, at least 1.
        recipe: how to train; the workload's own when None.
        seed: of the model's weights, the data order and what the model draws (dropout).
        max_seconds: most wall time; the step that passes it is finished.
        target: the goal; it is evaluated before the first step, every ``evaluate_every``
            steps and after the last.
        stop_at_target: end the run there.
        stop_when_diverged: end the run when it has diverged; otherwise only after
            :data:`PATIENCE_NOT_FINITE` losses in a row that are not finite.
        evaluate_every: steps between evaluations; None chooses by :func:`evaluation_cadence`.
        watch: attaches an observer to the model and the optimizer.

    Raises:
        InvalidInputError: the batch is larger than the data, or the user's code raised.
    """
    recipe = recipe or workload.recipe
    check_batch_size(workload, recipe.batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fresh_model(workload)
        loop = _Loop(
            workload=workload,
            recipe=recipe,
            model=model,
            run=TrainingRun(batch_size=recipe.batch_size, lr=recipe.lr, seed=seed),
            target=target,
            stop_at_target=stop_at_target,
            stop_when_diverged=stop_when_diverged,
            every=evaluate_every or evaluation_cadence(workload, recipe),
        )
        began = time.perf_counter()
        deadline = math.inf if max_seconds is None else began + max_seconds
        with blame_user(f"workload {workload.name!r}: training", only_theirs=True):
            loop.go(max_steps=max_steps, deadline=deadline, watch=watch)
        loop.run.seconds = time.perf_counter() - began
    return loop.run


def evaluation_cadence(workload: Workload, recipe: Recipe) -> int:
    """Return steps between evaluations: the recipe's, else ten an epoch, at most 50 steps."""
    if recipe.evaluate_every is not None:
        return recipe.evaluate_every
    return max(1, min(50, workload.train_size // recipe.batch_size // 10))


def batches(workload: Workload, *, batch_size: int, seed: int) -> Iterator[Any]:
    """Yield the training batches of a seed, reshuffled every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    for indices in EpochBatches(workload.train_size, batch_size, generator):
        yield take(workload.train, indices, workload.collate)


@dataclass(kw_only=True)
class _Loop:
    """The state of a run while it goes."""

    workload: Workload
    recipe: Recipe
    model: nn.Module
    run: TrainingRun
    target: Target | None
    stop_at_target: bool
    stop_when_diverged: bool
    every: int

    def go(self, *, max_steps: int, deadline: float, watch: Watch | None) -> None:
        run, model = self.run, self.model
        device = next(model.parameters()).device
        optimizer = make_optimizer(model, self.recipe)
        step = RealStep(model, self.workload.loss, self.recipe, optimizer)
        groups = step.optimizer.param_groups
        self._evaluator = Evaluator(self.workload, device)
        self._initial(model)
        model.train()
        constant = warmup_length(self.recipe) == 0 and self.recipe.schedule is None
        fresh = batches(self.workload, batch_size=self.recipe.batch_size, seed=run.seed)
        with contextlib.ExitStack() as stack:
            observer = None if watch is None else watch(model, step.optimizer)
            if isinstance(observer, contextlib.AbstractContextManager):
                stack.enter_context(observer)
            while self._goes_on(max_steps=max_steps, deadline=deadline):
                batch = move(next(fresh), device)
                if not constant:
                    for group in groups:
                        group["lr"] = self.recipe.lr * rate_factor(self.recipe, run.steps)
                if observer is not None:
                    observer.before_step(run.steps + 1, batch)
                loss = float(step(batch))
                self._note(loss)
                if observer is not None:
                    observer.after_step(run.steps, loss)
                if run.steps % self.every == 0:
                    self._evaluate()
            if self.target is not None and run.evaluations[-1][0] != run.steps:
                self._evaluate()

    def _initial(self, model: nn.Module) -> None:
        self.run.initial_loss = self._evaluator.initial_loss(model)
        self._smoothed = self.run.initial_loss
        self._in_a_row = 0
        self._evaluate()

    def _note(self, loss: float) -> None:
        run = self.run
        run.steps += 1
        run.losses.append(loss)
        if not math.isfinite(loss):
            run.diverged = True
            run.not_finite_steps += 1
            self._in_a_row += 1
            return
        self._in_a_row = 0
        self._smoothed += SMOOTHING * (loss - self._smoothed)
        start = run.initial_loss
        if self._smoothed > start + DIVERGED_RISE * abs(start):
            run.diverged = True

    def _goes_on(self, *, max_steps: int, deadline: float) -> bool:
        run = self.run
        if self.stop_at_target and run.steps_to_target is not None:
            run.stopped = "target"
        elif (run.diverged and self.stop_when_diverged) or self._in_a_row >= PATIENCE_NOT_FINITE:
            run.stopped = "diverged"
        elif run.steps >= max_steps:
            run.stopped = "steps"
        elif time.perf_counter() >= deadline:
            run.stopped = "time"
        else:
            return True
        return False

    def _evaluate(self) -> None:
        if self.target is None:
            return
        run = self.run
        run.evaluations.append(
            (run.steps, self._evaluator.value(self.model, self.target.split, self.target.metric))
        )
        if run.steps_to_target is None:
            run.steps_to_target = first_passage(self.target, run.evaluations[-2:])


def first_passage(target: Target, last_two: list[tuple[int, float]]) -> float | None:
    """Return where the target was passed between two evaluations, by linear interpolation.

    >>> goal = Target.parse("validation_error<0.05")
    >>> first_passage(goal, [(10, 0.09), (20, 0.04)])
    18.0
    """
    step, value = last_two[-1]
    if not target.reached(value):
        return None
    before, earlier = last_two[0]
    if len(last_two) == 1 or not math.isfinite(earlier) or earlier == value:
        return float(step)
    return before + (step - before) * (earlier - target.value) / (earlier - value)
