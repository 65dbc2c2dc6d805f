"""Sizes that split nothing are refused in one line; what is left out is chosen."""

from __future__ import annotations

import pytest

from noisescale import InvalidInputError, Recipe
from noisescale.run.audit import audit
from noisescale.run.audit.request import read_request
from run.audit.defects import alone, kinds, with_batch_norm, workload


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro": 33}, "micro 33: it cannot be larger than the batch of 32; give at most 16"),
        ({"micro": 0}, "micro 0: a whole number of at least 1"),
        ({"micro": 2.5}, "micro 2.5: a whole number of at least 1"),
        ({"micro": True}, "micro True"),
        ({"micro": 32}, "it does not split the batch of 32, and neither do replicas"),
        ({"replicas": 3}, "take 2 or 4 replicas, or a batch of 30 or 33"),
        ({"replicas": 64}, "take 32 replicas, or a batch of 64"),
        ({"replicas": 0}, "replicas 0"),
        ({"batch_size": 65}, "64 training examples, and a batch cannot be larger"),
        ({"batch_size": 1}, "at least 2 examples are required to split"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": "8"}, "batch_size '8'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 0.5}, "seed 0.5"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(options, words):
    with pytest.raises(InvalidInputError) as problem:
        audit(workload(), **{"replicas": 1, **options})
    assert words in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("batch_size", "micro", "replicas", "passes"),
    [(32, 8, 2, 4), (8, 4, 2, 2), (15, 7, 1, 3), (2, 1, 2, 2), (3, 1, 1, 3)],
)
def test_what_is_left_out_splits_the_batch(batch_size, micro, replicas, passes):
    made = workload(recipe=Recipe(lr=0.1, batch_size=batch_size))
    request = read_request(made, batch_size=None, micro=None, replicas=None)
    assert (request.batch_size, request.micro) == (batch_size, micro)
    assert (request.replicas, request.micro_batches) == (replicas, passes)


def test_the_whole_batch_in_one_pass_is_enough_with_replicas():
    request = read_request(workload(), batch_size=None, micro=32, replicas=2)
    assert request.micro_batches == 1


def test_replicas_that_are_not_possible_are_left_out_with_a_word():
    found = audit(workload(recipe=Recipe(lr=0.1, batch_size=15)))
    assert (found.verdict, found.replicas.outcome) == ("different", "not_run")
    assert kinds(found) == {"partial_window"}
    assert found.warnings == ("a batch of 15 does not split over 2 replicas: none was run",)


def test_a_pass_that_fails_is_told_with_its_size():
    with pytest.raises(InvalidInputError, match="a pass on 8 and 1 examples: ValueError"):
        alone(workload(model=with_batch_norm), batch_size=33)


def test_what_the_users_code_returns_is_checked():
    made = workload(loss=lambda model, batch: model(batch[0]).mean().item())
    with pytest.raises(InvalidInputError, match="returned a float"):
        alone(made)
    made = workload(loss=lambda model, batch: model(batch[0]))
    with pytest.raises(InvalidInputError, match="a tensor of shape"):
        alone(made)
