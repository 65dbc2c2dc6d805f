"""How the best rate follows the number of training examples, at one batch size.

Tunes the digits network on 1/8 to all of its training data and fits log(best rate) against
log N: slope -1 is tau ~ 1/N, slope 0 keeps the rate. Judged by validation loss, at rates that are
held constant and at rates that fall to 0 along the run, after as many epochs and after as many
steps. Then the price of either rule: the rate tuned at one end of N, converted to the other end,
loss over the least loss there.

    python benchmarks/data_size_rates.py [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from noisescale.run.builtins.digits import digits

BATCH = 16
SIZES = (180, 359, 718, 1437)
SEEDS = 6
RATES = {
    "sgd": [0.01 * 2 ** (i / 2) for i in range(17)],
    "momentum": [0.001 * 2 ** (i / 2) for i in range(19)],
    "adam": [1e-4 * 2 ** (i / 2) for i in range(21)],
}
CONSTANT = (3, 10, 30, 100)  # epochs, all read off one run
FALLING = (10, 40)  # epochs, a run each
SAME_STEPS = 900  # 10 epochs of all data, 80 of an eighth


class Stack:
    """One two-layer network for each rate and seed, trained side by side."""

    def __init__(self, optimizer: str, size: int, data: tuple, seed: int) -> None:
        self.optimizer, self.size, self.step = optimizer, size, 0
        self.rates = torch.tensor(RATES[optimizer]).repeat_interleave(SEEDS)
        self.x, self.y, self.vx, self.vy = data
        self.draws = torch.Generator().manual_seed(seed)
        # By seed the same start, subset and order at every rate.
        start = torch.Generator().manual_seed(seed + 1)
        widths = (64, 64, 10)
        self.weights = []
        for fan, out in itertools.pairwise(widths):
            for shape in ((fan, out), (1, out)):
                draw = (torch.rand(SEEDS, *shape, generator=start) * 2 - 1) / math.sqrt(fan)
                self.weights.append(draw.repeat(len(RATES[optimizer]), 1, 1).requires_grad_())
        self.subset = torch.stack(
            [torch.randperm(len(self.x), generator=start)[:size] for _ in range(SEEDS)]
        )
        self.state = [[torch.zeros_like(w), torch.zeros_like(w)] for w in self.weights]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits by network and example."""
        w1, b1, w2, b2 = self.weights
        return torch.relu(x @ w1 + b1) @ w2 + b2

    def train(self, steps: int, falling_over: int | None = None) -> None:
        """Take steps, at rates that fall to 0 over so many if that is given."""
        per_epoch = self.size // BATCH
        for _ in range(steps):
            at = self.step % per_epoch
            if at == 0:
                self.order = torch.stack(
                    [torch.randperm(self.size, generator=self.draws) for _ in range(SEEDS)]
                )
            chosen = self.subset.gather(1, self.order[:, at * BATCH : (at + 1) * BATCH])
            chosen = chosen.repeat(len(self.rates) // SEEDS, 1)
            x, y = self.x[chosen], self.y[chosen]
            losses = torch.nn.functional.cross_entropy(
                self.forward(x).transpose(1, 2), y, reduction="none"
            )
            gradients = torch.autograd.grad(losses.mean(1).sum(), self.weights)
            share = 1.0 if falling_over is None else 1 - self.step / falling_over
            self.step += 1
            self.update(gradients, (self.rates * share)[:, None, None])

    @torch.no_grad()
    def update(self, gradients: tuple, rate: torch.Tensor) -> None:
        """Take one step of the optimizer."""
        for w, g, (first, second) in zip(self.weights, gradients, self.state, strict=True):
            if self.optimizer == "adam":
                first.mul_(0.9).add_(g, alpha=0.1)
                second.mul_(0.999).addcmul_(g, g, value=0.001)
                size = (second / (1 - 0.999**self.step)).sqrt_().add_(1e-8)
                w -= rate / (1 - 0.9**self.step) * first / size
            else:
                first.mul_(0.9 if self.optimizer == "momentum" else 0.0).add_(g)
                w -= rate * first

    @torch.no_grad()
    def losses(self) -> list[float]:
        """Return the validation loss by rate, a mean over seeds in the logarithm."""
        logits = self.forward(self.vx)
        wanted = self.vy.expand(len(self.rates), -1)
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        finite = each.mean(1).nan_to_num(1e3).clamp(1e-9, 1e3)
        return finite.log().view(-1, SEEDS).mean(1).tolist()


def best(rates: list[float], losses: list[float]) -> tuple[float, bool]:
    """Return the rate of the least loss, by a parabola, and whether it lies on an edge."""
    at = int(np.argmin(losses))
    if at in (0, len(losses) - 1):
        return rates[at], True
    left, middle, right = losses[at - 1 : at + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return rates[at] * 2 ** (shift / 2), False


def price(rates: list[float], old: list[float], new: list[float], factor: float) -> float:
    """Return the loss at the old best rate times a factor, over the least loss."""
    rate = np.log(rates[int(np.argmin(old))] * factor)
    return math.exp(float(np.interp(rate, np.log(rates), new)) - min(new))


def measured(optimizer: str, data: tuple) -> dict:
    found: dict[str, dict[int, list[float]]] = {}
    for size in SIZES:
        per_epoch = size // BATCH
        stack = Stack(optimizer, size, data, 0)
        marks = {epochs * per_epoch: f"constant, {epochs} epochs" for epochs in CONSTANT}
        marks[SAME_STEPS] = marks.get(SAME_STEPS, "") + f"|constant, {SAME_STEPS} steps"
        for mark in sorted(marks):
            stack.train(mark - stack.step)
            for name in filter(None, marks[mark].split("|")):
                found.setdefault(name, {})[size] = stack.losses()
        lengths = {f"falling, {epochs} epochs": epochs * per_epoch for epochs in FALLING}
        lengths[f"falling, {SAME_STEPS} steps"] = SAME_STEPS
        for name, steps in lengths.items():
            stack = Stack(optimizer, size, data, 0)
            stack.train(steps, falling_over=steps)
            found.setdefault(name, {})[size] = stack.losses()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    (x, y), (vx, vy) = digits().train, digits().evaluate
    results: dict[str, dict] = {}
    for optimizer, rates in RATES.items():
        print(f"{optimizer}, B {BATCH}: best rate at N = {', '.join(map(str, SIZES))}; slope")
        for name, losses in measured(optimizer, (x, y, vx, vy)).items():
            tops = [best(rates, losses[size]) for size in SIZES]
            slope = np.polyfit(np.log(SIZES), np.log([rate for rate, _ in tops]), 1)[0]
            shown = "  ".join(f"{rate:.3g}{'*' if edge else ''}" for rate, edge in tops)
            least = "  ".join(f"{math.exp(min(losses[size])):.3f}" for size in SIZES)
            ends = (losses[SIZES[0]], losses[SIZES[-1]])
            ratio = SIZES[0] / SIZES[-1]
            prices = {
                f"{rule} {turn}": price(rates, *of, factor)
                for turn, of, step in (("up", ends, ratio), ("down", ends[::-1], 1 / ratio))
                for rule, factor in (("keep-rate", 1.0), ("long-run", step))
            }
            cost = ", ".join(f"{rule} {value:.2f}" for rule, value in prices.items())
            print(f"  {name:21} {shown:32} {slope:+.2f}  loss {least}  {cost}", flush=True)
            results.setdefault(optimizer, {})[name] = {
                "rates": rates, "log_loss": losses, "best": tops, "slope": slope, "price": prices,
            }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
