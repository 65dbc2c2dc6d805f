"""Which examples of a step give the norm under Adam: all, or a few drawn by their gradients' size?

    OMP_NUM_THREADS=1 python benchmarks/adam_draws.py [--workload digits] [--steps 300]

One training with several meters on it, so that all see the same steps: every example's square
(`all`), and some of them per layer, drawn with chances in proportion to a bound on their gradients
(`sized`) or uniformly (`uniform`); a quarter of the number where examples have several positions.
Printed: quantiles over the steps of |tr(Sigma) / that of all - 1|, which is what the draw adds; and
per window of 100 steps how many noise scales are not determined, and the mean of log(high / low)
of those that are.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from noisescale import NoiseMeter, Outcome
from noisescale.measure import preconditioned
from noisescale.measure.preconditioned import AdamNorm
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import train_run

WINDOW, SKIP = 100, 20
FEW = (16, 32, 64, 128)


class Watch:
    """Keeps several meters on a run."""

    def __init__(self, meters: dict[str, NoiseMeter]) -> None:
        self.meters = meters

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for meter in self.meters.values():
            meter.detach()

    def before_step(self, step: int, batch: object) -> None:
        """Nothing to do."""

    def after_step(self, step: int, loss: float) -> None:
        """Nothing to do."""


class Uniform(preconditioned.AdamMetric):
    """The same norm with the same chance for every example."""

    def sample(self, calls):  # type: ignore[no-untyped-def]
        """Draw with equal chances."""
        most, size = self.norm.at_most, calls[0].size
        several = any(g.dim() > 2 for call in calls for g in call.gradients)
        most = most // preconditioned.DEAR if several else most
        if size <= most:
            return None
        start = float(torch.rand((), generator=self._generator))
        order = torch.randperm(size, generator=self._generator)
        drawn = preconditioned.draw(torch.ones(size), most, start)
        return type(drawn)(order[drawn.examples], drawn.scale)


def meter(model, optimizer, most: int | None, uniform: bool) -> NoiseMeter:  # type: ignore[no-untyped-def]
    kind = preconditioned.AdamMetric
    preconditioned.AdamMetric = Uniform if uniform else kind  # type: ignore[misc]
    try:
        norm = AdamNorm(at_most=most, seed=7)
        return NoiseMeter(model, optimizer, preconditioner=norm)
    finally:
        preconditioned.AdamMetric = kind  # type: ignore[misc]


def run(arguments: argparse.Namespace, seed: int) -> dict[str, NoiseMeter]:
    """Train once with every meter."""
    workload = resolve_workload(arguments.workload)
    recipe = workload.recipe.with_changes(
        optimizer="adamw", lr=arguments.lr, momentum=None, batch_size=arguments.batch_size
    )
    meters: dict[str, NoiseMeter] = {}

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Watch:
        meters["all"] = meter(model, optimizer, None, False)
        for few in FEW:
            meters[f"sized {few}"] = meter(model, optimizer, few, False)
            meters[f"uniform {few}"] = meter(model, optimizer, few, True)
        return Watch(meters)

    train_run(workload, recipe=recipe, seed=seed, max_steps=arguments.steps + SKIP, watch=watch)
    return meters


def figures(runs: list[dict[str, NoiseMeter]], name: str) -> dict[str, float]:
    """What the draw adds per step, and what windows say."""
    added, widths, undetermined, windows = [], [], 0, 0
    for r in runs:
        own, whole = (r[key].history.trace_cov[SKIP:] for key in (name, "all"))
        added.append(np.abs(own / whole - 1))
        for first in range(SKIP, r[name].steps - WINDOW + 1, WINDOW):
            record = r[name].estimate(first=first, last=first + WINDOW)
            windows += 1
            if record.outcome is Outcome.DETERMINED and record.low:
                widths.append(math.log(record.high / record.low))
            else:
                undetermined += 1
    q50, q90, q99 = np.quantile(np.concatenate(added), [0.5, 0.9, 0.99])
    return {
        "added_50": float(q50),
        "added_90": float(q90),
        "added_99": float(q99),
        "windows": windows,
        "undetermined": undetermined,
        "log_width": float(np.mean(widths)) if widths else math.nan,
    }


def main() -> None:
    """Train, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", default="digits")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/adam_draws.json"))
    arguments = parser.parse_args()
    runs = [run(arguments, seed) for seed in range(arguments.seeds)]
    rows = {name: figures(runs, name) for name in runs[0]}
    print(f"{'examples':12}{'50 %':>8}{'90 %':>8}{'99 %':>8}  undetermined  log width")
    for name, row in rows.items():
        print(
            f"{name:12}{row['added_50']:8.3f}{row['added_90']:8.3f}{row['added_99']:8.3f}"
            f"{row['undetermined']:8d} of {row['windows']:<4d}{row['log_width']:8.2f}"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(vars(arguments) | {"rows": rows}, indent=1, default=str))


if __name__ == "__main__":
    main()
