from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from noisescale.errors import InvalidInputError
from noisescale.records.trial import TrialOutcome, TrialResult
from noisescale.run.trials import TrialProgress, train_trial, train_trials
from noisescale.run.trials.quantities import answers_kept
from run.trials.small import MODELS, cross_entropy, error, plans, small_workload

TARGETS = ("train_loss<1.37", "train_loss<1.33", "validation_error<0.72")


def told(results: Sequence[TrialResult]) -> list[Any]:
    """What must not depend on who trained: all but time and engine."""
    return [(r.plan.key, r.outcome, r.steps, r.stopped_by, r.evaluated_at) for r in results]


@pytest.mark.parametrize(
    ("model", "engine", "workers"),
    [
        ("perceptron", "stacked", 1),
        ("perceptron", "stacked", 2),
        ("perceptron", "alone", 2),
        ("perceptron", "auto", 1),
        ("convolutions", "stacked", 1),
    ],
)
def test_all_engines_agree_with_one_by_one(model: str, engine: str, workers: int) -> None:
    workload = small_workload(MODELS[model])
    chosen = plans(targets=TARGETS, rates=(0.03, 0.3, 1.0), seeds=(0, 1), max_steps=40)
    ours = train_trials(workload, chosen, engine=engine, workers=workers, keep_curves=True)
    theirs = [train_trial(workload, plan, keep_curves=True) for plan in chosen]
    assert told(ours) == told(theirs)
    assert sum(r.outcome is TrialOutcome.REACHED for r in ours) >= 2
    for a, b in zip(ours, theirs, strict=True):
        assert [crossing.target for crossing in a.crossings] == list(TARGETS)
        for ours_c, theirs_c in zip(a.crossings, b.crossings, strict=True):
            for name in ("first", "sustained", "closest"):
                x, y = getattr(ours_c, name), getattr(theirs_c, name)
                assert x == y if x is None else x == pytest.approx(y, abs=1e-9)
    if engine != "auto":
        assert {r.engine for r in ours} == {engine}


def test_single_precision_agrees_on_the_steps_to_target() -> None:
    """Rounding moves a crossing by far less than another seed does."""
    workload = small_workload(dtype=torch.float32)
    chosen = plans(targets=("train_loss<1.25",), rates=(0.1, 0.3), max_steps=200)
    ours = train_trials(workload, chosen, engine="stacked", workers=1)
    theirs = [train_trial(workload, plan) for plan in chosen]
    reached = [
        (a.crossings[0].first, b.crossings[0].first) for a, b in zip(ours, theirs, strict=True)
    ]
    assert all((a is None) == (b is None) for a, b in reached)
    assert max(abs(math.log(a / b)) for a, b in reached if a and b) < 1e-3
    assert sum(a is not None for a, _ in reached) >= 3


def test_a_diverging_trial_ends_and_the_others_go_on() -> None:
    workload = small_workload()
    chosen = plans(rates=(0.1, 1e6), seeds=(0,), max_steps=40)
    for engine in ("stacked", "alone"):
        good, bad = train_trials(workload, chosen, engine=engine, workers=1)
        assert bad.outcome is TrialOutcome.DIVERGED
        assert bad.stopped_by == "divergence"
        assert good.outcome in (TrialOutcome.REACHED, TrialOutcome.NOT_REACHED)


def test_results_are_handed_over_once_each_as_trials_end() -> None:
    seen: list[TrialResult] = []
    chosen = plans(rates=(0.03, 0.3, 1.0), max_steps=60)
    results = train_trials(
        small_workload(), chosen, engine="stacked", workers=2, on_result=seen.append
    )
    assert sorted(r.plan.key for r in seen) == sorted(plan.key for plan in chosen)
    assert [r.plan for r in results] == chosen


class StopSlow:
    """Stops one rate as soon as it is asked, and notes what it was told."""

    def __init__(self, lr: float) -> None:
        self.lr, self.asked = lr, 0

    def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
        self.asked += 1
        self.keys = [each.key for each in progress]
        return {each.key for each in progress if each.plan.recipe.lr == self.lr}


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_a_judge_stops_trials_and_changes_nothing_for_the_others(engine: str) -> None:
    workload = small_workload()
    chosen = plans(rates=(0.001, 0.3), max_steps=60)
    judge = StopSlow(0.001)
    raced = train_trials(workload, chosen, engine=engine, workers=1, judge=judge)
    free = train_trials(workload, chosen, engine=engine, workers=1)
    assert judge.keys == [plan.key for plan in chosen]
    for plan, a, b in zip(chosen, raced, free, strict=True):
        if plan.recipe.lr == 0.001:
            assert a.stopped_by == "race"
            assert a.outcome is TrialOutcome.NOT_REACHED
            assert a.steps < b.steps
        else:
            assert told([a]) == told([b])


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_stopping_from_outside_interrupts(engine: str) -> None:
    asked = []

    def stop() -> bool:
        asked.append(threading.get_ident())
        return len(asked) > 20

    results = train_trials(small_workload(), plans(), engine=engine, workers=1, should_stop=stop)
    assert {r.outcome for r in results} == {TrialOutcome.INTERRUPTED}
    assert len(results) == 9


def test_what_on_result_raises_ends_everything() -> None:
    def full(result: TrialResult) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        train_trials(small_workload(), plans(max_steps=5), workers=2, on_result=full)


def test_little_memory_makes_trials_wait() -> None:
    workload = small_workload()
    chosen = plans(max_steps=30)
    results = train_trials(workload, chosen, engine="stacked", workers=1, memory_bytes=1)
    assert told(results) == told(train_trials(workload, chosen, engine="stacked", workers=1))


def test_a_stack_that_fails_is_trained_one_by_one() -> None:
    """A loss that cannot take many trials' examples at once after all."""
    workload = small_workload()

    def choosy(model: Any, batch: Any) -> Tensor:
        if len(batch[1]) > 60 and torch.is_grad_enabled():
            raise RuntimeError("too many examples")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    workload = dataclasses.replace(workload, loss=choosy)
    results = train_trials(
        workload, plans(rates=(0.1, 0.2), seeds=(0, 1, 2), max_steps=10), engine="auto", workers=1
    )
    assert {r.outcome for r in results} <= {TrialOutcome.REACHED, TrialOutcome.NOT_REACHED}


@pytest.mark.parametrize(
    ("raised", "outcome", "stopped_by"),
    [
        (ValueError("broken"), TrialOutcome.CRASHED, "crash"),
        (MemoryError("full"), TrialOutcome.INFEASIBLE_MEMORY, "memory"),
    ],
)
def test_a_crash_is_an_outcome(raised: Exception, outcome: TrialOutcome, stopped_by: str) -> None:
    def broken(model: Any, batch: Any) -> Tensor:
        if len(batch[1]) == 17 and model.training:
            raise raised
        return cross_entropy(model, batch)

    (plan,) = plans(rates=(0.1,), seeds=(0,))
    result = train_trial(small_workload(loss=broken), plan)
    assert result.outcome is outcome
    assert result.stopped_by == stopped_by
    assert str(raised) in result.detail


@pytest.mark.parametrize("engine", ["alone", "stacked"])
def test_losses_and_metrics_may_take_of_the_model_what_they_like(engine: str) -> None:
    def decayed(model: Any, batch: Any) -> Tensor:
        assert isinstance(model, nn.Module)
        return cross_entropy(model, batch) + 1e-3 * sum(
            p.square().sum() for layer in list(model)[1:] for p in layer.parameters()
        )

    def measured(model: Any, batch: Any) -> dict[str, Tensor]:
        return {"error": error(model, batch)["error"] + 0 * model[1].weight.sum()}

    workload = small_workload(loss=decayed, metrics=measured)
    chosen = plans(targets=TARGETS, rates=(0.1, 0.2), max_steps=10)
    results = train_trials(workload, chosen, workers=1, engine=engine)
    assert TrialOutcome.CRASHED not in {r.outcome for r in results}
    for ours, plan in zip(results, chosen, strict=True):
        theirs = train_trial(workload, plan)
        assert ours.steps == theirs.steps
        for mine, other in zip(ours.crossings, theirs.crossings, strict=True):
            assert mine.closest == pytest.approx(other.closest, rel=1e-4)


def test_weights_that_were_exchanged_are_asked_again() -> None:
    model, inputs = nn.Linear(2, 1), torch.ones(3, 2)
    with torch.no_grad(), answers_kept(model):
        first = model(inputs)
        assert model(inputs) is first
        moved = functional_call(model, {"weight": model.weight + 1}, (inputs,))
        torch.testing.assert_close(moved, first + 2)
        model.weight.add_(1)
        torch.testing.assert_close(model(inputs), moved)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("judged", [False, True])
def test_models_that_draw_are_trained_as_one_by_one(judged: bool) -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Dropout(0.5), nn.Linear(16, 4))

    workload = small_workload(dropping)
    chosen = plans(rates=(0.1, 0.3), max_steps=30)
    judge = StopSlow(-1.0) if judged else None
    ours = train_trials(workload, chosen, workers=2, judge=judge)
    theirs = [train_trial(workload, plan) for plan in chosen]
    assert [r.crossings for r in ours] == [r.crossings for r in theirs]
    assert {r.engine for r in ours} == {"alone"}


def test_clipping_is_known_by_one_by_one_only() -> None:
    chosen = plans(clip_norm=1.0, max_steps=5)
    results = train_trials(small_workload(), chosen, workers=1)
    assert {r.engine for r in results} == {"alone"}
    with pytest.raises(InvalidInputError, match="clip_norm"):
        train_trials(small_workload(), chosen, engine="stacked", workers=1)


def test_the_callers_random_state_and_threads_are_left_alone() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    train_trials(small_workload(), plans(max_steps=5), workers=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_bad_input() -> None:
    workload = small_workload()
    assert train_trials(workload, []) == []
    with pytest.raises(InvalidInputError, match="one batch size"):
        train_trials(workload, plans() + plans(batch_size=4))
    with pytest.raises(InvalidInputError, match="batch size 500"):
        train_trials(workload, plans(batch_size=500))
    with pytest.raises(InvalidInputError, match="engine"):
        train_trials(workload, plans(), engine="fast")
    with pytest.raises(InvalidInputError, match="takes betas"):
        train_trials(workload, plans(optimizer="adam", momentum=0.9))
    normed = small_workload(
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 4))
    )
    with pytest.raises(InvalidInputError, match="can be stacked"):
        train_trials(normed, plans(), engine="stacked")
