"""The optimizer factor: critical batch size over the pooled online noise scale.

For workloads other than the ones that `noisescale advise` is judged on: (1) the critical batch
size from steps to target with the rate tuned at each batch size; (2) the noise scale of the tuned
run at a recipe's batch size, pooled up to the same goal (sum over steps of the unbiased trace
over the sum of the unbiased |G|^2). Their ratio, its mean and its spread over workloads is the
factor that turns a measured noise scale into a critical batch size.

    python benchmarks/optimizer_factor.py --data DIR   tune what is missing, print the table
    python benchmarks/optimizer_factor.py --check      closed-form norms against vmap(grad)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from racing import EVALUATE_EVERY
from stacked import Task, epoch_batches, fresh_model, toy_task
from torch import Tensor, nn
from tuned_steps import MOMENTUM, tune, write_json
from tuning_tasks import SPECS, load_task

from noisescale.theory.tradeoff import fit_tradeoff

OUT = Path(__file__).parent / "out"
WORKLOADS = ("patches-cnn", "teacher", "cifar8-mlp", "mnist", "cifar8-cnn", "mnist14-cnn")
NOISE_BATCH_SIZES = (32, 128)


@dataclass(frozen=True, kw_only=True)
class NoiseRun:
    """The noise scale of the tuned run, pooled up to a goal.

    Attributes:
        batch_size: examples per step.
        lr: the tuned rate.
        pooled: sum of traces over sum of |G|^2, all seeds together; None if not positive.
        by_seed: the same of each seed alone; None where not positive.
        steps: of each seed until the goal.
    """

    batch_size: int
    lr: float
    pooled: float | None
    by_seed: list[float | None]
    steps: list[int]


@dataclass(frozen=True, kw_only=True)
class FactorRow:
    """One workload, optimizer, goal and measured batch size.

    Attributes:
        workload: its name.
        optimizer: ``sgd`` or ``momentum``.
        goal: validation error to get below.
        critical_batch: of the steps law fitted to the tuned steps, in examples.
        low: lower end of its 95 % interval.
        high: upper end; None when unbounded.
        rms_log_error: of that fit.
        points: batch sizes in the fit.
        noise: the pooled noise scale beside it.
        factor: their ratio.
    """

    workload: str
    optimizer: str
    goal: float
    critical_batch: float | None
    low: float | None
    high: float | None
    rms_log_error: float | None
    points: int
    noise: NoiseRun
    factor: float | None


def squared_norms(
    layers: Sequence[nn.Module], x: Tensor, y: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the mean gradients, sum over examples of |g_i|^2, and |mean gradient|^2.

    A linear layer's |g_i|^2 is |delta_i|^2 (|h_i|^2 + 1); a convolution's comes from its unfolded
    input. Nothing of the model but Linear and Conv2d has parameters.
    """
    inputs, outputs, params, h = [], [], [], x
    for layer in layers:
        inputs.append(h.detach())
        h = layer(h)
        params += list(layer.parameters())
        if isinstance(layer, nn.Linear | nn.Conv2d):
            outputs.append(h)
    grads = torch.autograd.grad(F.cross_entropy(h, y), [*outputs, *params])
    deltas, means = iter(grads[: len(outputs)]), list(grads[len(outputs) :])
    total = x.new_zeros(())
    for layer, below in zip(layers, inputs, strict=True):
        if isinstance(layer, nn.Linear):
            delta = next(deltas) * len(x)
            total += (delta.square().sum(1) * (below.square().sum(1) + 1)).sum()
        elif isinstance(layer, nn.Conv2d):
            delta = (next(deltas) * len(x)).flatten(2)
            columns = F.unfold(below, layer.kernel_size, padding=layer.padding)
            total += torch.bmm(delta, columns.transpose(1, 2)).square().sum()
            total += delta.sum(2).square().sum()
    return means, total, sum((g.square().sum() for g in means), x.new_zeros(()))


def measured_steps(
    task: Task, *, lr: float, momentum: float, batch_size: int, seed: int
) -> Iterator[tuple[nn.Sequential, float, float]]:
    """Train without end; yield the model and the step's unbiased tr(Sigma) and |G|^2."""
    model = fresh_model(task, seed)
    velocities = [torch.zeros_like(p) for p in model.parameters()]
    for index in epoch_batches(len(task.x_train), batch_size, seed):
        x, y = task.x_train[index], task.y_train[index]
        means, sum_sq, mean_sq = squared_norms(list(model), x, y)
        trace = float(sum_sq - batch_size * mean_sq) / (batch_size - 1)
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocities, means, strict=True):
                p.sub_(v.mul_(momentum).add_(g), alpha=lr)
        yield model, trace, float(mean_sq) - trace / batch_size


def pooled_noise(
    task: Task,
    *,
    goal: float,
    lr: float,
    momentum: float,
    batch_size: int,
    seeds: range,
    max_steps: int,
) -> NoiseRun:
    """Return the noise scale pooled up to the goal along the runs of these seeds."""
    sums: list[tuple[float, float, int]] = []
    for seed in seeds:
        traces, squares, step, check_at = 0.0, 0.0, 0, 1
        run = measured_steps(task, lr=lr, momentum=momentum, batch_size=batch_size, seed=seed)
        for model, trace, square in run:
            traces, squares, step = traces + trace, squares + square, step + 1
            if step == check_at:
                check_at += max(1, int(step * EVALUATE_EVERY))
                with torch.no_grad():
                    error = float((model(task.x_val).argmax(1) != task.y_val).float().mean())
                if error < goal:
                    break
            if step >= max_steps or not math.isfinite(traces):
                break
        sums.append((traces, squares, step))
    ratios = [t / s if s > 0 and math.isfinite(t) else None for t, s, _ in sums]
    top, bottom = sum(t for t, _, _ in sums), sum(s for _, s, _ in sums)
    return NoiseRun(
        batch_size=batch_size,
        lr=lr,
        pooled=top / bottom if bottom > 0 else None,
        by_seed=ratios,
        steps=[n for _, _, n in sums],
    )


def tuned(name: str, optimizer: str, data: Path | None) -> list[dict[str, float | None]]:
    """Return tuned steps of a workload, from the file of an earlier run where it is complete."""
    path = OUT / f"tuned-{name}-{optimizer}.json"
    if path.is_file():
        points = json.loads(path.read_text())["points"]
        if {p["batch_size"] for p in points} >= set(SPECS[name].batch_sizes):
            return list(points)
    return [asdict(p) for p in tune(name, optimizer=optimizer, data=data, out=path)]


def workload_rows(name: str, optimizer: str, data: Path | None, seeds: int) -> Iterator[FactorRow]:
    """Yield the rows of one workload and optimizer."""
    points, task = tuned(name, optimizer, data), load_task(name, data)
    for goal in SPECS[name].goals:
        good = [p for p in points if p["goal"] == goal and p["steps"]]
        fit = None
        if len(good) >= 4:
            fit = fit_tradeoff(
                batch_size=[p["batch_size"] for p in good], steps=[p["steps"] for p in good]
            )
        for p in good:
            if p["batch_size"] not in NOISE_BATCH_SIZES:
                continue
            noise = pooled_noise(
                task,
                goal=goal,
                lr=p["lr"],
                momentum=MOMENTUM[optimizer],
                batch_size=p["batch_size"],
                seeds=range(100, 100 + seeds),
                max_steps=int(4 * p["steps"]) + 4,
            )
            point = fit.critical_batch.point if fit else None
            yield FactorRow(
                workload=name,
                optimizer=optimizer,
                goal=goal,
                critical_batch=point,
                low=fit.critical_batch.low if fit else None,
                high=fit.critical_batch.high if fit else None,
                rms_log_error=fit.fit.rms_log_error if fit else None,
                points=len(good),
                noise=noise,
                factor=point / noise.pooled if point and noise.pooled else None,
            )


def summary(rows: Sequence[FactorRow]) -> dict[str, dict[str, float]]:
    """Return the factor of each optimizer and its spread, every workload counting once.

    The factor of a workload is the geometric mean over its goals and measured batch sizes.
    """
    found: dict[str, dict[str, float]] = {}
    for optimizer in sorted({row.optimizer for row in rows}):
        logs: dict[str, list[float]] = {}
        for row in rows:
            if row.optimizer == optimizer and row.factor:
                logs.setdefault(row.workload, []).append(math.log(row.factor))
        single = [value for values in logs.values() for value in values]
        means = [statistics.fmean(values) for values in logs.values()]
        if len(means) < 2:
            continue
        found[optimizer] = {
            "factor": math.exp(statistics.fmean(means)),
            "log_sd_between_workloads": statistics.stdev(means),
            "log_sd_all_rows": statistics.stdev(single),
            "lowest": math.exp(min(single)),
            "highest": math.exp(max(single)),
            "workloads": len(means),
            "rows": len(single),
        }
    return found


def line(row: FactorRow) -> str:
    """Return one row of the table."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    seeds = [b for b in row.noise.by_seed if b]
    spread = f"{show(min(seeds, default=None))}..{show(max(seeds, default=None))}"
    interval = f"[{show(row.low)}, {show(row.high)}]"
    return (
        f"{row.workload:12s} {row.optimizer:9s} {row.goal:5.2f} {show(row.critical_batch):>7s}"
        f" {interval:18s} {row.rms_log_error or 0:5.2f} {row.noise.batch_size:4d}"
        f" {show(row.noise.pooled):>7s} {spread:>16s}"
        f" {'-' if row.factor is None else f'{row.factor:.2f}':>6s}"
    )


HEAD = (
    "workload     optimizer  goal   Bcrit 95 %                 rms    B  pooled"
    "         by seed  ratio"
)


def check() -> bool:
    """Print and return whether the closed-form norms are those of per-example gradients."""
    fine = True
    for kind in ("mlp", "cnn"):
        task = toy_task(kind)
        model, x, y = fresh_model(task, 0), task.x_train[:20], task.y_train[:20]
        params = dict(model.named_parameters())

        def loss(p: dict[str, Tensor], x: Tensor, y: Tensor, m: nn.Module = model) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(m, p, (x[None],)), y[None])

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
        flat = torch.cat([g.flatten(1) for g in each.values()], 1).detach()
        with_grad = squared_norms(list(model), x, y)
        total, mean_sq = (value.detach() for value in with_grad[1:])
        off = max(
            abs(float(total / flat.square().sum()) - 1),
            abs(float(mean_sq / flat.mean(0).square().sum()) - 1),
        )
        fine &= off < 1e-10
        print(f"{kind}: relative difference {off:.1e}")
    print("check:", "ok" if fine else "FAILED")
    return fine


def finished(path: Path) -> list[FactorRow]:
    """Return the rows of an earlier run."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [FactorRow(**{**row, "noise": NoiseRun(**row["noise"])}) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--optimizers", default=",".join(MOMENTUM))
    parser.add_argument("--seeds", type=int, default=4, help="runs behind each pooled noise scale")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=OUT / "optimizer_factor.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what OUT holds")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.check:
        sys.exit(0 if check() else 1)
    began = time.monotonic()
    rows = [] if a.fresh else finished(a.out)
    for name, optimizer in product(a.workloads.split(","), a.optimizers.split(",")):
        if any((row.workload, row.optimizer) == (name, optimizer) for row in rows):
            continue
        rows += workload_rows(name, optimizer, a.data, a.seeds)
        write_json(a.out, {"rows": [asdict(r) for r in rows], "factors": summary(rows)})
    print(HEAD, *map(line, rows), sep="\n")
    for optimizer, f in summary(rows).items():
        print(
            f"{optimizer}: factor {f['factor']:.2f}; single rows {f['lowest']:.2f} to"
            f" {f['highest']:.2f}; sd of the log {f['log_sd_between_workloads']:.2f} between"
            f" {f['workloads']:.0f} workloads, {f['log_sd_all_rows']:.2f} over all rows"
        )
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
