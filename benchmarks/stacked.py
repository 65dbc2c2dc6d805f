"""Train many trials (rates x seeds) of one batch size as one stacked model, quickly on one core.

The trials of one seed share their initial weights and their order of the data, so the first layer
of all of them is one product: their weights lie side by side along the hidden dimension. Deeper
layers are batched products (MLPs) or grouped convolutions (CNNs). Trials that reached the last
goal, diverged or became hopeless are compacted away, so the work shrinks while it runs.

    python benchmarks/stacked.py --check    stacked == one by one with torch.optim.SGD (float64)
    python benchmarks/stacked.py --speed    seconds per step against the one-by-one loop
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_PIXELS = 1 << 16  # trials x batch x pixels of one grouped convolution, by measurement


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem with a model made of Linear, Conv2d, ReLU, MaxPool2d, Flatten.

    Attributes:
        name: what it is called.
        model: returns a fresh ``nn.Sequential``; the caller seeds torch.
        x_train: training inputs, shape (N, features) or (N, channels, height, width).
        y_train: training classes, shape (N,).
        x_val: validation inputs.
        y_val: validation classes.
    """

    name: str
    model: Callable[[], nn.Sequential]
    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor

    def to(self, dtype: torch.dtype) -> Task:
        """Return the same task with inputs of another precision."""
        return Task(
            name=self.name,
            model=lambda: self.model().to(dtype),
            x_train=self.x_train.to(dtype),
            y_train=self.y_train,
            x_val=self.x_val.to(dtype),
            y_val=self.y_val,
        )


@dataclass(kw_only=True)
class Trial:
    """One training: its rate and seed, and where it first passed each goal.

    Attributes:
        lr: learning rate.
        seed: of the initial weights and of the order of the data.
        passages: steps (interpolated) at the first passage, by goal.
        outcome: ``reached`` (every goal), ``hopeless``, ``diverged`` or ``not_reached``.
        steps: optimizer steps it ran.
    """

    lr: float
    seed: int
    passages: dict[float, float] = field(default_factory=dict)
    outcome: str = "not_reached"
    steps: int = 0


def fresh_model(task: Task, seed: int) -> nn.Sequential:
    """Return the task's model as every trial of this seed starts."""
    torch.manual_seed(seed)
    return task.model()


def epoch_batches(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield index tensors without end, reshuffled every epoch, the partial last one dropped."""
    if not 1 <= batch_size <= size:
        raise SystemExit(f"batch size {batch_size}: must lie in 1..{size} (training examples)")
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    while True:
        order = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def spans(sizes: Sequence[int]) -> list[slice]:
    """Return consecutive slices of the given sizes.

    >>> spans([2, 0, 3])
    [slice(0, 2, None), slice(2, 2, None), slice(2, 5, None)]
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class Stack:
    """Trials sorted by seed; parameter j of all of them is one tensor, shape (trials, ...)."""

    def __init__(self, task: Task, trials: Sequence[Trial], momentum: float) -> None:
        self.task, self.momentum = task, momentum
        self.trials = sorted(trials, key=lambda trial: trial.seed)
        models = {trial.seed: fresh_model(task, trial.seed) for trial in self.trials}
        self.layers = list(next(iter(models.values())))
        own = [[p.detach() for p in models[trial.seed].parameters()] for trial in self.trials]
        self.params = [torch.stack(same) for same in zip(*own, strict=True)]
        self.velocities = [torch.zeros_like(p) for p in self.params] if momentum else []
        self.rates = torch.tensor([t.lr for t in self.trials], dtype=self.params[0].dtype)
        self._group()

    def _group(self) -> None:
        self.seeds = sorted({trial.seed for trial in self.trials})
        counts = [sum(trial.seed == seed for trial in self.trials) for seed in self.seeds]
        self.parts = spans(counts)

    def keep(self, index: Sequence[int]) -> None:
        """Drop all trials but these, and compact the tensors."""
        rows = torch.tensor(index, dtype=torch.long)
        self.trials = [self.trials[i] for i in index]
        self.params = [p[rows] for p in self.params]
        self.velocities = [v[rows] for v in self.velocities]
        self.rates = self.rates[rows]
        self._group()

    def step(self, batches: dict[int, Tensor]) -> None:
        """Take one optimizer step of every trial; ``batches`` holds example indices by seed."""
        raise NotImplementedError

    def logits(self, part: Tensor, x: Tensor) -> Tensor:
        """Return logits of the trials in ``part``, shape (trials, classes, examples)."""
        raise NotImplementedError

    def errors(self, rows: Sequence[int], examples: slice = slice(None)) -> list[float]:
        """Return the validation error of these trials; nan where logits are not finite."""
        x, y = self.task.x_val[examples], self.task.y_val[examples]
        size = max(1, CHUNK_PIXELS // x[:, 0].numel()) if x.dim() == 4 else 32
        found: list[float] = []
        for start in range(0, len(rows), size):
            z = self.logits(torch.tensor(rows[start : start + size]), x)
            wrong = (z.argmax(1) != y).to(z.dtype).mean(1)
            wrong[~torch.isfinite(z).all(2).all(1)] = math.nan
            found += wrong.tolist()
        return found


class DenseStack(Stack):
    """Linear and ReLU alternating, the backward pass written out, layout (trials, features, B)."""

    def logits(self, part: Tensor, x: Tensor) -> Tensor:
        """Return logits of the trials in ``part``, shape (trials, classes, examples)."""
        weight, bias = self.params[0][part], self.params[1][part]
        z = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), x.flatten(1).T)
        h = z.view(*bias.shape, len(x))
        for w, b in zip(self.params[2::2], self.params[3::2], strict=True):
            h = torch.baddbmm(b[part].unsqueeze(2), w[part], h.relu_())
        return h

    def step(self, batches: dict[int, Tensor]) -> None:
        """Take one optimizer step of every trial; ``batches`` holds example indices by seed."""
        weights, biases = self.params[0::2], self.params[1::2]
        inputs = [self.task.x_train[batches[seed]].flatten(1) for seed in self.seeds]
        labels = [self.task.y_train[batches[seed]] for seed in self.seeds]
        B = len(labels[0])
        z = weights[0].new_empty(*biases[0].shape, B)
        for part, x in zip(self.parts, inputs, strict=True):
            flat = z[part].view(-1, B)
            torch.addmm(
                biases[0][part].reshape(-1, 1), weights[0][part].flatten(0, 1), x.T, out=flat
            )
        hidden: list[Tensor] = []
        for w, b in zip(weights[1:], biases[1:], strict=True):
            hidden.append(z.relu_())
            z = torch.baddbmm(b.unsqueeze(2), w, hidden[-1])
        delta = torch.softmax(z, 1)
        for part, y in zip(self.parts, labels, strict=True):
            index = y.expand(part.stop - part.start, 1, B)
            delta[part].scatter_add_(1, index, delta.new_full((1, 1, 1), -1.0).expand_as(index))
        # the velocities carry the rate (u = lr v), which saves one pass over the parameters
        delta *= (self.rates / B)[:, None, None]
        for layer in range(len(weights) - 1, 0, -1):
            below = torch.bmm(weights[layer].transpose(1, 2), delta)
            self._update(
                2 * layer,
                lambda u, beta, alpha, d=delta, h=hidden[layer - 1]: u.baddbmm_(
                    d, h.transpose(1, 2), beta=beta, alpha=alpha
                ),
            )
            self._update(
                2 * layer + 1,
                lambda u, beta, alpha, d=delta: u.mul_(beta).add_(d.sum(2), alpha=alpha),
            )
            delta = below.mul_(hidden[layer - 1] > 0)
        self._update(0, lambda u, beta, alpha: self._first(u, delta, inputs, beta, alpha))
        self._update(1, lambda u, beta, alpha: u.mul_(beta).add_(delta.sum(2), alpha=alpha))

    def _first(
        self, u: Tensor, delta: Tensor, inputs: list[Tensor], beta: float, alpha: float
    ) -> None:
        for part, x in zip(self.parts, inputs, strict=True):
            flat = u[part].view(-1, x.shape[1])
            flat.addmm_(delta[part].flatten(0, 1), x, beta=beta, alpha=alpha)

    def _update(self, j: int, accumulate: Callable[[Tensor, float, float], object]) -> None:
        if not self.momentum:
            accumulate(self.params[j], 1.0, -1.0)
            return
        accumulate(self.velocities[j], self.momentum, 1.0)
        self.params[j] -= self.velocities[j]


class ConvStack(Stack):
    """Convolutions of the trials of one seed as grouped ones along channels, by autograd."""

    def logits(self, part: Tensor, x: Tensor) -> Tensor:
        """Return logits of the trials in ``part``, shape (trials, classes, examples)."""
        with torch.no_grad():
            return self._forward([p[part] for p in self.params], x)

    def _forward(self, params: list[Tensor], x: Tensor) -> Tensor:
        n, rest, h, shared = len(params[0]), iter(params), x, True
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                w, b = next(rest), next(rest)
                h = F.conv2d(
                    h,
                    w.flatten(0, 1),
                    b.flatten(),
                    padding=layer.padding,
                    groups=1 if shared else n,
                )
                shared = False
            elif isinstance(layer, nn.MaxPool2d):
                h = F.max_pool2d(h, layer.kernel_size)
            elif isinstance(layer, nn.Flatten):
                h = h.view(len(x), n, -1).permute(1, 2, 0)
            elif isinstance(layer, nn.Linear):
                w, b = next(rest), next(rest)
                h = torch.baddbmm(b.unsqueeze(2), w, h)
            else:
                h = h.relu()
        return h

    def step(self, batches: dict[int, Tensor]) -> None:
        """Take one optimizer step of every trial; ``batches`` holds example indices by seed."""
        for seed, part in zip(self.seeds, self.parts, strict=True):
            x, y = self.task.x_train[batches[seed]], self.task.y_train[batches[seed]]
            size = max(1, CHUNK_PIXELS // x[:, 0].numel())
            for start in range(part.start, part.stop, size):
                self._step_part(slice(start, min(start + size, part.stop)), x, y)

    def _step_part(self, part: slice, x: Tensor, y: Tensor) -> None:
        params = [p[part].detach().requires_grad_() for p in self.params]
        z = self._forward(params, x)
        loss = F.cross_entropy(z, y.expand(len(z), -1), reduction="sum") / len(y)
        rates = self.rates[part]
        for j, grad in enumerate(torch.autograd.grad(loss, params)):
            move = grad
            if self.momentum:
                move = self.velocities[j][part].mul_(self.momentum).add_(grad)
            self.params[j][part].addcmul_(rates.view(-1, *[1] * (grad.dim() - 1)), move, value=-1)


def make_stack(task: Task, trials: Sequence[Trial], momentum: float) -> Stack:
    """Return the stack that fits the task's layers."""
    convolves = any(isinstance(layer, nn.Conv2d) for layer in task.model())
    return (ConvStack if convolves else DenseStack)(task, trials, momentum)


# --- the slow obvious version, and the check against it -------------------------------------


def train_one(
    task: Task, *, lr: float, momentum: float, batch_size: int, seed: int, steps: int
) -> list[Tensor]:
    """Return the parameters after ``steps`` steps of torch.optim.SGD on one model."""
    model = fresh_model(task, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    order = epoch_batches(len(task.x_train), batch_size, seed)
    for _ in range(steps):
        index = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(task.x_train[index]), task.y_train[index]).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def toy_model(kind: str) -> nn.Sequential:
    """Return a small model of the kinds of layers that stacks know."""
    if kind == "mlp":
        widths = nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4)
        return nn.Sequential(*widths)
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
    last = nn.Linear(45, 4)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last)


def toy_task(kind: str, size: int = 300) -> Task:
    """Return a small random problem in float64 for the check."""
    g = torch.Generator().manual_seed(5)
    shape = (12,) if kind == "mlp" else (2, 6, 6)
    x = torch.randn(size, *shape, generator=g, dtype=torch.float64)
    y = (x.flatten(1)[:, :4]).argmax(1)
    data = {"x_train": x[60:], "y_train": y[60:], "x_val": x[:60], "y_val": y[:60]}
    return Task(name=kind, model=lambda: toy_model(kind), **data).to(torch.float64)


def check(steps: int = 50, tolerance: float = 1e-9) -> bool:
    """Print and return whether stacked training, compacted half-way, equals one by one."""
    fine = True
    for kind in ("mlp", "cnn"):
        for momentum in (0.0, 0.9):
            task = toy_task(kind)
            trials = [Trial(lr=lr, seed=s) for s in (0, 1, 2) for lr in (0.02, 0.05, 0.1)]
            stack = make_stack(task, trials, momentum)
            orders = {s: epoch_batches(len(task.x_train), 17, s) for s in (0, 1, 2)}
            for step in range(steps):
                if step == steps // 2:
                    stack.keep([0, 2, 4, 8])
                stack.step({s: next(orders[s]) for s in stack.seeds})
            worst = 0.0
            for i, trial in enumerate(stack.trials):
                alone = train_one(
                    task,
                    lr=trial.lr,
                    momentum=momentum,
                    batch_size=17,
                    seed=trial.seed,
                    steps=steps,
                )
                pairs = zip(stack.params, alone, strict=True)
                worst = max(worst, *(float((p[i] - a).abs().max()) for p, a in pairs))
            fine &= worst < tolerance
            print(f"{kind} momentum {momentum}: largest difference {worst:.1e} after {steps} steps")
    print("check:", "ok" if fine else "FAILED")
    return fine


def speed() -> None:
    """Print seconds per step and trial, stacked (24 trials) and one by one."""
    for kind, sizes in (("mlp", (8, 32, 128, 512)), ("cnn", (8, 32, 128))):
        task = toy_task(kind, 2000).to(torch.float32)
        for batch_size in sizes:
            trials = [Trial(lr=lr, seed=s) for s in range(4) for lr in (0.01,) * 6]
            stack = make_stack(task, trials, 0.9)
            orders = {s: epoch_batches(len(task.x_train), batch_size, s) for s in range(4)}
            train_one(task, lr=0.01, momentum=0.9, batch_size=batch_size, seed=0, steps=9)
            began = time.perf_counter()
            for _ in range(30):
                stack.step({s: next(orders[s]) for s in range(4)})
            stacked = (time.perf_counter() - began) / 30 / len(trials)
            began = time.perf_counter()
            train_one(task, lr=0.01, momentum=0.9, batch_size=batch_size, seed=0, steps=60)
            alone = (time.perf_counter() - began) / 60
            print(
                f"{kind} B {batch_size}: {1e6 * stacked:.0f} us per step and trial,"
                f" one by one {1e6 * alone:.0f} us, ratio {alone / stacked:.1f}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--speed", action="store_true")
    chosen = parser.parse_args()
    if chosen.speed:
        speed()
    if chosen.check or not chosen.speed:
        sys.exit(0 if check() else 1)
