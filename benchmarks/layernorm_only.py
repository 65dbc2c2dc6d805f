"""Does the noise scale of the LayerNorms alone follow that of the whole model?

    OMP_NUM_THREADS=1 python benchmarks/layernorm_only.py [--steps 600] [--seeds 3] [--out FILE]

The built-in character GPT is trained by its own recipe with a meter on every step. Each window of
30 steps gives two noise scales, of the LayerNorms' parameters and of all; windows in which one of
them is not positive are counted and left out. Reported over all windows and seeds:

  correlation   Pearson's, of the logarithms
  slope         least squares, whole = a + slope x LayerNorm
  ratio         geometric mean of whole / LayerNorm, and its spread (sd of the logarithm)

Intervals (95 %) by bootstrap over blocks of 4 adjacent windows within a run. Error of the windows'
estimates themselves lowers the correlation and the slope. Also the time of a measured step, with
all parameters and with the LayerNorms alone, over that of a plain one, in one run.

Source: Gray et al. 2024, "Normalization layer per-example gradients are sufficient to predict
gradient noise scale in transformers".
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from noisescale import NoiseMeter
from noisescale.measure.norm_layers import norm_layers
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import train_run

WINDOW, BLOCK, REPEATS = 30, 4, 4000
Pairs = list[tuple[float, float]]


class Watch:
    """Keeps a meter on a run."""

    def __init__(self, meter: NoiseMeter) -> None:
        self.meter = meter

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.detach()

    def before_step(self, step: int, batch: object) -> None:
        """Nothing to do."""

    def after_step(self, step: int, loss: float) -> None:
        """Nothing to do."""


def run(seed: int, steps: int) -> Pairs:
    """Train once: (LayerNorm, whole) per window."""
    workload = resolve_workload("chars")
    meters: list[NoiseMeter] = []

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Watch:
        chosen = norm_layers(model)
        meters.append(
            NoiseMeter(model, optimizer, groups=lambda n: "norm" if chosen(n) else "other")
        )
        return Watch(meters[0])

    train_run(workload, seed=seed, max_steps=steps, watch=watch)
    pairs = []
    for first in range(0, meters[0].steps - WINDOW + 1, WINDOW):
        span = {"first": first, "last": first + WINDOW}
        parts = meters[0].estimate_groups(**span)["norm"], meters[0].estimate(**span)
        pairs.append(tuple((p.trace_cov or 0.0) / (p.grad_sq or np.nan) for p in parts))
    return pairs


def figures(pairs: np.ndarray) -> dict[str, float]:
    """Correlation, slope and ratio of (LayerNorm, whole) pairs."""
    logs = np.log(pairs)
    norm, whole = pairs.T
    gap = logs[:, 1] - logs[:, 0]
    return {
        "correlation": float(np.corrcoef(logs.T)[0, 1]),
        "slope": float(np.polyfit(norm, whole, 1)[0]),
        "ratio": float(np.exp(gap.mean())),
        "spread": float(gap.std(ddof=1)),
    }


def bootstrap(runs: list[np.ndarray]) -> dict[str, list[float]]:
    """95 % intervals over blocks of adjacent windows."""
    rng = np.random.default_rng(0)
    blocks = [r[i : i + BLOCK] for r in runs for i in range(0, len(r) - BLOCK + 1)]
    count = sum(map(len, runs)) // BLOCK
    drawn = [
        figures(np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=count)]))
        for _ in range(REPEATS)
    ]
    return {
        name: [float(q) for q in np.quantile([d[name] for d in drawn], [0.025, 0.975])]
        for name in drawn[0]
    }


def step_times(repeats: int = 60) -> dict[str, float]:
    """Median time of a measured step over a plain one, taken in turn."""
    workload = resolve_workload("chars")
    torch.manual_seed(0)
    models = {name: workload.model() for name in ("plain", "LayerNorm", "whole")}
    meters = {
        "LayerNorm": NoiseMeter(models["LayerNorm"], parameters=norm_layers(models["LayerNorm"])),
        "whole": NoiseMeter(models["whole"]),
    }
    batch = tuple(t[: workload.recipe.batch_size] for t in workload.train)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            model.zero_grad()
            began = time.perf_counter()
            workload.loss(model, batch).backward()
            if name in meters:
                meters[name].close_step()
            times[name].append(time.perf_counter() - began)
    return {
        name: statistics.median(
            a / b for a, b in zip(times[name][5:], times["plain"][5:], strict=True)
        )
        for name in meters
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/layernorm_only.json"))
    arguments = parser.parse_args()
    began = time.perf_counter()
    runs = [np.array(run(seed, arguments.steps)) for seed in range(arguments.seeds)]
    good = [r[(r > 0).all(1)] for r in runs]
    pairs = np.concatenate(good)
    found = {
        "steps": arguments.steps,
        "windows": len(pairs),
        "left_out": sum(map(len, runs)) - len(pairs),
        "figures": figures(pairs),
        "intervals": bootstrap(good),
        "step_time": step_times(),
        "runs": [r.tolist() for r in runs],
        "seconds": time.perf_counter() - began,
    }
    for name, value in found["figures"].items():
        low, high = found["intervals"][name]
        print(f"{name:12} {value:6.3f}  95 % {low:.3f} to {high:.3f}")
    print(f"{found['windows']} windows, {found['left_out']} left out; {found['seconds']:.0f} s")
    for name, value in found["step_time"].items():
        print(f"measured step, {name}: {value:.3f} of a plain one")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
