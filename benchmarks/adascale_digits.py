"""Does AdaScale reach the same training loss after the same count of base steps on digits?

    python benchmarks/adascale_digits.py [--seeds 10] [--out FILE.json]

The digits workload (MLP 64-64-10, plain SGD) at the base batch of 32 and its rate, at S = 4, 16
and 64 times the batch with AdaScale and with the rate scaled linearly, examples drawn with
replacement. Every larger batch is made of S micro-batches of 32, whose squared norms give the
moments, as in the paper. Bound, fixed before the first run: the sum of the gains at the target is
within 10 % of the base run's steps, in the median over seeds, for every S. Linear scaling is shown
beside, in steps times S; a run that has not arrived after three times the base run's is "never".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from noisescale.theory.noise_scale import unbiased_moments
from noisescale.train import AdaScale, GradientMoments

BASE, RATE, BOUND = 32, 0.5, 0.1
TARGETS = (0.3, 0.1)
SCALES = (4, 16, 64)
LONGEST = 3


def digits() -> tuple[Tensor, Tensor]:
    """The built-in workload's training examples."""
    pixels, labels = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(labels))[:1437]
    return torch.tensor(pixels[rows] / 16, dtype=torch.float32), torch.tensor(labels[rows])


class Run:
    """One training run; ``clock`` counts base steps."""

    def __init__(self, data: tuple[Tensor, Tensor], scale: int, seed: int, rule: str) -> None:
        torch.manual_seed(seed)
        self.images, self.labels = data
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.draws = torch.Generator().manual_seed(1000 + seed)
        self.scale, self.rule, self.clock, self.steps = scale, rule, 0.0, 0
        rate = RATE * scale if rule == "linear" else RATE
        optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)
        self.controller = AdaScale(optimizer, base_batch_size=BASE, batch_size=BASE * scale)

    def step(self) -> None:
        """Take the gradients of S micro-batches in one pass, and move by their mean."""
        rows = torch.randint(len(self.labels), (self.scale, BASE), generator=self.draws)
        parameters = list(self.model.parameters())
        copies = [p.detach().expand(self.scale, *p.shape).requires_grad_() for p in parameters]
        hidden = torch.baddbmm(copies[1][:, None], self.images[rows], copies[0].mT).relu()
        logits = torch.baddbmm(copies[3][:, None], hidden, copies[2].mT)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), self.labels[rows].flatten())
        gradients = torch.autograd.grad(losses * self.scale, copies)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.mean(0)
        if self.rule == "adascale":
            self.observe(parameters, BASE * sum(float(g.square().sum()) for g in gradients))
        self.controller.step()
        self.steps += 1
        self.clock = self.controller.clock if self.rule == "adascale" else self.steps * self.scale

    def observe(self, parameters: list[nn.Parameter], squares: float) -> None:
        """Hand the step's moments to AdaScale."""
        mean_sq = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
        grad_sq, trace = unbiased_moments(
            units=self.scale, examples=BASE * self.scale, weighted_sq=squares, mean_sq=mean_sq
        )
        self.controller.observe(GradientMoments(trace_cov=float(trace), grad_sq=float(grad_sq)))

    @torch.no_grad()
    def loss(self) -> float:
        """Training loss over all examples."""
        return float(nn.functional.cross_entropy(self.model(self.images), self.labels))

    def until(self, limit: float) -> dict[float, tuple[float, int]]:
        """Base steps and steps at which each target was first met; infinite where never."""
        found: dict[float, tuple[float, int]] = {}
        while len(found) < len(TARGETS) and self.clock < limit:
            self.step()
            loss = self.loss()
            for target in TARGETS:
                if loss <= target and target not in found:
                    found[target] = self.clock, self.steps
        return {target: found.get(target, (math.inf, self.steps)) for target in TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/adascale_digits.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, seeds, rows = digits(), range(arguments.seeds), []
    base = [Run(data, 1, seed, "base").until(math.inf) for seed in seeds]
    longest = LONGEST * max(run[min(TARGETS)][0] for run in base)
    cases = [(rule, scale) for scale in SCALES for rule in ("adascale", "linear")]
    results = {
        case: [Run(data, case[1], s, case[0]).until(longest) for s in seeds] for case in cases
    }
    for target in TARGETS:
        wanted = statistics.median(run[target][0] for run in base)
        print(
            f"training loss {target}: {wanted:.0f} steps at {BASE} (median of {len(seeds)} seeds)"
        )
        for (rule, scale), runs in results.items():
            ratio = statistics.median(run[target][0] for run in runs) / wanted
            steps = statistics.median(run[target][1] for run in runs)
            never = sum(math.isinf(run[target][0]) for run in runs)
            verdict = "MET" if abs(ratio - 1) <= BOUND else "MISSED"
            shown = f"  within {BOUND:.0%}: {verdict}" if rule == "adascale" else ""
            found = f"base steps x {ratio:5.2f}, {steps:5.0f} steps, {never} never"
            print(f"  {rule:8} S {scale:3}: {found}{shown}")
            rows.append(
                {"target": target, "rule": rule, "scale": scale, "runs": runs, "base": base}
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, default=str))


if __name__ == "__main__":
    main()
