"""The sampler against a slow walk through lists; workers, replicas, resuming, bad input."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from noisescale.errors import InvalidInputError
from noisescale.train import ResizableBatchSampler
from noisescale.train.shuffling import order_of
from saved_states import through_a_file

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=6)


def size_function(steps, examples, multiple=1):
    """A size that is piecewise constant in the position, at most the data."""
    steps = sorted(steps)

    def size(position):
        wanted = 4
        for start, value in steps:
            wanted = value if position >= start else wanted
        return max(multiple, min(wanted, examples) // multiple * multiple)

    return size


def slow_batches(examples, size, seed, last, batches):
    """The same sequence of global batches from lists, one example at a time."""
    found, epoch, position = [], 0, 0
    left = order_of(examples, seed, epoch).tolist()
    while len(found) < batches:
        want = size(position)
        if len(left) < want:
            if last == "keep" and left:
                want = len(left)
            else:
                epoch += 1
                left = (left if last == "carry" else []) + order_of(examples, seed, epoch).tolist()
                continue
        found.append(left[:want])
        left = left[want:]
        position += want
    return found


def take(sampler, batches):
    """So many batches over as many epochs as it takes, each counted."""
    found = []
    while True:
        for batch in sampler:
            found.append(batch)
            sampler.advance()
            if len(found) == batches:
                return found


@settings(deadline=None, max_examples=80)
@given(
    examples=st.integers(1, 60),
    steps=SIZES,
    seed=st.integers(0, 2**40),
    last=st.sampled_from(["keep", "drop", "carry"]),
    resume_after=st.integers(0, 19),
)
def test_the_sequence_is_the_slow_ones_and_resumes_at_any_batch(
    examples, steps, seed, last, resume_after
):
    size = size_function(steps, examples)
    expected = slow_batches(examples, size, seed, last, 20)

    def make():
        return ResizableBatchSampler(examples, size, seed=seed, last=last)

    sampler = make()
    first = take(sampler, resume_after) if resume_after else []
    state = through_a_file(sampler.state_dict())
    assert sampler.position == sum(map(len, first))
    resumed = make()
    resumed.load_state_dict(state)
    assert first + take(resumed, 20 - resume_after) == expected
    assert first + take(sampler, 20 - resume_after) == expected


@settings(deadline=None, max_examples=60)
@given(
    examples=st.integers(12, 60),
    steps=SIZES,
    replicas=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    last=st.sampled_from(["drop", "carry"]),
    before=st.integers(1, 6),
)
def test_replicas_share_one_sequence_and_their_number_may_change_on_resuming(
    examples, steps, replicas, last, before
):
    size = size_function(steps, examples, multiple=12)
    whole = slow_batches(examples, size, 5, last, before * len(replicas))
    found, state = [], None
    for count in replicas:
        ranks = [
            ResizableBatchSampler(examples, size, seed=5, last=last, num_replicas=count, rank=rank)
            for rank in range(count)
        ]
        for sampler in ranks:
            if state is not None:
                sampler.load_state_dict(state)
        shares = [take(sampler, before) for sampler in ranks]
        found += [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
        assert all(len({len(part) for part in parts}) == 1 for parts in zip(*shares, strict=True))
        state = ranks[-1].state_dict()
        assert all(sampler.state_dict() == state for sampler in ranks)
    assert found == whole


@pytest.mark.parametrize("last", ["keep", "drop", "carry"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_per_epoch(last, shuffle):
    sampler = ResizableBatchSampler(53, lambda p: 1 + p % 7, last=last, shuffle=shuffle)
    flat = list(itertools.chain(*take(sampler, 200)))
    if last == "drop":
        return  # what is dropped is the slow walk's to say
    epochs = [flat[at : at + 53] for at in range(0, len(flat) - 53, 53)]
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert (epochs[0] != epochs[1]) == shuffle


def test_orders_differ_by_seed_and_epoch_beyond_32_bits():
    pairs = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), (2**32 + 1, 0), (1, 1)]
    orders = {tuple(order_of(100, seed, epoch).tolist()) for seed, epoch in pairs}
    assert len(orders) == len(pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_draws_ahead_sees_the_same_batches_and_the_loop_its_own_sizes(workers):
    data = TensorDataset(torch.arange(90))

    def size(position):
        return 3 if position < 30 else 10

    def loader_of(sampler):
        ahead = {"prefetch_factor": 3, "persistent_workers": True} if workers else {}
        return DataLoader(data, batch_sampler=sampler, num_workers=workers, **ahead)

    sampler = ResizableBatchSampler(data, size, seed=3)
    found = []
    for (rows,) in loader_of(sampler):
        found.append(rows.tolist())
        assert sampler.batch_size == len(rows)
        assert sampler.position == sum(map(len, found[:-1]))
        assert sampler.advance().size == len(rows)
        if len(found) == 7:
            state = sampler.state_dict()
            break  # with batches drawn that the loop never saw
    resumed = ResizableBatchSampler(data, size, seed=3)
    resumed.load_state_dict(state)
    loader = loader_of(resumed)
    while len(found) < 30:
        for (rows,) in loader:
            found.append(rows.tolist())
            resumed.advance()
    assert found == slow_batches(90, size, 3, "keep", len(found))
    assert (len(found), resumed.epoch) == (34, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_size_set_on_the_way_holds_from_a_place_that_prefetching_does_not_move(workers):
    data = TensorDataset(torch.arange(400))
    sampler = ResizableBatchSampler(data, batch_size=4, lead=4)
    ahead = {"prefetch_factor": 2} if workers else {}
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, **ahead)
    sizes, states = [], []
    for (rows,) in loader:
        sizes.append(len(rows))
        sampler.advance()
        if len(sizes) == 3:
            sampler.set_batch_size(16)
            assert (sampler.batch_size, sampler.last_asked) == (4, 16)
            states.append(through_a_file(sampler.state_dict()))
        if len(sizes) == 12:
            break
    assert sizes == [4] * 7 + [16] * 5
    # What was decided and not reached yet is in the state.
    resumed = ResizableBatchSampler(data, batch_size=4, lead=0)
    resumed.load_state_dict(states[0])
    assert [len(batch) for batch in take(resumed, 9)] == sizes[3:]


def test_a_size_for_batches_that_are_drawn_is_refused():
    data = TensorDataset(torch.arange(400))
    sampler = ResizableBatchSampler(data, batch_size=4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=2)
    for _ in loader:
        sampler.advance()
        break
    with pytest.raises(InvalidInputError, match="are drawn already; give lead="):
        sampler.set_batch_size(8)
    sampler.set_batch_size(8, at=40)
    assert len(sampler) == 10 + 45


@settings(deadline=None, max_examples=50)
@given(
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=5),
    last=st.sampled_from(["keep", "drop", "carry"]),
    resume_after=st.integers(1, 38),
    lead=st.integers(0, 3),
)
def test_sizes_set_at_any_batch_resume_at_any_batch(changes, last, resume_after, lead):
    changes = dict(changes)

    def run(resume_at=None):
        def make():
            return ResizableBatchSampler(31, batch_size=5, last=last, lead=lead)

        sampler, found = make(), []
        while len(found) < 45:
            for batch in sampler:
                found.append(batch)
                sampler.advance()
                if len(found) - 1 in changes:
                    sampler.set_batch_size(changes[len(found) - 1])
                if len(found) == resume_at:
                    state = sampler.state_dict()
                    sampler = make()
                    sampler.load_state_dict(through_a_file(state))
                    break
                if len(found) == 45:
                    break
        return found

    assert run() == run(resume_at=resume_after)


def test_length_is_what_an_iteration_gives():
    for last in ("keep", "drop", "carry"):
        sampler = ResizableBatchSampler(50, lambda p: 3 if p < 20 else 8, last=last)
        for _ in range(4):
            expected, found = len(sampler), 0
            for _ in sampler:
                assert len(sampler) == expected
                sampler.advance()
                found += 1
            assert found == expected


def test_an_iteration_goes_on_where_the_loop_is_unless_another_epoch_is_asked():
    sampler = ResizableBatchSampler(20, batch_size=4, seed=1)
    whole = slow_batches(20, lambda _: 4, 1, "keep", 15)
    assert next(iter(sampler)) == whole[0]  # a glance counts nothing
    assert take(sampler, 2) == whole[:2]
    sampler.set_epoch(0)
    assert take(sampler, 1) == whole[2:3]
    sampler.set_epoch(2)
    assert (sampler.epoch, take(sampler, 1)) == (2, whole[10:11])
    assert sampler.position == 16


def test_epochs_set_by_a_host_are_those_it_goes_through():
    for last in ("keep", "drop", "carry"):
        sampler, plain = (ResizableBatchSampler(22, batch_size=5, last=last) for _ in range(2))
        found = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            for batch in sampler:
                found.append(batch)
                sampler.advance()
        assert found == take(plain, len(found))


def test_an_epoch_of_which_nothing_is_counted_is_refused_rather_than_repeated():
    sampler = ResizableBatchSampler(20, batch_size=4)
    for _ in range(2):
        assert len(list(sampler)) == 5
    with pytest.raises(InvalidInputError, match=r"call BatchSizeSchedule\.step\(\)"):
        list(sampler)
    sampler = ResizableBatchSampler(100, batch_size=1)
    assert len(list(sampler)) == 100
    with pytest.raises(InvalidInputError, match="no batch was counted"):
        list(sampler)


def test_a_glance_at_a_loader_that_draws_all_ahead_changes_nothing():
    data = TensorDataset(torch.arange(12))
    sampler = ResizableBatchSampler(data, batch_size=4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=8)
    first = next(iter(loader))[0].tolist()
    found = []
    for (rows,) in loader:
        found.append(rows.tolist())
        sampler.advance()
    assert found[0] == first
    assert sorted(itertools.chain(*found)) == list(range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_that_counts_every_second_batch_is_told(workers):
    sampler = ResizableBatchSampler(TensorDataset(torch.arange(200)), batch_size=2)
    loader = DataLoader(
        TensorDataset(torch.arange(200)), batch_sampler=sampler, num_workers=workers
    )
    batches = enumerate(loader)

    def count_every_second():
        for number, _ in batches:
            if number % 2:
                sampler.advance()

    with pytest.raises(InvalidInputError, match="5 batches counted and 5 not"):
        count_every_second()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_may_leave_out_a_few_batches(workers):
    sampler = ResizableBatchSampler(TensorDataset(torch.arange(200)), batch_size=2)
    loader = DataLoader(
        TensorDataset(torch.arange(200)), batch_sampler=sampler, num_workers=workers
    )
    for number, _ in enumerate(loader):
        if number % 10 != 5:
            sampler.advance()
    assert sampler.position == 180


def test_uneven_shares_are_refused_or_weighed():
    with pytest.raises(InvalidInputError, match="10 examples over 4 replicas: equal shares"):
        ResizableBatchSampler(100, batch_size=10, num_replicas=4, rank=0)
    with pytest.raises(InvalidInputError, match="over 4 replicas: every replica needs"):
        ResizableBatchSampler(100, batch_size=3, num_replicas=4, rank=0, uneven_shares=True)
    # At the end of an epoch that was begun by one process: 10 of 12 examples are left.
    short = ResizableBatchSampler(12, batch_size=8, num_replicas=4, rank=0)
    alone = ResizableBatchSampler(12, batch_size=2)
    take(alone, 1)
    short.load_state_dict({**alone.state_dict(), "sizes": [[0, 8]]})
    with pytest.raises(InvalidInputError, match="a batch of 2 examples over 4 replicas"):
        list(short)
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).double()
    means = []
    for rank in range(4):
        sampler = ResizableBatchSampler(
            10, batch_size=10, num_replicas=4, rank=rank, uneven_shares=True
        )
        (batch,) = sampler
        assert sampler.local_batch_size == len(batch)
        means.append(values[batch].mean() * sampler.loss_scale)
    torch.testing.assert_close(torch.stack(means).mean(), values.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [{"batch_size": 8}, {"micro_batch_size": 2}])
def test_an_epoch_whose_end_replicas_cannot_share_is_refused_before_it_begins(size):
    with pytest.raises(InvalidInputError, match=r"epoch of 42 examples over 4 replicas.*'drop'"):
        ResizableBatchSampler(42, num_replicas=4, rank=0, **size)
    for enough in ({"last": "drop"}, {"last": "carry"}, {"uneven_shares": True}):
        ResizableBatchSampler(42, num_replicas=4, rank=0, **size, **enough)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        return 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": Stream()}, "an IterableDataset: a batch sampler needs data that can be indexed"),
        ({"data": 0}, "number of examples 0"),
        ({"data": []}, "number of examples 0"),
        ({"data": 2.5}, "number of examples 2.5"),
        ({"batch_size": 101}, "larger than the data, which hold 100 examples; give at most 100"),
        ({"batch_size": 0}, "batch_size 0: a whole number of at least 1"),
        ({"batch_size": True}, "batch_size True"),
        ({"batch_size": 8.0}, "batch_size 8.0"),
        ({"batch_size": None}, "one of the two is required"),
        ({"micro_batch_size": 4}, "one of the two is required"),
        ({"batch_size": None, "micro_batch_size": -1}, "micro_batch_size -1"),
        ({"last": "carri"}, "did you mean carry?"),
        ({"seed": -1}, "seed -1"),
        ({"lead": 0.5}, "lead 0.5"),
        ({"num_replicas": 0}, "num_replicas 0"),
        ({"num_replicas": 2, "rank": 2}, "rank 2: must be below num_replicas 2"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)) as error:
        ResizableBatchSampler(**{"data": 100, "batch_size": 8, **arguments})
    assert "\n" not in str(error.value)


def test_bad_calls_are_one_clear_line():
    sampler = ResizableBatchSampler(100, batch_size=8)
    with pytest.raises(InvalidInputError, match=r"advance\(\) without a batch"):
        sampler.advance()
    with pytest.raises(InvalidInputError, match="batch_size 200: larger than the data"):
        sampler.set_batch_size(200)
    follows = ResizableBatchSampler(100, batch_size=lambda position: 500 if position else 8)
    with pytest.raises(InvalidInputError, match="that follows a schedule"):
        follows.set_batch_size(4)
    with pytest.raises(InvalidInputError, match="batch_size 500: larger than the data"):
        take(follows, 2)
    micro = ResizableBatchSampler(100, micro_batch_size=8)
    with pytest.raises(InvalidInputError, match="sampler of micro-batches"):
        micro.set_batch_size(4)
    with pytest.raises(InvalidInputError, match="sampler of micro-batches"):
        micro.follow(lambda position: 4)
    with pytest.raises(InvalidInputError, match="epoch -1"):
        sampler.set_epoch(-1)
    next(batches := iter(sampler))
    with pytest.raises(InvalidInputError, match="a schedule for a sampler in use"):
        sampler.follow(lambda position: 4)
    batches.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"data": 101}, "dataset_size 100: here it is 101"),
        ({"seed": 1}, "seed 0: here it is 1; resume with seed 0, or start afresh"),
        ({"shuffle": False}, "shuffle True"),
        ({"last": "drop"}, "last keep"),
        ({"batch_size": None, "micro_batch_size": 4}, "per_pass None: here it is 4"),
    ],
)
def test_states_of_other_runs_are_refused(other, words):
    state = ResizableBatchSampler(100, batch_size=8).state_dict()
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        ResizableBatchSampler(**{"data": 100, "batch_size": 8, **other}).load_state_dict(state)


def test_states_that_are_none_are_refused():
    sampler = ResizableBatchSampler(100, batch_size=8)
    good = sampler.state_dict()
    for bad in (None, {}, [], {"version": 1}, {**good, "version": 2}, {**good, "offset": -1}):
        with pytest.raises(InvalidInputError):
            sampler.load_state_dict(bad)
    follows = ResizableBatchSampler(100, batch_size=lambda position: 8).state_dict()
    with pytest.raises(InvalidInputError, match="make its BatchSizeSchedule first"):
        sampler.load_state_dict(follows)
    assert sampler.state_dict() == good


def test_numpy_numbers_are_numbers():
    sampler = ResizableBatchSampler(np.int64(10), batch_size=np.int32(4), seed=np.int64(3))
    sampler.set_batch_size(np.int64(5))
    assert len(next(iter(sampler))) == 5
    assert through_a_file(sampler.state_dict())["seed"] == 3
