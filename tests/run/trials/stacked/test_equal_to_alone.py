"""Stacked training gives the weights of training one by one: 50 steps in float64, to 1e-9."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from noisescale.records.trial import TrialPlan
from noisescale.run.trials.alone import LoneTrial
from noisescale.run.trials.passages import Passages, quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.chain import ChainNetwork
from noisescale.run.trials.stacked.columns import Columns
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.optimizers import make_update
from noisescale.run.trials.stacked.routes import Route, sound_routes
from noisescale.run.trials.stacked.shelf import Shelf
from noisescale.run.trials.stacked.stack import Stack
from noisescale.run.trials.units import RunningTrial
from noisescale.workload import Workload
from run.trials.small import MODELS, plans, small_workload, smoothed

STEPS = 50
TOLERANCE = 1e-9

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "decay": {"weight_decay": 0.01},
    "scheduled": {"schedule": {"kind": "cosine"}, "total_steps": 60, "warmup_steps": 5},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "momentum-scheduled": {
        "momentum": 0.9,
        "schedule": {"kind": "step", "milestones": [10]},
    },
    "dampened": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-4},
    "lars": {"optimizer": "lars", "weight_decay": 0.01, "trust_coefficient": 0.02},
    "lars-nesterov": {"optimizer": "lars", "nesterov": True, "momentum": 0.8},
    "lamb": {"optimizer": "lamb"},
}

MIXED: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"weight_decay": 0.1}, {"warmup_steps": 9}, {}],
    "momentum": [{"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.05}, {"momentum": 0.99}],
    "adam": [
        {"optimizer": "adam", "betas": (0.5, 0.9)},
        {"optimizer": "adam", "eps": 1e-3, "weight_decay": 0.1},
    ],
    "adamw": [
        {"optimizer": "adamw", "betas": (0.5, 0.9)},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
    "lars": [{"optimizer": "lars", "momentum": 0.0}, {"optimizer": "lars", "weight_decay": 0.1}],
    "lamb": [{"optimizer": "lamb", "betas": (0.5, 0.9)}, {"optimizer": "lamb", "eps": 1e-3}],
}


def routes(workload: Workload, plan: TrialPlan) -> dict[str, Route]:
    return {route.name: route for route in sound_routes(workload, plan)}


def stack_of(
    workload: Workload, route: Route, chosen: list[TrialPlan], *, sorts: bool = False
) -> Stack:
    cpu = torch.device("cpu")
    trials = [
        RunningTrial(plan=plan, place=i, passages=Passages(plan)) for i, plan in enumerate(chosen)
    ]
    evaluator = TrialEvaluator(workload, cpu, quantities(chosen[0]))
    return Stack(route, workload, Feed(workload, cpu), evaluator, trials, sorts=sorts)


def worst_difference(workload: Workload, stack: Stack, steps: int) -> float:
    """Largest difference of weights and values from trials trained by themselves."""
    worst = 0.0
    values = stack.values()
    for i, trial in enumerate(stack.trials):
        with torch.random.fork_rng():
            torch.manual_seed(trial.plan.seed)
            alone = LoneTrial(workload, trial.plan)
        for _ in range(steps):
            alone.step()
        for ours, theirs in zip(stack.weights, alone.model.parameters(), strict=True):
            worst = max(worst, float((ours[i] - theirs.detach()).abs().max()))
        theirs_values, loss = alone._evaluator.all_values(alone.model)
        worst = max(worst, abs(values[i][1] - loss))
        worst = max(worst, *(abs(values[i][0][k] - v) for k, v in theirs_values.items()))
    return worst


def trained(stack: Stack, *, drop: tuple[int, ...] = (1, 4, 5)) -> Stack:
    with torch.no_grad():
        for step in range(STEPS):
            if step == STEPS // 2:
                for trial in stack.trials:
                    if trial.place in drop:
                        trial.stopped_by = "race"
                stack.drop_ended()
            stack.step()
    return stack


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("model", "name"),
    [("perceptron", "products"), ("convolutions", "channels"), ("residual", "vmap")],
)
def test_every_optimizer_through_compaction(model: str, name: str, optimizer: str) -> None:
    workload = small_workload(MODELS[model])
    every = plans(**OPTIMIZERS[optimizer])
    route = routes(workload, every[0])[name]
    chosen = every if route.joins_orders else every[:3]
    stack = trained(stack_of(workload, route, chosen))
    assert len(stack.trials) == len(chosen) - (3 if route.joins_orders else 1)
    assert worst_difference(workload, stack, STEPS) < TOLERANCE


@pytest.mark.parametrize("kind", MIXED)
def test_hyper_parameters_of_each_trial(kind: str) -> None:
    workload = small_workload()
    # Rates that do not make rounding grow: what Adam does at 0.1 is shown below.
    rates = (0.003, 0.01, 0.03)
    chosen = [p for keys in MIXED[kind] for p in plans(seeds=(0, 1), rates=rates, **keys)]
    route = routes(workload, chosen[0])["products"]
    assert worst_difference(workload, trained(stack_of(workload, route, chosen)), STEPS) < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 4, 16, 60])
@pytest.mark.parametrize("one_order", [True, False])
def test_every_layout_of_the_first_layer(batch_size: int, one_order: bool) -> None:
    workload = small_workload()
    chosen = plans(batch_size=batch_size, one_order=one_order)
    route = routes(workload, chosen[0])["products"]
    assert worst_difference(workload, trained(stack_of(workload, route, chosen)), STEPS) < TOLERANCE


@pytest.mark.parametrize("model", ["perceptron", "convolutions"])
def test_any_mean_loss(model: str) -> None:
    workload = small_workload(MODELS[model], loss=smoothed)
    chosen = plans(one_order=True)
    for name, route in routes(workload, chosen[0]).items():
        if name != "vmap":
            assert (
                route.make(TrialEvaluator(workload, torch.device("cpu"), ()))[0].head.name == "mean"
            )  # type: ignore[attr-defined]
        stack = trained(stack_of(workload, route, chosen))
        assert worst_difference(workload, stack, STEPS) < TOLERANCE


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_batches_in_pieces(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noisescale.run.trials.stacked.chain.PIECE_BYTES", 1.0)
    monkeypatch.setattr("noisescale.run.trials.stacked.chain.FEWEST_EXAMPLES", 5)
    workload = small_workload(MODELS["convolutions"])
    chosen = plans(one_order=True, **OPTIMIZERS[optimizer])
    route = routes(workload, chosen[0])["channels"]
    stack = stack_of(workload, route, chosen)
    leaves = [torch.zeros(1, 17, 2), torch.zeros(1, 17)]
    assert isinstance(stack._network, ChainNetwork)
    pieces = list(stack._network._pieces(stack.weights[0], leaves))
    assert [[leaf.shape[1] for leaf in piece] for piece in pieces] == [[6, 6], [6, 6], [5, 5]]
    assert worst_difference(workload, trained(stack), STEPS) < TOLERANCE


def test_a_batch_that_fits_is_one_piece() -> None:
    workload = small_workload(MODELS["convolutions"])
    chosen = plans(one_order=True)
    stack = stack_of(workload, routes(workload, chosen[0])["channels"], chosen)
    leaves = [torch.zeros(1, 70, 2)]
    assert isinstance(stack._network, ChainNetwork)
    assert list(stack._network._pieces(stack.weights[0], leaves)) == [leaves]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_joined_stacks_go_on_as_before(optimizer: str) -> None:
    workload = small_workload()
    chosen = plans(seeds=(0, 1), **OPTIMIZERS[optimizer])
    route = routes(workload, chosen[0])["products"]
    one = stack_of(workload, route, chosen[::2])
    other = stack_of(workload, route, chosen[1::2])
    with torch.no_grad():
        for _ in range(10):
            one.step()
            other.step()
        assert one.may_join(other)
        one.join(other)
        for _ in range(10):
            one.step()
    assert len(one.trials) == len(chosen)
    assert worst_difference(workload, one, 20) < TOLERANCE


def black_at_the_edges() -> Workload:
    """Inputs of which most are zero, in columns that lie anywhere."""
    workload = small_workload()
    generator = torch.Generator().manual_seed(7)
    columns = torch.randperm(72, generator=generator)

    def blackened(data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = data
        used = 4 + (60 * torch.rand(len(inputs), 1, generator=generator) ** 2).long()
        seen = torch.empty(len(inputs), 72, dtype=torch.bool)
        seen[:, columns] = torch.arange(72) < used
        return inputs * seen.view_as(inputs), labels

    return dataclasses.replace(
        workload, train=blackened(workload.train), evaluate=blackened(workload.evaluate)
    )


@pytest.mark.parametrize("piece", [64, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_of_the_inputs_are_left_out(
    optimizer: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("noisescale.run.trials.stacked.columns.PIECE", piece)
    workload = black_at_the_edges()
    chosen = plans(**OPTIMIZERS[optimizer])
    route = routes(workload, chosen[0])["products"]
    stack = stack_of(workload, route, chosen, sorts=True)
    assert stack._columns is not None
    assert worst_difference(workload, trained(stack), STEPS) < TOLERANCE


def test_sorted_stacks_join_sorted_ones_only() -> None:
    workload = black_at_the_edges()
    chosen = plans(seeds=(0, 1), optimizer="adam")
    route = routes(workload, chosen[0])["products"]
    one, other = (stack_of(workload, route, chosen[i::2], sorts=True) for i in (0, 1))
    assert not one.may_join(stack_of(workload, route, chosen[1::2]))
    with torch.no_grad():
        one.step(), other.step()
        one.join(other)
        one.step()
    assert worst_difference(workload, one, 2) < TOLERANCE


def test_inputs_that_are_hardly_zero_are_left_as_they_are() -> None:
    workload = small_workload()
    chosen = plans()
    route = routes(workload, chosen[0])["products"]
    assert stack_of(workload, route, chosen, sorts=True)._columns is None
    assert Columns.of(torch.zeros(3, 4)) is not None
    assert Columns.of(torch.ones(3, 4)) is None


def lone(workload: Workload, plan: TrialPlan) -> LoneTrial:
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        return LoneTrial(workload, plan)


def apart(one: LoneTrial, other: LoneTrial) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_agree_wherever_the_gradients_do(optimizer: str) -> None:
    """At rates that make rounding grow as well: the order of operations is torch's."""
    workload = small_workload()
    for plan in plans(rates=(0.1,), seeds=(0, 1), **OPTIMIZERS[optimizer]):
        alone = lone(workload, plan)
        params = list(alone.model.parameters())
        shelf = Shelf([p.detach().clone().unsqueeze(0) for p in params])
        update = make_update(shelf, [plan.recipe])
        for step in range(STEPS):
            alone.step()
            with torch.no_grad():
                update.begin(step)
                for j, p in enumerate(params):
                    scale = 1.0 if update.scale is None else update.scale
                    update.value(j, scale * p.grad.unsqueeze(0))
                update.finish()
        for ours, theirs in zip(update.weights.parts, params, strict=True):
            assert float((ours[0] - theirs.detach()).abs().max()) < 1e-13


def test_what_is_beyond_is_growth_of_rounding() -> None:
    """Adam's large steps: a trial that starts one unit in the last place off is as far off."""
    workload = small_workload()
    chosen = plans(rates=(0.1,), seeds=(0, 1, 2, 3), optimizer="adam", betas=(0.5, 0.9))
    grown = 0.0
    for plan in chosen:
        one, other = lone(workload, plan), lone(workload, plan)
        with torch.no_grad():
            for p in other.model.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps)
        for _ in range(STEPS):
            one.step()
            other.step()
        grown = max(grown, apart(one, other))
    assert grown > TOLERANCE / 10
    route = routes(workload, chosen[0])["products"]
    stack = trained(stack_of(workload, route, chosen), drop=())
    assert worst_difference(workload, stack, STEPS) < 30 * grown
