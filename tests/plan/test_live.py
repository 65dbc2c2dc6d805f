from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from noisescale import InvalidInputError
from noisescale.plan.live import apply, convert_live
from noisescale.records import LiveConversion
from noisescale.train import LAMB, LARS

OLD, NEW = 64, 256
GROWTH = NEW // OLD


def weights(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def sgd(lr: float = 0.1, **options) -> torch.optim.SGD:
    return torch.optim.SGD(weights(), lr=lr, **options)


def convert(optimizer, scheduler=None, *, per="step", old=OLD, new=NEW, **options):
    # Plain SGD would get momentum in place of a rate, and these tests are about rates.
    plain = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    if plain and "noise_scale" not in options:
        options.setdefault("rule", "linear")
    return convert_live(
        optimizer, old_batch_size=old, batch_size=new, scheduler=scheduler,
        scheduler_per=per if scheduler is not None else None, **options,
    )  # fmt: skip


def rates(optimizer, scheduler, steps: int) -> list[float]:
    """The rate at each step, from the present one on."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer.step(): only rates are looked at
        for _ in range(steps):
            found.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
    return found


def warm_up_then_cosine(optimizer):
    first = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=80)
    then = schedulers.CosineAnnealingLR(optimizer, T_max=320)
    return schedulers.SequentialLR(optimizer, [first, then], milestones=[80])


SCHEDULES = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=100, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[100, 300], gamma=0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=100),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=100),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.99),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=400, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=400, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(
        o, T_0=40, T_mult=2, eta_min=0.01
    ),
    "SequentialLR": warm_up_then_cosine,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.StepLR(o, step_size=100), schedulers.ExponentialLR(o, gamma=0.995)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("done", [0, 8, 200])
def test_a_converted_schedule_is_the_old_one_at_every_step(name, done):
    """On the common grid of steps the rate is the old one times the factor, exactly."""
    one, other = sgd(), sgd()
    old, new = SCHEDULES[name](one), SCHEDULES[name](other)
    rates(one, old, done), rates(other, new, done)
    apply(convert(other, new), other, new)
    kept = rates(one, old, 400 - done)[::GROWTH]
    found = rates(other, new, len(kept))
    assert found == pytest.approx([GROWTH * rate for rate in kept], rel=1e-9)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "ChainedScheduler"])
def test_between_two_steps_the_rate_is_that_of_the_schedule(name):
    """Seven steps are no whole number of new ones: the rate follows the rounded position."""
    one, other = sgd(), sgd()
    old, new = SCHEDULES[name](one), SCHEDULES[name](other)
    rates(other, new, 7)
    apply(convert(other, new), other, new)
    expected = rates(one, old, 401)
    found = rates(other, new, 98)
    assert new.last_epoch == 2 + 98
    late = [GROWTH * rate for rate in expected[2 * GROWTH :: GROWTH]][:98]
    if name == "CosineAnnealingWarmRestarts":  # its position in the cycle is not rounded
        assert found[0] == pytest.approx(GROWTH * expected[7])
    elif name == "SequentialLR":
        assert found[0] == pytest.approx(late[0])
        assert found[30:] == pytest.approx(late[30:], rel=1e-6)
    else:
        assert found == pytest.approx(late, rel=1e-6)


def test_one_cycle_keeps_its_shape_and_its_peak():
    one, other = sgd(momentum=0.9), sgd(momentum=0.9)
    old = schedulers.OneCycleLR(one, max_lr=0.2, total_steps=400)
    new = schedulers.OneCycleLR(other, max_lr=0.2, total_steps=400)
    found = convert(other, new)
    assert found.groups[0].conversion.original.lr == 0.2
    assert any("cycles the momentum" in text for text in found.not_converted)
    apply(found, other, new)
    assert new.total_steps == 100
    kept = rates(one, old, 399)[::GROWTH]
    seen = rates(other, new, 99)
    # torch ends a phase of T steps at T - 1: on another grid that is not the same point, and a
    # step of the steepest rise (0.8 over 29 steps, times pi/2) is what may lie between.
    assert seen == pytest.approx([GROWTH * rate for rate in kept[:99]], abs=0.8 / 29 * 1.6)
    assert max(seen) == pytest.approx(0.8, rel=0.01)


def test_functions_of_transformers_are_restated_and_others_are_named():
    def shape(step, *, num_warmup_steps, num_training_steps):
        if step < num_warmup_steps:
            return step / num_warmup_steps
        left = (num_training_steps - step) / (num_training_steps - num_warmup_steps)
        return max(0.0, left)

    shape.__module__ = "transformers.optimization"
    known = functools.partial(shape, num_warmup_steps=40, num_training_steps=400)
    one, other = sgd(), sgd()
    old, new = schedulers.LambdaLR(one, known), schedulers.LambdaLR(other, known)
    found = convert(other, new)
    assert found.not_converted == ()
    assert any(c.new == {"num_warmup_steps": 10, "num_training_steps": 100}
               for c in found.scheduler_changes)  # fmt: skip
    apply(found, other, new)
    kept = rates(one, old, 400)[::GROWTH]
    assert rates(other, new, 100) == pytest.approx([GROWTH * rate for rate in kept])

    optimizer = sgd()
    unknown = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    found = convert(optimizer, unknown)
    assert "LambdaLR" in found.not_converted[0]
    assert "step times 4" in found.not_converted[0]
    apply(found, optimizer, unknown)
    assert unknown.base_lrs == [0.4]
    assert rates(optimizer, unknown, 2) == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
        lambda o: schedulers.CyclicLR(o, base_lr=0.1, max_lr=0.2, cycle_momentum=False),
        schedulers.ReduceLROnPlateau,
    ],
)
def test_what_is_not_known_is_named(make):
    optimizer = sgd()
    scheduler = make(optimizer)
    found = convert(optimizer, scheduler)
    assert type(scheduler).__name__ in found.not_converted[0]
    assert "divided by 4" in found.not_converted[0]


def test_both_ends_of_a_cycle_are_scaled():
    optimizer = sgd()
    cycle = schedulers.CyclicLR(optimizer, base_lr=0.1, max_lr=0.2, cycle_momentum=False)
    apply(convert(optimizer, cycle), optimizer, cycle)
    assert (cycle.base_lrs, cycle.max_lrs) == ([0.4], [0.8])


def test_a_scheduler_stepped_per_epoch_keeps_its_clock():
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, step_size=30)
    apply(convert(optimizer, scheduler, per="epoch"), optimizer, scheduler)
    assert scheduler.step_size == 30
    assert scheduler.base_lrs == [0.4]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


def test_groups_with_different_rates_are_all_scaled():
    first, second, still = weights(3)
    optimizer = torch.optim.SGD(
        [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01, "momentum": 0.8},
         {"params": [still], "lr": 0.0}], lr=1.0, momentum=0.9,
    )  # fmt: skip
    found = convert(optimizer)
    apply(found, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.4, 0.04, 0.0])
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.8, 0.9]
    assert LiveConversion.from_json(found.to_json()) == found


def test_factors_that_differ_are_warned_of_and_rounding_is_no_difference():
    def groups(*rates: float) -> torch.optim.SGD:
        return torch.optim.SGD(
            [{"params": [w], "lr": r} for w, r in zip(weights(len(rates)), rates, strict=True)]
        )

    alike = groups(0.1, 0.3, 0.7, 1e-3, 1 / 3, 1e-7, 0.11, 0.13, 0.17)
    scheduler = schedulers.CosineAnnealingLR(alike, T_max=100, eta_min=1e-3)
    found = convert(alike, scheduler, old=3, new=7 * 10**6)
    assert not any("different factors" in text for text in found.warnings)
    assert found.not_converted == ()
    capped = groups(0.001, 1.0)
    scheduler = schedulers.CosineAnnealingLR(capped, T_max=100, eta_min=1e-3)
    found = convert(capped, scheduler, noise_scale=1e4, curvature=4.0)
    assert any("different factors" in text for text in found.warnings)
    assert "eta_min 0.001 holds for all groups" in found.not_converted[0]


def test_adam_with_tensors_for_rate_and_betas():
    optimizer = torch.optim.Adam(weights(), lr=torch.tensor(1e-3, dtype=torch.float64))
    held = optimizer.param_groups[0]["lr"]
    apply(convert(optimizer, rule="square-root"), optimizer)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(2e-3)


OPTIMIZERS = {
    "sgd": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda w: torch.optim.Adam(w, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3),
    "adamw": lambda w: torch.optim.AdamW(w, lr=1e-3),
    "rmsprop": lambda w: torch.optim.RMSprop(w, lr=1e-3, momentum=0.5),
    "lars": lambda w: LARS(w, lr=1.0, weight_decay=1e-4),
    "lamb": lambda w: LAMB(w, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("new", [8, 512])
@pytest.mark.parametrize("facts", [{}, {"noise_scale": 100.0}])
def test_a_group_says_what_its_recipe_says(name, new, facts):
    """What is in the group afterwards, read as a recipe, is the converted recipe."""
    optimizer = OPTIMIZERS[name](weights())
    found = convert(optimizer, new=new, **facts)
    apply(found, optimizer)
    again = convert(optimizer, old=new, new=new).groups[0].conversion.recipe
    assert again.optimizer == name
    wanted = found.groups[0].conversion.recipe
    for key, value in vars(wanted).items():
        assert getattr(again, key) == value, key
    assert wanted != found.groups[0].conversion.original


def test_decoupled_decay_is_told_from_the_group():
    adam = torch.optim.Adam(weights(), lr=1e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW(weights(), lr=1e-3, weight_decay=0.1)
    assert convert(adam).groups[0].conversion.original.optimizer == "adam"
    assert convert(adamw).groups[0].conversion.original.optimizer == "adamw"


def test_subclasses_and_wrappers_are_seen_through():
    class Mine(torch.optim.SGD):
        pass

    class AcceleratedOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    inner = Mine(weights(), lr=0.1)
    apply(convert(AcceleratedOptimizer(inner), rule="linear"), AcceleratedOptimizer(inner))
    assert inner.param_groups[0]["lr"] == pytest.approx(0.4)

    scheduler = schedulers.StepLR(inner, step_size=100)
    wrapper = types.SimpleNamespace(scheduler=scheduler)
    apply(convert(inner, wrapper), inner, wrapper)
    assert (scheduler.step_size, scheduler.base_lrs) == (25, [pytest.approx(1.6)])


def test_a_scheduler_of_another_make_is_named():
    optimizer = sgd()
    found = convert(optimizer, types.SimpleNamespace(get_lr=lambda: 0.1))
    assert any("where it keeps its rates" in text for text in found.not_converted)
    apply(found, optimizer, types.SimpleNamespace(get_lr=lambda: 0.1))


def test_the_same_batch_changes_nothing():
    optimizer = sgd(momentum=0.9)
    scheduler = warm_up_then_cosine(optimizer)
    before = copy.deepcopy((optimizer.param_groups[0]["lr"], scheduler.state_dict()))
    found = convert(optimizer, scheduler, new=OLD)
    assert found.unchanged
    assert found.scheduler_changes == ()
    apply(found, optimizer, scheduler)
    assert (optimizer.param_groups[0]["lr"], scheduler.state_dict()) == before


def test_applying_twice_is_refused_and_changes_nothing():
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, step_size=100)
    found = convert(optimizer, scheduler)
    apply(found, optimizer, scheduler)
    with pytest.raises(InvalidInputError, match="applied before"):
        apply(found, optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert scheduler.step_size == 25


def test_another_optimizer_or_scheduler_is_refused():
    optimizer = sgd()
    found = convert(optimizer)
    with pytest.raises(InvalidInputError, match="2 parameter groups"):
        apply(found, torch.optim.SGD([{"params": [w]} for w in weights(2)], lr=0.1))
    with pytest.raises(InvalidInputError, match="scheduler StepLR"):
        apply(found, optimizer, schedulers.StepLR(optimizer, step_size=3))


def test_a_scheduler_that_was_not_given_is_warned_of():
    optimizer = sgd()
    schedulers.StepLR(optimizer, step_size=3)
    assert any("give scheduler=" in text for text in convert(optimizer).warnings)


def test_gathered_averages_are_warned_of():
    optimizer = sgd(momentum=0.9)
    assert not any("averages" in text for text in convert(optimizer).warnings)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert any("averages" in text for text in convert(optimizer).warnings)


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        (object(), {}, "param_groups"),
        (types.SimpleNamespace(param_groups=[]), {}, "param_groups"),
        (types.SimpleNamespace(param_groups=[{"lr": 0.1}]), {}, "SimpleNamespace"),
        (torch.optim.Adagrad(weights(), lr=0.1), {}, "Adagrad"),
        (sgd(), {"new": 0}, "batch_size 0"),
        (sgd(), {"old": 0}, "batch_size 0"),
        (sgd(), {"kind": "sdg"}, "did you mean sgd"),
        (sgd(), {"rule": "liner"}, "did you mean linear"),
        (sgd(), {"dataset_size": 100}, "the data has 100 examples"),
    ],
)
def test_bad_input(optimizer, options, words):
    with pytest.raises(InvalidInputError, match=words):
        convert(optimizer, **options)


def test_how_often_a_scheduler_is_stepped_is_required():
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, step_size=3)
    with pytest.raises(InvalidInputError, match="scheduler_per='step'"):
        convert_live(optimizer, old_batch_size=8, batch_size=16, scheduler=scheduler)


def test_an_unknown_class_may_be_declared():
    optimizer = types.SimpleNamespace(param_groups=[{"lr": 0.1, "momentum": 0.9}])
    apply(convert(optimizer, kind="sgd"), optimizer)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.4)


def test_torch_is_not_imported():
    code = (
        "import sys, types\n"
        "from noisescale.plan.live import apply, convert_live\n"
        "SGD = type('SGD', (), {'param_groups': [{'lr': 0.1, 'momentum': 0.9}]})\n"
        "o = SGD(); apply(convert_live(o, old_batch_size=64, batch_size=256), o)\n"
        "assert abs(o.param_groups[0]['lr'] - 0.4) < 1e-12\n"
        "print([m for m in ('torch', 'scipy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_group_that_has_no_decay_is_not_warned_of_a_default():
    decayed, plain = ([torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}])
    found = convert(optimizer)
    assert not any("weight_decay" in text for text in found.warnings)
    lars = convert(LARS(weights(), lr=0.1, momentum=0.0))
    assert not any("momentum is not in the recipe" in text for text in lars.warnings)
