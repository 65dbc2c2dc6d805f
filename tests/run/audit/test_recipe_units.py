"""Lengths in a recipe that cannot be meant, and those that can."""

from __future__ import annotations

import pytest

from noisescale import Recipe
from noisescale.run.audit.counts import explain_weights
from noisescale.run.audit.recipe_units import Counting, unit_warnings

COUNTING = Counting(batch_size=32, micro_batches=4, replicas=2, dataset_size=3200)


def warnings(counting=COUNTING, **recipe):
    return unit_warnings(Recipe(lr=0.1, **{"batch_size": 32, **recipe}), counting)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"total_steps": 1000, "warmup_steps": 50, "evaluate_every": 100},
        {"total_steps": 100, "total_examples": 3210},
        {"total_examples": 32000, "warmup_examples": 320},
        {"total_steps": 900, "schedule": {"kind": "step", "milestones": [300, 600]}},
        {"warmup_steps": 500},
        {"dataset_size": 3200},
        {"dataset_size": 99, "unit": "sequences"},
    ],
)
def test_sound_recipes_are_left_alone(recipe):
    assert warnings(**recipe) == ()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"total_steps": 400, "total_examples": 3200}, "it seems to count micro-batches"),
        ({"total_steps": 200, "total_examples": 3200}, "it seems to count the steps of all"),
        ({"total_steps": 800, "total_examples": 3200}, "micro-batches of all replicas"),
        ({"total_steps": 3200, "total_examples": 3200}, "it seems to count examples"),
        ({"total_steps": 500, "total_examples": 3200}, "the two contradict each other"),
        ({"warmup_steps": 40, "warmup_examples": 320}, "warmup_steps 40 is 4 times"),
        ({"total_steps": 400, "warmup_steps": 400}, "never reached; does it count micro-batches?"),
        ({"total_steps": 400, "warmup_steps": 9000}, "never reached; does it count examples?"),
        ({"warmup_examples": 10}, "there is no warm-up; does it count steps?"),
        ({"total_steps": 400, "evaluate_every": 800}, "evaluate_every 800 is longer"),
        (
            {"total_steps": 400, "schedule": {"kind": "step", "milestones": [300, 1000]}},
            "milestone 1000 of the schedule is never reached in 400 steps; does it count micro",
        ),
        (
            {"total_steps": 9000, "schedule": {"kind": "step", "milestones": [30, 60]}},
            "the last milestone 60 lies in the first 1% of 9000 steps; do they count epochs?",
        ),
        ({"total_steps": 3_200_000}, "pass 32000 times over the data"),
        ({"dataset_size": 50_000}, "dataset_size 50000 of the recipe is not"),
        ({"batch_size": 64, "total_steps": 900}, "total_steps count steps of 64 examples"),
    ],
)
def test_what_cannot_be_meant_is_told(recipe, words):
    found = warnings(**recipe)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    ("milestones", "told"), [([30, 60, 90], True), ([90], True), ([30], False), ([300, 600], False)]
)
def test_milestones_in_epochs_of_few_steps_are_told(milestones, told):
    # 10 steps per epoch: 90 epochs are 900 of 1000 steps; 30 may be meant in steps.
    counting = Counting(batch_size=32, micro_batches=4, replicas=1, dataset_size=320)
    schedule = {"kind": "step", "milestones": milestones}
    recipe = Recipe(lr=0.1, batch_size=32, total_steps=1000, schedule=schedule)
    words = "the last milestone 90 lies in the first 9% of 1000 steps; do they count epochs?"
    assert unit_warnings(recipe, counting) == ((words,) if told else ())


def test_weights_that_nothing_counted_explains_stay_unexplained():
    import torch

    parts = [{"x": torch.ones(2, 3), "mask": torch.tensor([True, False])}] * 2
    assert explain_weights(parts, [0.5, 0.5]) == "the sum of batch['x']"
    assert explain_weights(parts, [0.4, 0.6]) is None
    parts = [(torch.tensor([True, False]),), (torch.tensor([True, True]),)]
    assert explain_weights(parts, [1 / 3, 2 / 3]) == "the true entries of batch[0]"
