from __future__ import annotations

import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import (
    EqualBudget,
    Recipe,
    TrialCurve,
    TrialOutcome,
    TrialPlan,
    TrialResult,
)
from noisescale.theory.equal_budgets import equal_budgets, trial_curves


def curve(
    size: int,
    rate: float,
    seed: str,
    losses: list[float | None],
    outcome: TrialOutcome = TrialOutcome.NOT_REACHED,
) -> TrialCurve:
    at = tuple(10 * (i + 1) for i in range(len(losses)))
    return TrialCurve(
        batch_size=size,
        values={"lr": rate},
        seed=seed,
        outcome=outcome,
        steps=at[-1],
        evaluated_at=at,
        metrics={"validation_loss": tuple(losses)},
    )


CURVES = [
    curve(8, 0.1, "a", [3, 2, 1]),
    curve(8, 0.1, "b", [3, 2.2, 1.2]),
    curve(8, 0.1, "c", [3, 2.4, 1.4]),
    curve(8, 0.5, "a", [1, 5, 0.5]),
    curve(8, 0.5, "b", [2.5, None], TrialOutcome.DIVERGED),
    curve(8, 0.5, "c", [2.6, None], TrialOutcome.DIVERGED),
    curve(16, 0.1, "a", [2.5, 1.5, 0.7]),
]


def at(kind: str, budget: float, **options: int) -> list[EqualBudget]:
    return equal_budgets(CURVES, metric="validation_loss", kind=kind, budgets=[budget], **options)


def test_equal_steps() -> None:
    small, large = at("steps", 20)
    assert small.metric == 2.2  # the median of the rate that does not diverge for most
    assert (small.low, small.high, small.seeds) == (2.0, 2.4, 3)
    assert small.best == {"lr": 0.1}
    assert large.metric == 1.5
    assert small.whole


def test_a_trial_that_diverges_later_counts_until_then() -> None:
    small, _ = at("steps", 10)
    assert small.metric == 2.5
    assert small.best == {"lr": 0.5}


def test_equal_examples_and_epochs_are_the_same_count() -> None:
    by_examples, by_epochs = at("examples", 160), at("epochs", 2, dataset_size=80)
    assert [row.metric for row in by_examples] == [2.2, 2.5]
    assert [row.metric for row in by_epochs] == [row.metric for row in by_examples]


def test_beyond_what_was_run() -> None:
    small, large = at("steps", 100)
    assert small.metric == 1.2
    assert not small.whole
    assert not large.whole


def test_nothing_within_the_budget() -> None:
    small, _ = at("steps", 5)
    assert small.metric is None
    assert small.low is None
    assert EqualBudget.from_json(small.to_json()) == small


def test_greatest() -> None:
    rows = equal_budgets(
        [curve(8, 0.1, "a", [0.2, 0.9]), curve(8, 0.2, "a", [0.3, 0.5])],
        metric="validation_loss",
        kind="steps",
        budgets=[10, 20],
        greatest=True,
    )
    assert [row.metric for row in rows] == [0.3, 0.9]


def test_curves_of_results() -> None:
    plan = TrialPlan(
        workload="w",
        recipe=Recipe(lr=0.1, batch_size=8),
        seed=1,
        order_seed=2,
        targets=(),
        max_steps=20,
    )
    result = TrialResult(
        plan=plan,
        outcome=TrialOutcome.NOT_REACHED,
        steps=20,
        crossings=(),
        stopped_by="budget",
        seconds=1.0,
        evaluated_at=(0, 20),
        values={"validation_loss": (2.0, 1.0)},
    )
    (found,) = trial_curves([result])
    assert found.values["lr"] == 0.1
    assert found.seed == "1/2"
    assert found.metrics == {"validation_loss": (2.0, 1.0)}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"metric": "loss"}, "validation_loss"),
        ({"kind": "days"}, "kind 'days'"),
        ({"kind": "epochs"}, "dataset_size"),
        ({"budgets": [0]}, "positive"),
    ],
)
def test_bad_input(wrong: dict, match: str) -> None:
    options = {"metric": "validation_loss", "kind": "steps", "budgets": [1]} | wrong
    with pytest.raises(InvalidInputError, match=match):
        equal_budgets(CURVES, **options)
