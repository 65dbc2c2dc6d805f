"""Does the race change the answer? Full curves, judged again with the race and without.

    python benchmarks/race_check.py [--workload digits] [--batch-sizes 8,32,128,512]

Every rate of a grid is trained with every seed in full, no race, and its curve is kept. Then the
same evaluations are played in lockstep to the race, which stops trials as it would have, and
both tables are tuned alike. Shown for each batch size and goal, by first passage and by crossing
for good: tuned steps of both, and the share of the steps that the race ran. With --halves the
race is replayed on every half of the seeds as well.

Fixed before the first full run: every trial of a setting within 1.2 times the best passes where
it did; tuned steps differ by at most a fifth of their own standard error over seeds.
Found in it: the first holds, from a race at 1.3 times the best on; the second does not, because
the smooth model between the settings knows less of a setting that was stopped. The race waits
until 1.6 for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from noisescale.records import TrialOutcome, TrialResult, TunedSteps
from noisescale.run.resolve import resolve_workload
from noisescale.run.sweep.race import Race
from noisescale.run.sweep.request import make_request
from noisescale.run.sweep.standing import standing, steps_of
from noisescale.run.trials import TrialProgress, train_trials
from noisescale.run.trials.passages import Passages
from noisescale.theory.trial_table import trial_rows
from noisescale.theory.tuned_steps import tuned_steps

GOALS = ("validation_error<0.1", "validation_error<0.07", "validation_error<0.05")
NEAR = 1.2
OUT = Path(__file__).parent / "out" / "race_check.json"


@dataclass(kw_only=True)
class Replay:
    """A trial's curve, played again."""

    full: TrialResult
    passages: Passages
    at: int = 0
    result: TrialResult | None = None

    @classmethod
    def of(cls, full: TrialResult) -> Replay:
        """Begin at step 0."""
        return cls(full=full, passages=Passages(full.plan))

    @property
    def due(self) -> int:
        """Step of the next evaluation."""
        return self.full.evaluated_at[self.at] if self.result is None else 2**62

    def advance(self, step: int) -> None:
        """Play the evaluations up to a step; at the curve's end the trial ends as it did."""
        while self.due <= step:
            values = {name: curve[self.at] for name, curve in self.full.values.items()}
            known = {k: math.nan if v is None else v for k, v in values.items()}
            self.passages.note(self.due, known, loss=1.0)
            self.at += 1
            if self.at == len(self.full.evaluated_at):
                self.result = self.full

    def stop(self, step: int) -> None:
        """End it as the race does."""
        self.result = dataclasses.replace(
            self.full,
            outcome=TrialOutcome.NOT_REACHED,
            crossings=self.passages.crossings,
            steps=step,
            stopped_by="race",
        )

    def progress(self) -> TrialProgress:
        """Say how far it is."""
        return TrialProgress(
            key=self.full.plan.key,
            plan=self.full.plan,
            steps=max(self.passages.steps, 0),
            crossings=self.passages.crossings,
            running=self.result is None,
        )


def raced(full: Sequence[TrialResult]) -> list[TrialResult]:
    """Return what the race would have left of full trials."""
    trials, race = [Replay.of(result) for result in full], Race()
    while any(trial.result is None for trial in trials):
        step = min(trial.due for trial in trials)
        for trial in trials:
            trial.advance(step)
        progress = [trial.progress() for trial in trials]
        hopeless = race.hopeless(progress)
        for trial in trials:
            if trial.result is None and trial.full.plan.key in hopeless:
                trial.stop(step)
    return [trial.result for trial in trials if trial.result is not None]


def tuned(results: Sequence[TrialResult], goal: str, crossing: str) -> TunedSteps:
    return tuned_steps(
        trial_rows(results, target=goal, crossing=crossing), target=goal, crossing=crossing
    )


def lost(full: Sequence[TrialResult], left: Sequence[TrialResult], goal: str, kind: str) -> int:
    """Count the trials of near-best settings that no longer pass where they did."""
    after = {result.plan.key: result for result in left}
    settings: dict[float, list[TrialResult]] = {}
    for result in full:
        settings.setdefault(result.plan.recipe.lr, []).append(result)
    scores = {lr: standing(of, goal, kind).steps for lr, of in settings.items()}
    near = [lr for lr, steps in scores.items() if steps <= NEAR * min(scores.values()) < math.inf]
    return sum(
        steps_of(result, goal, kind) != steps_of(after[result.plan.key], goal, kind)
        for lr in near
        for result in settings[lr]
    )


def compare(full: Sequence[TrialResult], left: Sequence[TrialResult]) -> list[dict]:
    """Return one row for each goal and kind of crossing."""
    rows = []
    for goal in GOALS:
        for crossing in ("first", "sustained"):
            one, other = tuned(full, goal, crossing), tuned(left, goal, crossing)
            if one.steps is None or other.steps is None:
                fine = one.steps == other.steps
                shift = None
            else:
                shift = math.log(other.steps / one.steps)
                fine = abs(shift) <= 0.2 * (one.log_error or math.inf)
            rows.append(
                {
                    "batch_size": one.batch_size,
                    "goal": goal,
                    "crossing": crossing,
                    "full": one.steps,
                    "raced": other.steps,
                    "log_shift": shift,
                    "log_error": one.log_error,
                    "fine": fine,
                    "lost": lost(full, left, goal, crossing),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", default="digits")
    parser.add_argument("--data")
    parser.add_argument("--batch-sizes", default="8,32,128,512")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--max-examples", type=int, default=60_000)
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    workload = resolve_workload(a.workload, data=a.data)
    request = make_request(
        workload, targets=GOALS, batch_sizes=a.batch_sizes, trials=a.trials, seeds=a.seeds,
        search="grid", full=True, over=(), max_steps=a.max_steps, max_examples=a.max_examples,
        seed=0, data=a.data, overrides=None,
    )  # fmt: skip
    rows, known = [], {}
    for batch_size in request.batch_sizes:
        tuning = request.tuning(batch_size, known)
        began = time.perf_counter()
        full = train_trials(request.workload, tuning.next_plans({}), keep_curves=True)
        known[batch_size] = tuned(full, GOALS[-1], "first").best["lr"] / batch_size
        left = raced(full)
        ran = sum(r.steps for r in left) / sum(r.steps for r in full)
        took = time.perf_counter() - began
        print(f"B {batch_size}: {len(full)} trials, {took:.0f} s; the race runs {ran:.0%} of steps")
        found = compare(full, left)
        if a.halves:
            for parity in (0, 1):
                half = [r for r in full if r.plan.seed % 2 == parity]
                found += compare(half, raced(half))
        for row in found:
            flag = "" if row["fine"] else "  <-- differs"
            flag += f"  <-- {row['lost']} trials near the best lost" if row["lost"] else ""
            full_steps, raced_steps = row["full"] or math.nan, row["raced"] or math.nan
            print(
                f"  {row['goal']} {row['crossing']:9}: {full_steps:8.1f} in full,"
                f" {raced_steps:8.1f} raced, error {100 * (row['log_error'] or 0):.1f} %{flag}"
            )
        rows += [{**row, "share": ran} for row in found]
    fine = sum(row["fine"] for row in rows)
    print(f"{sum(row['lost'] for row in rows)} trials near the best lost by the race")
    print(f"{fine} of {len(rows)} tuned points unchanged within a fifth of their error")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
