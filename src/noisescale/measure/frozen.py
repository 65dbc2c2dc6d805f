"""The noise scale at weights that are held still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisescale.measure.arguments import SOURCES, check_choice, check_count, check_level
from noisescale.measure.batches import Collate, batch_size_of, check_batch_size, move, take
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, Refused, StepNorms
from noisescale.measure.grouping import Grouping
from noisescale.measure.mean_gradients import MeanGradients
from noisescale.measure.microbatches import gradients_of, split_gradients
from noisescale.measure.squares import squared_norm
from noisescale.measure.untouched import untouched
from noisescale.measure.verdict import (
    Circumstances,
    left_out,
    normalised_unit,
    record,
    undetermined,
)
from noisescale.records import NoiseScale
from noisescale.theory.frozen import estimate_frozen
from noisescale.theory.interval import RatioEstimate
from noisescale.workload import data_size

Loss = Callable[[nn.Module, Any], Tensor]


def measure_noise_scale(
    model: nn.Module,
    loss: Loss,
    data: Any,
    *,
    batch_size: int,
    steps: int,
    source: Literal["auto", "examples", "microbatches"] = "auto",
    micro_batch_size: int | None = None,
    population: Literal["infinite", "train_set"] = "infinite",
    seed: int = 0,
    generator: torch.Generator | None = None,
    level: float = 0.95,
    groups: Grouping = None,
    collate: Collate = None,
    unit: str = "examples",
) -> tuple[NoiseScale, dict[str, NoiseScale]]:
    """Measure tr(Sigma)/|G|^2 at the model's present weights, all draws pooled.

    ``steps`` batches are drawn without replacement over all of them; when they would exhaust
    the data, every example is used once. A full pass by examples with
    ``population="train_set"`` is a census: its interval has no width. Weights, ``p.grad``,
    buffers, random states and modes are left as they were.

    Args:
        model: in the mode to measure in; its parameters decide the device.
        loss: ``loss(model, batch)`` returns the mean over the batch's examples.
        data: a map-style dataset, a tensor, or a tuple of tensors.
        batch_size: examples per draw.
        steps: number of draws.
        source: ``examples``, ``microbatches``, or ``auto``: examples if every trainable
            parameter can be measured so.
        micro_batch_size: examples per micro-batch; default: an eighth of the batch.
        population: whose gradient is meant: the distribution's, or that of ``data`` itself.
        seed: of the draws, unless ``generator`` is given, and of the sketch of large models.
        generator: random state of the draws.
        level: confidence level.
        groups: parameter name -> group; default: the module that holds the parameter.
        collate: makes a batch of a list of examples of a dataset.
        unit: what one example is: ``examples`` or ``sequences``.

    Returns:
        The whole model's noise scale, and that of each parameter group.

    Raises:
        InvalidInputError: an argument cannot be used, the loss is not a scalar, or the model
            has no trainable parameter.

    Source: McCandlish et al. 2018, App. A.1, with every draw part of one big batch.
    """
    check_choice("source", source, SOURCES)
    check_choice("population", population, ("infinite", "train_set"))
    check_count("steps", steps, 20)
    check_count("batch_size", batch_size, 32)
    check_level(level)
    if micro_batch_size is not None:
        check_count("micro_batch_size", micro_batch_size, 8)
    size = data_size(data)
    check_batch_size(batch_size, size)
    draws = _draws(size, batch_size, steps, generator or torch.Generator().manual_seed(seed))
    plan = _Plan(
        model=model,
        loss=loss,
        batches=lambda: (_batch(data, indices, collate, model) for indices in draws),
        micro_batch_size=micro_batch_size,
        batch_size=batch_size,
        groups=groups,
        seed=seed,
    )
    with untouched(model), torch.enable_grad():
        found = _gather(plan, source)
    circumstances = Circumstances(
        source=found.source,
        unit=unit,
        population_size=size if population == "train_set" else None,
        level=level,
        refused=int(bool(found.refusal)),
        refusal=found.refusal,
    )
    names = dict.fromkeys(s.group for s in found.inventory.slots if s.missing is None)
    return (
        _judge(found, circumstances, None),
        {group: _judge(found, circumstances, group) for group in names},
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to differentiate."""

    model: nn.Module
    loss: Loss
    batches: Callable[[], Iterator[Any]]
    micro_batch_size: int | None
    batch_size: int
    groups: Grouping
    seed: int

    @property
    def normalised(self) -> bool:
        """Whether BatchNorm mixes the examples of a pass."""
        layers = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        return any(m.training or m.running_mean is None for m in layers)

    @property
    def micro(self) -> int:
        """Examples per micro-batch."""
        # BatchNorm cannot normalise a single example.
        return self.micro_batch_size or max(2 if self.normalised else 1, self.batch_size // 8)


@dataclass(eq=False)
class _Found:
    """Sums over the draws so far."""

    source: str
    inventory: Inventory
    means: MeanGradients
    steps: int = 0
    skipped: int = 0
    refusal: str = ""
    unit_size: int = 0
    normalised: bool = False

    def add(self, weighted: Tensor, mean: dict[int, Tensor], units: int, examples: int) -> None:
        square = weighted.cpu().double().numpy()
        finite = torch.stack([squared_norm(g) for g in mean.values()]).isfinite().all()
        if not (np.isfinite(square).all() and bool(finite)):
            self.skipped += 1
            return
        self.means.add(mean, square, examples=examples, units=units)
        self.steps += 1


def _gather(plan: _Plan, source: str) -> _Found:
    if source == "microbatches":
        return _by_microbatches(plan)
    inventory = Inventory(plan.model, plan.groups)
    watch = ExamplesSource(plan.model, inventory, any_mode=True)
    auto = source == "auto"
    try:
        while True:
            if auto and (inventory.missing or plan.normalised):
                return _by_microbatches(plan)
            found = _by_examples(plan, watch)
            if found is None:
                continue  # a parameter had to be left out: the earlier draws do not count
            if auto and (found.refusal or inventory.missing):
                return _by_microbatches(plan)
            return found
    finally:
        watch.detach()


def _empty(plan: _Plan, inventory: Inventory, source: str) -> _Found:
    means = MeanGradients(inventory, seed=plan.seed)
    return _Found(source, inventory, means)


def _by_examples(plan: _Plan, watch: ExamplesSource) -> _Found | None:
    inventory = watch.inventory
    seen = inventory.seen
    found = _empty(plan, inventory, "examples")
    found.unit_size = 1
    for batch in plan.batches():
        watch.open()
        gradients = dict(gradients_of(plan.loss(plan.model, batch), inventory))
        seen_gradients = {i: g for i, g in gradients.items() if i in seen}
        norms = watch.close(seen_gradients)
        if inventory.seen != seen and inventory.seen:
            return None
        if isinstance(norms, StepNorms) and norms.examples != batch_size_of(batch):
            norms = Refused(
                f"the model ran on {norms.examples} examples for a batch of "
                f"{batch_size_of(batch)}; use source='microbatches'"
            )
        if not isinstance(norms, StepNorms):
            found.refusal = norms.detail if norms else "the loss has no gradient"
            return found
        weighted = norms.weighted.double() * norms.weighted_factor
        found.add(weighted, seen_gradients, norms.examples, norms.examples)
    return found


def _by_microbatches(plan: _Plan) -> _Found:
    inventory = Inventory(plan.model, plan.groups)
    found = _empty(plan, inventory, "microbatches")
    found.normalised = plan.normalised
    found.unit_size = plan.micro
    for batch in plan.batches():
        split = split_gradients(plan.loss, plan.model, inventory, batch, plan.micro)
        weighted = inventory.pack(split.weighted)
        found.add(weighted, split.mean, len(split.sizes), sum(split.sizes))
    return found


def _draws(
    size: int, batch_size: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    order = torch.randperm(size, generator=generator)[: min(size, steps * batch_size)]
    return torch.split(order, batch_size)


def _batch(data: Any, indices: Tensor, collate: Collate, model: nn.Module) -> Any:
    return move(take(data, indices, collate), next(model.parameters()).device)


def _judge(found: _Found, circumstances: Circumstances, group: str | None) -> NoiseScale:
    notes = [left_out(found.inventory)]
    if found.normalised:
        notes.append(normalised_unit(found.unit_size))
    return record(
        _estimate(found, circumstances, group),
        found.inventory,
        circumstances,
        group=group,
        steps=found.steps,
        examples=int(found.means.examples.sum()),
        skipped=found.skipped,
        notes=notes,
    )


def _estimate(found: _Found, circumstances: Circumstances, group: str | None) -> RatioEstimate:
    if found.refusal or found.means.units.sum() < 2:
        return undetermined(circumstances, found.skipped)
    return estimate_frozen(
        gram=found.means.gram(group),
        group_examples=found.means.examples,
        group_units=found.means.units,
        group_weighted_sq=found.means.weighted_sq(group),
        mean_sq=found.means.mean_sq(group) if found.means.sketched else None,
        population_size=circumstances.population_size,
        level=circumstances.level,
    )
