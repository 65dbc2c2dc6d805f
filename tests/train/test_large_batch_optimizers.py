"""LARS and LAMB against slow versions step by step, and as ordinary torch optimizers."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from noisescale.errors import InvalidInputError
from noisescale.train import LAMB, LARS, biases_and_norms
from noisescale.train.layerwise import CHUNK_ELEMENTS
from slow_optimizers import SlowLAMB, SlowLARS

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = 8

LARS_SETTINGS = [
    {"lr": 2.0},
    {"lr": 2.0, "momentum": 0.0, "trust_coefficient": 0.02},
    {"lr": 2.0, "momentum": 0.0, "weight_decay": 0.1},
    {"lr": 2.0, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.01},
    {"lr": 2.0, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "trust_coefficient": 0.01},
]
LAMB_SETTINGS = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.0},
    {"lr": 0.02, "betas": (0.5, 0.8), "weight_decay": 0.3, "eps": 1e-3},
    {"lr": 0.02, "betas": (0.0, 0.0), "eps": 1e-3},
]
CASES = [(LARS, case) for case in LARS_SETTINGS] + [(LAMB, case) for case in LAMB_SETTINGS]


def slow(kind, excluded, **case):
    if kind is LAMB:
        return SlowLAMB(excluded=excluded, **case)
    trust = case.pop("trust_coefficient", 0.001)
    return SlowLARS(excluded=excluded, trust=trust, **case)


def some_weights(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def some_gradients(weights, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]


def far(ours, theirs):
    """The difference over the tensor's own scale."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


def assert_equal_to_slow(kind, case, weights, gradients_at, tolerance, steps=STEPS):
    optimizer = kind(weights, **case)
    excluded = optimizer.param_groups[0]["excluded"]
    references = [slow(kind, flag, **case) for flag in excluded]
    expected = [weight.detach().clone() for weight in weights]
    for step in range(steps):
        gradients = gradients_at(weights, step)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        expected = [
            reference.step(weight, gradient)
            for reference, weight, gradient in zip(references, expected, gradients, strict=True)
        ]
        for weight, gradient, other in zip(weights, gradients, expected, strict=True):
            assert far(weight.detach(), other) < tolerance
            assert torch.equal(weight.grad, gradient)  # the gradient is read only


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_steps_equal_the_slow_version(kind, case, dtype):
    weights = some_weights([(4, 3), (4,), (2, 3, 2, 2), (), (1, 5)], dtype)
    assert_equal_to_slow(kind, case, weights, some_gradients, TOLERANCE[dtype])


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_chunks_change_nothing(kind, case, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 10)
    weights = some_weights([(4, 3), (2, 2), (3, 2), (7,), (1, 1)])
    assert_equal_to_slow(kind, case, weights, some_gradients, 1e-12)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_norms_of_zero_give_a_ratio_of_one(kind, case):
    weights = some_weights([(2, 3), (3, 2)])
    weights[0].data.zero_()

    def gradients_at(weights, step):
        # At first no gradient for the second tensor, so that Adam's update is 0 there but for
        # the decay; later none for the first, which has moved by then.
        first, second = some_gradients(weights, step)
        return [first, 0 * second] if step < 4 else [0 * first, second]

    assert_equal_to_slow(kind, case, weights, gradients_at, 1e-12)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_zero_weights_move_by_the_plain_step(kind):
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.full((2, 2), 0.5)
    kind([weight], lr=0.1).step()
    expected = -0.1 * (0.5 if kind is LARS else 0.5 / (0.5 + 1e-6))
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), expected))


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_nothing_to_go_by_moves_nothing(kind):
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    kind([weight], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(("kind", "expected"), [(LARS, 2.0 * 0.05), (LAMB, 0.03)])
@given(scale=st.floats(1e-3, 1e3), gradient_scale=st.floats(1e-2, 1e6))
@settings(max_examples=25, deadline=None)
def test_a_first_step_is_a_share_of_the_weights_norm(kind, expected, scale, gradient_scale):
    case = {"lr": 2.0, "trust_coefficient": 0.05} if kind is LARS else {"lr": 0.03}
    (weight,) = some_weights([(3, 4)])
    weight.data *= scale
    before = weight.detach().clone()
    weight.grad = gradient_scale * some_gradients([weight], 0)[0]
    kind([weight], weight_decay=0.0, **case).step()
    moved = (weight.detach() - before).norm() / before.norm()
    assert float(moved) == pytest.approx(expected, rel=1e-9)


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**16),
    exclude=st.sampled_from([True, False, biases_and_norms, lambda _, p: p.numel() > 5]),
)
@settings(max_examples=40, deadline=None)
def test_any_shapes_equal_the_slow_version(shapes, case, seed, exclude):
    kind, keys = case
    weights = some_weights(shapes, seed=seed)
    optimizer = kind(weights, exclude=exclude, **keys)
    excluded = optimizer.param_groups[0]["excluded"]
    if callable(exclude):
        assert excluded == [bool(exclude("", weight)) for weight in weights]
    else:
        assert excluded == [exclude] * len(weights)
    references = [slow(kind, flag, **keys) for flag in excluded]
    expected = [weight.detach().clone() for weight in weights]
    for step in range(3):
        for place, weight in enumerate(weights):
            weight.grad = some_gradients(weights, step)[place]
            expected[place] = references[place].step(expected[place], weight.grad)
        optimizer.step()
    for weight, other in zip(weights, expected, strict=True):
        assert far(weight.detach(), other) < 1e-12


def test_without_ratio_and_decay_they_are_torchs_own():
    for kind, torchs, keys in (
        (LARS, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (LAMB, torch.optim.Adam, {"lr": 0.1, "eps": 1e-6}),
    ):
        ours, theirs = some_weights([(3, 2), (4,)]), some_weights([(3, 2), (4,)])
        optimizers = kind(ours, exclude=True, **keys), torchs(theirs, **keys)
        for step in range(STEPS):
            for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
                for weight, gradient in zip(weights, some_gradients(weights, step), strict=True):
                    weight.grad = gradient
                optimizer.step()
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_parameter_without_gradient_waits(kind):
    weights = some_weights([(3, 2), (2, 2)])
    optimizer = kind(weights, lr=0.1)
    reference, expected = slow(kind, False, lr=0.1), weights[1].detach().clone()
    before = weights[1].detach().clone()
    for step in range(4):
        weights[0].grad, gradient = some_gradients(weights, step)
        weights[1].grad = gradient if step >= 2 else None
        if step >= 2:
            expected = reference.step(expected, gradient)
        optimizer.step()
        if step < 2:
            assert torch.equal(weights[1].detach(), before)
    # Its own steps count for the bias correction, not the optimizer's.
    torch.testing.assert_close(weights[1].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_groups_have_their_own_keys(kind):
    weights = some_weights([(3, 2), (2, 2), (3,), (2, 3)])
    optimizer = kind(
        [
            {"params": [weights[0], weights[2]], "lr": 0.3, "weight_decay": 0.2},
            {"params": [weights[1]], "exclude": True},
        ],
        lr=0.1,
        weight_decay=0.5,
    )
    optimizer.add_param_group({"params": [weights[3]], "exclude": lambda name, p: False})
    assert [group["excluded"] for group in optimizer.param_groups] == [[False, True], [True], [0]]
    references = [
        slow(kind, False, lr=0.3, weight_decay=0.2),
        slow(kind, True, lr=0.1),
        slow(kind, True, lr=0.3),
        slow(kind, False, lr=0.1, weight_decay=0.5),
    ]
    expected = [weight.detach().clone() for weight in weights]
    for step in range(3):
        for place, gradient in enumerate(some_gradients(weights, step)):
            weights[place].grad = gradient
            expected[place] = references[place].step(expected[place], gradient)
        optimizer.step()
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), other, rtol=1e-12, atol=1e-12)


def test_names_reach_the_predicate():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = LAMB(model.named_parameters(), exclude=lambda name, p: name.startswith("1."))
    assert optimizer.param_groups[0]["excluded"] == [False, False, True, True]


def train(optimizer, weights, first, last):
    for step in range(first, last):
        for weight, gradient in zip(weights, some_gradients(weights, step), strict=True):
            weight.grad = gradient
        optimizer.step()


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_state_dict_resumes_bit_for_bit(kind, case):
    weights = some_weights([(3, 2), (2,)], torch.float32)
    optimizer = kind(weights, exclude=lambda name, p: p.ndim < 2, **case)
    train(optimizer, weights, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = kind(again, lr=9.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(weights)
    train(optimizer, weights, 3, 6)
    train(resumed, again, 3, 6)
    assert not torch.equal(weights[0], copied[0])
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))


def test_other_optimizers_state_is_refused():
    weights = some_weights([(3, 2)])
    other = torch.optim.SGD(weights, lr=0.1).state_dict()
    with pytest.raises(InvalidInputError, match=r"excluded, trust_coefficient.*of LARS"):
        LARS(weights, lr=0.1).load_state_dict(other)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_copies_and_pickles_go_on(kind):
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.add_param_group({"params": some_weights([(2, 2), (2,)])})
        assert twin.param_groups[1]["excluded"] == [False, True]
        twin.step()


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_closure_is_run_with_gradients(kind):
    (weight,) = some_weights([(3, 2)])
    optimizer = kind([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_schedulers_move_the_rate(kind):
    (weight,) = some_weights([(3, 2)])
    optimizer = kind([weight], lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4)
    reference, expected = slow(kind, False, lr=0.5), weight.detach().clone()
    for step in range(3):
        group = optimizer.param_groups[0]
        reference.lr = group["lr"]
        if kind is LARS:
            reference.momentum = group["momentum"]
        else:
            reference.betas = group["betas"]
        (weight.grad,) = some_gradients([weight], step)
        expected = reference.step(expected, weight.grad)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["lr"] != 0.5
    saved = optimizer.state_dict()
    kind([weight], lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_grad_scaler_skips_and_unscales(kind):
    ours, scaled = some_weights([(3, 2)], torch.float32), some_weights([(3, 2)], torch.float32)
    plain, under = kind(ours, lr=0.1), kind(scaled, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        (gradient,) = some_gradients(ours, step)
        ours[0].grad, scaled[0].grad = gradient, gradient * scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scale
        if step == 2:
            scaled[0].grad[0, 0] = torch.inf
        else:
            plain.step()
        scaler.step(under)
        scaler.update()
    torch.testing.assert_close(ours[0], scaled[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_half_precision_takes_its_norms_in_single(kind):
    # 256 entries of 300: the sum of squares overflows float16, and the norm bfloat16's digits.
    weight = nn.Parameter(torch.full((16, 16), 300.0, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    kind([weight], lr=1.0, **({"trust_coefficient": 0.5} if kind is LARS else {})).step()
    wanted = 150.0 if kind is LARS else 0.0
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, wanted), rtol=0, atol=2.0)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_no_value_is_copied_to_the_host(kind):
    # Tensors of the meta device hold no values: whatever asks for one raises.
    weights = [nn.Parameter(torch.empty(s, device="meta")) for s in [(3, 2), (2,), (2, 2)]]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    for given_parameters, named in (
        (table.named_parameters(), "weight"),
        (table.parameters(), re.escape("(4, 2)")),
    ):
        with pytest.raises(InvalidInputError, match=f"sparse gradient of parameter .*{named}"):
            LARS(given_parameters, lr=0.1).step()


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        (LARS, {"lr": -0.1}, "lr -0.1"),
        (LARS, {"lr": torch.tensor(0.1)}, "lr a tensor"),
        (LARS, {"lr": 0.1, "momentum": 1.0}, "momentum 1.0.*below 1"),
        (LARS, {"lr": 0.1, "momentum": 0.0, "nesterov": True}, "nesterov"),
        (LARS, {"lr": 0.1, "trust_coefficient": 0}, "trust_coefficient 0"),
        (LARS, {"lr": 0.1, "weight_decay": float("nan")}, "weight_decay nan"),
        (LAMB, {"betas": (0.9, 1.0)}, "betas 1.0"),
        (LAMB, {"betas": 0.9}, "betas 0.9: two numbers"),
        (LAMB, {"eps": 0.0}, "eps 0.0"),
        (LAMB, {"weight_decay": -1}, "weight_decay -1"),
    ],
)
def test_settings_out_of_range_are_refused(kind, keys, named):
    with pytest.raises(InvalidInputError, match=named):
        kind(some_weights([(2, 2)]), **keys)


def test_complex_parameters_are_refused_and_leave_no_group():
    optimizer = LARS(some_weights([(2, 2)]), lr=0.1)
    with pytest.raises(InvalidInputError, match="complex parameter"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.cfloat))]})
    assert len(optimizer.param_groups) == 1


class NoHostCopies(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, on the path that the processor takes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        assert "_to_copy" not in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_no_value_is_read_on_the_real_path(kind, case):
    weights = some_weights([(3, 2), (2,), (2, 2)], torch.float32)
    weights[2].data.zero_()
    optimizer = kind(weights, **case)
    with NoHostCopies():
        train(optimizer, weights, 0, 3)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_norms_do_not_overflow_in_float16(kind):
    # 90,000 entries of 300 have a norm of 90,000, float16 ends at 65,504.
    weight = nn.Parameter(torch.full((300, 300), 300.0, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    kind([weight], lr=0.5, **({"trust_coefficient": 1.0} if kind is LARS else {})).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 150.0), rtol=0, atol=1.0)


def test_the_bias_correction_starts_at_each_parameters_first_step():
    # With betas of 0.9 and 0.999 an uncorrected update would be 0.1 / sqrt(0.001) = 3.2 long.
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    weight.grad = torch.full((2, 2), 0.25, dtype=torch.float64)
    LAMB([weight], lr=0.1, exclude=True, eps=1e-12).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -0.1), rtol=1e-9, atol=0)


def test_decay_is_inside_the_ratio():
    # Without gradient the update is decay alone: LAMB moves by lr of the norm, whatever decay.
    for decay in (0.001, 0.5):
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        weight.grad = torch.zeros_like(weight)
        LAMB([weight], lr=0.1, weight_decay=decay).step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.9))
