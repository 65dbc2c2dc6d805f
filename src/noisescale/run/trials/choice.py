"""Stacked or one by one, and how many side by side: decided by a few timed steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from noisescale.records.trial import TrialPlan
from noisescale.run.trials.alone import LoneTrial
from noisescale.run.trials.passages import Passages, quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.routes import Route
from noisescale.run.trials.stacked.stack import Stack, sortable_columns
from noisescale.run.trials.units import RunningTrial
from noisescale.workload import Workload

TIMED_SECONDS = 0.003
"""Wall time over which steps of one candidate are timed. (assumed)"""

FEWEST_STEPS = 2
"""Steps timed at least; the fastest counts. (assumed)"""

LONGEST_STEP = 0.3
"""Wider stacks are not tried once a step would take so many seconds. (assumed)"""

NO_GAIN = 4
"""Nor once one so many times as wide as another was no faster per trial. (assumed: by two
doublings, as one may be timed while the machine is busy)"""

TIE = 0.97
"""Widths are tied whose times are within this share, and the stack that is taken must be faster
than this share of the time one by one. (assumed)"""

EVALUATED_TOGETHER = 8
"""Trials whose evaluation is timed: it takes as long per trial with more. (measured)"""

NARROWEST = 2


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How trials are trained.

    Attributes:
        route: how they are stacked; None for one by one.
        width: trials side by side.
        sorts: whether stacks leave out zeros of the inputs.
        stacked_seconds: per step and trial at that width, with its share of the evaluations, when
            it was measured.
        alone_seconds: the same one by one.
    """

    route: Route | None
    width: int
    sorts: bool = False
    stacked_seconds: float | None = None
    alone_seconds: float | None = None


def choose(
    workload: Workload,
    plans: Sequence[TrialPlan],
    route: Route,
    feed: Feed,
    evaluator: TrialEvaluator,
    *,
    widest: int,
    forced: bool = False,
) -> Choice:
    """Time a few steps and evaluations of each way, thrown away after, and take the fastest.

    Args:
        workload: model and data.
        plans: trials that can be stacked together, at least one.
        route: the fastest sound one.
        feed: makes batches.
        evaluator: holds the evaluation data.
        widest: most trials side by side, by memory and by workers.
        forced: stacked whatever one by one takes.

    Raises:
        Exception: what the workload's code raises, or memory that does not suffice.
    """
    if len(plans) < NARROWEST and not forced:
        return Choice(route=None, width=1)
    width, stacked = _best_width(workload, plans, route, feed, evaluator, widest)
    sorts, stacked = _sorting(workload, plans, route, feed, evaluator, width, stacked)
    if forced:
        return Choice(route=route, width=width, sorts=sorts, stacked_seconds=stacked)
    trials = _side_by_side(plans, route, min(width, EVALUATED_TOGETHER))
    stack = Stack(route, workload, feed, evaluator, trials)
    with torch.random.fork_rng():
        torch.manual_seed(plans[0].seed)
        lone = LoneTrial(workload, plans[0])
        together, single = fastest(stack.values, lone.values)
        (alone,) = fastest(lone.step)
    share = evaluations_per_step(plans[0])
    stacked += share * together / len(trials)
    alone += share * single
    kept = route if stacked <= TIE * alone else None
    return Choice(
        route=kept, width=width, sorts=sorts, stacked_seconds=stacked, alone_seconds=alone
    )


def alone_seconds(workload: Workload, plan: TrialPlan) -> float:
    """Return the seconds of a step one by one with its share of the evaluations, by timing a few.

    Infinite where the workload's code fails, which is for the trials to tell.
    """
    try:
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            lone = LoneTrial(workload, plan)
            (single,) = fastest(lone.values)
            (step,) = fastest(lone.step)
    except Exception:  # noqa: BLE001  the workload's code may raise anything
        return math.inf
    return step + evaluations_per_step(plan) * single


def evaluations_per_step(plan: TrialPlan) -> float:
    """Return the evaluations over the steps of a trial that uses up its budget."""
    passages, count = Passages(plan), 0
    never = dict.fromkeys(quantities(plan), math.nan)
    while passages.steps < plan.max_steps:
        passages.note(passages.next_step, never, math.nan)
        count += 1
    return count / max(1, plan.max_steps)


def _best_width(
    workload: Workload,
    plans: Sequence[TrialPlan],
    route: Route,
    feed: Feed,
    evaluator: TrialEvaluator,
    widest: int,
) -> tuple[int, float]:
    """Return the width that trains and evaluates fastest, and its seconds per step and trial."""

    def stack_of(width: int) -> Stack:
        return Stack(route, workload, feed, evaluator, _side_by_side(plans, route, width))

    widths = _widths(len(_side_by_side(plans, route, widest)))
    fixed = _evaluation_overhead(stack_of, widths) * evaluations_per_step(plans[0])
    timed: list[tuple[float, int, float]] = []
    for width in widths:
        stack = stack_of(width)
        with torch.no_grad():
            step = fastest(stack.step)[0] / width
        timed.append((step + fixed / width, width, step))
        best = min(timed)[0]
        tied = [each for each in timed if TIE * each[0] <= best]
        if width >= NO_GAIN * tied[0][1] or 2 * width * step > LONGEST_STEP:
            break
    # Of ties the widest: it stays wide for longer while its trials end.
    _, width, step = tied[-1]
    return width, step


def _evaluation_overhead(stack_of: Callable[[int], Stack], widths: Sequence[int]) -> float:
    """Return the seconds of an evaluation that do not depend on how many trials it is of."""
    narrow, wide = widths[0], min(widths[-1], max(EVALUATED_TOGETHER, 2 * widths[0]))
    if narrow == wide:
        return 0.0
    one, other = (stack_of(width).values for width in (narrow, wide))
    few, many = fastest(one, other)
    return max(0.0, few - narrow * (many - few) / (wide - narrow))


def _sorting(
    workload: Workload,
    plans: Sequence[TrialPlan],
    route: Route,
    feed: Feed,
    evaluator: TrialEvaluator,
    width: int,
    seconds: float,
) -> tuple[bool, float]:
    """Return whether leaving out zeros is faster, and the seconds of the faster way."""
    if sortable_columns(route.make(evaluator)[0], feed) is None:
        return False, seconds
    stacks = [
        Stack(route, workload, feed, evaluator, _side_by_side(plans, route, width), sorts=sorts)
        for sorts in (False, True)
    ]
    with torch.no_grad():
        plain, sorted_ = fastest(*(stack.step for stack in stacks))
    return (True, sorted_ / width) if sorted_ < TIE * plain else (False, seconds)


def _side_by_side(plans: Sequence[TrialPlan], route: Route, most: int) -> list[RunningTrial]:
    """Return trials that can be in one stack, at least one, all with the same initial weights."""
    ordered = sorted(plans, key=lambda plan: plan.order_seed)
    if not route.joins_orders:
        orders = [plan.order_seed for plan in plans]
        commonest = max(set(orders), key=orders.count)
        ordered = [plan for plan in plans if plan.order_seed == commonest]
    return [
        RunningTrial(plan=replace(plan, seed=plans[0].seed), place=0, passages=Passages(plan))
        for plan in ordered[: max(1, most)]
    ]


def _widths(largest: int) -> list[int]:
    """Return widths to try, ascending, the last one the largest.

    >>> _widths(48)
    [3, 6, 12, 24, 48]
    """
    widths = [largest]
    while widths[-1] > 2 * NARROWEST:
        widths.append(-(-widths[-1] // 2))
    return widths[::-1]


def fastest(*calls: Callable[[], object]) -> list[float]:
    """Return the seconds of the fastest run of each call; the first run of each is not timed.

    They take turns, so that a machine that is busy for a while is so for all of them.
    """
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    while len(taken[0]) < FEWEST_STEPS or sum(map(sum, taken)) < TIMED_SECONDS:
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [min(seconds) for seconds in taken]
