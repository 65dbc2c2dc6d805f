"""Tuned steps at every batch size: `noisescale sweep` against Optuna with a pruner, two workers.

Ours is the command as it is: its default grid and scouts, four seeds, race, intervals, the laws
fitted at the end. Optuna's way is written to be fast:

- a trial is sweep_speed.py's plain loop, in two one-thread processes started before the clock, and
  ends at its first passage (ours goes on until it knows whether the target is passed for good);
- the study is in memory: the workers report every evaluation through pipes, no database, no file;
- TPE draws rates from two decades, 0.02 to 2, at every batch size; each is trained with one seed;
- at each batch size it stops at the least of 12, 24 and 48 trials whose best rate is as good as
  ours, as if it knew; then the three more seeds of an answer from four are trained at that rate.

As good: the median steps of fresh seeds, the same ones for both, are at most 5 % more than at our
rate (not timed). Pruners: Optuna's median and successive halving (its first rung at 25 steps: by
default it is at a few, where errors say little), by the error at each evaluation. The bound is for
the faster of those two that are as good in the geometric mean over batch sizes. For information,
`helped`: the median pruner and what a sweep of ours knows, written by hand: rates within four
times what the sizes tuned before suggest, that suggestion first, and every trial beyond the best
one's steps is ended.

    pip install -c constraints.txt optuna==5.0.0
    python benchmarks/sweep_optuna.py
    python benchmarks/sweep_optuna.py --quick --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from sweep_speed import RATES, plain, plans_of, prepare

from noisescale.records import TrialPlan
from noisescale.run.sweep.driver import sweep
from noisescale.run.sweep.request import Request, make_request
from noisescale.run.sweep.space import coordinate
from noisescale.run.trials import train_trials

WORKLOAD = "digits"
TRIALS = (12, 24, 48)
SEEDS = 4
SIDE = 4.0  # of the suggested rate, either way, where Optuna is helped
AS_GOOD = 1.05
BOUND = 5.0
APART = 10  # first seeds of repeats
FRESH = 1000  # first of the seeds that neither way has seen
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "halving": partial(optuna.pruners.SuccessiveHalvingPruner, min_resource=25),
    "helped": optuna.pruners.MedianPruner,
}
OWN = ("median", "halving")


# --- workers ---------------------------------------------------------------------------------


def serve(pipe: Any) -> None:
    """Train the plans that come through the pipe, asking after each evaluation whether to end."""
    prepare(WORKLOAD, None)
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        plan, asks = message

        def pruned(step: int, error: float) -> bool:
            pipe.send((step, error))
            return bool(pipe.recv())

        pipe.send((None, plain(plan, pruned if asks else None)[0]))


class Crew:
    """Processes that train one plan each."""

    def __init__(self, pipes: Sequence[Any]) -> None:
        self.size = len(pipes)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for pipe in pipes:
            self._idle.put(pipe)

    def train(
        self, plan: TrialPlan, pruned: Callable[[int, float], bool] | None = None
    ) -> float | None:
        """Return the first passage; None if there is none or the trial was pruned."""
        pipe = self._idle.get()
        try:
            pipe.send((plan, pruned is not None))
            while True:
                step, value = pipe.recv()
                if step is None:
                    return value
                pipe.send(pruned is not None and pruned(step, value))
        finally:
            self._idle.put(pipe)

    def all(self, plans: Sequence[TrialPlan]) -> list[float | None]:
        """Train plans side by side."""
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(self.train, plans))


@contextmanager
def crew_of(workers: int) -> Iterator[Crew]:
    """Start the processes and wait until they can train."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=serve, args=(theirs,)) for _, theirs in pairs]
    for process in processes:
        process.start()
    for ours, _ in pairs:
        ours.recv()
    try:
        yield Crew([ours for ours, _ in pairs])
    finally:
        for ours, _ in pairs:
            ours.send(None)
        for process in processes:
            process.join()


# --- Optuna ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Study:
    """Optuna's search at one batch size.

    Attributes:
        crew: trains.
        like: a plan of the batch size, at the rate that the sizes before suggest.
        pruner: one of :data:`PRUNERS`.
        best: fewest steps so far.
    """

    crew: Crew
    like: TrialPlan
    pruner: str
    best: float = math.inf

    def __post_init__(self) -> None:
        """Make the study."""
        seed = 10_000 * self.like.seed + self.like.recipe.batch_size
        sampler = optuna.samplers.TPESampler(seed=seed)
        self.study = optuna.create_study(sampler=sampler, pruner=PRUNERS[self.pruner]())
        self.helped = self.pruner == "helped"
        self.box = RATES[WORKLOAD]
        if self.helped:
            middle = self.like.recipe.lr
            self.box = (middle / SIDE, middle * SIDE)
            self.study.enqueue_trial({"lr": middle})

    def search(self, trials: int) -> None:
        """Run more trials until there are so many."""
        more = trials - sum(trial.state.is_finished() for trial in self.study.trials)
        self.study.optimize(self._objective, n_trials=more, n_jobs=self.crew.size)

    @property
    def lr(self) -> float | None:
        """The best trial's rate; None if no trial passed the target."""
        return None if math.isinf(self.best) else float(self.study.best_params["lr"])

    def _objective(self, trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", *self.box, log=True)
        ended = False

        def pruned(step: int, error: float) -> bool:
            nonlocal ended
            trial.report(error, step)
            late = self.helped and step > self.best
            ended = late or trial.should_prune()
            return ended

        first = self.crew.train(at_rate(self.like, lr), pruned)
        if ended or first is None:
            raise optuna.TrialPruned
        self.best = min(self.best, first)
        return first


def at_rate(plan: TrialPlan, lr: float, *, seed: int | None = None) -> TrialPlan:
    """Return the plan at another rate and with another seed."""
    seed = plan.seed if seed is None else seed
    return replace(plan, recipe=plan.recipe.with_changes(lr=lr), seed=seed, order_seed=seed)


def fresh_median(request: Request, like: TrialPlan, lr: float | None, seeds: int) -> float:
    """Return the median steps of seeds that no search has seen; infinite without a rate."""
    if lr is None:
        return math.inf
    plans = [at_rate(like, lr, seed=FRESH + i) for i in range(seeds)]
    firsts = [result.crossings[0].first for result in train_trials(request.workload, plans)]
    return statistics.median(math.inf if first is None else first for first in firsts)


def first_plan(request: Request, batch_size: int, known: dict[int, float]) -> TrialPlan:
    """Return a plan at the rate that the sizes known so far suggest; it ends at the target."""
    tuning = request.tuning(batch_size, known)
    plan = tuning.plan({"lr": tuning.centre}, 0)
    return replace(plan, hold=1)


def theirs(
    request: Request, crew: Crew, pruner: str, goals: dict[int, float], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Tune every batch size by Optuna, each until it is as good as ours; one row for each."""
    rows, known = [], {}
    for batch_size in request.batch_sizes:
        like = first_plan(request, batch_size, known)
        study, seconds = Study(crew=crew, like=like, pruner=pruner), 0.0
        for trials in TRIALS:
            began = time.perf_counter()
            study.search(trials)
            seconds += time.perf_counter() - began
            steps = fresh_median(request, like, study.lr, args.fresh)
            if steps <= AS_GOOD * goals[batch_size]:
                break
        began = time.perf_counter()
        if study.lr is not None:
            # The search trained one seed at this rate.
            others = range(like.seed + 1, like.seed + SEEDS)
            crew.all([at_rate(like, study.lr, seed=seed) for seed in others])
            recipe = request.workload.recipe.with_changes(batch_size=batch_size)
            known[batch_size] = coordinate("lr", study.lr, recipe)
        rows.append({
            "repeat": request.seed // APART, "batch_size": batch_size, "trials": trials,
            "lr": study.lr, "fresh_steps": steps, "our_fresh_steps": goals[batch_size],
            "as_good": steps <= AS_GOOD * goals[batch_size], "search_seconds": seconds,
            "seconds": seconds + time.perf_counter() - began,
            "pruned": sum(t.state.name == "PRUNED" for t in study.study.trials),
        })  # fmt: skip
        show(pruner, rows[-1], goals[batch_size])
    return rows


def show(pruner: str, row: dict[str, Any], goal: float) -> None:
    """Print one batch size."""
    print(
        f"  {pruner:8} B {row['batch_size']:5d}: {row['seconds']:6.2f} s, {row['trials']} trials"
        f" ({row['pruned']} pruned), lr {row['lr'] or math.nan:.3g}, fresh seeds"
        f" {row['fresh_steps']:.1f} steps to ours {goal:.1f}"
        f"{'' if row['as_good'] else '  <-- not as good'}",
        flush=True,
    )


# --- ours, and both --------------------------------------------------------------------------


def ours(
    request: Request, sizes: str, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], float]:
    """Run the sweep, its store included; one row for each batch size, and seconds."""
    torch.set_num_threads(args.threads)
    train_trials(
        request.workload, plans_of(WORKLOAD, request.workload, 8, rates=2, seeds=2, steps=20)
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = sweep(
            WORKLOAD, batch_sizes=sizes, seeds=SEEDS, seed=request.seed, store=Path(folder) / "a"
        )
        seconds = time.perf_counter() - began
    rows = []
    for row in result.batch_sizes:
        like, lr = first_plan(request, row.batch_size, {}), row.best.get("lr")
        steps = fresh_median(request, like, lr, args.fresh)
        rows.append({
            "repeat": request.seed // APART, "batch_size": row.batch_size, "trials": row.trials,
            "steps": row.steps,
            "low": row.low, "high": row.high, "lr": lr, "fresh_steps": steps,
        })  # fmt: skip
        print(f"  ours     B {row.batch_size:5d}: {row.trials} trials, lr {lr or math.nan:.3g},"
              f" tuned {row.steps or math.nan:.1f} steps, fresh seeds {steps:.1f}")  # fmt: skip
    print(f"  ours: {seconds:.2f} s in all, {result.trials} trials", flush=True)
    return rows, seconds


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Print the ratios and whether the bound is met by the faster of Optuna's own pruners."""
    seconds = sum(found["our_seconds"])
    ways = {}
    for pruner, rows in found["optuna"].items():
        logs = [math.log(row["fresh_steps"] / row["our_fresh_steps"]) for row in rows]
        ways[pruner] = {
            "ratio": sum(row["seconds"] for row in rows) / seconds,
            "search_ratio": sum(row["search_seconds"] for row in rows) / seconds,
            "quality": math.exp(statistics.fmean(logs)),
        }
        good = sum(row["as_good"] for row in rows)
        print("Optuna, {0}: {1:.2f} s, {ratio:.2f} times ours ({search_ratio:.2f} without the four"
              " seeds); steps {quality:.3f} times ours, as good at {2} of {3} batch sizes".format(
                  pruner, ways[pruner]["ratio"] * seconds, good, len(rows), **ways[pruner]
              ))  # fmt: skip
    own = {pruner: way for pruner, way in ways.items() if pruner in OWN}
    alike = [way["ratio"] for way in own.values() if way["quality"] <= AS_GOOD]
    verdict: dict[str, Any] = {"bound": BOUND, "ways": ways, "ratio": min(alike, default=None)}
    if alike:
        verdict["met"] = min(alike) >= BOUND
        print(f"the same quality by Optuna takes {min(alike):.2f} times as long, bound {BOUND:g}:"
              f" {'MET' if verdict['met'] else 'MISSED'}")  # fmt: skip
    else:
        print("no pruner of Optuna's was as good: no verdict")
    return verdict


def once(
    repeat: int, sizes: str, crew: Crew, args: argparse.Namespace, found: dict[str, Any]
) -> None:
    """Go both ways with the seeds of one repeat."""
    request = make_request(
        WORKLOAD, targets=None, batch_sizes=sizes, trials=None, seeds=SEEDS, search="grid",
        full=False, over=(), max_steps=None, max_examples=None, seed=APART * repeat, data=None,
        overrides=None,
    )  # fmt: skip
    if repeat == 0:
        warm = first_plan(request, request.batch_sizes[0], {})
        crew.all([replace(warm, max_steps=20)] * args.threads)
    rows, seconds = ours(request, sizes, args)
    found["ours"] += rows
    found["our_seconds"].append(seconds)
    goals = {row["batch_size"]: row["fresh_steps"] for row in rows}
    torch.set_num_threads(1)
    for pruner in args.pruners.split(","):
        rows = theirs(request, crew, pruner, goals, args)
        found["optuna"].setdefault(pruner, []).extend(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-sizes")
    parser.add_argument("--pruners", default=",".join(PRUNERS), help="with commas between")
    parser.add_argument("--threads", type=int, default=2, help="ours, and workers of Optuna")
    parser.add_argument("--fresh", type=int, default=64, help="fresh seeds to compare rates by")
    parser.add_argument("--quick", action="store_true", help="two batch sizes, once")
    parser.add_argument("--repeats", type=int, help="2; with --quick 1")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.repeats = args.repeats or (1 if args.quick else 2)
    sizes = args.batch_sizes or ("16,128" if args.quick else "2:1024")
    print(f"{WORKLOAD}, batch sizes {sizes}, median of {SEEDS} seeds; rates compared by"
          f" {args.fresh} fresh seeds; {args.repeats} times over, with other seeds")  # fmt: skip
    found: dict[str, Any] = {"ours": [], "our_seconds": [], "optuna": {}}
    with crew_of(args.threads) as crew:
        for repeat in range(args.repeats):
            once(repeat, sizes, crew, args, found)
    found["verdict"] = judged(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
