"""Curvature along a run: known on the quadratic, leaves training as it is."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.curvature import largest_eigenvalue
from noisescale.measure.second_moments import LEAST_STEPS
from noisescale.records.curvature import CurvaturePoint
from noisescale.run.curvature_along import CurvatureAlong, weighted_quantile
from noisescale.run.measuring import measure_workload
from noisescale.run.resolve import resolve_workload


def look(step, value):
    return CurvaturePoint(step=step, value=value, residual=0.0)


def test_quantiles_count_steps():
    points = [look(0, 5.0), look(1, 1.0), look(5, 3.0)]  # one step, four steps, five steps
    every = sorted([5.0] + [1.0] * 4 + [3.0] * 5)
    for quantile in (0.05, 0.35, 0.45, 0.85, 0.95):
        expected = every[int(quantile * 10)]
        assert weighted_quantile(points, steps=10, quantile=quantile) == expected


def test_the_quadratics_curvature_is_its_own():
    workload = resolve_workload("quadratic")
    found = measure_workload("quadratic", steps=60, curvature=True).curvature
    chosen = torch.randperm(workload.train_size, generator=torch.Generator().manual_seed(0))
    inputs = workload.train[0][chosen[:1000]].double()
    truth = float(torch.linalg.eigvalsh(inputs.T @ inputs / 1000)[-1])
    assert found is not None
    for value in (found.upper, found.median, found.largest):
        assert value == pytest.approx(truth, rel=0.02)
    assert found.points[0].step == 0


def test_training_is_the_same_with_it():
    one, other = (
        measure_workload("digits", steps=40, curvature=curvature) for curvature in (False, True)
    )
    assert one.curvature is None
    assert other.curvature is not None
    assert one.noise_scale == other.noise_scale
    assert one.trajectory == other.trajectory


def test_looks_lie_ever_further_apart():
    found = measure_workload("digits", steps=100, curvature=True).curvature
    assert found is not None
    steps = [point.step for point in found.points]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[0] == 0
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] > 5
    assert found.median <= found.upper <= found.largest
    assert found.preconditioner == "none"


def test_adam_divides_the_hessian():
    workload = resolve_workload("digits")
    torch.manual_seed(0)
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, betas=(0.9, 0.99), eps=1e-6)
    rows = torch.arange(64)
    batch = tuple(part[rows] for part in workload.train)
    for _ in range(12):
        optimizer.zero_grad()
        workload.loss(model, batch).backward()
        optimizer.step()
    looks = CurvatureAlong(workload, model, optimizer)
    looks.before_step(LEAST_STEPS - 1)
    assert not looks.points
    looks.before_step(12)
    scales = [
        1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**12)).sqrt() + 1e-6).sqrt()
        for p in model.parameters()
    ]
    chosen = torch.randperm(workload.train_size, generator=torch.Generator().manual_seed(0))[:1000]
    sample = tuple(part[chosen] for part in workload.train)
    truth = largest_eigenvalue(model, workload.loss, sample, scales=scales, tolerance=1e-3)
    assert looks.points[0].value == pytest.approx(truth.value, rel=0.04)
    summary = looks.summary(steps=20)
    assert summary is not None
    assert summary.preconditioner == "adam"


def test_fewer_examples_where_each_is_a_sequence():
    workload = resolve_workload("quadratic")
    for length, wanted in ((1, 1000), (64, 128), (100_000, 1)):
        counted = dataclasses.replace(
            workload, recipe=workload.recipe.with_changes(unit="sequences", sequence_length=length)
        )
        model = counted.model()
        looks = CurvatureAlong(counted, model, torch.optim.SGD(model.parameters(), lr=0.1))
        looks.before_step(0)
        found = looks.summary(steps=1)
        assert found is not None
        assert found.examples == wanted


def test_not_at_frozen_weights():
    with pytest.raises(InvalidInputError, match="along a training"):
        measure_workload("digits", frozen=True, curvature=True)
