from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Crossing, Recipe, TrialOutcome, TrialPlan, TrialResult, TrialRow
from noisescale.theory.trial_table import coordinates, tables, trial_rows, unscaled

REACHED, LATE = TrialOutcome.REACHED, TrialOutcome.NOT_REACHED


def row(seed: str, outcome: TrialOutcome = REACHED, steps: float = 10.0, **values: object):
    return TrialRow(batch_size=8, values=values, seed=seed, outcome=outcome, steps=steps)


def result(first: float | None, sustained: float | None, outcome: TrialOutcome = REACHED):
    plan = TrialPlan(
        workload="w",
        recipe=Recipe(lr=0.1, momentum=0.9, batch_size=8, optimizer="adam", betas=(0.9, 0.99)),
        seed=1,
        order_seed=2,
        targets=("a<1", "b<1"),
        max_steps=100,
    )
    return TrialResult(
        plan=plan,
        outcome=outcome,
        steps=90,
        crossings=(
            Crossing(target="a<1", first=first, sustained=sustained, closest=0.5),
            Crossing(target="b<1", first=None, sustained=None, closest=2.0),
        ),
        stopped_by="targets",
        seconds=1.0,
    )


class TestRows:
    def test_reached(self) -> None:
        (found,) = trial_rows([result(40.5, 50.0)], target="a<1")
        assert (found.outcome, found.steps, found.closest) == (REACHED, 40.5, 0.5)
        assert found.values["beta2"] == 0.99
        assert "batch_size" not in found.values
        (found,) = trial_rows([result(40.5, 50.0)], target="a<1", crossing="sustained")
        assert found.steps == 50

    def test_too_early_to_tell_a_sustained_crossing(self) -> None:
        (found,) = trial_rows([result(40.5, None)], target="a<1", crossing="sustained")
        assert (found.outcome, found.steps) == (LATE, 90)

    def test_diverged_after_it_was_reached(self) -> None:
        diverged = result(40.5, None, TrialOutcome.DIVERGED)
        assert trial_rows([diverged], target="a<1")[0].outcome is REACHED
        assert trial_rows([diverged], target="b<1")[0].outcome is TrialOutcome.DIVERGED

    def test_other_targets_give_no_rows(self) -> None:
        assert trial_rows([result(1, 1)], target="c<1") == []

    def test_an_unknown_crossing(self) -> None:
        with pytest.raises(InvalidInputError, match="first or sustained"):
            trial_rows([], target="a<1", crossing="last")


class TestTables:
    def test_points_by_seeds(self) -> None:
        rows = [row("a", lr=0.1), row("b", lr=0.1, steps=20.0), row("a", LATE, 30.0, lr=0.2)]
        (table,) = tables(rows)
        assert table.names == ("lr",)
        assert table.seeds == ("a", "b")
        np.testing.assert_allclose(np.exp(table.logs[0]), [10, 20])
        assert math.isnan(table.logs[1, 1])
        assert table.reached.tolist() == [[True, True], [False, False]]
        assert table.censored.tolist() == [[False, False], [True, False]]
        assert table.run.tolist() == [2, 1]

    def test_families_of_words(self) -> None:
        rows = [row("a", optimizer=o, lr=r) for o in ("sgd", "adam") for r in (0.1, 0.2)]
        assert [len(table.points) for table in tables(rows)] == [2, 2]

    def test_failures_are_left_out(self) -> None:
        assert tables([row("a", TrialOutcome.CRASHED, lr=0.1)]) == []

    def test_seeds_that_no_two_points_share_are_repeats(self) -> None:
        rows = [row("1", lr=0.1), row("2", lr=0.1), row("3", lr=0.2)]
        (table,) = tables(rows)
        assert table.seeds == ("repeat 1", "repeat 2")
        assert table.reached.tolist() == [[True, True], [True, False]]

    def test_reached_before_the_first_step(self) -> None:
        with pytest.raises(InvalidInputError, match="choose a harder target"):
            tables([row("a", steps=0.0, lr=0.1)])


class TestCoordinates:
    def test_logarithms(self) -> None:
        points = [{"lr": 0.1, "momentum": 0.0, "wd": 0.0}, {"lr": 0.2, "momentum": 0.9, "wd": 2.0}]
        names, places = coordinates(points)
        assert names == ("lr", "momentum", "wd")
        np.testing.assert_allclose(places[1] - places[0], [math.log(2), math.log(10), 1])

    def test_back_again(self) -> None:
        values = {"lr": [0.1, 0.3], "momentum": [0.5, 0.9], "wd": [0.0, 2.0]}
        for name, column in values.items():
            _, places = coordinates([{name: v} for v in column])
            for place, value in zip(places[:, 0], column, strict=True):
                assert unscaled(name, float(place), np.array(column)) == pytest.approx(value)
