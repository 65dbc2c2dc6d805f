from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noisescale.run.builtins.quadratic import quadratic
from noisescale.run.trials.stacked.appraisal import wrong
from noisescale.run.trials.stacked.routes import sound_routes
from noisescale.workload import Workload
from run.trials.small import MODELS, cross_entropy, plans, small_workload


def names(workload: Workload, *targets: str) -> list[str]:
    (plan,) = plans(rates=(0.1,), seeds=(0,), targets=targets or ("validation_error<0.3",))
    return [route.name for route in sound_routes(workload, plan)]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("perceptron", ["products", "channels", "vmap"]),
        ("called", ["products", "channels", "vmap"]),
        ("convolutions", ["channels", "vmap"]),
        ("residual", ["vmap"]),
    ],
)
def test_the_fastest_route_comes_first(model: str, found: list[str]) -> None:
    assert names(small_workload(MODELS[model])) == found


def test_a_least_squares_loss_is_a_mean() -> None:
    assert names(quadratic(), "train_loss<0.6")[0] == "products"


def test_batch_norm_and_dropout_are_not_stacked() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 4))

    def dropping() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Dropout(0.5))

    def at_rest() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Dropout(0.0))

    assert names(small_workload(normed)) == []
    assert names(small_workload(dropping)) == []
    assert "products" in names(small_workload(at_rest))


def test_frozen_and_tied_parameters_are_not_stacked() -> None:
    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
        model[1].bias.requires_grad_(False)
        return model

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 4))
        model[2].weight = model[1].weight
        return model

    assert names(small_workload(frozen)) == []
    assert names(small_workload(tied)) == []


def test_a_loss_that_looks_into_the_model_is_not_taken_apart() -> None:
    def penalised(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + 1e-3 * sum(
            p.square().sum() for p in model.parameters()
        )

    assert names(small_workload(loss=penalised)) == ["vmap"]


def test_a_loss_that_uses_the_inputs_is_not_taken_apart() -> None:
    def weighted(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (1 + batch[0].square().mean())

    assert names(small_workload(loss=weighted)) == ["vmap"]


def test_a_loss_that_is_no_mean_is_not_taken_apart() -> None:
    def rooted(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model, batch).sqrt()

    assert names(small_workload(loss=rooted)) == ["vmap"]


def test_more_classes_than_examples_are_recognised() -> None:
    def many() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 150))

    assert names(small_workload(many))[0] == "products"


def test_a_model_that_is_a_chain_by_accident_of_one_batch_is_found_out() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), Doubling(72, 4))

    assert names(small_workload(model)) == ["vmap"]


def test_wrong_equals_argmax_with_ties_and_not_finite_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (50,), generator=generator)
    plain = torch.randn(3, 4, 50, generator=generator)
    tied = plain.round()
    broken = plain.clone()
    broken[1, 2, 7] = torch.nan
    for outputs in (plain, tied, broken):
        assert torch.equal(wrong(outputs, labels), (outputs.argmax(1) != labels).sum(1))
