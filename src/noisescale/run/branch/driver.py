"""A critical batch size measured, not modelled: branches at k times the batch."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from noisescale import __version__
from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import check_seed
from noisescale.measure.batches import EpochBatches, move, take
from noisescale.measure.real_step import RealStep
from noisescale.records import BranchPoint, BranchResult, BranchRow, Interval, Recipe
from noisescale.run.branch.checkpoint import load_weights
from noisescale.run.dry_run import check_workload, fresh_model
from noisescale.run.evaluation import Evaluator
from noisescale.run.optimizers import make_optimizer
from noisescale.run.rates import rate_factor
from noisescale.run.resolve import resolve_workload
from noisescale.run.sweep.sizes import read_batch_sizes
from noisescale.run.training import DIVERGED_RISE
from noisescale.run.users_code import blame_user
from noisescale.theory.branching import critical_by_branches, paired_excess, verdict
from noisescale.theory.per_example import SQUARE_ROOT
from noisescale.theory.scaling import rates as scaling
from noisescale.workload import Workload

TOLERANCE = 0.01
"""Loss that may be lost. (paper: Merrill et al. 2025)"""

FEWEST_STEPS = 8
"""Steps of the branch with the largest batch, where factors or examples are chosen. (assumed)"""

LAST = 0.25
"""Share at the end of a branch over which the loss is averaged. (assumed; the paper smooths the
training loss exponentially)"""

LOOKS = 4
"""Evaluations in that share, where its steps allow. (assumed)"""

QUANTITIES = ("train_loss", "validation_loss")
RULES = {"linear": scaling.LINEAR, "square_root": scaling.SQUARE_ROOT}

Progress = Callable[[str, float | None], None]


def branch(
    workload: str | Workload,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    at: Sequence[int] = (0,),
    factors: Sequence[int] | None = None,
    examples: int | None = None,
    seeds: int = 4,
    tolerance: float = TOLERANCE,
    rule: str = "auto",
    quantity: str = "train_loss",
    level: float = 0.95,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    on_progress: Progress | None = None,
) -> BranchResult:
    """Run short branches at k times the batch, and find the largest k that loses nothing.

    Every branch sees the same number of examples; its rate is converted (linear for SGD, square
    root for Adam), momentum and betas are kept, and so is the optimizer's state. A batch size
    counts only if all smaller ones tried keep the loss as well; larger ones than the first that
    surely does not are not run.

    Args:
        workload: a built-in's name, ``module:attribute``, ``path/to/file.py:attribute`` or a
            Workload; its recipe is that of the training.
        checkpoint: file of weights to start from; without it the workload is trained here.
        at: optimizer steps of that training after which branches start; ignored with a
            checkpoint.
        factors: multiples of the batch size; powers of two up to the data and ``FEWEST_STEPS``
            steps by default.
        examples: of each branch; one pass over the data, and at least 64 batches, by default.
        seeds: orders of the data; each is a pair of runs with k = 1.
        tolerance: loss that may be lost.
        rule: ``linear``, ``square_root``, or ``auto`` by the optimizer.
        quantity: ``train_loss`` (on 1,000 fixed examples) or ``validation_loss``.
        level: confidence level of the intervals.
        seed: of the weights and of the first order of the data.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        on_progress: told what is being done.

    Returns:
        A critical batch size with its interval at each point.

    Raises:
        InvalidInputError: bad input, or the user's code raised.

    Source: Merrill et al. 2025 (arXiv:2505.23971), sec. 3.
    """
    began = time.monotonic()
    if checkpoint is not None and tuple(at) != (0,):
        raise InvalidInputError(f"at {list(at)}", "a checkpoint is one point", "leave one out")
    found = resolve_workload(workload, data=data, overrides=overrides)
    check_workload(found)
    check_seed(seed)
    wish = _wish(
        found,
        factors=factors,
        examples=examples,
        seeds=seeds,
        tolerance=tolerance,
        rule=rule,
        quantity=quantity,
        level=level,
        seed=seed,
    )
    with torch.random.fork_rng(), blame_user(f"workload {found.name!r}: branching"):
        torch.manual_seed(seed)
        trunk = _Trunk(wish)
        if checkpoint is not None:
            load_weights(trunk.model, checkpoint)
        steps = [None] if checkpoint is not None else sorted(set(_steps(at)))
        points = []
        for step in steps:
            if step is not None:
                trunk.train_to(step)
            points.append(_point(wish, trunk, step, on_progress or _nobody))
    return BranchResult(
        workload=found.name,
        optimizer=found.recipe.optimizer_kind,
        unit=found.recipe.unit,
        batch_size=found.recipe.batch_size,
        lr=found.recipe.lr,
        rule=wish.rule,
        quantity=quantity,
        tolerance=tolerance,
        examples=wish.examples,
        level=level,
        points=tuple(points),
        checkpoint=None if checkpoint is None else str(checkpoint),
        seconds=time.monotonic() - began,
        version=__version__,
    )


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What is asked, checked."""

    workload: Workload
    factors: tuple[int, ...]
    examples: int
    seeds: tuple[int, ...]
    tolerance: float
    rule: str
    split: str
    level: float
    seed: int

    @property
    def recipe(self) -> Recipe:
        return self.workload.recipe

    def lr(self, factor: int, step: int) -> float:
        """Rate of a branch, constant at what the training has there."""
        scaled = RULES[self.rule].scale(self.recipe, factor * self.recipe.batch_size)
        return scaled.recipe.lr * rate_factor(self.recipe, step)


class _Trunk:
    """The training that branches leave from."""

    def __init__(self, wish: _Wish) -> None:
        self._wish, self._workload = wish, wish.workload
        self.model = fresh_model(wish.workload)
        self.optimizer = make_optimizer(self.model, wish.recipe)
        self.device = next(self.model.parameters()).device
        self.evaluator = Evaluator(wish.workload, self.device)
        self.steps = 0
        self._step = RealStep(self.model, wish.workload.loss, wish.recipe, self.optimizer)
        self._order = _order(wish.workload, wish.recipe.batch_size, wish.seed)

    def train_to(self, step: int) -> None:
        self.model.train()
        while self.steps < step:
            _set_rate(self.optimizer, self._wish.lr(1, self.steps))
            self._step(_batch(self._workload, next(self._order), self.device))
            self.steps += 1

    def loss(self, model: nn.Module | None = None) -> float:
        """Evaluate; infinite when not finite."""
        value = self.evaluator.value(model or self.model, self._wish.split, "loss")
        return value if math.isfinite(value) else math.inf

    def branch(self, factor: int, seed: int) -> float:
        """Return the loss at the end of a branch; infinite when it diverged."""
        wish = self._wish
        batch_size = factor * wish.recipe.batch_size
        model = copy.deepcopy(self.model)
        optimizer = make_optimizer(model, wish.recipe)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        _set_rate(optimizer, wish.lr(factor, self.steps))
        step = RealStep(model, wish.workload.loss, wish.recipe, optimizer)
        # Orders of their own: the trunk has seen the other one.
        order = _order(wish.workload, batch_size, 1_000_003 + seed)
        steps = wish.examples // batch_size
        looks = {steps - round(i * LAST * steps / LOOKS) for i in range(LOOKS)}
        seen = []
        model.train()
        torch.manual_seed(seed)
        for done in range(1, steps + 1):
            step(_batch(wish.workload, next(order), self.device))
            if done in looks:
                seen.append(self.loss(model))
        return sum(seen) / len(seen)


def _point(wish: _Wish, trunk: _Trunk, step: int | None, tell: Progress) -> BranchPoint:
    """Run the branches of one point, the smallest factor first."""
    reference: list[float] = []
    rows: list[BranchRow] = []
    gaps: list[Interval] = []
    for number, factor in enumerate(wish.factors):
        tell(f"branches at {factor} x {wish.recipe.batch_size}", number / len(wish.factors))
        losses = [trunk.branch(factor, seed) for seed in wish.seeds]
        ceiling = trunk.loss() + DIVERGED_RISE * abs(trunk.loss())
        losses = [loss if loss <= ceiling else math.inf for loss in losses]
        reference = reference or losses
        if not all(map(math.isfinite, reference)):
            raise InvalidInputError(
                f"workload {wish.workload.name!r}",
                "the branches at its own batch size and rate diverge",
                "choose a smaller rate, for example --set lr=...",
            )
        gap = _excess(losses, reference, wish.level, own=factor == wish.factors[0])
        rows.append(_row(wish, factor, trunk.steps, losses, gap))
        gaps.append(gap)
        if rows[-1].verdict in ("beyond", "diverged"):
            break
    sizes = [row.batch_size for row in rows]
    critical = critical_by_branches(batch_sizes=sizes, excess=gaps, tolerance=wish.tolerance)
    return BranchPoint(
        step=step,
        examples=None if step is None else step * wish.recipe.batch_size,
        loss=trunk.loss(),
        critical_batch=critical,
        rows=tuple(rows),
        detail=_detail(critical, rows),
    )


def _excess(
    losses: Sequence[float], reference: Sequence[float], level: float, *, own: bool
) -> Interval:
    if own:
        return Interval(point=0.0, low=0.0, high=0.0)
    if not all(map(math.isfinite, losses)):
        return Interval(point=math.inf, low=math.inf, high=None)
    return paired_excess(losses=losses, reference=reference, level=level)


def _row(wish: _Wish, factor: int, step: int, losses: Sequence[float], gap: Interval) -> BranchRow:
    finite = all(map(math.isfinite, losses))
    size = factor * wish.recipe.batch_size
    return BranchRow(
        factor=factor,
        batch_size=size,
        lr=wish.lr(factor, step),
        steps=wish.examples // size,
        loss=sum(losses) / len(losses) if finite else None,
        excess=gap.point if finite else None,
        low=gap.low if finite else None,
        high=gap.high,
        seeds=len(losses),
        verdict=verdict(low=gap.low, high=gap.high, tolerance=wish.tolerance)
        if finite
        else "diverged",
    )


def _detail(critical: Interval, rows: Sequence[BranchRow]) -> str:
    if len(rows) == 1:
        return "no larger batch fits: give more --examples, or a smaller batch size"
    if critical.high is None:
        return (
            f"no batch up to {rows[-1].batch_size} surely loses more than the tolerance: try larger"
            " factors, or more seeds where some are unclear"
        )
    return ""


def _wish(
    workload: Workload,
    *,
    factors: Sequence[int] | None,
    examples: int | None,
    seeds: int,
    tolerance: float,
    rule: str,
    quantity: str,
    level: float,
    seed: int,
) -> _Wish:
    """Check what is asked, and choose what is not."""
    own = workload.recipe.batch_size
    for name, value, allowed in (
        ("rule", rule, ("auto", *RULES)),
        ("quantity", quantity, QUANTITIES),
    ):
        if value not in allowed:
            raise InvalidInputError(
                f"{name} {value!r}", f"{' or '.join(allowed)} is required", f"change {name}"
            )
    if quantity == "validation_loss" and workload.evaluate is None:
        raise InvalidInputError(
            f"quantity {quantity!r}", "the workload has no validation data", "take train_loss"
        )
    if not isinstance(seeds, int) or seeds < 2:
        raise InvalidInputError(
            f"seeds {seeds!r}", "at least 2 are required to know their noise", "give seeds=4"
        )
    if not 0 < level < 1 or not tolerance > 0:
        raise InvalidInputError(
            f"level {level:g}, tolerance {tolerance:g}",
            "a level between 0 and 1 and a positive tolerance are required",
            "change them",
        )
    budget = examples or max(workload.train_size, 64 * own)
    chosen = _factors(factors, workload, budget)
    kind = workload.recipe.optimizer_kind
    by_kind = "square_root" if kind in SQUARE_ROOT else "linear"
    return _Wish(
        workload=workload,
        factors=chosen,
        examples=budget,
        seeds=tuple(range(seed, seed + seeds)),
        tolerance=tolerance,
        rule=by_kind if rule == "auto" else rule,
        split=quantity.removesuffix("_loss"),
        level=level,
        seed=seed,
    )


def _factors(given: Sequence[int] | None, workload: Workload, examples: int) -> tuple[int, ...]:
    own = workload.recipe.batch_size
    if own > examples:
        raise InvalidInputError(
            f"examples {examples}",
            f"a branch has no step of the recipe's batch size {own} then",
            f"give at least {FEWEST_STEPS * own}",
        )
    if given is None:
        most = min(workload.train_size, examples // FEWEST_STEPS) // own
        return tuple(2**i for i in range(max(1, most).bit_length()))
    sizes = read_batch_sizes(
        sorted({own, *(own * factor for factor in given)}),
        train_size=workload.train_size,
        recipe_size=own,
    )
    if sizes[-1] > examples:
        raise InvalidInputError(
            f"batch size {sizes[-1]}",
            f"a branch of {examples} examples has no step of it",
            "give more --examples",
        )
    return tuple(size // own for size in sizes)


def _steps(at: Sequence[int]) -> Sequence[int]:
    wrong = [step for step in at if not isinstance(step, int) or step < 0]
    if wrong or not at:
        raise InvalidInputError(
            f"at {list(at)}", "steps of at least 0 are required", "give for example 0,200,1000"
        )
    return at


def _order(workload: Workload, batch_size: int, seed: int) -> EpochBatches:
    generator = torch.Generator().manual_seed(seed)
    return EpochBatches(workload.train_size, batch_size, generator)


def _batch(workload: Workload, indices: torch.Tensor, device: torch.device) -> Any:
    return move(take(workload.train, indices, workload.collate), device)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _nobody(_what: str, _share: float | None) -> None:
    """Tell nobody."""
