"""Schedules in plain loops: sizes, rates, units, controllers, states."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.noise_driven import CostOptimal, NoiseDriven
from noisescale.plan.schedule.plan import plan_schedule
from noisescale.plan.schedule.rates import cosine
from noisescale.plan.schedule.sizes import Sizes
from noisescale.plan.schedule.text import parse_schedule
from noisescale.records import Recipe, SchedulePlan
from noisescale.records.schedule import BatchPiece, BatchSchedule
from noisescale.train import BatchSizeSchedule, GradientAccumulation, ResizableBatchSampler
from saved_states import through_a_file

GROWING = BatchSchedule(
    pieces=(BatchPiece(start=0, batch_size=4), BatchPiece(start=30, batch_size=12)),
    rate=cosine(0.1, total=120),
    coupling="linear",
    reference_batch_size=4,
)


def a_model():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def sampled(**arguments):
    return ResizableBatchSampler(60, **{"batch_size": 1, **arguments})


def accumulated(micro=2, **arguments):
    arguments.setdefault("last", "carry")
    return GradientAccumulation(a_model(), micro_batch_size=micro, **arguments)


def walk(schedule, driven, until):
    """Every step's (position, size): a loop without a model."""
    found = []
    while schedule.position < until:
        if isinstance(driven, GradientAccumulation):
            at, size = schedule.position, schedule.batch_size
            while True:
                with driven.micro_batch():
                    pass
                if driven.is_update:
                    break
            found.append((at, size))
            assert driven.last_batch_size * schedule._per_example == size
            schedule.step()
            continue
        for _ in driven:
            found.append((schedule.position, schedule.batch_size))
            schedule.step()
            if schedule.position >= until:
                break
    return found


@pytest.mark.parametrize("make", [lambda: sampled(last="carry"), accumulated])
def test_steps_are_those_of_the_record(make):
    driven = make()
    model = a_model()
    optimizer = sgd(model, lr=0.1)
    schedule = BatchSizeSchedule(GROWING, driven, optimizer)
    expected = list(GROWING.steps(total=120))
    for step in expected:
        assert (schedule.position, schedule.batch_size) == (step.position, step.batch_size)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(step.lr, rel=1e-12)
        walk(schedule, driven, step.position + 1)
    assert schedule.updates == len(expected) == GROWING.updates(120)


def test_five_lines_in_a_plain_loop():
    rows = torch.arange(60.0)
    sampler = sampled()
    model = a_model()
    schedule = BatchSizeSchedule(lambda position: 4 if position < 24 else 12, sampler)
    sizes = []
    for batch in torch.utils.data.DataLoader(rows, batch_sampler=sampler):
        sizes.append(len(batch))
        assert schedule.batch_size == len(batch)
        schedule.step()
    assert sizes == [4] * 6 + [12] * 3
    assert str(schedule) == "update 9 at 60 examples: global batch 12 examples"
    del model


def test_a_plan_is_its_schedule_also_after_json():
    recipe = Recipe(
        lr=0.1,
        batch_size=4,
        dataset_size=600,
        total_steps=100,
        schedule={"kind": "step", "milestones": [50], "gamma": 0.5},
    )
    plan = SchedulePlan.from_json(plan_schedule(recipe, grow=True).to_json())
    positions = []
    for either in (plan, plan.schedule):
        optimizer, sampler = sgd(a_model()), sampled(last="carry")
        schedule = BatchSizeSchedule(either, sampler, optimizer)
        walk(schedule, sampler, 250)
        positions.append((schedule.position, schedule.batch_size, optimizer.param_groups[0]["lr"]))
    assert positions[0] == positions[1] == (50 * 4 + 7 * 8, 8, 0.1)


def test_groups_keep_their_ratio_and_tensors_stay_tensors():
    model = a_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.weight], "lr": torch.tensor(0.02)},
            {"params": [model.bias], "lr": 0.2},
        ],
        foreach=False,
        capturable=False,
    )
    first = optimizer.param_groups[0]["lr"]
    sampler = sampled(last="carry")
    schedule = BatchSizeSchedule(GROWING, sampler, optimizer, reference_lr=0.1)
    walk(schedule, sampler, 60)
    rate = GROWING.lr_at(schedule.position)
    assert optimizer.param_groups[0]["lr"] is first
    assert first.item() == pytest.approx(0.02 * rate / 0.1, rel=1e-6)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2 * rate / 0.1, rel=1e-12)


@pytest.mark.parametrize(("coupling", "factor"), [("linear", 3), ("square_root", 3**0.5)])
def test_rates_follow_sizes(coupling, factor):
    optimizer = sgd(a_model(), lr=0.5)
    sampler = sampled()
    schedule = BatchSizeSchedule(
        lambda position: 4 if position < 24 else 12, sampler, optimizer, coupling=coupling
    )
    assert optimizer.param_groups[0]["lr"] == 0.5
    walk(schedule, sampler, 24)
    assert optimizer.param_groups[0]["lr"] == 0.5 * factor


def test_a_short_last_batch_keeps_the_rate():
    optimizer = sgd(a_model(), lr=0.5)
    sampler = ResizableBatchSampler(10, batch_size=4)
    schedule = BatchSizeSchedule(lambda _: 4, sampler, optimizer, coupling="linear")
    sizes = []
    for _ in sampler:
        sizes.append(schedule.batch_size)
        assert optimizer.param_groups[0]["lr"] == 0.5
        schedule.step()
    assert sizes == [4, 4, 2]


def test_tokens_are_shown_and_sequences_taken():
    plan = parse_schedule("0:4K 40K:16K", unit="tokens")
    for driven in (sampled(last="carry"), accumulated()):
        schedule = BatchSizeSchedule(plan, driven, sequence_length=1000)
        assert walk(schedule, driven, 100_000)[-1] == (88_000, 16_000)
        assert "at 104,000 tokens: global batch 16,000 tokens" in str(schedule)
        assert driven.position == 104


@settings(deadline=None, max_examples=30)
@given(
    resume_at=st.integers(0, 180),
    by_sampler=st.booleans(),
    noise_driven=st.booleans(),
    lead=st.integers(0, 3),
)
def test_resuming_at_any_step_changes_nothing(resume_at, by_sampler, noise_driven, lead):
    def make():
        driven = sampled(last="carry", lead=lead) if by_sampler else accumulated()
        optimizer = sgd(a_model())
        if not noise_driven:
            return driven, optimizer, BatchSizeSchedule(GROWING, driven, optimizer)
        # The "measured" noise grows with the training.
        controller = NoiseDriven(
            rule=CostOptimal(r=4), batch_size=2, sizes=Sizes(multiple_of=2, largest=20)
        )
        schedule = BatchSizeSchedule(
            controller, driven, optimizer, coupling="square_root", every=3,
            noise=lambda: 1.0 + schedule.position,
        )  # fmt: skip
        return driven, optimizer, schedule

    driven, optimizer, schedule = make()
    whole = walk(schedule, driven, 200)
    expected = optimizer.param_groups[0]["lr"]
    driven, _, schedule = make()
    first = walk(schedule, driven, resume_at)
    state = through_a_file(schedule.state_dict())
    driven, optimizer, schedule = make()
    schedule.load_state_dict(state)
    assert first + walk(schedule, driven, 200) == whole
    assert optimizer.param_groups[0]["lr"] == expected
    assert len({size for _, size in whole}) > 1


def test_the_noise_scale_drives_with_the_lead_of_the_sampler():
    sampler = sampled(last="carry", lead=2)
    controller = NoiseDriven(
        rule=CostOptimal(r=100), batch_size=4, sizes=Sizes(multiple_of=4, largest=60)
    )
    asked = []

    def noise():
        asked.append(schedule.updates)
        return 1.0 if len(asked) == 1 else 4.0

    schedule = BatchSizeSchedule(controller, sampler, noise=noise, every=2)
    sizes = [size for _, size in walk(schedule, sampler, 80)]
    assert asked[:2] == [2, 4]
    # Wanted 10 (8 allowed) after 2 updates, 20 (16 allowed at once) after 4.
    assert sizes[:8] == [4, 4, 4, 4, 8, 8, 16, 16]


def test_plans_that_cannot_be_made_are_refused_at_once():
    plan = BatchSchedule(
        pieces=(BatchPiece(start=0, batch_size=4), BatchPiece(start=10**9, batch_size=90))
    )
    with pytest.raises(InvalidInputError, match="batch_size 90: larger than the data"):
        BatchSizeSchedule(plan, sampled())
    with pytest.raises(InvalidInputError, match="global_batch_size 90: does not divide"):
        BatchSizeSchedule(plan, accumulated(micro=4))
    for sizes, words in (
        (Sizes(largest=40), "does not divide by micro_batch_size 4"),
        (Sizes(multiple_of=4), None),
        (Sizes(powers=True, smallest=4), None),
    ):
        controller = NoiseDriven(rule=CostOptimal(r=4), batch_size=8, sizes=sizes)
        if words is None:
            BatchSizeSchedule(controller, accumulated(micro=4), noise=1.0)
            continue
        with pytest.raises(InvalidInputError, match=words):
            BatchSizeSchedule(controller, accumulated(micro=4), noise=1.0)
    with pytest.raises(InvalidInputError, match=r"give sizes=Sizes\(largest=60\) or less"):
        BatchSizeSchedule(controller, sampled(), noise=1.0)
    with pytest.raises(InvalidInputError, match="a batch of 4 examples over 3 replicas"):
        BatchSizeSchedule(GROWING, sampled(batch_size=3, num_replicas=3, rank=0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plan": parse_schedule("0:4", unit="tokens")}, "give sequence_length"),
        ({"sequence_length": 8}, "sequence_length with a plan in examples"),
        (
            {"plan": parse_schedule("0:12", unit="tokens"), "sequence_length": 5},
            "batch_size 12 tokens: does not divide into sequences of 5 tokens; the nearest are 10",
        ),
        ({"plan": "0:4 30:12"}, "a plan of type str: a schedule record, a function"),
        ({"plan": {"pieces": []}}, "a plan of type dict: a schedule record, a function"),
        ({"driven": [[0, 1]]}, "a schedule that drives a list: a ResizableBatchSampler or"),
        ({"optimizer": nn.Linear(1, 1)}, "optimizer of type Linear: a torch.optim.Optimizer"),
        ({"coupling": "log"}, "coupling 'log': not a coupling"),
        ({"plan": lambda _: 4}, "give coupling='linear', 'square_root' or 'none'"),
        ({"plan": lambda _: 4, "coupling": "plan"}, "the plan says no rates"),
        ({"plan": lambda _: 4.5, "coupling": "none"}, "batch_size 4.5"),
        ({"optimizer": None, "coupling": "linear"}, "coupling 'linear' without an optimizer"),
        ({"reference_lr": 0.0}, "reference_lr 0.0: a positive rate is required"),
        ({"noise": 3.0}, "noise for a fixed plan"),
        ({"every": 0}, "every 0"),
        (
            {"plan": NoiseDriven(rule=CostOptimal(r=4), batch_size=2)},
            "a controller without noise: a controller and its noise scale go together",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, words):
    arguments = {
        "plan": GROWING,
        "driven": sampled(),
        "optimizer": sgd(a_model()),
        **arguments,
    }
    with pytest.raises(InvalidInputError, match=re.escape(words)) as error:
        BatchSizeSchedule(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("coupling", ["plan", "none"])
def test_two_schedulers_of_one_rate_are_refused(coupling):
    optimizer, sampler = sgd(a_model()), sampled()
    schedule = BatchSizeSchedule(GROWING, sampler, optimizer, coupling=coupling)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    next(iter(sampler))
    optimizer.step()
    if coupling == "plan":
        with pytest.raises(InvalidInputError, match="both set its rates"):
            schedule.step()
    else:
        schedule.step()
        other.step()
        assert optimizer.param_groups[0]["lr"] == 0.05


def test_groups_that_come_later_are_refused():
    model = a_model()
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    sampler = sampled()
    schedule = BatchSizeSchedule(GROWING, sampler, optimizer)
    optimizer.add_param_group({"params": [model.bias]})
    with pytest.raises(InvalidInputError, match="an optimizer with 2 groups: it had 1"):
        walk(schedule, sampler, 4)


def test_steps_without_a_batch_are_refused():
    sampler, window = sampled(), accumulated()
    for driven, words in ((sampler, "once per optimizer step"), (window, "after 0 completed")):
        schedule = BatchSizeSchedule(GROWING, driven)
        walk(schedule, driven, 4)
        with pytest.raises(InvalidInputError, match=words):
            schedule.step()
    window = accumulated()
    schedule = BatchSizeSchedule(lambda _: 2, window)
    for _ in range(2):  # two updates and one step: a schedule in another unit
        with window.micro_batch():
            pass
    with pytest.raises(InvalidInputError, match="after 2 completed batches"):
        schedule.step()


def test_states_of_other_runs_are_refused():
    state = BatchSizeSchedule(GROWING, sampled(), sgd(a_model())).state_dict()
    model = a_model()
    two = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    others = [
        (BatchSizeSchedule(GROWING, sampled(), two), "an optimizer with 1 groups"),
        (BatchSizeSchedule(GROWING, sampled()), "coupling plan: here it is none"),
        (BatchSizeSchedule(GROWING, sampled(seed=3), sgd(model)), "seed 0: here it is 3"),
        (BatchSizeSchedule(GROWING, accumulated(), sgd(model)), "state without"),
    ]
    for schedule, words in others:
        with pytest.raises(InvalidInputError, match=words):
            schedule.load_state_dict(state)
    with pytest.raises(InvalidInputError, match="a state of BatchSizeSchedule is required"):
        others[0][0].load_state_dict({})


def test_the_optimizers_state_may_come_before_or_after():
    def make():
        driven, optimizer = sampled(last="carry"), sgd(a_model())
        return driven, optimizer, BatchSizeSchedule(GROWING, driven, optimizer)

    driven, optimizer, schedule = make()
    walk(schedule, driven, 50)
    rate, saved = optimizer.param_groups[0]["lr"], optimizer.state_dict()
    state = schedule.state_dict()
    _, optimizer, schedule = make()
    optimizer.load_state_dict(saved)
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == rate
    _, optimizer, schedule = make()
    schedule.load_state_dict(state)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == rate
    # A schedule made after the optimizer was loaded takes its own rates from the state.
    optimizer = sgd(a_model())
    optimizer.load_state_dict(saved)
    schedule = BatchSizeSchedule(GROWING, sampled(last="carry"), optimizer)
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == rate
