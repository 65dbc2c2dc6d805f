"""The per-example optimizers against torch's at one size, and against slow sums as sizes change."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.theory import temperature as theory
from noisescale.train import PerExampleAdamW, PerExampleSGD

SHAPES = [(4, 3), (4,), (), (2, 3, 2)]
sizes = st.lists(st.integers(1, 300), min_size=1, max_size=12)


def some_weights(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def some_gradients(weights, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]


def train(optimizer, weights, steps, before=lambda step: None):
    for step in steps:
        for weight, gradient in zip(weights, some_gradients(weights, step), strict=True):
            weight.grad = gradient
        before(step)
        optimizer.step()


def one_weight(value=0.0):
    return nn.Parameter(torch.tensor([value], dtype=torch.float64))


def give(weight, value):
    weight.grad = torch.full_like(weight, value)


SGD_CASES = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True},
]
ADAMW_CASES = [
    {"lr": 0.01, "weight_decay": 0.0},
    {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.0, 0.99), "weight_decay": 0.0},
]


def sgd_of(weights, size, **keys):
    """The per-example optimizer by theory's conversions of torch's settings."""
    momentum = keys.get("momentum", 0.0)
    at = {"lr": keys["lr"], "batch_size": size, "momentum": momentum}
    return PerExampleSGD(
        weights,
        theory.temperature(**at),
        momentum_half_life=theory.half_life(decay=momentum, batch_size=size) if momentum else None,
        weight_shrinkage=theory.shrinkage_per_example(
            weight_decay=keys.get("weight_decay", 0.0), **at
        ),
        nesterov=keys.get("nesterov", False),
        batch_size=size,
    )


def adamw_of(weights, size, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    lives = [theory.half_life(decay=b, batch_size=size) if b else None for b in betas]
    return PerExampleAdamW(
        weights,
        theory.adam_temperature(lr=lr, batch_size=size),
        half_lives=tuple(lives),
        eps_per_example=theory.adam_eps_per_example(eps=eps, batch_size=size),
        weight_shrinkage=theory.shrinkage_per_example(
            lr=lr, weight_decay=weight_decay, batch_size=size
        ),
        batch_size=size,
    )


PAIRS = [(sgd_of, torch.optim.SGD, case) for case in SGD_CASES]
PAIRS += [(adamw_of, torch.optim.AdamW, case) for case in ADAMW_CASES]


@pytest.mark.parametrize("size", [1, 7, 512])
@pytest.mark.parametrize(("ours_of", "theirs_of", "case"), PAIRS)
def test_at_one_size_they_are_torchs(ours_of, theirs_of, case, size):
    ours, theirs = some_weights(), some_weights()
    train(ours_of(ours, size, **case), ours, range(12))
    train(theirs_of(theirs, **case), theirs, range(12))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        {"tau": 0.003},
        {"tau": 0.003, "weight_shrinkage": 1e-3, "momentum_half_life": 50},
    ],
    ids=str,
)
def test_sgd_is_torchs_to_the_bit_with_the_settings_that_it_tells(case):
    ours, theirs = some_weights(torch.float32), some_weights(torch.float32)
    optimizer = PerExampleSGD(ours, **case, batch_size=24)
    (told,) = optimizer.as_torch()
    train(optimizer, ours, range(8))
    train(torch.optim.SGD(theirs, foreach=True, **told), theirs, range(8))
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


def test_adamw_tells_torchs_settings():
    ours, theirs = some_weights(), some_weights()
    optimizer = PerExampleAdamW(
        ours, 0.001, half_lives=(100, 3000), weight_shrinkage=1e-4, batch_size=24
    )
    (told,) = optimizer.as_torch()
    train(optimizer, ours, range(8))
    train(torch.optim.AdamW(theirs, **told), theirs, range(8))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


def slow_sgd(batches, gradients, tau, half_life, start=0.0, nesterov=False):
    """Weights after each step as a sum over the history, one past batch at a time.

    Of each batch's B g, the share 1 - m is spent at once, m (1 - m') at the next step, and so on.
    """
    kept = [2.0 ** (-size / half_life) for size in batches]
    path = []
    for now in range(len(batches)):
        moved = 0.0
        for born in range(now + 1):
            left = math.prod(kept[born : now + 1])  # not yet spent after this step
            if nesterov:
                left -= math.prod(kept[born:now]) * (1 - kept[now]) * kept[now]
            moved += (1 - left) * batches[born] * gradients[born]
        path.append(start - tau * moved)
    return path


@pytest.mark.parametrize("nesterov", [False, True])
@given(batches=sizes, half_life=st.floats(1, 1000), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_sgd_with_changing_sizes_is_the_sum_over_its_history(nesterov, batches, half_life, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(batches), generator=generator, dtype=torch.float64).tolist()
    weight = one_weight()
    optimizer = PerExampleSGD([weight], 0.01, momentum_half_life=half_life, nesterov=nesterov)
    wanted = slow_sgd(batches, gradients, 0.01, half_life, nesterov=nesterov)
    for size, gradient, expected in zip(batches, gradients, wanted, strict=True):
        optimizer.set_batch_size(size)
        give(weight, gradient)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
@given(batches=sizes, first=st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_an_examples_gradient_moves_by_tau_in_the_end(nesterov, batches, first):
    weight = one_weight()
    optimizer = PerExampleSGD(
        [weight], 0.01, momentum_half_life=40, nesterov=nesterov, batch_size=first
    )
    give(weight, 1.0)
    optimizer.step()
    give(weight, 0.0)
    for size in [*batches, *[400] * 6]:  # the last 60 half-lives leave 2^-60
        optimizer.set_batch_size(size)
        optimizer.step()
    assert weight.item() == pytest.approx(-0.01 * first, rel=1e-9)


def test_torchs_own_momentum_does_not_keep_it():
    """What the restatement is for: converted settings alone overshoot."""
    weight = one_weight()
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    ours = PerExampleSGD([one_weight()], 0.01, momentum_half_life=40)
    for size, gradient in ((10, 1.0), (100, 0.0), *[(100, 0.0)] * 30):
        ours.set_batch_size(size)
        for group, told in zip(optimizer.param_groups, ours.as_torch(), strict=True):
            group.update(told)
        give(weight, gradient)
        optimizer.step()
    m0, m = 2 ** (-10 / 40), 2 ** (-100 / 40)
    wanted = 1 - m0 + m0 * (m * 100) / (m0 * 10)  # instead of 1
    assert weight.item() == pytest.approx(-0.01 * 10 * wanted)
    assert wanted > 1.9


def slow_adamw(batches, gradients, tau, half_lives, eps, shrinkage, start):
    """As the docstring says it, with per-example second moments and the products of the betas."""
    weight, path = start, []
    for now, size in enumerate(batches):
        betas = [[2.0 ** (-b / life) for b in batches[: now + 1]] for life in half_lives]
        mean = square = 0.0
        for born in range(now + 1):
            left = [math.prod(beta[born + 1 :]) * (1 - beta[born]) for beta in betas]
            mean += left[0] * gradients[born]
            square += left[1] * batches[born] * gradients[born] ** 2
        mean /= 1 - math.prod(betas[0])
        square /= 1 - math.prod(betas[1])
        weight *= 1 - shrinkage * size
        weight -= tau * size * mean / (math.sqrt(square) + eps)
        path.append(weight)
    return path


@given(
    batches=sizes, lives=st.tuples(st.floats(1, 1000), st.floats(1, 10000)),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_adamw_with_changing_sizes_is_the_slow_version(batches, lives, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(batches), generator=generator, dtype=torch.float64).tolist()
    weight = one_weight(2.0)
    optimizer = PerExampleAdamW(
        [weight], 1e-3, half_lives=lives, eps_per_example=0.1, weight_shrinkage=1e-3
    )
    wanted = slow_adamw(batches, gradients, 1e-3, lives, 0.1, 1e-3, 2.0)
    for size, gradient, expected in zip(batches, gradients, wanted, strict=True):
        optimizer.set_batch_size(size)
        give(weight, gradient)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(batches=sizes)
@settings(max_examples=25, deadline=None)
def test_adamw_moves_by_tau_per_example_of_constant_standard_deviation(batches):
    # Gradients of size s / sqrt(B), as noise makes them, s = 3: every step is tau sqrt(B).
    weight = one_weight()
    optimizer = PerExampleAdamW([weight], 1e-3, half_lives=(None, 100), eps_per_example=1e-12)
    for size in batches:
        before = weight.item()
        optimizer.set_batch_size(size)
        give(weight, 3 / math.sqrt(size))
        optimizer.step()
        assert before - weight.item() == pytest.approx(1e-3 * math.sqrt(size), rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, **k: PerExampleSGD(w, 0.01, momentum_half_life=30, weight_shrinkage=1e-3, **k),
        lambda w, **k: PerExampleSGD(w, 0.01, **k),
        lambda w, **k: PerExampleAdamW(w, 0.01, half_lives=(30, 300), weight_shrinkage=1e-3, **k),
    ],
    ids=["momentum", "sgd", "adamw"],
)
class TestAsOrdinaryOptimizers:
    def test_a_state_dict_resumes_bit_for_bit(self, make):
        weights = some_weights(torch.float32)
        optimizer = make(weights, batch_size=8)
        vary = [8, 16, 3, 40, 40, 7]
        train(optimizer, weights, range(3), lambda step: optimizer.set_batch_size(vary[step]))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = [nn.Parameter(weight.detach().clone()) for weight in weights]
        resumed = make(again)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.as_torch() == optimizer.as_torch()
        for each, theirs in ((optimizer, weights), (resumed, again)):
            train(each, theirs, [3])  # at the size that was loaded
            train(each, theirs, [4, 5], lambda step, o=each: o.set_batch_size(vary[step]))
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))

    def test_a_state_dict_may_lack_what_others_keep_in_groups(self, make):
        saved = make(some_weights(), batch_size=8).state_dict()
        resumed = make([{"params": some_weights(), "name": "all of them"}])
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0]["batch_size"] == 8

    def test_schedulers_multiply_tau(self, make):
        weights = some_weights()
        optimizer = make(weights, batch_size=8)
        rate = optimizer.as_torch()[0]["lr"]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        train(optimizer, weights, [0])
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.005
        assert optimizer.as_torch()[0]["lr"] == pytest.approx(rate / 2)

    def test_a_parameter_without_gradient_waits(self, make):
        weights = some_weights()
        optimizer = make(weights, batch_size=8)
        train(optimizer, weights, [0])
        twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
        twin = make(twins)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.set_batch_size(32)
        weights[1].grad = None
        optimizer.step()
        assert torch.equal(weights[1], twins[1])
        # The step in between, at another size, changes nothing of what comes.
        for each, theirs in ((optimizer, weights), (twin, twins)):
            each.set_batch_size(16)
            theirs[1].grad = some_gradients(theirs, 5)[1]
            for other in (0, 2, 3):
                theirs[other].grad = None
            each.step()
        assert torch.equal(weights[1], twins[1])

    def test_a_grad_scaler_skips_and_unscales(self, make):
        ours, scaled = some_weights(torch.float32), some_weights(torch.float32)
        plain, under = make(ours, batch_size=8), make(scaled, batch_size=8)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            for our, other, gradient in zip(ours, scaled, some_gradients(ours, step), strict=True):
                our.grad, other.grad = gradient, gradient * scaler.get_scale()
            scaler.scale(torch.zeros(()))  # makes the scale
            if step == 2:
                scaled[0].grad[0, 0] = torch.inf
            else:
                plain.step()
            scaler.step(under)
            scaler.update()
        for our, other in zip(ours, scaled, strict=True):
            torch.testing.assert_close(our, other, rtol=1e-5, atol=1e-5)

    def test_no_value_is_copied_to_the_host(self, make):
        weights = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
        optimizer = make(weights)
        for size in (8, 8, 16):
            optimizer.set_batch_size(size)
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            optimizer.step()

    def test_copies_go_on_and_closures_run(self, make):
        weights = some_weights()
        optimizer = make(weights, batch_size=8)
        twin = copy.deepcopy(optimizer)
        twin.add_param_group({"params": [one_weight()], "tau": 0.5})
        assert twin.as_torch()[1]["lr"] > twin.as_torch()[0]["lr"]

        def closure():
            optimizer.zero_grad()
            loss = sum((weight**2).sum() for weight in weights)
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert optimizer.step(closure) < first

    def test_gradients_are_read_only(self, make):
        weights = some_weights()
        train(make(weights, batch_size=8), weights, [0])
        for weight, gradient in zip(weights, some_gradients(weights, 0), strict=True):
            assert torch.equal(weight.grad, gradient)

    def test_a_step_needs_a_batch_size(self, make):
        optimizer = make(some_weights())
        for refused in (optimizer.step, optimizer.as_torch):
            with pytest.raises(InvalidInputError, match="set_batch_size before"):
                refused()

    @pytest.mark.parametrize("size", [0, -4, math.nan, "8", None, True, torch.tensor(8)], ids=str)
    def test_sizes_out_of_range_are_refused(self, make, size):
        with pytest.raises(InvalidInputError, match="batch_size"):
            make(some_weights()).set_batch_size(size)

    def test_settings_per_step_are_refused_in_groups(self, make):
        with pytest.raises(InvalidInputError, match="give tau and weight_shrinkage"):
            make([{"params": some_weights(), "lr": 0.1}])

    def test_sparse_complex_and_foreign_are_refused(self, make):
        table = nn.Embedding(4, 2, sparse=True)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(InvalidInputError, match="sparse gradient"):
            make(table.parameters(), batch_size=2).step()
        with pytest.raises(InvalidInputError, match="complex"):
            make([nn.Parameter(torch.ones(2, dtype=torch.cfloat))])
        weights = some_weights()
        other = torch.optim.SGD(weights, lr=0.1).state_dict()
        with pytest.raises(InvalidInputError, match="state dict without batch_size"):
            make(weights).load_state_dict(other)


def test_groups_have_their_own_settings():
    weights = some_weights()
    optimizer = PerExampleSGD(
        [
            {"params": weights[:2], "tau": 0.02, "weight_shrinkage": 1e-3},
            {"params": weights[2:], "momentum_half_life": 10},
        ],
        0.01,
        batch_size=10,
    )
    one, other = optimizer.as_torch()
    assert one == {"lr": 0.2, "momentum": 0.0, "nesterov": False, "weight_decay": 0.05}
    assert other["lr"] == pytest.approx(0.05)
    assert other["momentum"] == 0.5


def test_numpys_sizes_are_sizes():
    optimizer = PerExampleSGD([one_weight()], 0.01, batch_size=np.int64(8))
    assert type(optimizer.state_dict()["param_groups"][0]["batch_size"]) is int


def test_half_lives_far_below_a_batch_leave_plain_steps():
    weight = one_weight()
    optimizer = PerExampleSGD([weight], 0.01, momentum_half_life=1e-3, batch_size=10_000)
    give(weight, 1.0)
    for _ in range(2):
        optimizer.step()
    assert weight.item() == pytest.approx(-200)


def test_half_lives_far_above_a_batch_keep_their_digits():
    weight = one_weight()
    optimizer = PerExampleAdamW([weight], 1e-3, half_lives=(1e12, 1e15), eps_per_example=1e-12)
    optimizer.set_batch_size(1)
    for _ in range(3):
        give(weight, 1.0)
        optimizer.step()
    assert weight.item() == pytest.approx(-3e-3, rel=1e-9)


@pytest.mark.parametrize(("make", "said"), [
    (lambda w: PerExampleSGD(w, 0.0), "tau 0.0"),
    (lambda w: PerExampleSGD(w, torch.tensor(0.1)), "tau a tensor"),
    (lambda w: PerExampleSGD(w, 0.1, momentum_half_life=0), "momentum_half_life 0"),
    (lambda w: PerExampleSGD(w, 0.1, nesterov=True), "Nesterov needs it"),
    (lambda w: PerExampleSGD(w, 0.1, weight_shrinkage=1.0), "weight_shrinkage 1.0.*below 1"),
    (lambda w: PerExampleSGD(w, 0.1, weight_shrinkage=0.01, batch_size=100), "shrinkage of 0.01"),
    (lambda w: PerExampleAdamW(w, 0.1, half_lives=10), "half_lives 10"),
    (lambda w: PerExampleAdamW(w, 0.1, half_lives=(1, 2, 3)), "half_lives"),
    (lambda w: PerExampleAdamW(w, 0.1, half_lives=(1, None)), r"half_lives\[1\] None"),
    (lambda w: PerExampleAdamW(w, 0.1, half_lives=(-1, 2)), r"half_lives\[0\] -1"),
    (lambda w: PerExampleAdamW(w, 0.1, half_lives=(1, 2), eps_per_example=0), "eps_per_example 0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(InvalidInputError, match=said):
        make(some_weights())


def test_a_schedule_that_raises_the_decay_too_far_is_refused_before_the_step():
    weights = some_weights()
    optimizer = PerExampleAdamW(
        weights, 0.1, half_lives=(1, 2), weight_shrinkage=0.01, batch_size=50
    )
    before = copy.deepcopy(weights)
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(InvalidInputError, match=r"not 1\.5 of them"):
        train(optimizer, weights, [0])
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
