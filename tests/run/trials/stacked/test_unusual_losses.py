"""What a loss or a metric does that a few examples at the start do not show."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisescale.measure.batches import EpochBatches
from noisescale.records import TrialOutcome, TrialResult
from noisescale.records.trial import TrialPlan
from noisescale.run.trials import train_trials
from noisescale.run.trials.passages import Passages, quantities
from noisescale.run.trials.quantities import TrialEvaluator
from noisescale.run.trials.stacked.feed import Feed
from noisescale.run.trials.stacked.routes import Route, sound_routes
from noisescale.run.trials.stacked.stack import Stack
from noisescale.run.trials.units import RunningTrial
from noisescale.workload import Workload
from run.trials.small import BATCH, MODELS, cross_entropy, plans, small_workload

TARGETS = ("validation_error<0.1", "train_loss<0.1")


def trained(workload: Workload, given: list[TrialPlan], engine: str) -> list[TrialResult]:
    return train_trials(workload, given, engine=engine, keep_curves=True, workers=1)


def worst(workload: Workload, given: list[TrialPlan] | None = None) -> float:
    """Largest difference between evaluations of stacked trials and of lone ones."""
    given = given or plans(rates=(0.03, 0.1), seeds=(0, 1), targets=TARGETS, max_steps=25)
    stacked, alone = (trained(workload, given, engine) for engine in ("stacked", "alone"))
    found = 0.0
    for ours, theirs in zip(stacked, alone, strict=True):
        assert ours.engine == "stacked"
        for name, values in theirs.values.items():
            found = max(found, *np.abs(np.subtract(ours.values[name], values)))
    return found


def weighted_classes(model: Any, batch: Any) -> Tensor:
    weight = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight)


def smoothed_weights(model: Any, batch: Any) -> Tensor:
    weight = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1].long(), weight=weight, label_smoothing=0.1)


def without_class_0(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def clamped(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).clamp(-15, 15), batch[1])


def at_most(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 4).double()).clamp(max=1e4)


@pytest.mark.parametrize("loss", [weighted_classes, smoothed_weights, without_class_0])
@pytest.mark.parametrize("model", ["perceptron", "convolutions"])
def test_a_denominator_of_the_batch_is_not_shared(
    model: str, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("noisescale.run.trials.stacked.chain.PIECE_BYTES", 1.0)
    monkeypatch.setattr("noisescale.run.trials.stacked.chain.FEWEST_EXAMPLES", 5)
    assert worst(small_workload(MODELS[model], loss=loss)) < 1e-12


def test_a_class_that_is_rare_and_left_out() -> None:
    workload = small_workload(loss=without_class_0)
    (x, y), order = workload.train, torch.arange(140)
    rare = dataclasses.replace(workload, train=(x, torch.where(order == 139, 0, 1 + y % 3)))
    assert worst(rare) < 1e-12


def test_a_mask_that_is_rarely_zero() -> None:
    def masked(model: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * batch[2]).sum() / batch[2].sum()

    workload = small_workload(loss=masked)
    (x, y), (vx, vy) = workload.train, workload.evaluate
    seen = next(EpochBatches(len(x), 64, torch.Generator().manual_seed(0)))
    unseen = sorted(set(range(len(x))) - set(seen.tolist()))
    mask = torch.ones(len(x), dtype=torch.float64)
    mask[unseen[:10]] = 0.0
    both = dataclasses.replace(
        workload, train=(x, y, mask), evaluate=(vx, vy, torch.ones(len(vx), dtype=torch.float64))
    )
    assert worst(both) < 1e-12


@pytest.mark.parametrize("loss", [clamped, at_most])
def test_outputs_that_are_large(loss: Any) -> None:
    workload = small_workload(loss=loss)
    (x, y), (vx, vy) = workload.train, workload.evaluate
    large = dataclasses.replace(workload, train=(10 * x, y), evaluate=(10 * vx, vy))
    given = plans(rates=(0.01, 1.0, 5.0), seeds=(0,), targets=TARGETS, max_steps=12)
    assert worst(large, given) < 1e-9


def test_a_diverging_trial_does_not_stop_the_others() -> None:
    given = plans(rates=(0.01, 3.0, 30.0), seeds=(0,), targets=TARGETS, max_steps=20)
    workload = small_workload(loss=at_most)
    ours, theirs = (trained(workload, given, engine) for engine in ("stacked", "alone"))
    outcomes = [TrialOutcome.NOT_REACHED, TrialOutcome.DIVERGED]
    assert [ours[0].outcome, ours[2].outcome] == outcomes
    assert [r.outcome for r in ours] == [r.outcome for r in theirs]
    assert ours[0].values["train_loss"] == pytest.approx(theirs[0].values["train_loss"], 1e-9)


def test_a_loss_with_a_denominator_is_evaluated_batch_by_batch() -> None:
    """As lone trials are: batches of 1,024 and the rest."""
    workload = small_workload(loss=weighted_classes, examples=1500)
    x, y = workload.train
    order = y.argsort()  # other weights in every batch
    later = dataclasses.replace(workload, evaluate=(x[order], y[order]))
    given = plans(rates=(0.03, 0.1), seeds=(0, 1), targets=("validation_loss<0.1",), max_steps=25)
    assert worst(later, given) < 1e-12


def test_a_metric_that_calls_the_model_on_something_else() -> None:
    def turned(model: Any, batch: Any) -> dict[str, Tensor]:
        z = model(batch[0]) + 0.5 * model(batch[0].flip(-1))
        return {"error": (z.argmax(1) != batch[1]).float()}

    assert worst(small_workload(metrics=turned)) < 1e-12


def test_classes_of_a_metric_are_looked_for_in_every_split() -> None:
    def clean(model: Any, batch: Any) -> dict[str, Tensor]:
        return {"error": (model(batch[0]).argmax(1) != batch[2]).float()}

    workload = small_workload(metrics=clean)
    (x, y), (vx, vy) = workload.train, workload.evaluate
    noisy = torch.where(torch.arange(len(y)) % 5 == 4, (y + 1) % 4, y)
    both = dataclasses.replace(workload, train=(x, noisy, y), evaluate=(vx, vy, vy))
    given = plans(rates=(0.03, 0.1), targets=("validation_error<0.1", "train_error<0.1"))
    assert worst(both, given) < 1e-12


def test_labels_that_are_left_out_of_the_evaluation_do_not_end_a_sweep() -> None:
    workload = small_workload()
    vx, vy = workload.evaluate
    left = dataclasses.replace(
        workload, evaluate=(vx, torch.where(torch.arange(len(vy)) < 3, -100, vy))
    )
    given = plans(rates=(0.03, 0.1), seeds=(0,), targets=TARGETS, max_steps=25)
    for engine in ("auto", "stacked"):
        ours, theirs = (trained(left, given, each) for each in (engine, "alone"))
        assert [r.crossings for r in ours] == [r.crossings for r in theirs]


@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_a_metric_that_raises_is_an_outcome(engine: str) -> None:
    """Beyond the few examples on which a way to stack is checked."""

    def raising(model: Any, batch: Any) -> dict[str, Tensor]:
        if len(batch[1]) > 16:
            raise RuntimeError("not so many")
        return {"error": (model(batch[0]).argmax(1) != batch[1]).double()}

    given = plans(rates=(0.03, 0.1), seeds=(0,), max_steps=5)
    found = trained(small_workload(metrics=raising), given, engine)
    assert [r.outcome for r in found] == [TrialOutcome.CRASHED] * 2
    assert all("not so many" in r.detail for r in found)


def test_arrays_that_run_backwards() -> None:
    workload = small_workload()
    x, y = (part.numpy()[::-1] for part in workload.train)
    given = plans(rates=(0.03, 0.1), seeds=(0,), max_steps=25)
    turned = dataclasses.replace(workload, train=(x, y))
    straight = dataclasses.replace(workload, train=(x.copy(), y.copy()))
    ours, theirs = (trained(each, given, "stacked") for each in (turned, straight))
    assert [r.values for r in ours] == [r.values for r in theirs]


def test_layers_that_differ_in_evaluation_are_found_out() -> None:
    class Cooler(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if self.training else 1.05)

    workload = small_workload(lambda: nn.Sequential(nn.Flatten(), Cooler(72, 4)))
    (plan,) = plans(rates=(0.1,), seeds=(0,))
    assert [route.name for route in sound_routes(workload, plan)] == ["vmap"]


@pytest.mark.parametrize("between", [True, False])
def test_outputs_changed_in_place_between_layers_are_found_out(between: bool) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.act = nn.Flatten(), nn.GELU()
            self.first, self.last = nn.Linear(72, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.first(self.flat(x)))
            if between:
                hidden.clamp_(max=2.5)
            answer: Tensor = self.last(hidden)
            return answer if between else answer.clamp_(-9, 9)

    (plan,) = plans(rates=(0.1,), seeds=(0,))
    workload = small_workload(Changing)
    assert [route.name for route in sound_routes(workload, plan)] == ["vmap"]


def test_layers_that_work_in_place_are_stacked() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(inplace=True), nn.Linear(9, 4))

    (plan,) = plans(rates=(0.1,), seeds=(0,))
    found = [route.name for route in sound_routes(small_workload(model), plan)]
    assert found == ["products", "channels", "vmap"]


def stack_of(workload: Workload, given: list[TrialPlan], route: Route | None = None) -> Stack:
    cpu = torch.device("cpu")
    evaluator = TrialEvaluator(workload, cpu, quantities(given[0]))
    route = route or next(sound_routes(workload, given[0]))
    trials = [RunningTrial(plan=p, place=i, passages=Passages(p)) for i, p in enumerate(given)]
    return Stack(route, workload, Feed(workload, cpu), evaluator, trials)


def test_an_order_that_nobody_follows_any_more_does_not_come_back_by_joining() -> None:
    workload = small_workload()
    shared, own = plans(rates=(0.03,), seeds=(0, 1))
    (late,) = plans(rates=(0.1,), seeds=(0,))
    one = stack_of(workload, [shared, own])
    other = stack_of(workload, [late], one.route)
    with torch.no_grad():
        for step in range(20):
            if step == 5:
                one.trials[0].stopped_by = "race"
                one.drop_ended()
            one.step(), other.step()
        one.join(other)
        for _ in range(10):
            one.step()
    alone = trained(workload, [late], "alone")[0]
    at = alone.evaluated_at.index(30)
    place = [trial.plan for trial in one.trials].index(late)
    name = "validation_error"
    assert one.values()[place][0][name] == pytest.approx(alone.values[name][at], abs=1e-12)
    assert one.values()[place][1] == pytest.approx(alone.values["validation_loss"][at], abs=1e-12)


def test_stacks_of_other_updates_do_not_join() -> None:
    workload = small_workload()
    (constant,) = plans(rates=(0.03,), seeds=(0,), momentum=0.9)
    (scheduled,) = plans(
        rates=(0.03,), seeds=(0,), momentum=0.9,
        schedule={"kind": "step", "milestones": [10]},
    )  # fmt: skip
    one = stack_of(workload, [constant])
    other = stack_of(workload, [scheduled], one.route)
    assert one.may_join(stack_of(workload, [constant], one.route))
    assert not one.may_join(other)
    assert worst(workload, [constant, scheduled]) < 1e-12


def test_the_batch_is_smaller_than_what_is_seen_of_a_loss() -> None:
    assert BATCH < 64
    assert worst(small_workload(loss=cross_entropy)) < 1e-12
