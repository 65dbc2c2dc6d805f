"""Accumulated gradients against the whole batch's; ends of data, changes, replicas."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.train import GradientAccumulation, ResizableBatchSampler
from saved_states import through_a_file


def data(examples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 3, generator=generator, dtype=torch.float64)


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def losses(model, rows):
    return (model(rows).squeeze(1) - rows.sum(1)).square()


def gradient(model, rows, weights=None):
    """The slow way: one backward pass over the whole batch."""
    found = copy.deepcopy(model)
    found.zero_grad()
    weights = torch.ones(len(rows)) if weights is None else weights
    ((losses(found, rows) * weights).sum() / weights.sum()).backward()
    return [parameter.grad for parameter in found.parameters()]


def close(model, expected):
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    examples=st.integers(1, 60),
    last=st.sampled_from(["flush", "drop", "carry"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_updates_are_means_over_the_examples_seen(micro, accumulation, examples, last, reduction):
    model, rows = a_model(), data(examples)
    window = GradientAccumulation(
        model, micro_batch_size=micro, batch_size=micro * accumulation, last=last,
        loss_reduction=reduction,
    )  # fmt: skip
    passes = [*rows.split(micro)] * 2 if last == "carry" else [*rows.split(micro)]
    epochs = (
        [passes[: len(passes) // 2], passes[len(passes) // 2 :]] if last == "carry" else [passes]
    )
    seen, sizes = [], []
    for epoch in epochs:
        for part in window.over(epoch):
            seen.append(part)
            with window.micro_batch(len(part)) as weight:
                loss = losses(model, part)
                ((loss.mean() if reduction == "mean" else loss.sum()) * weight).backward()
            if window.is_update:
                assert window.micro_batches_done == 0
                batch = torch.cat(seen)
                sizes.append(len(batch))
                assert window.last_batch_size == len(batch)
                close(model, gradient(model, batch))
                model.zero_grad()
                seen = []
    assert (window.updates, window.position) == (len(sizes), sum(sizes))
    left = len(passes) % accumulation
    if last == "flush":
        assert sum(sizes) == examples
    if last == "drop":
        assert window.dropped == examples - sum(sizes)
        assert all(parameter.grad is None for parameter in model.parameters())
    if last == "carry":
        assert (window.micro_batches_done, len(seen)) == (left, left)


def test_a_full_batch_of_full_micro_batches_is_the_usual_division():
    rows, ours, theirs = data(12), a_model(), a_model()
    window = GradientAccumulation(ours, micro_batch_size=4, batch_size=12)
    for part in window.over(rows.split(4)):
        with window.micro_batch() as weight:
            assert weight == 1 / 3
            (losses(ours, part).mean() * weight).backward()
        (losses(theirs, part).mean() * (1 / 3)).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tokens_that_count_weigh_micro_batches(reduction):
    model, rows = a_model(), data(16)
    tokens = torch.tensor([1, 7, 3, 5] * 4)
    window = GradientAccumulation(
        model, micro_batch_size=2, batch_size=8, weight_per_example=7, loss_reduction=reduction
    )
    done = 0
    for part, count in window.over(zip(rows.split(2), tokens.split(2), strict=True)):
        with window.micro_batch(weight=float(count.sum())) as weight:
            loss = (losses(model, part) * count).sum()
            loss = loss / count.sum() if reduction == "mean" else loss
            (loss * weight).backward()
        if window.is_update:
            batch = slice(8 * done, 8 * done + 8)
            close(model, gradient(model, rows[batch], tokens[batch]))
            model.zero_grad()
            done += 1
    assert (done, window.position) == (2, 16)


def test_a_batch_without_any_token_leaves_the_gradient():
    model = a_model()
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=4, loss_reduction="sum")
    for part in window.over(data(4).split(2)):
        with window.micro_batch(weight=0) as weight:
            (losses(model, part) * 0).sum().mul(weight).backward()
    assert window.is_update
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_the_accumulation_changes_only_between_updates():
    model = a_model()
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=4)
    sizes = []
    for part in window.over(data(24).split(2)):
        with window.micro_batch():
            losses(model, part).mean().backward()
        if window.is_update:
            sizes.append(window.last_batch_size)
            window.set_batch_size(8 if len(sizes) >= 2 else 4)
        else:
            with pytest.raises(InvalidInputError) as error:
                window.set_batch_size(8)
            assert "the accumulation changes only between updates" in str(error.value)
            assert "\n" not in str(error.value)
            with pytest.raises(InvalidInputError, match=r"after [123] of [24] micro"):
                window.follow(lambda position: 8)
    assert sizes == [4, 4, 8, 8]
    with pytest.raises(InvalidInputError, match="the nearest valid splits are 8 = 2 x 4 x 1 or 10"):
        window.set_batch_size(9)
    assert window.batch_size == 8


def test_sizes_follow_a_function_of_the_position():
    model = a_model()
    window = GradientAccumulation(model, micro_batch_size=2)
    window.follow(lambda position: 2 if position < 4 else 6)
    sizes = []
    for part in window.over(data(24).split(2)):
        with window.micro_batch():
            losses(model, part).mean().backward()
        if window.is_update:
            sizes.append((window.position, window.last_batch_size, window.batch_size))
    assert sizes == [(2, 2, 2), (4, 2, 6), (10, 6, 6), (16, 6, 6), (22, 6, 6), (24, 2, 6)]


def test_a_micro_batch_that_failed_does_not_count():
    model = a_model()
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=4, last="carry")
    for fails in (False, True, False):
        context = pytest.raises(RuntimeError) if fails else contextlib.nullcontext()
        with context, window.micro_batch():
            if fails:
                raise RuntimeError("out of memory")
        assert window.micro_batches_done == (0 if window.is_update else 1)
    assert (window.updates, window.position) == (1, 4)


def test_a_loop_that_is_left_early_keeps_its_batch():
    model = a_model()
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=6, last="drop")
    for part in window.over(data(8).split(2)):
        with window.micro_batch():
            losses(model, part).mean().backward()
        break
    assert (window.micro_batches_done, window.dropped) == (1, 0)
    assert list(window.over([])) == []


def test_sparse_gradients_are_means_too():
    model = nn.EmbeddingBag(5, 2, sparse=True, mode="sum")
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=8)
    for part in window.over([torch.tensor([[1], [2]]), torch.tensor([[2]])]):
        with window.micro_batch(len(part)) as weight:
            (model(part).sum(1).mean() * weight).backward()
    dense = model.weight.grad.to_dense()[:, 0]
    torch.testing.assert_close(dense, torch.tensor([0.0, 1 / 3, 2 / 3, 0.0, 0.0]))


class Synchronised(nn.Module):
    """Notes when gradients would be averaged, as DistributedDataParallel or fully_shard does."""

    def __init__(self, sharded):
        super().__init__()
        self.inner, self.synced, self.log = a_model(), True, []
        if sharded:
            self.set_requires_gradient_sync = lambda now: setattr(self, "synced", now)
        else:
            self.no_sync = self._no_sync

    @contextlib.contextmanager
    def _no_sync(self):
        self.synced = False
        yield
        self.synced = True

    def forward(self, rows):
        self.log.append(self.synced)
        return self.inner(rows)


@pytest.mark.parametrize("sharded", [True, False])
def test_only_the_last_micro_batch_synchronises(sharded):
    model = Synchronised(sharded)
    window = GradientAccumulation(model, micro_batch_size=2, batch_size=6)
    for part in window.over(data(10).split(2)):
        with window.micro_batch():
            losses(model, part).mean().backward()
    assert model.log == [False, False, True, False, True]


def test_grad_scaler_sees_the_same_gradients():
    plain, scaled = a_model().float(), a_model().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rows = data(10).float()
    for model in (plain, scaled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        window = GradientAccumulation(model, micro_batch_size=4, batch_size=8)
        for part in window.over(rows.split(4)):
            with window.micro_batch(len(part)) as weight:
                loss = losses(model, part).mean() * weight
                (scaler.scale(loss) if model is scaled else loss).backward()
            if window.is_update:
                if model is scaled:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_weights_are_summed_over_replicas(replicas):
    rows, tokens = data(8), torch.arange(1, 9)
    total = float(tokens.sum())
    models = [a_model() for _ in range(replicas)]
    for rank, model in enumerate(models):
        share = slice(8 // replicas * rank, 8 // replicas * (rank + 1))
        window = GradientAccumulation(
            model, micro_batch_size=1, batch_size=8, num_replicas=replicas, last="carry",
            sum_over_replicas=lambda own: total,
        )  # fmt: skip
        for part, count in zip(rows[share].split(1), tokens[share], strict=True):
            with window.micro_batch(weight=float(count)) as weight:
                (losses(model, part).mean() * weight).backward()
        assert (window.is_update, window.position) == (True, 8)
    mean = [
        torch.stack(grads).mean(0)
        for grads in zip(*[[p.grad for p in m.parameters()] for m in models], strict=True)
    ]
    for found, expected in zip(mean, gradient(a_model(), rows, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def micro_batches(replicas, micro, state, updates, size, examples=50):
    """Global batches that simulated replicas make, and the state after them."""
    batches = [[] for _ in range(updates)]
    for rank in range(replicas):
        sampler = ResizableBatchSampler(
            examples, micro_batch_size=micro, last="carry", num_replicas=replicas, rank=rank
        )
        window = GradientAccumulation(a_model(), micro_batch_size=micro, sampler=sampler)
        window.follow(size)
        if state is not None:
            window.load_state_dict(state)
        done, passes = 0, []
        for _ in itertools.count():
            for part in window.over(sampler):
                if done == updates:
                    break
                with window.micro_batch(len(part)):
                    passes.append(part)
                if window.is_update:
                    batches[done].append(passes)
                    saved = through_a_file(window.state_dict())
                    done, passes = done + 1, []
            if done == updates:
                break
    # By pass, then by rank: the order of the stream.
    return [
        [index for parts in zip(*ranks, strict=True) for part in parts for index in part]
        for ranks in batches
    ], saved


@settings(deadline=None, max_examples=15)
@given(
    splits=st.lists(
        st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1), (2, 6)]),
        min_size=1, max_size=4,
    ),
    threshold=st.integers(0, 150),
)  # fmt: skip
def test_global_batches_are_the_same_under_any_split_after_any_resume(splits, threshold):
    def size(position):
        return 12 if position < threshold else 36

    found, state = [], None
    for replicas, micro in splits:
        batches, state = micro_batches(replicas, micro, state, 3, size)
        found += batches
    assert found == micro_batches(1, 12, None, 3 * len(splits), size)[0]


def test_a_state_inside_a_batch_is_that_of_the_last_update():
    def make():
        sampler = ResizableBatchSampler(30, micro_batch_size=2, last="carry")
        return sampler, GradientAccumulation(
            a_model(), micro_batch_size=2, batch_size=8, sampler=sampler
        )

    sampler, window = make()
    seen = []
    for part in window.over(sampler):
        with window.micro_batch():
            seen.append(part)
        if len(seen) == 6:
            break
    assert (window.position, window.micro_batches_done, sampler.position) == (8, 2, 12)
    again, resumed = make()
    resumed.load_state_dict(through_a_file(window.state_dict()))
    assert next(iter(again)) == seen[4]
    # The loop itself goes on where it is.
    assert next(iter(sampler)) not in seen


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
        ({"batch_size": 9}, "global_batch_size 9: does not divide by micro_batch_size 2"),
        ({"num_replicas": 3}, "global_batch_size 8: does not divide"),
        ({"last": "flash"}, "last 'flash': not a policy; did you mean flush?"),
        ({"loss_reduction": "max"}, "choose mean or sum"),
        ({"weight_per_example": 0}, "weight_per_example 0"),
        ({"sampler": ResizableBatchSampler(9, 2)}, "last='carry', micro_batch_size=2"),
        (
            {"sampler": ResizableBatchSampler(9, micro_batch_size=2, last="carry"), "last": "drop"},
            "last 'drop' with a ResizableBatchSampler",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)) as error:
        GradientAccumulation(a_model(), **{"micro_batch_size": 2, "batch_size": 8, **arguments})
    assert "\n" not in str(error.value)


def test_bad_calls_are_one_clear_line():
    window = GradientAccumulation(a_model(), micro_batch_size=2, batch_size=4)
    with pytest.raises(InvalidInputError, match="outside over"), window.micro_batch():
        pass
    window = GradientAccumulation(a_model(), micro_batch_size=2, batch_size=4, last="carry")
    with pytest.raises(InvalidInputError, match="a micro-batch of 3"), window.micro_batch(3):
        pass
    for bad in (float("nan"), -1, "many"):
        with pytest.raises(InvalidInputError, match="at least 0"), window.micro_batch(weight=bad):
            pass
    with window.micro_batch(weight=2.0):
        pass
    with pytest.raises(InvalidInputError, match="with and without weight"), window.micro_batch():
        pass
    with pytest.raises(InvalidInputError, match="a schedule step after 0 completed batches"):
        window.advance()
    with pytest.raises(InvalidInputError, match="state without"):
        window.load_state_dict({"version": 1})
    other = GradientAccumulation(a_model(), micro_batch_size=3, batch_size=6)
    with pytest.raises(InvalidInputError, match="4: does not divide"):
        other.load_state_dict(window.state_dict())
    sampler = ResizableBatchSampler(9, micro_batch_size=2, last="carry")
    fed = GradientAccumulation(a_model(), micro_batch_size=2, sampler=sampler)
    with pytest.raises(InvalidInputError, match="state of an accumulation without a sampler"):
        fed.load_state_dict(window.state_dict())
    with pytest.raises(InvalidInputError, match="advance"), fed.micro_batch():
        pass  # the loader is not the sampler's
