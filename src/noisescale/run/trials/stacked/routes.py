"""The ways to stack a workload's model, fastest first, each checked before it is used."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from noisescale.measure.batches import slices
from noisescale.records import Recipe
from noisescale.records.trial import TrialPlan
from noisescale.run.dry_run import fresh_model
from noisescale.run.trials.passages import quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.anatomy import Anatomy, take_apart
from noisescale.run.trials.stacked.appraisal import Appraiser, GeneralAppraiser, Values
from noisescale.run.trials.stacked.chain import ChainNetwork, is_known
from noisescale.run.trials.stacked.dense import DenseNetwork, perceptron
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.general import GeneralNetwork, is_stackable
from noisescale.run.trials.stacked.groups import Groups
from noisescale.run.trials.stacked.heads import close, find_head
from noisescale.run.trials.stacked.shelf import Shelf
from noisescale.run.trials.stacked.updates import GradientUpdate, Update
from noisescale.workload import Workload

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative difference between stacked gradients and plain ones that rounding explains.
(assumed: sums of some thousand terms in another order)"""

TOLERANCE_ELSEWHERE = 3e-2
"""The same for shorter floating point. (assumed)"""

_FEW = 5
"""Examples of the batch on which a route is checked."""

_LOSS_SEEN_ON = 64
"""Examples on which a loss is recognised, at most."""

_EVALUATED = 16
"""Examples on which its evaluation is checked."""

_SEEDS = (0, 1)
"""Initial weights of the models on which a route is checked."""


class Network(Protocol):
    """Stacked models of one structure."""

    name: str
    joins_orders: bool

    def step(self, update: Update, leaves: Sequence[Tensor], groups: Groups) -> None:
        """Hand the gradients of all trials to their update."""


class Valuing(Protocol):
    """Evaluates stacked weights."""

    def values(self, weights: Sequence[Tensor]) -> Values:
        """Evaluate trials; ``weights`` holds per parameter (trials, ...)."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way to stack a workload.

    Attributes:
        name: ``products``, ``channels`` or ``vmap``.
        joins_orders: whether trials with different orders of the data fit in one stack.
        make: makes a network, and what evaluates it on an evaluator's data; a stack needs its
            own.
        bytes_per_trial: of weights, gradients and activations, at a batch size.
    """

    name: str
    joins_orders: bool
    make: Callable[[TrialEvaluator], tuple[Network, Valuing]]
    bytes_per_trial: Callable[[int], int]


def sound_routes(workload: Workload, plan: TrialPlan) -> Iterator[Route]:
    """Yield the routes whose gradients and values equal the plain ones, fastest first.

    Args:
        workload: model, loss, metrics and data.
        plan: its targets say what is evaluated, its order what the routes are checked on.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(workload)
    device = next(model.parameters()).device
    feed = Feed(workload, device)
    evaluator = _FewExamples(workload, device, quantities(plan))
    some = next(feed.order(min(_FEW, workload.train_size), plan.order_seed))
    for candidate in _candidates(workload, model, feed, some):
        if _is_sound(candidate, workload, feed, evaluator, some):
            yield candidate


def named_route(workload: Workload, plan: TrialPlan, name: str) -> Route:
    """Return a route that was found sound before, as in another process.

    Args:
        workload: model, loss and data.
        plan: any trial of it.
        name: the route's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(workload)
    feed = Feed(workload, next(model.parameters()).device)
    some = next(feed.order(min(_FEW, workload.train_size), plan.order_seed))
    candidates = _candidates(workload, model, feed, some)
    return next(candidate for candidate in candidates if candidate.name == name)


def _candidates(workload: Workload, model: nn.Module, feed: Feed, some: Tensor) -> Iterator[Route]:
    if not is_stackable(model) or draws(workload, model):
        return
    batch = feed.batch(some)
    anatomy = take_apart(model, workload.loss, batch)
    leaves, spec = tree_flatten(batch)
    if anatomy is not None:
        more = next(feed.order(min(_LOSS_SEEN_ON, workload.train_size), 0))
        yield from _chains(workload, model, anatomy, tree_leaves(feed.batch(more)))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return

    def general(evaluator: TrialEvaluator) -> tuple[Network, Valuing]:
        with torch.random.fork_rng():
            own = fresh_model(workload)
        network = GeneralNetwork(own, workload.loss, lambda parts: tree_unflatten(parts, spec))
        return network, GeneralAppraiser(workload, evaluator, network)

    numbers = _numbers(model, None if anatomy is None else anatomy.numbers)
    yield Route(name="vmap", joins_orders=False, make=general, bytes_per_trial=numbers)


def _chains(
    workload: Workload,
    model: nn.Module,
    anatomy: Anatomy,
    leaves: Sequence[Tensor],
) -> Iterator[Route]:
    head = find_head(anatomy, workload.loss, leaves)
    if head is None:
        return
    networks: list[DenseNetwork | ChainNetwork] = []
    affines = perceptron(anatomy)
    if affines is not None:
        networks.append(DenseNetwork(affines, head, anatomy.input))
    if all(is_known(layer) for layer in anatomy.layers):
        networks.append(ChainNetwork(anatomy, head))
    for network in networks:
        yield Route(
            name=network.name,
            joins_orders=network.joins_orders,
            make=partial(_with_appraiser, workload, anatomy, network),
            bytes_per_trial=_numbers(model, anatomy.numbers),
        )


def _with_appraiser(
    workload: Workload,
    anatomy: Anatomy,
    network: DenseNetwork | ChainNetwork,
    evaluator: TrialEvaluator,
) -> tuple[Network, Valuing]:
    return network, Appraiser(workload, evaluator, anatomy, network)


class _FewExamples(TrialEvaluator):
    """Evaluates on a few examples of each split."""

    def batches(self, split: str) -> Iterable[tuple[int, Any]]:
        """Return the first examples of the split's first batch."""
        size, batch = next(iter(super().batches(split)))
        return [(min(size, _EVALUATED), next(slices(batch, _EVALUATED)))]


def draws(workload: Workload, model: nn.Module) -> bool:
    """Whether a training step draws from torch's random state, which no stack can repeat."""
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        batch = Feed(workload, next(model.parameters()).device).batch(torch.arange(2))
        workload.loss(model, batch)
        return not torch.equal(before, torch.random.get_rng_state())


def _numbers(model: nn.Module, activations: int | None) -> Callable[[int], int]:
    weights = sum(parameter.numel() for parameter in model.parameters())
    width = next(model.parameters()).element_size()
    # Weights, gradients and up to three memories of past steps. Where activations are not
    # known, as many per example as there are weights: too many for most models.
    per_example = 3 * (weights if activations is None else activations)
    return lambda batch_size: width * (5 * weights + per_example * batch_size)


class _Gathered(GradientUpdate):
    """Keeps the gradients and moves nothing."""

    def _move(self) -> None:
        return

    @property
    def gradients(self) -> list[Tensor]:
        return self._gradients.parts


def _is_sound(
    route: Route, workload: Workload, feed: Feed, evaluator: TrialEvaluator, some: Tensor
) -> bool:
    models = []
    for seed in _SEEDS:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(fresh_model(workload))
    own = [[p.detach() for p in model.parameters()] for model in models]
    update = _Gathered(
        Shelf([torch.stack(same) for same in zip(*own, strict=True)]),
        [Recipe(lr=1.0, batch_size=len(some))] * len(models),
    )
    # torch tells that some functions have no batching rule: slow is what is measured later.
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        network, appraiser = route.make(evaluator)
        update.begin(0)
        network.step(update, feed.leaves([some]), Groups([0] * len(models)))
        values = appraiser.values(update.weights.parts)
        return all(
            _same_slopes(workload, model, feed.batch(some), [g[i] for g in update.gradients])
            and _same_values(evaluator.all_values(model), values[i], own[i][0].dtype)
            for i, model in enumerate(models)
        )
    return False  # a route that raises is not taken


def _same_slopes(
    workload: Workload, model: nn.Module, batch: Any, stacked: Sequence[Tensor]
) -> bool:
    model.train()
    plain = torch.autograd.grad(
        workload.loss(model, batch).reshape(()), list(model.parameters()), materialize_grads=True
    )
    return all(
        close(ours, theirs, TOLERANCE.get(theirs.dtype, TOLERANCE_ELSEWHERE))
        for ours, theirs in zip(stacked, plain, strict=True)
    )


def _same_values(
    plain: tuple[dict[str, float], float],
    stacked: tuple[dict[str, float], float],
    dtype: torch.dtype,
) -> bool:
    """Whether values by name, and the loss beside them, agree but for rounding."""
    names, share = plain[0], TOLERANCE.get(dtype, TOLERANCE_ELSEWHERE)
    pairs = [(stacked[0][name], names[name]) for name in names] + [(stacked[1], plain[1])]
    return all(abs(ours - theirs) <= share * abs(theirs) + 1e-6 for ours, theirs in pairs)
