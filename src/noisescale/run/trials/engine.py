"""Trials of one batch size, trained by the fastest sound way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.memory import available_bytes
from noisescale.records.trial import TrialPlan, TrialResult
from noisescale.run.dry_run import check_batch_size, fresh_model
from noisescale.run.optimizers import make_optimizer
from noisescale.run.trials.choice import Choice, choose
from noisescale.run.trials.judge import Judge
from noisescale.run.trials.passages import Passages, quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.routes import Route, draws, sound_routes
from noisescale.run.trials.stacked.stack import Stack, stack_kind
from noisescale.run.trials.units import LoneUnit, RunningTrial, ShouldStop
from noisescale.run.trials.workers import Slot, Workers
from noisescale.workload import Workload

MEMORY_SHARE = 0.25
"""Share of the memory that is free which trials may take together. (assumed)"""

KEPT_WEIGHTS = 5
"""A trial by itself keeps so many times its weights: gradients, memories. (assumed)"""

REUSED_BYTES = 31 << 20
"""Blocks up to this size are kept by the process when they are freed. (glibc's own limit is 32 MB)
"""

ENGINES = ("auto", "stacked", "alone")


def train_trials(
    workload: Workload,
    plans: Sequence[TrialPlan],
    *,
    judge: Judge | None = None,
    on_result: Callable[[TrialResult], None] | None = None,
    should_stop: ShouldStop | None = None,
    engine: str = "auto",
    keep_curves: bool = False,
    memory_bytes: int | None = None,
    workers: int | None = None,
) -> list[TrialResult]:
    """Train trials of one batch size until each has passed its targets or ended otherwise.

    The crossings are those of :func:`~noisescale.run.trials.alone.train_trial` up to rounding.

    Args:
        workload: model, loss and data; its own recipe is not used.
        plans: what to train; all of one batch size.
        judge: stops hopeless trials; asked after evaluations.
        on_result: called with each result as soon as its trial ends, one at a time, from a
            thread of the engine.
        should_stop: asked before every step, by several threads; once true all trials end as
            ``interrupted``.
        engine: ``auto`` takes the faster of ``stacked`` and ``alone`` by measurement.
        keep_curves: keep the value of every evaluation.
        memory_bytes: what the trials in training may take together; default: a quarter of what
            is free. Trials that do not fit wait for others to end.
        workers: threads that train; default: as many as torch may use. Each computes with one
            thread of torch when there are several.

    Returns:
        One result per plan, in their order.

    Raises:
        InvalidInputError: batch sizes differ or exceed the data, a recipe cannot be used, or
            ``engine="stacked"`` and the workload cannot be stacked.
    """
    if engine not in ENGINES:
        raise InvalidInputError(
            f"engine {engine!r}", "auto, stacked or alone is required", "choose one"
        )
    if not plans:
        return []
    _check(workload, plans)
    _reuse_freed_memory()
    capacity = memory_bytes or int(MEMORY_SHARE * available_bytes())
    trials = [
        RunningTrial(plan=plan, place=i, passages=Passages(plan, keep_curves=keep_curves))
        for i, plan in enumerate(plans)
    ]
    with _threads(min(workers or torch.get_num_threads(), len(plans))) as threads:
        crew = Workers(
            list(_slots(workload, trials, engine, capacity, threads)),
            trials,
            capacity=capacity,
            judge=judge,
            on_result=on_result,
            should_stop=should_stop,
        )
        crew.run(1 if _is_isolated(workload) else threads)
    return [crew.results[place] for place in range(len(plans))]


def _check(workload: Workload, plans: Sequence[TrialPlan]) -> None:
    sizes = sorted({plan.recipe.batch_size for plan in plans})
    if len(sizes) > 1:
        raise InvalidInputError(
            f"plans of batch sizes {sizes}", "one batch size is required", "train them in turn"
        )
    check_batch_size(workload, sizes[0])
    with torch.random.fork_rng():
        model = fresh_model(workload)
    for recipe in {repr(plan.recipe): plan.recipe for plan in plans}.values():
        make_optimizer(model, recipe)


def _is_isolated(workload: Workload) -> bool:
    """Whether trials must be trained one at a time, since they draw from torch's random state."""
    with torch.random.fork_rng():
        model = fresh_model(workload)
    return next(model.parameters()).device.type != "cpu" or draws(workload, model)


def _reuse_freed_memory() -> None:
    """Let the C library keep what is freed, up to a limit, for the next step's activations.

    glibc hands blocks above a threshold back to the system at once, whose return as fresh zeroed
    pages takes up to half of a step. The threshold follows the largest block freed so far, so
    that one which is never touched raises it. Elsewhere this does nothing.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    before = torch.get_num_threads()
    if wanted > 1:
        torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Some functions have no batching rule: whether that is too slow is measured.
            warnings.filterwarnings("ignore", message="There is a performance drop because")
            yield max(1, wanted)
    finally:
        torch.set_num_threads(before)


def _slots(
    workload: Workload, trials: Sequence[RunningTrial], engine: str, capacity: int, threads: int
) -> Iterator[Slot]:
    kinds: dict[tuple[object, ...], list[RunningTrial]] = {}
    for trial in trials:
        kinds.setdefault(stack_kind(trial.plan), []).append(trial)
    isolated = _is_isolated(workload)
    with torch.random.fork_rng():
        model = fresh_model(workload)
    device = next(model.parameters()).device
    kept = KEPT_WEIGHTS * sum(p.numel() * p.element_size() for p in model.parameters())
    feed = Feed(workload, device)
    for alike in kinds.values():
        evaluator = TrialEvaluator(workload, device, quantities(alike[0].plan))
        choice = _choice(workload, alike, engine, feed, evaluator, capacity, threads)
        if choice.route is None:
            yield from (_lone(workload, trial, kept, isolated=isolated) for trial in alike)
        else:
            yield from _stacks(workload, alike, choice, choice.route, feed, evaluator)


def _choice(
    workload: Workload,
    trials: Sequence[RunningTrial],
    engine: str,
    feed: Feed,
    evaluator: TrialEvaluator,
    capacity: int,
    threads: int,
) -> Choice:
    plans = [trial.plan for trial in trials]
    unknown = any(map(_only_alone, plans))
    if unknown and engine == "stacked":
        raise InvalidInputError(
            "clip_norm or ema_decay with engine='stacked'",
            "stacks know neither",
            "use engine='auto'",
        )
    if unknown or engine == "alone":
        return Choice(route=None, width=1)
    route = _route(workload, plans[0])
    if route is None and engine == "stacked":
        raise InvalidInputError(
            f"workload {workload.name!r} with engine='stacked'",
            "a model that can be stacked is required: parameters only, all trained, no random"
            " numbers in its steps",
            "use engine='auto'",
        )
    if route is None:
        return Choice(route=None, width=1)
    fits = capacity // (threads * route.bytes_per_trial(plans[0].recipe.batch_size))
    widest = max(1, min(fits, -(-len(plans) // threads)))
    return choose(
        workload, plans, route, feed, evaluator, widest=widest, forced=engine == "stacked"
    )


def _route(workload: Workload, plan: TrialPlan) -> Route | None:
    """Return the fastest sound route; None where there is none, or the search itself fails.

    It runs the workload's code on a few examples and on what stands in for the model. Whether
    that code fails in training is for the trials to tell, which is one of their outcomes.
    """
    try:
        return next(sound_routes(workload, plan), None)
    except InvalidInputError:
        raise
    except Exception:  # noqa: BLE001  the workload's code may raise anything
        return None


def _only_alone(plan: TrialPlan) -> bool:
    """Whether a recipe has keys that stacks do not know."""
    return plan.recipe.clip_norm is not None or plan.recipe.ema_decay is not None


def _stacks(
    workload: Workload,
    trials: Sequence[RunningTrial],
    choice: Choice,
    route: Route,
    feed: Feed,
    evaluator: TrialEvaluator,
) -> Iterator[Slot]:
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
            yield Slot(
                own,
                trial_bytes=size,
                make=partial(Stack, route, workload, feed, evaluator, own),
                again=partial(_again, workload, size),
                width=choice.width,
            )


def _lone(workload: Workload, trial: RunningTrial, size: int, *, isolated: bool) -> Slot:
    make = partial(LoneUnit, workload, trial, isolated=isolated)
    return Slot([trial], trial_bytes=size, make=make)


def _again(workload: Workload, size: int, trial: RunningTrial) -> Slot:
    """Begin a trial anew, one by one."""
    trial.passages = trial.passages.afresh()
    trial.engine, trial.steps = "alone", 0
    return _lone(workload, trial, size, isolated=False)
