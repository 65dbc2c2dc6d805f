"""Evaluation data in pieces: every example once, and nothing but zeros is left out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from noisescale.records import Recipe
from noisescale.records.trial import TrialPlan
from noisescale.run.trials.alone import train_trial
from noisescale.run.trials.engine import train_trials
from noisescale.run.trials.stacked.pieces import cut, cut_sorted, joined
from noisescale.workload import Workload

TOGETHER = 100


def pictures(count: int, features: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which each uses a few columns; some columns are used by none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=generator)
    width = torch.randint(1, features // 2, (count, 1), generator=generator)
    x[torch.arange(features) >= width] = 0
    return x, torch.randint(0, 3, (count,), generator=generator)


def error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"error": (model(batch[0]).argmax(1) != batch[1]).double()}


def test_sorted_pieces_give_every_examples_products() -> None:
    x, y = pictures(2 * TOGETHER + 5)
    part = cut_sorted((x, y), 0, TOGETHER)
    assert part.columns is not None
    weight = torch.randn(7, x.shape[1], dtype=torch.float64)
    own = weight[:, part.columns]
    found = torch.cat([piece.double() @ own[:, : piece.shape[1]].T for piece in part.inputs])
    assert torch.allclose(found, part.batch[0].double() @ weight.T, rtol=1e-12, atol=1e-12)
    assert part.count == len(x)
    together = torch.cat([x, y[:, None].float()], 1)
    again = torch.cat([part.batch[0], part.batch[1][:, None].float()], 1)
    assert sorted(together.tolist()) == sorted(again.tolist())
    assert sum(piece.numel() for piece in part.inputs) < 0.5 * x.numel()


def test_inputs_without_zeros_stay_as_they_are() -> None:
    x, y = torch.ones(300, 8), torch.zeros(300, dtype=torch.long)
    part = cut_sorted((x, y), 0, TOGETHER)
    assert part.columns is None
    assert torch.equal(torch.cat(list(part.inputs)), x)


def test_inputs_of_nothing_but_zeros() -> None:
    part = cut_sorted((torch.zeros(3, 8), torch.zeros(3)), 0, TOGETHER)
    assert [tuple(piece.shape) for piece in part.inputs] == [(3, 1)]


def test_batches_are_joined_where_all_is_per_example() -> None:
    x, y = pictures(10)
    (whole,) = joined([(x[:6], y[:6]), (x[6:], y[6:])])
    assert torch.equal(whole[0], x)
    assert torch.equal(whole[1], y)
    odd = [(x[:6], torch.tensor(1.0)), (x[6:], torch.tensor(2.0))]
    assert len(joined(odd)) == 2
    assert cut(whole, 0, 4).count == 10


def test_crossings_on_sparse_inputs_are_those_of_training_alone() -> None:
    train, held = pictures(200), pictures(600)
    train, held = (tuple(p.double() if p.is_floating_point() else p for p in s)
                   for s in (train, held))  # fmt: skip
    workload = Workload(
        name="sparse",
        model=lambda: nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3)).double(),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        train=train,
        evaluate=held,
        recipe=Recipe(lr=0.1, batch_size=20),
        metrics=error,
    )
    plans = [
        TrialPlan(
            workload="sparse",
            recipe=Recipe(lr=lr, batch_size=20, weight_decay=1e-3),
            seed=seed,
            order_seed=seed,
            targets=("validation_loss<1.09", "validation_error<0.6"),
            max_steps=60,
        )
        for lr in (0.1, 0.3)
        for seed in (0, 1)
    ]
    stacked = train_trials(workload, plans, engine="stacked", keep_curves=True)
    for plan, ours in zip(plans, stacked, strict=True):
        theirs = train_trial(workload, plan, keep_curves=True)
        assert ours.steps == theirs.steps
        for name, values in theirs.values.items():
            pairs = zip(ours.values[name], values, strict=True)
            assert all(abs(a - b) <= 1e-9 for a, b in pairs if a is not None and b is not None)
