"""The first round of a real sweep with the race and without, against the fastest plain loop.

Unlike sweep_speed.py, whose budgets are short, the trials are those that a sweep asks for first:
its grid of rates about the best of the size next to it, its seeds, and its budget (40 passes over
the data; for mnist 240,000 examples, since 60,000 in a first run ended before anything was
hopeless). They are trained in one run: by ``train_trials`` without any early stopping, by
``train_trials`` with the race, and, without the race, by the plain loop in two one-thread workers.
All of them end a trial that reached the target or diverged.

The plain loop trains whole seeds (every rate of each) until a limit of time at each batch size;
the rest is taken to cost as much per trial and to be spread evenly over the workers, which is in
its favour. The answer is compared: tuned steps with the race and without, and, for the sampled
trials, first passages of the plain loop and of the stack.

    python benchmarks/sweep_speed_race.py digits
    python benchmarks/sweep_speed_race.py mnist --data DIR
    python benchmarks/sweep_speed_race.py digits --quick --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sweep_speed import TOLERANCE, numbers, plain, plans_of, prepare

from noisescale.records import TrialPlan, TrialResult, TunedSteps
from noisescale.run.sweep.race import Race
from noisescale.run.sweep.request import Request, make_request
from noisescale.run.sweep.space import coordinate
from noisescale.run.trials import TrialProcesses, train_trials
from noisescale.theory.trial_table import trial_rows
from noisescale.theory.tuned_steps import tuned_steps

SAME = 0.05  # of tuned steps, with the race over without; seeds alone scatter by 4 to 10 %


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload: its grid, its budget and what is claimed of it.

    Attributes:
        batch_sizes: examples per step.
        rates: of the grid.
        seeds: runs of each.
        bounds: least ratio of the plain loop's time to ours, without the race and with it.
        max_steps: budget; None with max_examples None takes the sweep's own.
        max_examples: budget; the more generous of both counts.
    """

    batch_sizes: tuple[int, ...]
    rates: int
    seeds: int
    bounds: tuple[float, float]
    max_steps: int | None = None
    max_examples: int | None = None


CASES = {
    "digits": Case(
        batch_sizes=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        rates=12, seeds=8, bounds=(5.0, 10.0),
    ),
    "mnist": Case(
        batch_sizes=(2, 8, 32, 128, 512), rates=11, seeds=3, bounds=(1.5, 3.0),
        max_steps=400, max_examples=240_000,
    ),
}  # fmt: skip
QUICK = {"batch_sizes": (16, 128), "rates": 8, "seeds": 4}


def timed(plan: TrialPlan) -> tuple[float | None, int, float]:
    """Train one trial by the plain loop; its first passage, steps and seconds."""
    began = time.perf_counter()
    first, steps = plain(plan)
    return first, steps, time.perf_counter() - began


def sampled(
    pool: Any, plans: Sequence[TrialPlan], *, workers: int, seconds: float
) -> tuple[dict[str, float | None], float]:
    """Train whole seeds in the pool until the time is up.

    Returns:
        First passages by the plan's key, and the wall time that all plans would have taken.
    """
    firsts: dict[str, float | None] = {}
    busy, began = 0.0, time.perf_counter()
    for seed in dict.fromkeys(plan.seed for plan in plans):
        own = [plan for plan in plans if plan.seed == seed]
        for plan, (first, _, spent) in zip(own, pool.map(timed, own, chunksize=1), strict=True):
            firsts[plan.key] = first
            busy += spent
        if time.perf_counter() - began > seconds:
            break
    return firsts, busy / workers * len(plans) / len(firsts)


def clocked(
    request: Request, plans: Sequence[TrialPlan], *, race: bool, threads: int, processes: Any
) -> tuple[list[TrialResult], TunedSteps, float]:
    """Train all plans by our engine; results, tuned steps and wall time."""
    judge = Race() if race else None
    began = time.perf_counter()
    results = train_trials(
        request.workload, plans, judge=judge, workers=threads, processes=processes
    )
    seconds = time.perf_counter() - began
    target = request.targets[0]
    return results, tuned_steps(trial_rows(results, target=target), target=target), seconds


def change(one: float | None, other: float | None) -> float:
    """Return the relative difference; infinite where only one of both is known."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(other / one - 1)


def compare(
    request: Request,
    pool: Any,
    plans: Sequence[TrialPlan],
    *,
    threads: int,
    plain_seconds: float,
    processes: Any,
) -> dict[str, Any]:
    """Train the same trials in the three ways and return one row."""
    firsts, plain_time = sampled(pool, plans, workers=threads, seconds=plain_seconds)
    full, answer, full_time = clocked(
        request, plans, race=False, threads=threads, processes=processes
    )
    raced, short_answer, race_time = clocked(
        request, plans, race=True, threads=threads, processes=processes
    )
    ours = {result.plan.key: result.crossings[0].first for result in full}
    both = [abs(math.log(a / b)) for key, a in firsts.items() if a and (b := ours[key])]
    return {
        "batch_size": plans[0].recipe.batch_size,
        "engine": statistics.mode(result.engine for result in full),
        "max_steps": plans[0].max_steps,
        "trials": len(plans),
        "plain_share": len(firsts) / len(plans),
        "plain_seconds": plain_time,
        "full_seconds": full_time,
        "race_seconds": race_time,
        "full_ratio": plain_time / full_time,
        "race_ratio": plain_time / race_time,
        "race_steps_share": sum(r.steps for r in raced) / sum(r.steps for r in full),
        "tuned": answer.steps,
        "tuned_raced": short_answer.steps,
        "log_error": answer.log_error,
        "lr": (answer.optimum or {}).get("lr"),
        "difference": change(answer.steps, short_answer.steps),
        "plain_difference": statistics.median(both) if both else 0.0,
        "plain_reached": sum(first is not None for first in firsts.values()),
        "same_reached": sum(ours[key] is not None for key in firsts),
    }


def speed(name: str, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Go through the batch sizes, each grid about the best of the sizes before."""
    request = make_request(
        name, targets=None, batch_sizes=case.batch_sizes, trials=case.rates, seeds=case.seeds,
        search="grid", full=True, over=(), max_steps=case.max_steps,
        max_examples=case.max_examples, seed=0, data=args.data, overrides=None,
    )  # fmt: skip
    print(HEADER.format(name=name, target=request.targets[0], case=case))
    context = multiprocessing.get_context("spawn")
    rows, known = [], {}
    with (
        context.Pool(args.threads, initializer=partial(prepare, name, args.data)) as pool,
        TrialProcesses(request.workload) as ours,
    ):
        processes = None if args.in_threads else ours
        if processes is not None and not processes.start(args.threads):
            print(f"threads train: {processes.refused}")
        pool.map(abs, range(8))  # every worker has imported and read its data
        warm = plans_of(name, request.workload, 8, rates=2, seeds=2, steps=20)
        pool.map(plain, warm)
        train_trials(request.workload, warm, workers=args.threads, processes=processes)
        for batch_size in request.batch_sizes:
            plans = request.tuning(batch_size, known).next_plans({})
            plans.sort(key=lambda plan: (plan.seed, plan.recipe.lr))
            row = compare(
                request, pool, plans, threads=args.threads, plain_seconds=args.plain_seconds,
                processes=processes,
            )  # fmt: skip
            rows.append(row)
            show(row)
            if row["lr"]:
                recipe = request.workload.recipe.with_changes(batch_size=batch_size)
                known[batch_size] = coordinate("lr", row["lr"], recipe)
    return sorted(rows, key=lambda row: row["batch_size"])


HEADER = """{name} to {target}: {case.rates} rates x {case.seeds} seeds at each batch size.
Plain: seconds of all trials, from the share of them (whole seeds) that was trained; `alike`: most
of their first passages are ours. Seconds and ratios: without early stopping, and with the race,
which ran `steps` of the steps. Tuned steps without the race and with it, and standard error."""


def show(row: dict[str, Any]) -> None:
    """Print one batch size."""
    alike = row["plain_difference"] <= TOLERANCE
    print(
        "  B {batch_size:5d}: plain {plain_seconds:7.2f} s (share {plain_share:4.0%}),"
        " full {full_seconds:6.2f} s ({engine}), race {race_seconds:6.2f} s (steps"
        " {race_steps_share:4.0%}); ratios {full_ratio:5.2f}, {race_ratio:5.2f}; tuned".format(
            **row
        ),
        f"{row['tuned'] or math.nan:.1f} and {row['tuned_raced'] or math.nan:.1f}"
        f" ({row['difference']:.1%}; error {row['log_error'] or math.nan:.1%}),"
        f" reached {row['same_reached']} and {row['plain_reached']} of the share,"
        f" {'alike' if alike else 'UNLIKE'}",
        flush=True,
    )


def verdicts(name: str, case: Case, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print what is claimed and whether it holds."""
    theirs = sum(row["plain_seconds"] for row in rows)
    found = []
    for kind, bound in zip(("full", "race"), case.bounds, strict=True):
        ratio = theirs / sum(row[f"{kind}_seconds"] for row in rows)
        found.append({"what": f"{kind}: plain over ours", "value": ratio, "met": ratio >= bound})
        found[-1]["bound"] = bound
        least = min(row[f"{kind}_ratio"] for row in rows)
        print(f"{name}, {kind}: overall {ratio:.2f}, bound {bound:g},", end=" ")
        print(f"{'MET' if found[-1]['met'] else 'MISSED'}; least {least:.2f}")
    worst = max(row["difference"] for row in rows)
    found.append({"what": "same answer", "value": worst, "bound": SAME, "met": worst <= SAME})
    print(f"{name}: tuned steps with the race differ by at most {worst:.1%}, bound {SAME:.0%},"
          f" {'MET' if worst <= SAME else 'MISSED'}")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("workload", choices=sorted(CASES))
    parser.add_argument("--batch-sizes", type=numbers)
    parser.add_argument("--data")
    parser.add_argument(
        "--threads", type=int, default=2, help="ours, and workers of the plain loop"
    )
    parser.add_argument("--in-threads", action="store_true", help="ours in threads")
    parser.add_argument("--plain-seconds", type=float, help="of the plain loop at a batch size")
    parser.add_argument("--quick", action="store_true", help="two batch sizes, fewer trials")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    case = CASES[args.workload]
    if args.quick:
        case = Case(**{**vars(case), **QUICK})
    if args.batch_sizes:
        case = Case(**{**vars(case), "batch_sizes": tuple(args.batch_sizes)})
    if args.plain_seconds is None:
        args.plain_seconds = 3.0 if args.quick else 12.0
    rows = speed(args.workload, case, args)
    found = verdicts(args.workload, case, rows)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "verdicts": found}, indent=1))


if __name__ == "__main__":
    main()
