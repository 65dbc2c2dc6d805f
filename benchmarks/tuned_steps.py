"""Steps to a validation error with the rate tuned at every batch size: the ground truth.

Each batch size gets its own grid of constant learning rates, widened while the best one sits on
an edge; every rate is run with several seeds, and the best rate's steps count. This is what
`noisescale advise` predicts and is judged against.

    python benchmarks/tuned_steps.py digits --optimizer sgd --batch-sizes 8,32,128
    python benchmarks/tuned_steps.py mnist --optimizer momentum --goals 0.1,0.05 --data DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

import torch
from racing import race
from stacked import Task, Trial
from tuning_tasks import SPECS, load_task

MOMENTUM = {"sgd": 0.0, "momentum": 0.9}
FACTOR = 1.6  # between neighbouring rates of the grid
RATES = 5  # of the first grid at a batch size, centred on what the one before found best
WIDENINGS = 5  # at most, two rates beyond the edge each
SCOUTS = 2  # seeds that look for the best rate; the others run it and its neighbours
FILLS = 3  # rounds of that: the best of all seeds may lie beside the scouts' best
SCOUT_SLACK = 1.3  # the scouts' best may have been lucky by this factor
RATE_EXPONENT = 0.75  # first guess of the best rate at the next batch size: B ** this


@dataclass(frozen=True, kw_only=True)
class TunedPoint:
    """The best rate's steps to one goal at one batch size.

    Attributes:
        batch_size: examples per step.
        goal: validation error to get below.
        lr: the best rate; None when no rate got there with most seeds.
        steps: geometric mean over seeds (the median where a seed never got there).
        log_se: standard error of ln(steps) over seeds; None without two of them.
        seeds: number of seeds that got there at the best rate.
        outcome: ``reached``, ``edge`` (the best rate is at the grid's edge) or ``not_reached``.
        rates: rates tried, and the mean steps of each (None: not reached by most seeds).
    """

    batch_size: int
    goal: float
    lr: float | None
    steps: float | None
    log_se: float | None
    seeds: int
    outcome: str
    rates: dict[str, float | None]


def mean_steps(steps: Sequence[float]) -> float:
    """Return the geometric mean, or the upper median where some are infinite."""
    if math.inf in steps:
        return statistics.median_high(steps)
    return math.exp(statistics.fmean(map(math.log, steps)))


def tuned_point(trials: Sequence[Trial], batch_size: int, goal: float, seeds: int) -> TunedPoint:
    """Return the best rate's steps to the goal; only rates with that many seeds may win."""
    by_rate: dict[float, list[float]] = {}
    for trial in sorted(trials, key=lambda t: t.lr):
        by_rate.setdefault(trial.lr, []).append(trial.passages.get(goal, math.inf))
    score = {lr: mean_steps(s) for lr, s in by_rate.items()}
    tried = {f"{r:.6g}": (round(s, 2) if math.isfinite(s) else None) for r, s in score.items()}
    lr = min((r for r, s in by_rate.items() if len(s) >= seeds), key=score.__getitem__)
    if math.isinf(score[lr]):
        return TunedPoint(
            batch_size=batch_size,
            goal=goal,
            lr=None,
            steps=None,
            log_se=None,
            seeds=0,
            outcome="not_reached",
            rates=tried,
        )
    logs = [math.log(s) for s in by_rate[lr] if math.isfinite(s)]
    se = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
    edge = lr in (min(score), max(score))
    return TunedPoint(
        batch_size=batch_size,
        goal=goal,
        lr=lr,
        steps=score[lr],
        log_se=se,
        seeds=len(logs),
        outcome="edge" if edge else "reached",
        rates=tried,
    )


def missing_rates(points: Sequence[TunedPoint]) -> list[float]:
    """Return two rates beyond each edge of the grid that holds some goal's best."""
    wanted: list[float] = []
    for point in points:
        tried = [float(rate) for rate in point.rates]
        low, high = min(tried), max(tried)
        down = point.lr is None or math.isclose(point.lr, low, rel_tol=1e-4)
        up = point.lr is None or math.isclose(point.lr, high, rel_tol=1e-4)
        wanted += [low / FACTOR, low / FACTOR**2] if down else []
        wanted += [high * FACTOR, high * FACTOR**2] if up else []
    return sorted({float(f"{lr:.6g}") for lr in wanted})


def best_and_neighbours(points: Sequence[TunedPoint]) -> list[float]:
    """Return the best rate of every goal and the rates next to it."""
    chosen: set[float] = set()
    for point in points:
        tried = [float(rate) for rate in point.rates]
        if point.lr is not None:
            at = min(range(len(tried)), key=lambda i: abs(tried[i] - point.lr))
            chosen |= set(tried[max(at - 1, 0) : at + 2])
    return sorted(chosen)


def tune_batch_size(
    task: Task,
    *,
    momentum: float,
    batch_size: int,
    centre: float,
    goals: Sequence[float],
    seeds: int,
    max_examples: int,
    seconds: float,
) -> list[TunedPoint]:
    """Return the tuned point of every goal.

    Two seeds scout a grid that is widened while a best is on its edge; the remaining seeds run
    the best rates and their neighbours.
    """
    rates = [float(f"{centre * FACTOR ** (i - RATES // 2):.6g}") for i in range(RATES)]
    trials: list[Trial] = []
    began = time.process_time()

    def run(rates: Sequence[float], seeds: range, known_best: float) -> None:
        trials.extend(
            race(
                task,
                momentum=momentum,
                batch_size=batch_size,
                rates=rates,
                seeds=seeds,
                goals=goals,
                max_steps=max(50, max_examples // batch_size),
                known_best=known_best,
                seconds=max(seconds - (time.process_time() - began), 1.0),
            )
        )

    known_best = math.inf
    for _ in range(1 + WIDENINGS):
        run(rates, range(min(seeds, SCOUTS)), known_best)
        points = [tuned_point(trials, batch_size, goal, min(seeds, SCOUTS)) for goal in goals]
        known_best = min(
            (p.steps for p in points if p.steps and p.goal == min(goals)), default=math.inf
        )
        rates = missing_rates(points)
        if not rates or time.process_time() - began > seconds:
            break
    for _ in range(FILLS if seeds > SCOUTS else 0):
        done = Counter(trial.lr for trial in trials)
        rest = [lr for lr in best_and_neighbours(points) if done[lr] < seeds]
        beyond = missing_rates(points)
        if not rest + beyond or time.process_time() - began > seconds:
            break
        for rates, first in ((rest, SCOUTS), (beyond, 0)):
            if rates:
                run(rates, range(first, seeds), SCOUT_SLACK * known_best)
        points = [tuned_point(trials, batch_size, goal, seeds) for goal in goals]
    return points


def write_json(path: Path, content: object) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def tune(
    name: str,
    *,
    optimizer: str,
    batch_sizes: Sequence[int] | None = None,
    goals: Sequence[float] | None = None,
    seeds: int | None = None,
    guess: float | None = None,
    seconds_each: float = 120.0,
    data: Path | None = None,
    out: Path | None = None,
    show: Callable[[str], None] = print,
) -> list[TunedPoint]:
    """Return steps to every goal at every batch size with the rate tuned at each.

    Args:
        name: a workload of ``SPECS``.
        optimizer: ``sgd`` or ``momentum`` (0.9).
        batch_sizes: examples per step, ascending; None for the workload's own.
        goals: validation errors; None for the workload's own.
        seeds: number of seeds; None for the workload's own.
        guess: centre of the first grid of rates; None for the workload's own.
        seconds_each: CPU time for one batch size; what is not done then is not reached.
        data: folder of the data files.
        out: JSON file, rewritten after every batch size; what it holds of other batch sizes stays.
        show: takes one line of progress.
    """
    spec, task = SPECS[name], load_task(name, data)
    goals = tuple(goals or spec.goals)
    centre = guess or spec.guess * (0.1 if optimizer == "momentum" else 1.0)
    sizes = sorted(batch_sizes or spec.batch_sizes)
    points: list[TunedPoint] = []
    kept = json.loads(out.read_text())["points"] if out and out.is_file() else []
    kept = [p for p in kept if p["batch_size"] not in sizes]
    before = 0
    for batch_size in sizes:
        began = time.process_time()
        centre *= (batch_size / before) ** RATE_EXPONENT if before else 1.0
        new = tune_batch_size(
            task,
            momentum=MOMENTUM[optimizer],
            batch_size=batch_size,
            centre=centre,
            goals=goals,
            seeds=seeds or spec.seeds,
            max_examples=max(spec.max_examples, 50 * batch_size),
            seconds=seconds_each,
        )
        points += new
        centre, before = next((p.lr for p in reversed(new) if p.lr), centre), batch_size
        for p in new:
            steps = "-" if p.steps is None else f"{p.steps:8.1f} +- {100 * (p.log_se or 0):.0f} %"
            show(
                f"{name} {optimizer} B {batch_size:5d} error<{p.goal}: {steps} steps at lr {p.lr}"
                f" ({p.outcome}, {len(p.rates)} rates, {time.process_time() - began:.1f} s)"
            )
        if out:
            every = sorted(kept + [asdict(p) for p in points], key=itemgetter("batch_size"))
            write_json(out, {"workload": name, "optimizer": optimizer, "points": every})
    return points


def numbers(kind: type) -> Callable[[str], list[float]]:
    """Return a parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("workload", choices=sorted(SPECS))
    parser.add_argument("--optimizer", choices=sorted(MOMENTUM), default="sgd")
    parser.add_argument("--batch-sizes", type=numbers(int))
    parser.add_argument("--goals", type=numbers(float))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--guess", type=float, help="centre of the first grid of rates")
    parser.add_argument("--seconds-each", type=float, default=120.0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    out = a.out or Path(__file__).parent / "out" / f"tuned-{a.workload}-{a.optimizer}.json"
    tune(
        a.workload,
        optimizer=a.optimizer,
        batch_sizes=a.batch_sizes,
        goals=a.goals,
        seeds=a.seeds,
        guess=a.guess,
        seconds_each=a.seconds_each,
        data=a.data,
        out=out,
    )


if __name__ == "__main__":
    main()
