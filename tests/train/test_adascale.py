"""AdaScale on the noisy quadratic, where all is known, and as a controller of torch optimizers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.records import NoiseScale, Outcome, ParametersSeen
from noisescale.train import AdaScale, GradientMoments

RATE = 0.02  # times the curvature 1: lambda = 1 - (1 - 0.02)^2 = 0.0396
NOISE = 1.0  # variance of one example's gradient in each direction
SHRINK = 1 - (1 - RATE) ** 2
FLOOR = RATE**2 * NOISE / SHRINK
"""Stationary E[w^2] of SGD at batch size 1: e' = (1 - RATE)^2 e + RATE^2 NOISE."""
START = 1000 * FLOOR


def sgd(weight=None, **keys):
    weight = nn.Parameter(torch.ones(2)) if weight is None else weight
    return torch.optim.SGD([weight], **{"lr": 0.5, **keys})


def record(outcome=Outcome.DETERMINED, b_simple=32.0, unit="examples"):
    return NoiseScale(
        b_simple=b_simple, low=None, high=None, outcome=outcome, grad_sq=-1.0, trace_cov=3.0,
        steps=5, examples=100, unit=unit, source="examples",
        parameters_seen=ParametersSeen(seen=1, total=1),
    )  # fmt: skip


class Quadratic:
    """Many independent copies of w under SGD with noise NOISE/B; E[w^2] is seen as their mean."""

    copies = 100_000

    def __init__(self, batch_size):
        self.generator = torch.Generator().manual_seed(batch_size)
        self.weight = nn.Parameter(torch.full((self.copies,), math.sqrt(START)).double())
        self.optimizer = torch.optim.SGD([self.weight], lr=RATE)
        self.spread = math.sqrt(NOISE / batch_size)

    @property
    def square(self):
        return float(self.weight.detach().square().mean())

    def gradient(self):
        draws = torch.randn(self.copies, generator=self.generator, dtype=torch.float64)
        self.weight.grad = self.weight.detach() + self.spread * draws


def run(world, controller, until):
    """Step to a value of E[w^2]; return the gains."""
    gains = []
    while world.square > until and len(gains) < 1000:
        controller.observe(GradientMoments(trace_cov=NOISE, grad_sq=world.square))
        world.gradient()
        gains.append(controller.gain)
        controller.step()
    return gains


def base_steps(until):
    """How many (fractional) steps at batch size 1 take START to a value: the exact recursion."""
    return math.log((until - FLOOR) / (START - FLOOR)) / math.log(1 - SHRINK)


@pytest.mark.parametrize("scale", [4, 16, 128])
def test_equal_loss_after_equal_scale_invariant_iterations(scale):
    # One AdaScale step is e' - FLOOR = (1 - r SHRINK)(e - FLOOR) exactly, r base steps are
    # (1 - SHRINK)^r: AdaScale is ahead by at most the largest ratio of the two logarithms.
    target = 10 * FLOOR
    world = Quadratic(scale)
    controller = AdaScale(world.optimizer, base_batch_size=1, batch_size=scale, smoothing=0.0)
    gains = run(world, controller, target)
    assert controller.clock == pytest.approx(sum(gains))
    assert all(1 <= gain <= scale for gain in gains)
    ahead = max(math.log(1 - r * SHRINK) / (r * math.log(1 - SHRINK)) for r in gains)
    wanted = base_steps(target)
    # The mean over the copies is within 5 standard errors of E[w^2] near the target: in steps,
    slack = 5 * math.sqrt(2 / world.copies) / SHRINK
    assert wanted / ahead - slack <= controller.clock <= wanted + gains[-1] + slack
    assert len(gains) < 0.75 * wanted


def test_each_step_is_the_predicted_one():
    world = Quadratic(16)
    controller = AdaScale(world.optimizer, base_batch_size=1, batch_size=16, smoothing=0.0)
    for _ in range(40):
        before = world.square
        controller.observe(GradientMoments(trace_cov=NOISE, grad_sq=before))
        world.gradient()
        controller.step()
        moved = before + controller.gain * (-SHRINK * before + RATE**2 * NOISE)
        # Standard error of the mean square after one step, given the copies before it.
        rate = controller.gain * RATE
        spread = rate * world.spread
        error = math.sqrt((4 * spread**2 * before + 2 * spread**4) / world.copies)
        assert abs(world.square - moved) < 5 * error


def test_linear_scaling_diverges_where_adascale_arrives():
    linear = Quadratic(128)  # 128 x RATE = 2.56, beyond 2
    for group in linear.optimizer.param_groups:
        group["lr"] *= 128
    for _ in range(60):
        linear.gradient()
        linear.optimizer.step()
    assert linear.square > START


class SlowAdaScale:
    """The paper's bookkeeping, all estimates kept."""

    def __init__(self, base):
        self.base, self.clock, self.gain, self.past, self.known = base, 0.0, 1.0, [], None

    def step(self, trace, square, batch):
        scale = batch / self.base
        self.past.append((trace, square, max(1 - scale / 1000, 0)))
        mean_trace = mean_square = 0.0
        for count, (one, other, theta) in enumerate(self.past, start=1):
            share = 1 / count if count < 1 / (1 - theta) else 1 - theta
            mean_trace = (1 - share) * mean_trace + share * one
            mean_square = (1 - share) * mean_square + share * other
        if mean_trace > 0 and mean_square > 0:
            self.known = mean_trace / self.base, mean_square
        if self.known is not None:
            sigma, mu = self.known
            self.gain = (sigma + mu) / (sigma / scale + mu)
        self.clock += self.gain


@given(
    estimates=st.lists(
        st.tuples(st.floats(-1, 10), st.floats(-1, 10), st.sampled_from([64, 320, 6400])),
        min_size=1, max_size=30,
    )
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_gain_and_clock_equal_the_slow_version(estimates):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = sgd(weight)
    controller, slow = AdaScale(optimizer, base_batch_size=32, batch_size=64), SlowAdaScale(32)
    for trace, square, batch in estimates:
        controller.set_batch_size(batch)
        controller.observe(GradientMoments(trace_cov=trace, grad_sq=square))
        slow.step(trace, square, batch)
        weight.grad = torch.ones_like(weight)
        before = weight.item()
        controller.step()
        low, high = sorted((1.0, batch / 32))
        assert low <= controller.gain <= high
        # Sums that cancel to nearly 0 differ by rounding between the two.
        if min(abs(controller._moments.trace_cov), abs(controller._moments.grad_sq)) > 1e-6:
            assert controller.gain == pytest.approx(slow.gain, rel=1e-6)
        else:
            return
        assert before - weight.item() == pytest.approx(0.5 * controller.gain)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert controller.clock == pytest.approx(slow.clock, rel=1e-6)


def test_the_schedulers_clock_advances_by_the_gain():
    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8], gamma=0.1)
    controller = AdaScale(
        optimizer, base_batch_size=32, batch_size=128, noise=32.0, scheduler=scheduler
    )
    rates = []
    for _ in range(6):  # the clock: 1.6, 3.2, 4.8, 6.4, 8, 9.6
        controller.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.05, 0.05, 0.05, 0.005, 0.005])
    assert scheduler.last_epoch == 9


@pytest.mark.parametrize("nothing", [
    None, 0.0, -3.0, math.nan, math.inf, record(Outcome.LOWER_BOUND, None),
    record(Outcome.TOO_FEW_STEPS, None), record(Outcome.NOT_FINITE, None),
    record(Outcome.UNSUPPORTED, None), record(b_simple=0.0),
    GradientMoments(trace_cov=math.nan, grad_sq=1.0),
    GradientMoments(trace_cov=1.0, grad_sq=math.inf),
], ids=str)  # fmt: skip
def test_what_says_nothing_keeps_the_last_gain(nothing):
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128)
    controller.observe(nothing)
    assert (controller.gain, controller.held) == (1.0, 1)
    controller.observe(record())
    assert controller.gain == pytest.approx(1.6)
    controller.observe(nothing)
    assert (controller.gain, controller.held) == (pytest.approx(1.6), 2)


def test_averages_that_are_not_positive_keep_the_last_gain():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128)
    controller.observe(GradientMoments(trace_cov=32.0, grad_sq=1.0))
    controller.observe(GradientMoments(trace_cov=32.0, grad_sq=-2.0))
    assert (controller.gain, controller.held) == (pytest.approx(1.6), 1)
    controller.observe(GradientMoments(trace_cov=32.0, grad_sq=4.0))
    assert (controller.gain, controller.held) == (pytest.approx(1.6), 1)


def test_a_record_stands_for_itself_and_a_later_one_replaces_it():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128, noise=record())
    controller.observe(record(b_simple=96.0))
    assert controller.gain == pytest.approx(4 / 1.75)
    controller.observe(GradientMoments(trace_cov=5.0, grad_sq=5.0))
    assert controller.gain == pytest.approx((1 + 1 / 32) / (1 + 1 / 128))


def test_a_function_is_asked_before_every_step():
    answers = iter(
        [
            None,
            32.0,
            record(Outcome.LOWER_BOUND, None),
            GradientMoments(trace_cov=96.0, grad_sq=1.0),
        ]
    )
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128, noise=lambda: next(answers))
    gains = []
    for _ in range(4):
        controller.step()
        gains.append(controller.gain)
    assert gains == pytest.approx([1.0, 1.6, 1.6, 4 / 1.75])
    assert controller.held == 2


def test_numpys_numbers_are_numbers():
    controller = AdaScale(sgd(), base_batch_size=np.int64(32), batch_size=np.int32(128))
    controller.observe(np.float32(32))
    assert controller.gain == pytest.approx(1.6)
    assert type(controller.state_dict()["batch_size"]) is float


def test_a_new_batch_size_gives_a_new_gain_from_the_same_averages():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128, noise=32.0)
    controller.set_batch_size(32)
    assert controller.gain == 1.0
    controller.set_batch_size(16)
    assert controller.gain == pytest.approx(2 / 3)


def test_a_held_gain_never_passes_the_scale():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=320)
    controller.observe(GradientMoments(trace_cov=1e9, grad_sq=1.0))
    controller.observe(GradientMoments(trace_cov=1e9, grad_sq=-9.0))
    assert controller.gain == pytest.approx(10, rel=1e-5)
    controller.set_batch_size(64)
    assert controller.gain == pytest.approx(2, rel=1e-5)


def test_averages_too_far_apart_for_a_float_give_the_ends():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=320, smoothing=0.0)
    controller.observe(GradientMoments(trace_cov=1e300, grad_sq=1e-300))
    assert controller.gain == pytest.approx(10)
    controller.observe(GradientMoments(trace_cov=1e-300, grad_sq=1e300))
    assert controller.gain == 1.0


def test_adams_power_moves_the_rate_by_the_root_and_the_clock_by_the_gain():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    controller = AdaScale(optimizer, base_batch_size=32, batch_size=128, noise=32.0, power=0.5)
    weight.grad = torch.ones(1)
    controller.step()
    assert -weight.item() == pytest.approx(0.1 * math.sqrt(1.6), rel=1e-6)
    assert controller.clock == pytest.approx(1.6)


def test_a_gain_of_one_is_the_optimizer_itself():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, twin)
    ]
    controller = AdaScale(optimizers[0], base_batch_size=8, batch_size=8, noise=100.0)
    for _ in range(3):
        batch = torch.randn(4, 3)
        for each, step in ((model, controller.step), (twin, optimizers[1].step)):
            each(batch).square().mean().backward()
            step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_rates_of_groups_and_of_tensors_come_back():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    rate = torch.tensor(0.3)
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], rate)
    controller = AdaScale(optimizer, base_batch_size=32, batch_size=128, noise=32.0)
    for weight in weights:
        weight.grad = torch.ones(1)
    controller.step()
    assert [-weight.item() for weight in weights] == pytest.approx([0.16, 0.48])
    assert optimizer.param_groups[1]["lr"] is rate
    assert float(rate) == pytest.approx(0.3)


def test_the_rates_come_back_after_an_error():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = sgd(weight)
    controller = AdaScale(optimizer, base_batch_size=32, batch_size=128, noise=32.0)

    def closure():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        controller.step(closure)
    assert (optimizer.param_groups[0]["lr"], controller.clock) == (0.5, 0.0)
    assert controller.step(lambda: 3.0) == 3.0


def test_a_grad_scaler_skips_step_and_clock():
    weight = nn.Parameter(torch.zeros(1))
    controller = AdaScale(sgd(weight), base_batch_size=32, batch_size=128, noise=32.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for gradient in (1.0, math.inf, 1.0):
        controller.zero_grad()
        scaler.scale(weight.sum() * gradient).backward()
        scaler.unscale_(controller)
        scaler.step(controller)
        scaler.update()
    assert weight.item() == pytest.approx(-2 * 0.5 * 1.6)
    assert controller.clock == pytest.approx(3.2)


def test_a_state_dict_goes_on():
    def controller():
        return AdaScale(sgd(), base_batch_size=32, batch_size=128)

    first, second = controller(), controller()
    moments = [GradientMoments(trace_cov=30.0 + k, grad_sq=1.0 + k) for k in range(6)]
    for each in moments[:3]:
        first.observe(each)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each in moments[3:]:
        for one in (first, second):
            one.observe(each)
            one.step()
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize(("keys", "said"), [
    ({"base_batch_size": 0}, "base_batch_size 0"),
    ({"batch_size": math.nan}, "batch_size nan"),
    ({"batch_size": "128"}, "batch_size '128'"),
    ({"power": 0}, "power 0"),
    ({"smoothing": 1.0}, "smoothing 1.0"),
    ({"noise": "32"}, "noise of type str"),
    ({"noise": True}, "noise of type bool"),
    ({"noise": record(unit="tokens")}, "a noise scale in tokens.*examples"),
    ({"scheduler": 3}, "scheduler of type int"),
], ids=str)  # fmt: skip
def test_settings_out_of_range_are_refused(keys, said):
    with pytest.raises(InvalidInputError, match=said):
        AdaScale(sgd(), **{"base_batch_size": 32, "batch_size": 128, **keys})


def test_other_optimizers_and_schedulers_are_refused():
    keys = {"base_batch_size": 32, "batch_size": 128}
    with pytest.raises(InvalidInputError, match="optimizer of type Linear"):
        AdaScale(nn.Linear(1, 1), **keys)
    optimizer = sgd()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(InvalidInputError, match="ReduceLROnPlateau"):
        AdaScale(optimizer, scheduler=plateau, **keys)
    other = torch.optim.lr_scheduler.ConstantLR(sgd())
    with pytest.raises(InvalidInputError, match="another optimizer"):
        AdaScale(optimizer, scheduler=other, **keys)


def test_other_states_are_refused():
    controller = AdaScale(sgd(), base_batch_size=32, batch_size=128)
    with pytest.raises(InvalidInputError, match=r"state without .*clock"):
        controller.load_state_dict({})
    with pytest.raises(InvalidInputError, match="base_batch_size 64: here it is 32"):
        controller.load_state_dict({**controller.state_dict(), "base_batch_size": 64})
