"""Growing the batch in place of decaying the rate: the same accuracy with fewer updates?

    python benchmarks/growing_batch.py [digits] [mnist] [--optimizer sgd momentum] [--data DIR]

A rate that falls by 5 at three milestones (60, 80 and 90 % of the training) against the schedule
that `noisescale.plan.schedule.growth.grow` makes of it: the batch grows by 5 where the rate would
fall, up to a tenth of the training set, and the rate falls from there. Both arms start from the
same weights and see the examples in the same order, seed by seed. A third arm decays the rate
alike and never grows, with other seeds: what two runs of the same differ by.

Fixed before the first run: the final validation accuracies are called the same when the 90 %
interval of their mean difference (paired by seed, Student's t) lies within 0.3 points, that is two
one-sided tests at 5 %; updates saved are to be within 1 % of the plan's.
Source: Smith et al. 2018 (arXiv:1711.00489), secs. 4 and 5.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from noisescale.measure.batches import take
from noisescale.plan.schedule.growth import grow
from noisescale.plan.schedule.rates import step
from noisescale.plan.schedule.sizes import Sizes
from noisescale.records import BatchPiece, BatchSchedule
from noisescale.run.evaluation import Evaluator
from noisescale.run.resolve import resolve_workload
from noisescale.theory.tuned_steps import student
from noisescale.workload import Workload

WITHIN = 0.3
"""Points of accuracy."""

UPDATES_WITHIN = 0.01
MILESTONES = (0.6, 0.8, 0.9)
GAMMA = 0.2
OTHER_SEEDS = 10_000
OUT = Path(__file__).parent / "out" / "growing_batch.json"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One workload.

    Attributes:
        batch_size: at the start.
        epochs: length.
        seeds: pairs of runs.
        lr: by optimizer.
    """

    batch_size: int
    epochs: int
    seeds: int
    lr: dict[str, float]


PROBLEMS = {
    "digits": Problem(batch_size=8, epochs=30, seeds=60, lr={"sgd": 0.2, "momentum": 0.02}),
    "mnist": Problem(batch_size=32, epochs=6, seeds=20, lr={"sgd": 0.2, "momentum": 0.02}),
}
MOMENTUM = {"sgd": 0.0, "momentum": 0.9}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its accuracy in per cent, and its updates."""

    accuracy: float
    updates: int


def examples(size: int, seed: int) -> Iterator[int]:
    """Yield the training examples' indices without end, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def train(workload: Workload, schedule: BatchSchedule, *, momentum: float, seed: int) -> Run:
    """Train by a schedule."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    order, updates = examples(workload.train_size, seed), 0
    for now in schedule.steps():
        batch = take(workload.train, torch.tensor([next(order) for _ in range(now.batch_size)]))
        assert now.lr is not None
        # torch's velocity holds gradients, not displacements: a new rate acts at once.
        optimizer.param_groups[0]["lr"] = now.lr
        optimizer.zero_grad(set_to_none=True)
        workload.loss(model, batch).backward()
        optimizer.step()
        updates += 1
    error = Evaluator(workload, torch.device("cpu")).value(model, "validation", "error")
    return Run(accuracy=100 * (1 - error), updates=updates)


def arms(workload: Workload, problem: Problem, lr: float) -> dict[str, BatchSchedule]:
    """Make the schedules."""
    total = problem.epochs * workload.train_size
    rate = step(lr, milestones=[round(share * total) for share in MILESTONES], gamma=GAMMA)
    limit = Sizes(largest=workload.train_size // 10)
    start = (BatchPiece(start=0, batch_size=problem.batch_size),)
    decayed = BatchSchedule(pieces=start, rate=rate, total=total)
    grown = grow(
        rate, batch_size=problem.batch_size, coupling="linear", total=total, sizes=limit
    )  # fmt: skip
    return {"decay": decayed, "grow": grown, "decay again": decayed}


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of one - other and half the width of its 90 % interval, paired."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps), student(level=0.9, freedom=len(gaps) - 1) * error


def judge(name: str, optimizer: str, data: Path | None) -> dict[str, object]:
    """Run one problem, and print it."""
    problem, workload = PROBLEMS[name], resolve_workload(name, data=data)
    schedules = arms(workload, problem, problem.lr[optimizer])
    sizes = [piece.batch_size for piece in schedules["grow"].pieces]
    print(f"{name}, {optimizer}: batch sizes {sizes}, {problem.seeds} seeds", flush=True)
    runs: dict[str, list[Run]] = {arm: [] for arm in schedules}
    for seed in range(problem.seeds):
        for arm, schedule in schedules.items():
            shift = OTHER_SEEDS if arm == "decay again" else 0
            run = train(workload, schedule, momentum=MOMENTUM[optimizer], seed=seed + shift)
            runs[arm].append(run)
    accuracy = {arm: [run.accuracy for run in done] for arm, done in runs.items()}
    for arm, values in accuracy.items():
        print(f"  {arm:12} accuracy {statistics.fmean(values):.2f} (standard deviation"
              f" {statistics.stdev(values):.2f}), {runs[arm][0].updates} updates")  # fmt: skip
    found = {"accuracy": accuracy, "updates": {arm: done[0].updates for arm, done in runs.items()}}
    for arm in ("grow", "decay again"):
        mean, half = difference(accuracy[arm], accuracy["decay"])
        same = max(abs(mean - half), abs(mean + half)) <= WITHIN
        verdict = ("met" if same else "MISSED") if arm == "grow" else "for comparison"
        print(f"  {arm} - decay: {mean:+.2f} ± {half:.2f} points (within {WITHIN}): {verdict}")
        found[arm] = [mean, half]
    planned = schedules["decay"].updates() - schedules["grow"].updates()
    saved = runs["decay"][0].updates - runs["grow"][0].updates
    close = abs(saved - planned) <= UPDATES_WITHIN * planned
    share = saved / runs["decay"][0].updates
    print(
        f"  updates saved {saved} ({share:.0%}), planned {planned}: {'met' if close else 'MISSED'}"
    )
    return found | {"saved": saved, "planned": planned}


def main() -> None:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=list(PROBLEMS), metavar="|".join(PROBLEMS))
    parser.add_argument("--optimizer", nargs="*", choices=list(MOMENTUM), default=list(MOMENTUM))
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        f"{name}-{optimizer}": judge(name, optimizer, arguments.data)
        for name in arguments.names
        for optimizer in arguments.optimizer
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
