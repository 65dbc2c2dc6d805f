from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from noisescale import Recipe, Target, Workload
from noisescale.errors import InvalidInputError
from noisescale.run.dry_run import check_workload
from noisescale.run.evaluation import Evaluator, evaluating
from noisescale.run.rates import rate_factor
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import first_passage, train_run


def regression(*, examples=64, model=None, loss=None, **options) -> Workload:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, 3, generator=generator)
    labels = inputs @ torch.tensor([1.0, -2.0, 0.5])
    recipe = options.pop("recipe", Recipe(lr=0.1, batch_size=8))
    return Workload(
        name="regression",
        model=model or (lambda: nn.Linear(3, 1)),
        loss=loss or (lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean()),
        metrics=lambda m, b: {"miss": (m(b[0])[:, 0] - b[1]).abs()},
        train=(inputs, labels),
        evaluate=(inputs[:20], labels[:20]),
        recipe=recipe,
        **options,
    )


def test_a_run_is_the_plain_loop():
    workload = regression(recipe=Recipe(lr=0.05, batch_size=64, momentum=0.9))
    run = train_run(workload, max_steps=7, seed=3)
    torch.manual_seed(3)
    model = workload.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    expected = []
    for _ in range(7):
        optimizer.zero_grad()
        loss = workload.loss(model, workload.train)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert run.losses == pytest.approx(expected, rel=1e-5)
    assert (run.steps, run.stopped, run.examples) == (7, "steps", 448)


def test_runs_repeat_and_leave_the_callers_random_state():
    workload = regression()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train_run(workload, max_steps=20, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert train_run(workload, max_steps=20, seed=2).losses == first.losses
    assert train_run(workload, max_steps=20, seed=3).losses != first.losses


def test_the_target_is_interpolated_and_ends_the_run():
    workload = regression(recipe=Recipe(lr=0.02, batch_size=8))
    target = Target.parse("validation_loss<0.5")
    run = train_run(workload, max_steps=500, target=target, evaluate_every=10)
    (before, high), (after, low) = run.evaluations[-2:]
    assert run.stopped == "target"
    assert (after, after - before) == (run.steps, 10)
    assert high >= 0.5 > low
    assert run.steps_to_target == pytest.approx(before + 10 * (high - 0.5) / (high - low))
    goes_on = train_run(
        workload, max_steps=300, target=target, evaluate_every=10, stop_at_target=False
    )
    assert goes_on.steps == 300
    assert goes_on.steps_to_target == run.steps_to_target


def test_a_target_that_holds_at_the_start_takes_no_step():
    run = train_run(regression(), max_steps=50, target=Target.parse("train_loss<1000"))
    assert (run.steps, run.steps_to_target) == (0, 0.0)


def test_first_passage_with_a_value_before_that_is_not_finite():
    goal = Target.parse("train_loss<1")
    assert first_passage(goal, [(5, math.inf), (10, 0.5)]) == 10
    assert first_passage(goal, [(5, 3.0), (10, math.nan)]) is None


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_diverging_run_stops_early(rate):
    run = train_run(regression(recipe=Recipe(lr=rate, batch_size=8)), max_steps=500)
    assert run.diverged
    assert run.stopped == "diverged"
    assert run.steps < 50


def test_a_run_that_may_go_on_ends_after_losses_that_are_not_finite():
    workload = regression(recipe=Recipe(lr=1e30, batch_size=8))
    run = train_run(workload, max_steps=500, stop_when_diverged=False)
    assert run.stopped == "diverged"
    assert run.not_finite_steps >= 10


def test_a_loss_below_zero_is_no_divergence():
    workload = regression(
        loss=lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean() - 100,
    )
    assert not train_run(workload, max_steps=50).diverged


def test_time_ends_a_run():
    run = train_run(regression(), max_steps=10**9, max_seconds=0.05)
    assert run.stopped == "time"
    assert run.seconds < 5


def test_an_observer_sees_every_step():
    seen = []

    class Watch:
        def before_step(self, step, batch):
            seen.append(("before", step, len(batch[0])))

        def after_step(self, step, loss):
            seen.append(("after", step, loss))

    run = train_run(regression(), max_steps=2, watch=lambda model, optimizer: Watch())
    assert [entry[:2] for entry in seen] == [
        ("before", 1), ("after", 1), ("before", 2), ("after", 2),
    ]  # fmt: skip
    assert [entry[2] for entry in seen if entry[0] == "after"] == run.losses


def test_an_exception_in_the_loss_while_training_is_one_line():
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("no more")
        return model(batch[0]).square().mean()

    with pytest.raises(InvalidInputError, match=r"RuntimeError: no more; correct .*test_training"):
        train_run(regression(loss=loss), max_steps=50)


def test_rates_along_the_run():
    warm = Recipe(lr=1.0, batch_size=8, warmup_examples=32)
    assert [rate_factor(warm, step) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1]
    )
    cosine = Recipe(lr=1.0, batch_size=8, schedule={"kind": "cosine"}, total_steps=10)
    assert rate_factor(cosine, 5) == pytest.approx(0.5)
    assert rate_factor(cosine, 10) == rate_factor(cosine, 99) == pytest.approx(0)
    stairs = Recipe(lr=1.0, batch_size=8, schedule={"kind": "step", "milestones": [3, 6]})
    assert [rate_factor(stairs, s) for s in (2, 3, 6)] == pytest.approx([1, 0.1, 0.01])
    with pytest.raises(InvalidInputError, match="did you mean cosine"):
        rate_factor(Recipe(lr=1.0, batch_size=8, schedule={"kind": "cosin"}), 0)


def test_a_schedule_moves_the_weights_less():
    flat = train_run(regression(), max_steps=30)
    falling = Recipe(lr=0.1, batch_size=8, schedule={"kind": "step", "milestones": [1], "gamma": 0})
    stopped = train_run(regression(recipe=falling), max_steps=30)
    assert stopped.losses[:2] == flat.losses[:2]
    assert stopped.losses[-1] > 10 * flat.losses[-1]


def test_evaluation_is_the_mean_over_all_and_restores_the_modes():
    workload = regression(examples=3000)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
    model[0].eval()
    value = Evaluator(workload, torch.device("cpu")).value(model, "validation", "miss")
    assert model.training
    assert model[1].training
    assert not model[0].training
    with evaluating(model):
        expected = workload.metrics(model, workload.evaluate)["miss"].mean()
    assert value == pytest.approx(float(expected), rel=1e-6)


def test_training_quantities_are_those_of_a_fixed_thousand():
    workload = regression(examples=3000)
    model = workload.model()
    chosen = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:1000]
    expected = workload.loss(model, tuple(part[chosen] for part in workload.train)).item()
    found = Evaluator(workload, torch.device("cpu")).value(model, "train", "loss")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": lambda m, b: (m(b[0])[:, 0] - b[1]).square()}, r"shape \(3,\): a scalar"),
        ({"loss": lambda m, b: 1.0}, "a float: a scalar tensor"),
        ({"loss": lambda m, b: m(b[0]).mean().detach()}, "without a gradient"),
        ({"loss": lambda m, b: m(b[0][:, :2]).mean()}, "RuntimeError: mat1 and mat2"),
        (
            {"loss": lambda m, b: (m(b[0])[:, 0] - b[1]).square().sum()},
            "the mean over the examples is required, and this is a sum; divide",
        ),
        ({"model": lambda: 3}, r"model\(\) returned a int"),
        ({"model": nn.Identity}, "at least one trainable parameter"),
        ({"recipe": Recipe(lr=0.1, batch_size=65)}, "batch size 65.*at most 64"),
    ],
)
def test_a_dry_run_tells_what_is_wrong(options, words):
    with pytest.raises(InvalidInputError, match=words) as caught:
        check_workload(regression(**options))
    assert "\n" not in str(caught.value)


class Distances(nn.Module):
    """A model with everything that makes a loss depend on more than its examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1)
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        # Always on: the mode is of no help.
        return self.layers(nn.functional.dropout(batch, 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": Distances},
        {"loss": lambda m, b: (m(b[0]) * 0).sum()},
        {"loss": lambda m, b: m(b[0]).mean() * float("nan")},
        {"loss": lambda m, b: m(b[0]).mean()},
        {"loss": lambda m, b: nn.functional.cross_entropy(m(b[0]) @ b[1][None], b[1].argsort())},
        {"examples": 8, "recipe": Recipe(lr=0.1, batch_size=1)},
    ],
)
def test_a_dry_run_takes_every_mean(options):
    workload = regression(**options)
    model_state = torch.get_rng_state()
    check_workload(workload)
    assert torch.equal(torch.get_rng_state(), model_state)


@pytest.mark.parametrize("name", ["digits", "digits-cnn", "chars", "quadratic"])
def test_a_dry_run_takes_every_built_in(name):
    check_workload(resolve_workload(name))


def test_a_dry_run_checks_the_target():
    workload = regression()
    empty = dataclasses.replace(workload, evaluate=(torch.zeros(0, 3), torch.zeros(0)))
    with pytest.raises(InvalidInputError, match="evaluate with 0 examples"):
        check_workload(empty, target=Target.parse("validation_miss<0.1"))
    check_workload(empty, target=Target.parse("train_miss<0.1"))
    check_workload(workload, target=Target.parse("validation_miss<0.1"))
    with pytest.raises(InvalidInputError, match="did you mean miss"):
        check_workload(workload, target=Target.parse("validation_mis<0.1"))


def test_a_dry_run_refuses_an_averaged_metric_and_keeps_the_random_state():
    workload = regression()
    averaged = Workload(
        name="averaged",
        model=workload.model,
        loss=workload.loss,
        metrics=lambda m, b: {"miss": m(b[0]).mean()},
        train=workload.train,
        recipe=workload.recipe,
    )
    state = torch.get_rng_state()
    with pytest.raises(InvalidInputError, match=r"metric 'miss' of 3 examples has shape \(\)"):
        check_workload(averaged)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidInputError, match="no validation data"):
        check_workload(
            Workload(
                name="none",
                model=workload.model,
                loss=workload.loss,
                train=workload.train,
                recipe=workload.recipe,
            ),
            target=Target.parse("validation_loss<1"),
        )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)

    def __len__(self):
        return 64


def test_data_that_is_no_examples_by_index_is_told():
    workload = regression()
    loader = torch.utils.data.DataLoader(torch.zeros(64, 3), batch_size=8)
    for data, words in ((loader, "DataLoader.*its .dataset"), (Stream(), "Stream.*map-style")):
        with pytest.raises(InvalidInputError, match=words):
            dataclasses.replace(workload, train=data)
        with pytest.raises(InvalidInputError, match=words):
            check_workload(
                dataclasses.replace(workload, evaluate=data),
                target=Target.parse("validation_loss<1"),
            )


def test_numpy_data_train_as_tensors_do():
    workload = regression()
    arrays = dataclasses.replace(
        workload,
        train=tuple(part.numpy() for part in workload.train),
        evaluate=tuple(part.numpy() for part in workload.evaluate),
    )
    goal = Target.parse("validation_loss<0.001")
    runs = [train_run(each, max_steps=30, target=goal) for each in (workload, arrays)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].evaluations == runs[1].evaluations
