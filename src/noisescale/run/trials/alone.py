"""One trial trained by itself, step by step: the slow reference, which knows every recipe."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import EpochBatches, move, take
from noisescale.measure.real_step import RealStep
from noisescale.records.trial import TrialPlan, TrialResult
from noisescale.run.dry_run import check_batch_size, fresh_model
from noisescale.run.optimizers import make_optimizer
from noisescale.run.rates import rate_factor, warmup_length
from noisescale.run.trials.outcomes import failure, trial_result
from noisescale.run.trials.passages import Passages, quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.workload import Workload

ShouldStop = Callable[[], bool]


def train_trial(
    workload: Workload,
    plan: TrialPlan,
    *,
    keep_curves: bool = False,
    should_stop: ShouldStop | None = None,
) -> TrialResult:
    """Train one trial until it has passed its targets, diverged or used up its budget.

    Two calls with equal arguments give equal crossings; the caller's random state is left as it
    was. What the workload's code raises, or memory that does not suffice, is an outcome.

    Args:
        workload: model, loss and data; its own recipe is not used.
        plan: how to train and what to reach.
        keep_curves: keep the value of every evaluation.
        should_stop: asked before every step; once true the trial is ``interrupted``.

    Raises:
        InvalidInputError: the batch is larger than the data, the recipe's optimizer does not
            have a key that it sets, or the workload makes no model.
    """
    check_batch_size(workload, plan.recipe.batch_size)
    passages = Passages(plan, keep_curves=keep_curves)
    began = time.perf_counter()
    stopped_by = detail = ""
    alone = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            alone = LoneTrial(workload, plan)
            stopped_by = alone.go(passages, should_stop)
    except InvalidInputError:
        raise
    except Exception as problem:  # noqa: BLE001  a crash is one of the outcomes
        stopped_by, detail = failure(problem)
    return trial_result(
        plan,
        passages,
        steps=0 if alone is None else alone.steps,
        seconds=time.perf_counter() - began,
        engine="alone",
        stopped_by=stopped_by,
        detail=detail,
    )


class LoneTrial:
    """The model, the optimizer and the data order of one trial; the caller seeds torch.

    Attributes:
        model: the model.
        steps: optimizer steps done.
    """

    def __init__(self, workload: Workload, plan: TrialPlan) -> None:
        self._recipe = recipe = plan.recipe
        self._workload = workload
        self.model = fresh_model(workload)
        self.steps = 0
        self._device = next(self.model.parameters()).device
        optimizer = make_optimizer(self.model, recipe)
        self._step = RealStep(self.model, workload.loss, recipe, optimizer)
        self._constant = warmup_length(recipe) == 0 and recipe.schedule is None
        self._order = EpochBatches(
            workload.train_size,
            recipe.batch_size,
            torch.Generator().manual_seed(plan.order_seed),
        )
        self._evaluator = TrialEvaluator(workload, self._device, quantities(plan))
        self.model.train()

    def go(self, passages: Passages, should_stop: ShouldStop | None = None) -> str:
        """Train until the trial ends; return ``interruption`` when it was stopped."""
        while passages.goes_on:
            while self.steps < passages.next_step:
                if should_stop is not None and should_stop():
                    return "interruption"
                self.step()
            self.evaluate(passages)
        return ""

    def evaluate(self, passages: Passages) -> None:
        """Enter the values of the weights as they are."""
        passages.note(self.steps, *self.values())

    def values(self) -> tuple[dict[str, float], float]:
        """Return the quantities by name, and the loss that tells divergence."""
        return self._evaluator.all_values(self.model)

    def step(self) -> None:
        """Take one optimizer step."""
        indices = next(self._order)
        batch = move(take(self._workload.train, indices, self._workload.collate), self._device)
        if not self._constant:
            for group in self._step.optimizer.param_groups:
                group["lr"] = self._recipe.lr * rate_factor(self._recipe, self.steps)
        self._step(batch)
        self.steps += 1
