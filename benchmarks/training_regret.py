"""Converted recipes on real training: how many more steps than with the rate tuned there?

    python benchmarks/training_regret.py [digits mnist digits-cnn shakespeare]
        [--optimizer sgd momentum adamw] [--data DIR]

Problems, goals, factors, bounds and exclusions are in regret_cases.py. For each problem and
optimizer: (1) a sweep tunes the rate at every batch size; (2) one run of each tuned recipe
measures noise scale and curvature, as `noisescale measure --curvature` does; (3) every rule of
`noisescale.theory.scaling` converts each tuned recipe to the other sizes, and the converted
recipe trains with the same seeds. Every trial is kept in benchmarks/out/regret: a killed run
goes on. Raw regrets are written to benchmarks/results/training_regret.csv.

Printed for each rule: cases, the share within the bound, the median and the worst regret, cases
that did not reach the goal in four times the tuned steps (with those that diverged), cases
equal to the tuned recipe by an equivalence test; for the recommended rule the verdict.

    python benchmarks/training_regret.py --by-factor

trains nothing: shares by direction and factor over all problems of the raw table, which is what the
rules recommended without a noise scale rest on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regret_cases import (
    BOUNDS,
    EQUAL_WITHIN,
    FACTS_SEED,
    LARGEST_FACTOR,
    OLD_SIZES,
    OPTIMIZERS,
    PATIENCE,
    PROBLEMS,
)
from validated_in_part import validated_in_part

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, Target, TrialOutcome, TrialPlan, TrialResult
from noisescale.run.measuring import measure_run
from noisescale.run.store import TrialStore
from noisescale.run.sweep.driver import sweep
from noisescale.run.sweep.identity import fingerprint
from noisescale.run.trials import train_trials
from noisescale.theory.scaling.registry import recommended, rules_for
from noisescale.theory.scaling.rule import Facts, Rule
from noisescale.theory.tuned_steps import student
from noisescale.workload import Workload

HERE = Path(__file__).parent
OUT, RESULTS = HERE / "out" / "regret", HERE / "results"
RECOMMENDED = "(recommended)"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The tuned recipe at one batch size for one goal.

    Attributes:
        goal: what it was tuned for.
        recipe: with the best rate tried.
        steps: tuned steps.
    """

    goal: str
    recipe: Recipe
    steps: float


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One case under one rule.

    Attributes:
        rule: its name.
        tuned: where it starts.
        there: what is tuned at the new batch size.
        recipe: converted; None where the rule refuses.
        chosen: whether it is the recommended rule.
        why: of a refusal.
    """

    rule: str
    tuned: Tuned
    there: Tuned
    recipe: Recipe | None
    chosen: bool
    why: str = ""


def tune(name: str, optimizer: str, data: Path | None) -> tuple[Workload, list[Tuned]]:
    """Sweep, or read what was swept."""
    problem = PROBLEMS[name]
    overrides = {**OPTIMIZERS[optimizer], "lr": problem.lr[optimizer]}
    workload = validated_in_part(name, data, overrides)
    result = sweep(
        workload,
        targets=list(problem.goals),
        batch_sizes=problem.sizes,
        seeds=problem.seeds,
        store=OUT / f"{name}-{optimizer}",
        **problem.more,
    )
    tuned = [
        Tuned(
            goal=curve.target,
            recipe=workload.recipe.with_changes(batch_size=row.batch_size, lr=row.best["lr"]),
            steps=row.steps,
        )
        for curve in result.curves
        for row in curve.batch_sizes
        if curve.crossing == "first" and row.steps is not None
    ]
    return workload, tuned


def measured(workload: Workload, tuned: Tuned, kept: Path, *, curvature: bool) -> Facts:
    """Measure a tuned recipe once; the file remembers."""
    known = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{tuned.goal} {tuned.recipe.batch_size} {tuned.recipe.lr:g}"
    if key not in known:
        found = measure_run(
            workload,
            recipe=tuned.recipe,
            seed=FACTS_SEED,
            target=Target.parse(tuned.goal),
            max_steps=math.ceil(PATIENCE * tuned.steps),
            curvature=curvature,
        )
        known[key] = {
            "noise_scale": found.noise_scale.b_simple,
            "curvature": None if found.curvature is None else found.curvature.upper,
            "record": None if found.curvature is None else found.curvature.to_dict(),
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=1))
    return Facts(noise_scale=known[key]["noise_scale"], curvature=known[key]["curvature"])


def conversions(tuned: Sequence[Tuned], facts: dict[Tuned, Facts]) -> Iterable[Conversion]:
    """Convert every tuned recipe by every rule."""
    for old in tuned:
        if old.recipe.batch_size not in OLD_SIZES:
            continue
        for there in tuned:
            factor = there.recipe.batch_size / old.recipe.batch_size
            if there.goal == old.goal and factor != 1 and (
                1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR
            ):  # fmt: skip
                best = recommended(old.recipe, there.recipe.batch_size, facts[old])
                for rule in rules_for(old.recipe.optimizer_kind):
                    yield _converted(rule, old, there, facts[old], chosen=rule.name == best.name)


def _converted(rule: Rule, old: Tuned, there: Tuned, facts: Facts, *, chosen: bool) -> Conversion:
    recipe, why = None, ""
    try:
        recipe = rule.scale(old.recipe, there.recipe.batch_size, facts).recipe
    except InvalidInputError as refusal:
        why = str(refusal)
    return Conversion(rule=rule.name, tuned=old, there=there, recipe=recipe, chosen=chosen, why=why)


def plans_of(name: str, recipe: Recipe, there: Tuned, seeds: int) -> list[TrialPlan]:
    """One trial per seed."""
    return [
        TrialPlan(
            workload=name,
            recipe=recipe,
            seed=seed,
            order_seed=seed,
            targets=(there.goal,),
            max_steps=math.ceil(PATIENCE * there.steps),
        )
        for seed in range(seeds)
    ]


def train(
    workload: Workload, plans: dict[str, TrialPlan], store: TrialStore
) -> dict[str, TrialResult]:
    """Train what the store does not hold, one batch size after another."""
    with store.lock():
        done = {result.plan.key: result for result in store.results()}
        missing = defaultdict(list)
        for key, plan in plans.items():
            if key not in done:
                missing[plan.recipe.batch_size, plan.targets].append(plan)
        # The large sizes first: theirs are the shortest runs.
        for (size, goals), todo in sorted(missing.items(), reverse=True):
            print(f"    B {size} {goals[0]}: {len(todo)} trials", flush=True)
            for result in train_trials(workload, todo, on_result=store.append):
                done[result.plan.key] = result
    return done


@dataclass(frozen=True, kw_only=True)
class Regret:
    """One row of the raw table.

    Attributes:
        problem: the workload.
        optimizer: sgd, momentum or adamw.
        goal: the goal.
        rule: the rule's name.
        recommended: whether `recommended` chose it here.
        old_size: batch size of the tuned recipe.
        new_size: converted to.
        lr: the converted rate.
        tuned_lr: the best rate there.
        tuned_steps: tuned steps there.
        steps: median over seeds; infinite where half of them did not reach the goal.
        regret: their ratio.
        diverged: runs that diverged.
        seeds: runs.
        equal: whether the equivalence test calls it equal to the tuned recipe; empty with
            fewer than ten seeds.
        refused: why the rule does not convert; empty where it does.
    """

    problem: str
    optimizer: str
    goal: str
    rule: str
    recommended: bool
    old_size: int
    new_size: int
    lr: float | None
    tuned_lr: float
    tuned_steps: float
    steps: float | None
    regret: float | None
    diverged: int
    seeds: int
    equal: bool | None
    refused: str


def steps_of(results: Sequence[TrialResult]) -> list[float]:
    """Steps of first passage, infinite where there was none."""
    passed = (result.crossings[0].first for result in results)
    return [math.inf if steps is None else steps for steps in passed]


def equal(steps: Sequence[float], tuned: Sequence[float]) -> bool | None:
    """Two one-sided tests at 5 % on the logarithm of the ratio, paired by seed."""
    if len(steps) < 10 or not all(map(math.isfinite, (*steps, *tuned))):
        return None if len(steps) < 10 else False
    ratios = [math.log(a / b) for a, b in zip(steps, tuned, strict=True)]
    mean = statistics.fmean(ratios)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    reach = student(level=0.9, freedom=len(ratios) - 1) * error
    return max(abs(mean - reach), abs(mean + reach)) <= math.log(EQUAL_WITHIN)


def judge(name: str, optimizer: str, data: Path | None) -> list[Regret]:
    """Run one problem with one optimizer."""
    print(f"{name}, {optimizer}", flush=True)
    problem, store_path = PROBLEMS[name], OUT / f"{name}-{optimizer}-converted"
    seeds = problem.seeds
    workload, tuned = tune(name, optimizer, data)
    facts = {
        one: measured(
            workload, one, OUT / f"{name}-{optimizer}-facts.json", curvature=problem.curvature
        )
        for one in tuned
        if one.recipe.batch_size in OLD_SIZES
    }
    for one, fact in facts.items():
        print(f"  {one.goal} B {one.recipe.batch_size} lr {one.recipe.lr:.3g}: {fact}")
    cases = list(conversions(tuned, facts))
    mark = fingerprint(workload)
    wanted = [case.recipe for case in cases if case.recipe is not None]
    trials: dict[tuple[str, Recipe], list[TrialPlan]] = {}
    for case in cases:
        for recipe in (case.recipe, case.there.recipe):
            if recipe is not None:
                key = (case.there.goal, recipe)
                trials.setdefault(key, plans_of(mark, recipe, case.there, seeds))
    print(f"  {len(cases)} conversions, {len(wanted)} not refused, {len(trials)} recipes")
    store = TrialStore.open(store_path, workload=mark)
    plans = {plan.key: plan for group in trials.values() for plan in group}
    done = train(workload, plans, store)

    def results(case: Conversion, recipe: Recipe) -> list[TrialResult]:
        return [done[plan.key] for plan in trials[case.there.goal, recipe]]

    rows = []
    for case in cases:
        row = {
            "problem": name,
            "optimizer": optimizer,
            "goal": case.there.goal,
            "rule": case.rule,
            "recommended": case.chosen,
            "old_size": case.tuned.recipe.batch_size,
            "new_size": case.there.recipe.batch_size,
            "tuned_lr": case.there.recipe.lr,
            "tuned_steps": case.there.steps,
            "seeds": seeds,
            "refused": case.why,
        }
        if case.recipe is None:
            row |= {"lr": None, "steps": None, "regret": None, "diverged": 0, "equal": None}
        else:
            found = results(case, case.recipe)
            steps = steps_of(found)
            middle = statistics.median(steps)
            row |= {
                "lr": case.recipe.lr,
                "steps": middle,
                "regret": middle / case.there.steps,
                "diverged": sum(r.outcome is TrialOutcome.DIVERGED for r in found),
                "equal": equal(steps, steps_of(results(case, case.there.recipe))),
            }
        rows.append(Regret(**row))
    return rows


def show(rows: Sequence[Regret]) -> None:
    """Print the table of one problem and optimizer."""
    first = rows[0]
    most, share = BOUNDS[first.optimizer]
    by_rule = defaultdict(list)
    for row in rows:
        by_rule[row.rule].append(row)
        if row.recommended:
            by_rule[RECOMMENDED].append(row)
    print(f"  {'rule':18}{'cases':>6} {'<=' + format(most, 'g'):>7}{'median':>8}{'worst':>8}"
          f"{'failed':>8}{'diverged':>10}{'equal':>7}{'refused':>9}")  # fmt: skip
    for rule, group in sorted(by_rule.items(), key=lambda pair: pair[0] != RECOMMENDED):
        print(f"  {line(rule, group, most)}")
    chosen = [row.regret for row in by_rule[RECOMMENDED] if row.regret is not None]
    kept = sum(regret <= most for regret in chosen) / len(chosen)
    diverged = sum(2 * row.diverged >= row.seeds for row in by_rule[RECOMMENDED])
    enough = kept >= share and (first.optimizer != "sgd" or not diverged)
    verdict = ("met" if enough else "MISSED") if PROBLEMS[first.problem].judged else "no bound"
    print(f"  recommended within {most:g}: {kept:.0%} (at least {share:.0%}): {verdict}")
    for row in by_rule[RECOMMENDED]:
        if row.regret is not None and row.regret > most:
            print(f"    {row.goal} {row.old_size} -> {row.new_size} by {row.rule}: regret"
                  f" {row.regret:.2f}, lr {row.lr:.3g} (tuned {row.tuned_lr:.3g})")  # fmt: skip


def line(rule: str, rows: Sequence[Regret], most: float) -> str:
    """Lay out one rule."""
    ran = [row for row in rows if row.regret is not None]
    if not ran:
        return f"{rule:18}{0:6}{'':40}{len(rows):9}"
    regrets = [row.regret for row in ran if row.regret is not None]
    within = sum(regret <= most for regret in regrets) / len(regrets)
    failed = sum(math.isinf(regret) for regret in regrets)
    diverged = sum(2 * row.diverged >= row.seeds for row in ran)
    tested = [row.equal for row in ran if row.equal is not None]
    same = f"{sum(tested) / len(tested):.0%}" if tested else "-"
    return (
        f"{rule:18}{len(ran):6} {within:7.0%}{statistics.median(regrets):8.2f}"
        f"{max(regrets):8.2f}{failed:8}{diverged:10}{same:>7}{len(rows) - len(ran):9}"
    )


def write(rows: Sequence[Regret]) -> None:
    """Put these rows into the raw table, in place of older ones of the same problems."""
    path = RESULTS / "training_regret.csv"
    path.parent.mkdir(exist_ok=True)
    fresh = {(row.problem, row.optimizer) for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [
                row for row in csv.DictReader(file)
                if (row["problem"], row["optimizer"]) not in fresh
            ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Regret.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows(_short(asdict(row)) for row in rows)


def by_factor() -> None:
    """Print the raw table's shares by optimizer, rule, direction and factor."""
    groups: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    with (RESULTS / "training_regret.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["regret"]:
                factor = int(row["new_size"]) / int(row["old_size"])
                groups[row["optimizer"], row["rule"], factor].append(float(row["regret"]))
    print("optimizer  rule            factor  cases  <=1.25  <=1.5  median  worst  failed")
    for (optimizer, rule, factor), regrets in sorted(groups.items()):
        within = [sum(regret <= most for regret in regrets) for most in (1.25, 1.5)]
        print(f"{optimizer:11}{rule:15}{factor:7g}{len(regrets):7}{within[0]:8}{within[1]:7}"
              f"{statistics.median(regrets):8.2f}{max(regrets):7.2f}"
              f"{sum(map(math.isinf, regrets)):8}")  # fmt: skip


def _short(row: dict[str, object]) -> dict[str, object]:
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Run, print, write the raw table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=["digits", "mnist"], metavar="|".join(PROBLEMS))
    parser.add_argument("--optimizer", nargs="*", choices=list(OPTIMIZERS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--by-factor", action="store_true", help="only cut the raw table")
    arguments = parser.parse_args()
    if arguments.by_factor:
        by_factor()
        return
    for name in arguments.names:
        for optimizer in arguments.optimizer or OPTIMIZERS:
            if optimizer not in PROBLEMS[name].lr:
                continue
            rows = judge(name, optimizer, arguments.data)
            write(rows)
            show(rows)


if __name__ == "__main__":
    main()
