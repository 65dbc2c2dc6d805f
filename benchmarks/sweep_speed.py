"""Many trials of one batch size: the stacked engine against the fastest plain loop.

The same trials, evaluated equally often and stopped alike, are trained twice in one run: by
``train_trials`` in two processes and by a hand-tuned PyTorch loop, one trial after the other, in
two worker processes. All have one thread and are started before the clock. Both must give the same
answer. ``--in-threads`` trains ours in two threads of one process.

    python benchmarks/sweep_speed.py digits
    python benchmarks/sweep_speed.py mnist --data DIR
    python benchmarks/sweep_speed.py digits-cnn --quick --json out.json
    python benchmarks/sweep_speed.py digits --stacks      trials per second, memory by width
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from noisescale.measure.batches import EpochBatches
from noisescale.records.trial import TrialPlan
from noisescale.run.resolve import resolve_workload
from noisescale.run.trials import TrialProcesses, train_trials
from noisescale.run.trials.passages import Passages

SIZES = {
    "digits": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "digits-cnn": (2, 8, 32, 128, 512),
    "mnist": (2, 8, 32, 128, 512),
}
RATES = {"digits": (0.02, 2.0), "digits-cnn": (0.005, 0.2), "mnist": (0.02, 1.0)}
TOLERANCE = 0.02  # of ln(steps to target), median over trials that both saw reach it


def plans_of(
    name: str, workload: Any, batch_size: int, *, rates: int, seeds: int, steps: int
) -> list[TrialPlan]:
    low, high = RATES[name]
    grid = [low * (high / low) ** (i / max(1, rates - 1)) for i in range(rates)]
    return [
        TrialPlan(
            workload=name,
            recipe=workload.recipe.with_changes(batch_size=batch_size, lr=lr),
            seed=seed,
            order_seed=seed,
            targets=(str(workload.target),),
            max_steps=steps,
        )
        for seed in range(seeds)
        for lr in grid
    ]


# --- the plain loop --------------------------------------------------------------------------

_HELD: dict[str, Any] = {}


def prepare(name: str, data: str | None) -> None:
    torch.set_num_threads(1)
    # As the engine does: a large block freed once makes glibc keep what is freed later.
    torch.empty(31 << 20, dtype=torch.uint8)
    _HELD["workload"] = resolve_workload(name, data=data)
    _HELD["orders"] = OrderedDict()


def order_of(order_seed: int, batch_size: int) -> tuple[EpochBatches, list[torch.Tensor]]:
    """Return a data order and what was drawn of it, kept for the next trial that shares it."""
    key = (order_seed, batch_size)
    orders = _HELD["orders"]
    if key not in orders:
        while len(orders) > 1:
            orders.popitem(last=False)
        generator = torch.Generator().manual_seed(order_seed)
        orders[key] = (EpochBatches(_HELD["workload"].train_size, batch_size, generator), [])
    return orders[key]


def plain(
    plan: TrialPlan, pruned: Callable[[int, float], bool] | None = None
) -> tuple[float | None, int]:
    """Train one trial as fast as plain PyTorch does and return its first passage and steps.

    Args:
        plan: the trial.
        pruned: told the steps and the error of every evaluation; True ends the trial.
    """
    workload, recipe = _HELD["workload"], plan.recipe
    torch.manual_seed(plan.seed)
    model = workload.model()
    params = list(model.parameters())
    weights = [p.detach() for p in params]  # same memory, without autograd
    lr, momentum = recipe.lr, recipe.momentum or 0.0
    velocities = [torch.zeros_like(p) for p in weights] if momentum else []
    (x_train, y_train), (x_val, y_val) = workload.train, workload.evaluate
    batches, order = order_of(plan.order_seed, recipe.batch_size)
    passages = Passages(plan)
    step = 0
    while True:
        with torch.no_grad():
            z = model(x_val)
            error = float((z.argmax(1) != y_val).float().mean())
            passages.note(step, {"validation_error": error}, float(F.cross_entropy(z, y_val)))
        if not passages.goes_on or (pruned is not None and pruned(step, error)):
            return passages.crossings[0].first, step
        while len(order) < passages.next_step:
            order.append(next(batches))
        while step < passages.next_step:
            i = order[step]
            loss = F.cross_entropy(model(x_train[i]), y_train[i])
            grads = torch.autograd.grad(loss, params)
            if momentum:
                torch._foreach_mul_(velocities, momentum)
                torch._foreach_add_(velocities, grads)
                torch._foreach_add_(weights, velocities, alpha=-lr)
            else:
                torch._foreach_add_(weights, grads, alpha=-lr)
            step += 1


# --- the comparison --------------------------------------------------------------------------


def compare(
    name: str,
    workload: Any,
    pool: Any,
    batch_size: int,
    *,
    threads: int,
    processes: Any,
    **grid: int,
) -> dict[str, Any]:
    """Train the same trials both ways and return one row."""
    plans = plans_of(name, workload, batch_size, **grid)
    began = time.perf_counter()
    theirs = pool.map(plain, plans, chunksize=1)
    plain_seconds = time.perf_counter() - began
    began = time.perf_counter()
    results = train_trials(workload, plans, workers=threads, processes=processes)
    ours_seconds = time.perf_counter() - began
    pairs = [(r.crossings[0].first, first) for r, (first, _) in zip(results, theirs, strict=True)]
    both = [abs(math.log(a / b)) for a, b in pairs if a and b]
    return {
        "batch_size": batch_size,
        "engine": statistics.mode(r.engine for r in results),
        "plain_seconds": plain_seconds,
        "seconds": ours_seconds,
        "ratio": plain_seconds / ours_seconds,
        "steps": sum(r.steps for r in results),
        "plain_steps": sum(steps for _, steps in theirs),
        "reached": sum(a is not None for a, _ in pairs),
        "plain_reached": sum(b is not None for _, b in pairs),
        "median_difference": statistics.median(both) if both else 0.0,
    }


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    workload = resolve_workload(args.workload, data=args.data)
    sizes = args.batch_sizes or SIZES[args.workload]
    rates, seeds = (6, 4) if args.quick else (12, 8 if args.workload == "digits" else 3)
    rows = []
    context = multiprocessing.get_context("spawn")
    initialise = partial(prepare, args.workload, args.data)
    with (
        context.Pool(args.threads, initializer=initialise) as pool,
        TrialProcesses(workload) as ours,
    ):
        processes = None if args.in_threads else ours
        if processes is not None and not processes.start(args.threads):
            print(f"threads train: {processes.refused}")
        pool.map(abs, range(8))  # every worker has imported and read its data
        warm = plans_of(args.workload, workload, 8, rates=2, seeds=2, steps=20)
        pool.map(plain, warm)
        train_trials(workload, warm, workers=args.threads, processes=processes)
        for batch_size in sizes:
            most, examples = (300, 10_000) if args.quick else (1500, 40_000)
            steps = max(100, min(most, examples // batch_size))
            row = compare(
                args.workload, workload, pool, batch_size,
                threads=args.threads, processes=processes, rates=rates, seeds=seeds, steps=steps,
            )  # fmt: skip
            rows.append(row)
            same = row["median_difference"] <= TOLERANCE
            print(
                f"B {batch_size:5d}: plain {row['plain_seconds']:7.2f} s, ours"
                f" {row['seconds']:7.2f} s ({row['engine']}), ratio {row['ratio']:5.2f};"
                f" reached {row['reached']} and {row['plain_reached']} of {rates * seeds},"
                f" {'same' if same else 'DIFFERENT'} answer"
                f" (median difference {100 * row['median_difference']:.2f} %)",
                flush=True,
            )
    total = sum(r["plain_seconds"] for r in rows) / sum(r["seconds"] for r in rows)
    print(f"{args.workload}: overall {total:.2f}, least {min(r['ratio'] for r in rows):.2f}")
    return rows


# --- by the number of stacked trials -----------------------------------------------------------


def one_width(name: str, data: str | None, trials: int, queue: Any) -> None:
    torch.set_num_threads(1)
    workload = resolve_workload(name, data=data)
    seeds = max(1, trials // 12)
    warm = plans_of(name, workload, 32, rates=2, seeds=1, steps=5)
    train_trials(workload, warm, workers=1, engine="stacked")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plans = plans_of(name, workload, 32, rates=-(-trials // seeds), seeds=seeds, steps=200)
    began = time.perf_counter()
    train_trials(workload, plans[:trials], workers=1, engine="stacked")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put({
        "trials": trials, "trials_per_second": trials / seconds, "peak_mib": peak / 1024,
        "added_mib": (peak - before) / 1024,
    })  # fmt: skip


def stacks(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    context = multiprocessing.get_context("spawn")
    for trials in (1, 4, 16, 64) if args.quick else (1, 4, 16, 64, 256, 1024):
        queue = context.Queue()
        process = context.Process(target=one_width, args=(args.workload, args.data, trials, queue))
        process.start()
        rows.append(queue.get(timeout=600))
        process.join()
        print("{trials:5d} trials: {trials_per_second:8.2f} a second (200 steps at B 32),"
              " {added_mib:7.1f} MiB more".format(**rows[-1]), flush=True)  # fmt: skip
    return rows


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("workload", choices=sorted(SIZES))
    parser.add_argument("--batch-sizes", type=numbers)
    parser.add_argument("--data")
    parser.add_argument(
        "--threads", type=int, default=2, help="ours, and workers of the plain loop"
    )
    parser.add_argument("--in-threads", action="store_true", help="ours in threads")
    parser.add_argument("--quick", action="store_true", help="fewer trials and steps")
    parser.add_argument("--stacks", action="store_true", help="by the number of stacked trials")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = stacks(args) if args.stacks else speed(args)
    if args.json:
        args.json.write_text(json.dumps({"workload": args.workload, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
