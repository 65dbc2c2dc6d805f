"""The constants of the noise-aware rule, fitted on digits: how its conversions do with others.

    python benchmarks/training_regret.py digits      (tunes and measures: must have run)
    python benchmarks/regret_constants.py [digits] [--optimizer sgd] [--data DIR]

The rule with other constants: the noise scale times FACTOR, and a cap at BEYOND times the stability
limit of the curvature's upper quantile. Cases and regrets are those of training_regret.py. What is
printed for digits chose the constants in theory/scaling; for mnist it is no fresh test of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from regret_cases import BOUNDS, LARGEST_FACTOR, OLD_SIZES, PROBLEMS
from training_regret import OUT, Tuned, measured, plans_of, steps_of, train, tune

from noisescale.records import Recipe, TrialPlan
from noisescale.run.store import TrialStore
from noisescale.run.sweep.identity import fingerprint
from noisescale.theory.scaling.rule import Facts
from noisescale.theory.scaling.stability import noise_factor, rate_limit

TRIED = {
    "sgd": [(1, b) for b in (1, 1.25, 1.5, 1.75, 2, math.inf)],
    "momentum": [(f, 1) for f in (1, 2, 4, 8)] + [(4, 2), (4, math.inf)],
    "adamw": [(f, math.inf) for f in (1, 2, 4, 8)],
}
"""(FACTOR, BEYOND) by optimizer."""


def converted(old: Recipe, size: int, facts: Facts, factor: float, beyond: float) -> Recipe:
    """Restate the rate by the rule with these constants."""
    assert facts.noise_scale is not None
    gain = noise_factor(
        noise_scale=factor * facts.noise_scale, old=old.batch_size, new=size
    )  # fmt: skip
    gain = math.sqrt(gain) if old.optimizer == "adamw" else gain
    lr = old.lr * gain
    if gain > 1 and math.isfinite(beyond) and facts.curvature is not None:
        limit = rate_limit(old, facts.curvature)
        lr = lr if limit is None else min(lr, max(beyond * limit, old.lr))
    return old.with_changes(batch_size=size, lr=float(f"{lr:.6g}"))


def cases(tuned: list[Tuned]) -> list[tuple[Tuned, Tuned]]:
    """Pairs of where a conversion starts and what is tuned where it ends."""
    return [
        (old, there)
        for old in tuned
        for there in tuned
        if old.recipe.batch_size in OLD_SIZES
        and there.goal == old.goal
        and there is not old
        and abs(math.log2(there.recipe.batch_size / old.recipe.batch_size))
        <= math.log2(LARGEST_FACTOR)
    ]


def judge(name: str, optimizer: str, data: Path | None) -> None:
    """Train every case with every pair of constants, and print a line for each."""
    workload, tuned = tune(name, optimizer, data)
    kept, mark, seeds = (
        OUT / f"{name}-{optimizer}-facts.json",
        fingerprint(workload),
        PROBLEMS[name],
    )
    store = TrialStore.open(OUT / f"{name}-{optimizer}-variants", workload=mark)
    pairs = cases(tuned)
    facts = {old: measured(workload, old, kept) for old, _ in pairs}
    trials: dict[tuple[float, float], list[tuple[Tuned, list[TrialPlan]]]] = {}
    for factor, beyond in TRIED[optimizer]:
        trials[factor, beyond] = [
            (there, plans_of(mark, converted(
                old.recipe, there.recipe.batch_size, facts[old], factor, beyond
            ), there, seeds.seeds))
            for old, there in pairs
        ]  # fmt: skip
    plans = {p.key: p for rows in trials.values() for _, group in rows for p in group}
    done = train(workload, plans, store)
    most, _ = BOUNDS[optimizer]
    print(f"{name}, {optimizer}: share within {most:g}, median, worst")
    for (factor, beyond), rows in trials.items():
        regrets = [
            statistics.median(steps_of([done[p.key] for p in group])) / there.steps
            for there, group in rows
        ]
        share = sum(regret <= most for regret in regrets) / len(regrets)
        print(f"  factor {factor:g}, cap {beyond:g} limits: {share:.0%},"
              f" {statistics.median(regrets):.2f}, {max(regrets):.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=["digits"], metavar="|".join(PROBLEMS))
    parser.add_argument("--optimizer", nargs="*", choices=list(TRIED), default=list(TRIED))
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    for name in arguments.names:
        for optimizer in arguments.optimizer:
            judge(name, optimizer, arguments.data)


if __name__ == "__main__":
    main()
