"""Tuning at two or three batch sizes about the critical one, and the whole curve from them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import (
    Calibration,
    CriticalBatch,
    Interval,
    PredictedCurve,
    Recipe,
    TrialResult,
    TunedSteps,
)
from noisescale.run.sweep.driver import Driver, kept_store, trained_by_engine
from noisescale.run.sweep.progress import OnProgress, Reporter
from noisescale.run.sweep.request import Request, make_request
from noisescale.run.sweep.sizes import read_batch_sizes
from noisescale.theory.few_runs import CriticalPrior, first_pair, predict_curve
from noisescale.theory.trial_table import trial_rows
from noisescale.theory.tuned_steps import tuned_steps
from noisescale.workload import Workload

MOST_SIZES = 3
"""Batch sizes that are tuned. (measured: two predict the curve to 12 %, three to 9 %)"""

LEAST_ERROR = 0.01
"""Standard error of log steps below which a tuned size is not believed. (assumed)"""

UNKNOWN_FACTOR = 50.0
"""A recipe's batch size may be off the critical one by so much. (assumed)"""

UNKNOWN_ERROR = 0.1
"""Standard error of log steps where the seeds give none: their usual scatter. (measured)"""


def calibrate(
    workload: str | Workload,
    *,
    prior: CriticalPrior,
    prior_basis: str = "given",
    target: str | None = None,
    predict: str | Sequence[int] | None = None,
    seeds: int = 8,
    most_sizes: int = MOST_SIZES,
    store: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    seconds: float | None = None,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Tune at a batch size below and one above the critical one, and predict all others.

    The pair lies about a factor 4.5 below and above what the noise scale says. Where the tuned
    steps leave it open on which side of the critical batch both lie, a third size is tuned.

    Args:
        workload: a built-in's name, ``module:attribute``, ``path/to/file.py:attribute`` or a
            Workload.
        prior: where the noise scale puts the critical batch.
        prior_basis: where the prior comes from, for people.
        target: the goal; the workload's own by default.
        predict: batch sizes to predict, as :func:`noisescale.sweep` takes them; by default
            powers of two, and all examples.
        seeds: runs of the settings that matter.
        most_sizes: most batch sizes to tune, at least 2.
        store: folder that keeps every trial, such as a sweep's; None keeps none.
        engine: ``auto``, ``stacked`` or ``alone``.
        seconds: about the most wall time.
        seed: of each setting's first run.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        on_progress: told how far it is.

    Returns:
        The tuned sizes, and the predicted curve with its band.

    Raises:
        InvalidInputError: bad input, as for :func:`noisescale.sweep`.
    """
    began = time.monotonic()
    if most_sizes < 2:
        raise InvalidInputError(
            f"most_sizes {most_sizes}", "at least 2 are required", "leave it out for 3"
        )

    def ask(sizes: Sequence[int]) -> Request:
        return make_request(
            workload, targets=target, batch_sizes=sizes, trials=None, seeds=seeds, search="grid",
            full=False, over=(), max_steps=None, max_examples=None, seed=seed, data=data,
            overrides=overrides,
        )  # fmt: skip

    # Everything is checked once before the choice of sizes.
    checked = ask([1])
    train_size = checked.workload.train_size
    work = _Work(
        ask=ask,
        prior=prior,
        wanted=read_batch_sizes(predict or "1:full,full", train_size=train_size, recipe_size=1),
        most_sizes=most_sizes,
        engine=engine,
        deadline=began + (math.inf if seconds is None else seconds),
        on_progress=on_progress,
    )
    with kept_store(checked, store) as kept:
        work.run(first_pair(prior, largest=train_size), kept)
    return Calibration(
        target=checked.targets[0],
        prior=Interval(point=prior.point, low=prior.low, high=prior.high),
        prior_basis=prior_basis,
        tuned=tuple(work.tuned),
        predicted=work.predicted,
        trials=len(work.results),
        complete=work.complete,
        seconds=time.monotonic() - began,
        detail=_detail(work),
    )


def prior_of(critical: CriticalBatch, recipe: Recipe) -> tuple[CriticalPrior, str]:
    """Return where a measured noise scale puts the critical batch, and one sentence on it.

    Args:
        critical: from the noise scale, with its wider band.
        recipe: its batch size is where to look when nothing is known.
    """
    point, low, high = critical.point, critical.low, critical.high
    if point and low and high:
        return CriticalPrior(point=point, low=low, high=high), "the noise scale, wider band"
    if low:
        # Somewhere above the bound.
        prior = CriticalPrior(point=4 * low, low=low / 2, high=64 * low)
        return prior, "a lower bound of the noise scale"
    size = recipe.batch_size
    prior = CriticalPrior(point=size, low=size / UNKNOWN_FACTOR, high=size * UNKNOWN_FACTOR)
    return prior, "the recipe's batch size, for want of a noise scale"


@dataclass(kw_only=True)
class _Work:
    """The sizes tuned so far, and what they say."""

    ask: Any
    prior: CriticalPrior
    wanted: Sequence[int]
    most_sizes: int
    engine: str
    deadline: float
    on_progress: OnProgress | None
    results: dict[str, TrialResult] = field(default_factory=dict)
    tuned: list[TunedSteps] = field(default_factory=list)
    predicted: PredictedCurve | None = None
    complete: bool = True

    def run(self, sizes: Sequence[int], store: Any) -> None:
        """Tune these sizes, and others while they do not lie on both sides."""
        sizes = list(dict.fromkeys(sizes))
        while True:
            self._tune(self.ask(sizes), store)
            self.predicted = self._predict()
            further = None if self.predicted is None else self.predicted.next_batch_size
            if not self.complete or further is None or len(sizes) >= self.most_sizes:
                return
            sizes.append(further)

    def _tune(self, request: Request, store: Any) -> None:
        with trained_by_engine(request, self.engine) as train:
            driver = Driver(
                request=request,
                train=train,
                store=store,
                reporter=Reporter(
                    sizes=len(request.batch_sizes),
                    target=request.targets[0],
                    tell=self.on_progress,
                    deadline=self.deadline,
                ),
                deadline=self.deadline,
                results=self.results,
            )
            driver.run()
        self.complete = not driver.unfinished
        asked = {
            size: [plan.key for plan in tuning.plans(driver.results)]
            for size, tuning in driver.tunings.items()
            if size not in driver.unfinished
        }
        self.results = {k: driver.results[k] for keys in asked.values() for k in keys}
        target = request.targets[0]
        self.tuned = []
        for _, keys in sorted(asked.items()):
            rows = trial_rows([self.results[key] for key in keys], target=target, crossing="first")
            self.tuned.append(tuned_steps(rows, target=target))

    def _predict(self) -> PredictedCurve | None:
        known = [row for row in self.tuned if row.steps is not None]
        if not known:
            return None
        return predict_curve(
            batch_size=[row.batch_size for row in known],
            steps=[row.steps or math.nan for row in known],
            log_error=[max(row.log_error or UNKNOWN_ERROR, LEAST_ERROR) for row in known],
            prior=self.prior,
            sizes=list(self.wanted),
        )


def _detail(work: _Work) -> str:
    if work.predicted is None:
        closest = [f"{row.closest:.4g}" for row in work.tuned if row.closest is not None]
        near = f" (closest: {', '.join(closest)})" if closest else ""
        return f"no tuned batch size reached the target{near}"
    said = work.predicted.detail
    return said if work.complete else f"time was up before the tuning was over; {said}"
