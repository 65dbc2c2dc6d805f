from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch.utils.data import TensorDataset

from noisescale import InvalidInputError
from noisescale.measure.batches import EpochBatches, batch_size_of, move, slices, take

X, Y = torch.arange(10.0).unsqueeze(1), torch.arange(10)
ROWS = torch.tensor([3, 1])


def test_take_from_every_kind_of_data():
    assert take(Y, ROWS).tolist() == [3, 1]
    for data in ((X, Y), [X, Y], TensorDataset(X, Y)):
        x, y = take(data, ROWS)
        assert (x.flatten().tolist(), y.tolist()) == ([3.0, 1.0], [3, 1])
    x, y = take([(X[i], int(Y[i])) for i in range(10)], ROWS)
    assert (x.flatten().tolist(), y.tolist()) == ([3.0, 1.0], [3, 1])
    assert take(list("abcde"), ROWS, collate="".join) == "db"


def test_numpy_arrays_stand_for_tensors():
    x, y = X.numpy(), Y.numpy()
    x.flags.writeable = False  # as a memory-mapped file: torch would warn
    rows = take((x, y), ROWS)
    assert [part.flatten().tolist() for part in rows] == [[3.0, 1.0], [3, 1]]
    assert all(isinstance(part, torch.Tensor) for part in rows)
    assert take(y, ROWS).tolist() == [3, 1]
    assert [part.tolist() for part in take((Y, y), ROWS)] == [[3, 1], [3, 1]]
    with pytest.raises(InvalidInputError, match=r"NumPy type object.*torch.from_numpy"):
        take(y.astype(object), ROWS)


def test_batch_size_of_nested_batches():
    assert batch_size_of({"a": "text", "b": [torch.zeros(()), torch.zeros(5, 2)]}) == 5
    with pytest.raises(InvalidInputError, match="batch of type str"):
        batch_size_of("text")


def test_slices_cut_what_has_the_batchs_length():
    Pair = namedtuple("Pair", "x mask")
    batch = {"pair": Pair(X, torch.ones(3, 3)), "y": Y, "name": "n"}
    parts = list(slices(batch, 4))
    assert [len(p["y"]) for p in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([p["pair"].x for p in parts]), X)
    assert all(p["pair"].mask.shape == (3, 3) and p["name"] == "n" for p in parts)


def test_move_keeps_containers():
    found = move({"a": (X, [Y]), "b": 3}, torch.device("cpu"))
    assert found["a"][0] is X
    assert isinstance(found["a"][1], list)
    assert found["b"] == 3


def test_epochs_are_permutations_without_replacement():
    batches = EpochBatches(10, 3, torch.Generator().manual_seed(0))
    assert iter(batches) is batches
    epochs = [torch.cat([next(batches) for _ in range(batches.per_epoch)]) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch.unique()) == 9
    assert not torch.equal(epochs[0], epochs[1])
    again = EpochBatches(10, 3, torch.Generator().manual_seed(0))
    assert torch.equal(next(again), epochs[0][:3])


def test_epochs_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    next(EpochBatches(10, 3, torch.Generator().manual_seed(0)))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_batch_that_does_not_fit(size):
    with pytest.raises(InvalidInputError, match=f"batch size {size}"):
        EpochBatches(10, size, torch.Generator())
