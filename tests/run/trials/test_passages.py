from __future__ import annotations

import itertools
import math

import pytest

from noisescale.records import Recipe, Target
from noisescale.records.trial import TrialOutcome, TrialPlan
from noisescale.run.trials.passages import SUSTAINED_GRACE, Passage, Passages, quantities

GOAL = "validation_error<0.1"


def plan(*targets: str, max_steps: int = 1000, share: float = 0.04, hold: int = 3) -> TrialPlan:
    return TrialPlan(
        workload="w",
        recipe=Recipe(lr=0.1, batch_size=4),
        seed=0,
        order_seed=0,
        targets=targets or (GOAL,),
        max_steps=max_steps,
        evaluate_share=share,
        hold=hold,
    )


def noted(values: list[float], *, text: str = GOAL, hold: int = 3) -> Passage:
    passage = Passage(Target.parse(text), hold=hold)
    for i, value in enumerate(values):
        passage.note(10 * i, value)
    return passage


def test_first_passage_is_interpolated() -> None:
    passage = noted([0.9, 0.2, 0.05])
    assert passage.first == pytest.approx(10 + 10 * (0.2 - 0.1) / (0.2 - 0.05))
    assert passage.sustained is None
    assert passage.closest == 0.05


def test_a_target_of_more_than() -> None:
    passage = noted([0.1, 0.5, 0.9], text="validation_accuracy>0.7", hold=1)
    assert passage.first == passage.sustained == pytest.approx(15)
    assert passage.closest == 0.9


def test_sustained_begins_where_the_run_of_passes_does() -> None:
    passage = noted([0.3, 0.05, 0.15, 0.05, 0.05, 0.05])
    assert passage.first == pytest.approx(8)
    assert passage.sustained == pytest.approx(25)


def test_sustained_is_the_first_passage_without_flicker() -> None:
    passage = noted([0.3, 0.05, 0.04, 0.09])
    assert passage.first == passage.sustained


def test_reached_at_step_0() -> None:
    passage = noted([0.05, 0.05, 0.05])
    assert passage.first == 0
    assert passage.sustained == 0


def test_equal_to_the_target_is_not_passed() -> None:
    assert noted([0.3, 0.1, 0.1]).first is None


def test_not_finite_values_are_no_closest() -> None:
    passage = noted([math.nan, 0.4, math.inf])
    assert passage.closest == 0.4
    assert noted([math.nan]).closest is None


def test_interpolation_after_a_value_that_is_not_finite() -> None:
    assert noted([math.inf, 0.05]).first == 10


def test_the_cadence_follows_the_steps_done_and_ends_on_the_budget() -> None:
    passages = Passages(plan(max_steps=103))
    seen = []
    while passages.goes_on:
        seen.append(passages.next_step)
        passages.note(passages.next_step, {"validation_error": 0.5}, 1.0)
    assert seen[:3] == [0, 1, 2]
    assert seen[-1] == 103
    assert all(b - a == max(1, a // 25) for a, b in itertools.pairwise(seen[:-1]))
    assert passages.stopped_by == "budget"
    assert passages.outcome is TrialOutcome.NOT_REACHED


def test_it_ends_when_every_target_is_sustained() -> None:
    passages = Passages(plan(GOAL, "validation_error<0.2"))
    for error in (0.9, 0.15, 0.15, 0.15, 0.05, 0.05):
        passages.note(passages.next_step, {"validation_error": error}, 1.0)
        assert passages.goes_on
    passages.note(passages.next_step, {"validation_error": 0.05}, 1.0)
    assert passages.stopped_by == "targets"
    assert passages.outcome is TrialOutcome.REACHED
    hard, easy = passages.crossings
    assert hard.target == GOAL
    assert easy.sustained is not None
    assert hard.sustained is not None
    assert easy.sustained < hard.sustained


def test_a_flickering_trial_is_not_waited_for_without_end() -> None:
    passages = Passages(plan(max_steps=100_000))
    flips = 0
    while passages.goes_on:
        low = passages.next_step > 200 and flips % 2 == 0
        flips += passages.next_step > 200
        passages.note(passages.next_step, {"validation_error": 0.05 if low else 0.5}, 1.0)
    (crossing,) = passages.crossings
    assert passages.stopped_by == "targets"
    assert crossing.first is not None
    assert crossing.sustained is None
    assert crossing.first < passages.steps < 1.1 * SUSTAINED_GRACE * crossing.first


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_diverges(loss: float) -> None:
    passages = Passages(plan())
    passages.note(0, {"validation_error": 0.9}, 2.3)
    passages.note(1, {"validation_error": 0.9}, loss)
    assert passages.stopped_by == "divergence"
    assert passages.outcome is TrialOutcome.DIVERGED


def test_a_spike_does_not_diverge_and_a_lasting_rise_does() -> None:
    passages = Passages(plan())
    for step, loss in enumerate([2.0, 20.0, 2.0, 2.0]):
        passages.note(step, {"validation_error": 0.9}, loss)
    assert passages.goes_on
    for step in range(4, 20):
        passages.note(step, {"validation_error": 0.9}, 20.0)
        if not passages.goes_on:
            break
    assert passages.stopped_by == "divergence"


def test_a_trial_that_reached_and_then_diverged_has_reached() -> None:
    passages = Passages(plan())
    passages.note(0, {"validation_error": 0.9}, 2.0)
    passages.note(1, {"validation_error": 0.05}, 2.0)
    passages.note(2, {"validation_error": 0.9}, math.nan)
    assert passages.outcome is TrialOutcome.REACHED
    assert passages.stopped_by == "divergence"


def test_curves_are_kept_when_asked_for() -> None:
    passages = Passages(plan(), keep_curves=True)
    passages.note(0, {"validation_error": 0.9}, 2.0)
    passages.note(1, {"validation_error": math.nan}, 2.0)
    assert passages.evaluated_at == [0, 1]
    assert passages.values == {"validation_error": [0.9, None]}
    assert Passages(plan()).evaluated_at == []


def test_quantities_are_named_once() -> None:
    both = plan(GOAL, "train_loss<0.3", "validation_error<0.2")
    assert quantities(both) == ("validation_error", "train_loss")
