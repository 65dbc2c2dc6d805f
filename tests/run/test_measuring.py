from __future__ import annotations

import pytest
import torch
from torch import nn

from noisescale import Recipe, Target, Workload
from noisescale.errors import InvalidInputError
from noisescale.records import Outcome
from noisescale.run.builtins.quadratic import exact_noise_scale
from noisescale.run.measuring import measure_run, measure_workload
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import train_run
from noisescale.run.watching import micro_batch_size


def test_along_digits():
    measured = measure_workload("digits", seed=1)
    noise = measured.noise_scale
    assert noise.outcome is Outcome.DETERMINED
    assert (noise.source, noise.population, noise.unit) == ("examples", "train_set", "examples")
    assert noise.parameters_seen.complete
    assert set(measured.groups) == {"0", "2"}
    assert (measured.lr, measured.batch_size, measured.frozen) == (0.5, 32, False)
    steps = [row.step for row in measured.trajectory]
    assert steps == sorted(set(steps))
    assert [row.examples for row in measured.trajectory] == [32 * step for step in steps]
    assert measured.trajectory[0].loss > measured.trajectory[-1].loss


def test_the_whole_is_the_sum_of_groups_and_the_mean_of_windows():
    measured = measure_workload("digits", steps=60)
    noise = measured.noise_scale
    assert noise.steps == measured.trajectory[-1].step == 60
    assert sum(g.trace_cov for g in measured.groups.values()) == pytest.approx(noise.trace_cov)
    windows = [row.grad_sq for row in measured.trajectory]
    assert sum(windows) / len(windows) == pytest.approx(noise.grad_sq, rel=1e-6)


def test_measuring_does_not_change_the_training():
    workload = resolve_workload("digits")
    plain = train_run(workload, max_steps=30, seed=4)
    for source in ("examples", "microbatches"):
        assert measure_run(workload, max_steps=30, seed=4, source=source).run.losses == plain.losses


def test_frozen_quadratic_is_the_exact_answer():
    measured = measure_workload("quadratic", frozen=True, seed=7)
    torch.manual_seed(7)
    workload = resolve_workload("quadratic")
    grad_sq, trace_cov = exact_noise_scale(workload.model().weight, workload.train)
    noise = measured.noise_scale
    # The target is the training loss: the population is the training set, seen whole.
    assert noise.population == "train_set"
    assert noise.b_simple == pytest.approx(trace_cov / grad_sq, rel=1e-4)
    assert noise.low == noise.high == noise.b_simple
    assert measured.lr is None
    assert measured.trajectory == ()


def test_micro_batches_agree_with_examples():
    by = {
        source: measure_workload("digits", steps=100, source=source).noise_scale
        for source in ("examples", "microbatches")
    }
    # Both are unbiased; 8 units per step instead of 32 spread tr(Sigma) by about
    # sqrt(2/7/100) = 5 %, of which 4 deviations are allowed.
    assert by["microbatches"].trace_cov == pytest.approx(by["examples"].trace_cov, rel=0.2)
    assert by["microbatches"].source == "microbatches"
    assert "extra passes" in by["microbatches"].detail


def test_estimates_stop_at_the_goal():
    workload = resolve_workload("digits")
    measured = measure_run(workload, target=Target.parse("train_loss<1"), max_steps=300)
    goal = measured.run.steps_to_target
    assert goal is not None
    assert goal <= measured.noise_scale.steps < goal + 1
    assert measured.first.steps == measured.last.steps == measured.noise_scale.steps // 4
    assert measured.noise_scale.population == "train_set"


def test_a_diverging_run_is_a_result():
    measured = measure_workload("digits", steps=50, overrides={"lr": 1e30})
    assert measured.noise_scale.outcome in (Outcome.TOO_FEW_STEPS, Outcome.NOT_FINITE)
    assert measured.noise_scale.b_simple is None
    assert measured.noise_scale.skipped_steps > 0
    assert "not finite" in measured.warnings[0]


def with_batchnorm(loss=None, batch_size=9) -> Workload:
    inputs = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    return Workload(
        name="normalised",
        model=lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)),
        loss=loss or (lambda m, b: (m(b)[:, 0] - b[:, 0]).square().mean()),
        train=inputs,
        recipe=Recipe(lr=0.01, batch_size=batch_size),
    )


@pytest.mark.parametrize("batch_size", [9, 17, 32])
def test_batch_statistics_are_measured_by_micro_batches(batch_size):
    measured = measure_workload(with_batchnorm(batch_size=batch_size), steps=30)
    assert measured.noise_scale.source == "microbatches"
    assert measured.noise_scale.steps == 30


def test_no_micro_batch_under_batch_statistics_is_a_single_example():
    model = with_batchnorm().model()
    for batch_size in range(4, 200):
        size = micro_batch_size(model, batch_size)
        assert size >= 2
        assert batch_size % size != 1
    assert micro_batch_size(nn.Linear(1, 1), 32) == 4


def test_a_loss_that_is_never_finite_is_an_outcome():
    def loss(model, batch):
        return model(batch).mean() * float("nan")

    measured = measure_workload(with_batchnorm(loss), steps=30)
    assert measured.noise_scale.outcome is Outcome.NOT_FINITE
    assert "not finite at 10 of 10 steps" in measured.warnings[0]
    assert "the run ended after 10 of them in a row" in measured.warnings[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": -1}, "batch size"),
        ({"batch_size": 5000}, "at most 1437"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "from 0 to 2.63 - 1"),
        ({"seed": 1.0}, "seed 1.0"),
        ({"source": "exampels"}, "did you mean examples"),
        ({"source": "zzz"}, "one of auto, examples, microbatches is required; give source='auto'"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(InvalidInputError, match=words):
        measure_workload("digits", **options)


def test_progress_is_told():
    told = []
    measure_workload("digits", steps=5, on_progress=lambda what, share: told.append(share))
    assert told == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_under_adams_norm():
    recipe = {"optimizer": "adamw", "lr": 0.001}
    measured = measure_workload("digits", steps=40, overrides=recipe, preconditioner="adam")
    assert measured.noise_scale.preconditioner == "adam"
    assert measured.noise_scale.steps == 30
    assert {group.preconditioner for group in measured.groups.values()} == {"adam"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preconditioner": "adma"}, "did you mean adam"),
        ({"preconditioner": "adam"}, "with optimizer 'sgd': adam or adamw is required"),
        ({"preconditioner": "adam", "frozen": True}, "leave out --frozen"),
    ],
)
def test_norms_that_cannot_be_had(options, words):
    with pytest.raises(InvalidInputError, match=words):
        measure_workload("digits", steps=5, **options)
