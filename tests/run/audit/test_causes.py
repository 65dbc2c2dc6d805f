"""Each cause is found in a workload that has exactly it, with its size, and in pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noisescale import Recipe
from noisescale.records import Audit
from noisescale.run.audit import audit
from run.audit.defects import (
    CLASSES,
    IGNORED,
    TOKENS,
    WIDTH,
    alone,
    cause,
    cross_entropy,
    data,
    fresh,
    gradient,
    in_batch_negatives,
    kinds,
    parts_of,
    plain,
    rows,
    sequences,
    slow_difference,
    summed,
    token_mean,
    with_batch_norm,
    with_both,
    with_dropout,
    workload,
)


def near(value):
    # Rounding of float32 gradients of order one, added up in another order.
    return pytest.approx(value, rel=1e-4)


def test_a_sound_workload_is_the_same():
    found = alone(workload())
    assert found.verdict == "same"
    assert found.causes == ()
    assert found.total.accumulated < 1e-5
    assert found.total.rng == 0
    assert found.total.floating_point < 1e-6
    assert all(row.same for row in found.groups)
    assert found.total.parameters == sum(row.parameters for row in found.groups)
    assert [row.name for row in found.groups] == ["0", "2"]
    assert found.another_batch > 0.1


def test_token_mean_is_named_with_its_size_and_weights():
    made = workload(loss=token_mean, train=sequences())
    found = alone(made)
    assert (found.verdict, kinds(found)) == ("different", {"token_mean"})
    one = cause(found, "token_mean")
    true = slow_difference(made)
    assert true > 0.01
    assert one.difference == near(true)
    assert found.total.accumulated == near(true)
    counts = [int((part[1] != IGNORED).sum()) for part in parts_of(rows(made, 32), 8)]
    assert one.weights == pytest.approx([count / sum(counts) for count in counts], rel=1e-3)
    assert "batch[1] that are not -100" in one.evidence


def test_an_empty_part_of_a_token_mean_is_told():
    inputs, labels = sequences()
    made = workload(loss=token_mean, train=(inputs, labels))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    labels[order[8:16]] = IGNORED
    found = alone(made)
    one = cause(found, "token_mean")
    assert one.weights[1] == 0
    assert "part 2 has nothing that counts" in one.evidence
    assert one.difference == near(slow_difference(made))


def test_class_weights_are_a_mean_over_something_else():
    importance = torch.tensor([1.0, 5.0, 0.2, 3.0])

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=importance)

    made = workload(loss=loss)
    found = alone(made)
    assert kinds(found) == {"token_mean"}
    sums = [float(importance[part[1]].sum()) for part in parts_of(rows(made, 32), 8)]
    weights = cause(found, "token_mean").weights
    assert weights == pytest.approx([value / sum(sums) for value in sums], rel=1e-3)


def test_a_sum_is_named_with_its_ratio():
    made = workload(loss=summed)
    found = alone(made)
    assert kinds(found) == {"sum"}
    assert cause(found, "sum").ratio == near(1 / 4)
    assert cause(found, "sum").difference == near(slow_difference(made))
    assert cause(found, "sum").difference == near(3 / 4)


def test_a_sum_with_a_partial_window_needs_no_weights():
    found = alone(workload(loss=summed), micro=10)
    assert kinds(found) == {"sum"}


def test_a_loss_scaled_by_the_batch_size_is_named():
    made = workload(loss=lambda m, b: cross_entropy(m, b) * len(b[0]) ** 0.5)
    found = alone(made)
    assert kinds(found) == {"sum"}
    assert cause(found, "sum").ratio == near(0.5)
    assert cause(found, "sum").remedy.startswith("return the mean over the examples, whatever")


def test_tokens_that_the_loss_shifts_by_itself_are_counted():
    def loss(model, tokens):
        (tokens,) = tokens
        hidden = model(F.one_hot(tokens[:, :-1], WIDTH).float().flatten(0, 1))
        return F.cross_entropy(hidden, tokens[:, 1:].flatten() % CLASSES, ignore_index=0)

    lengths = torch.arange(1, 65)[:, None] % TOKENS
    tokens = (1 + data()[1][:, None] % 3).expand(-1, TOKENS)
    made = workload(loss=loss, train=(tokens.masked_fill(torch.arange(TOKENS) > lengths, 0),))
    one = cause(alone(made), "token_mean")
    assert "the entries of batch[0][:, 1:] that are not 0" in one.evidence


def test_a_sum_beside_a_penalty_is_no_mixing():
    def loss(model, batch):
        return summed(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())

    made = workload(loss=loss)
    found = alone(made)
    assert kinds(found) == {"sum"}
    assert cause(found, "sum").difference == near(slow_difference(made))
    assert "every pass adds anew" in cause(found, "sum").evidence


def test_a_root_of_the_mean_is_no_mean_of_its_parts():
    made = workload(loss=lambda m, b: m(b[0]).square().mean().sqrt())
    assert kinds(alone(made)) == {"mixing"}


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize(("batch_size", "micro"), [(32, 8), (32, 4), (32, 16), (16, 8), (8, 4)])
def test_a_root_of_very_different_losses_is_no_mean_either(power, batch_size, micro):
    """Weights that go with the losses meet its gradient and its value, by Euler's theorem."""
    inputs, labels = data()
    targets = labels * torch.logspace(-1, 1, len(labels))

    def loss(model, batch):
        errors = model(batch[0])[:, 0] - batch[1]
        return (errors.abs() ** power).mean() ** (1 / power)

    made = workload(loss=loss, train=(inputs, targets))
    assert kinds(alone(made, batch_size=batch_size, micro=micro)) == {"mixing"}
    # The split over two replicas is looked into as well, and has two parts.
    assert kinds(audit(made, batch_size=batch_size, micro=micro)) == {"mixing"}


@pytest.mark.parametrize("micro", [8, 16])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_token_mean_that_goes_with_the_batch_is_no_mixing(power, micro):
    made = workload(loss=lambda m, b: token_mean(m, b) * len(b[0]) ** power, train=sequences())
    found = alone(made, micro=micro)
    assert kinds(found) == {"sum", "token_mean"}
    assert cause(found, "sum").ratio == near((micro / 32) ** power)


def test_a_median_is_no_mean_over_something_else():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").median()

    assert kinds(alone(workload(loss=loss))) == {"mixing"}


def test_a_part_in_which_nothing_counts_may_be_zero():
    """Where people guard against 0 / 0."""

    def loss(model, batch):
        logits = model(batch[0].flatten(0, 1))
        added = F.cross_entropy(logits, batch[1].flatten(), ignore_index=IGNORED, reduction="sum")
        return added / (batch[1] != IGNORED).sum().clamp(min=1)

    inputs, labels = sequences()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    labels[order[8:16]] = IGNORED
    found = alone(workload(loss=loss, train=(inputs, labels)))
    assert kinds(found) == {"token_mean"}
    assert cause(found, "token_mean").weights[1] == pytest.approx(0, abs=1e-6)


def test_a_compiled_model_is_audited_uncompiled():
    made = workload(model=lambda: torch.compile(with_dropout(), backend="eager"))
    found = alone(made)
    assert kinds(found) == {"dropout"}
    assert cause(found, "dropout").where == ("2",)


def test_a_token_mean_times_the_batch_size_is_told_as_both():
    made = workload(loss=lambda m, b: token_mean(m, b) * len(b[0]), train=sequences())
    found = alone(made)
    assert kinds(found) == {"sum", "token_mean"}
    assert cause(found, "sum").ratio == near(1 / 4)
    counts = [int((part[1] != IGNORED).sum()) for part in parts_of(rows(made, 32), 8)]
    weights = [count / sum(counts) for count in counts]
    assert cause(found, "token_mean").weights == pytest.approx(weights, rel=1e-3)
    right = workload(loss=token_mean, train=sequences())
    assert cause(found, "token_mean").difference == near(slow_difference(right))


def test_a_partial_window_is_named_with_its_size():
    made = workload()
    found = alone(made, micro=10)
    assert (found.micro_batches, found.last_micro_batch) == (4, 2)
    assert kinds(found) == {"partial_window"}
    one = cause(found, "partial_window")
    assert one.difference == near(slow_difference(made, micro=10))
    assert "5 times the weight" in one.evidence
    assert found.total.weighted < 1e-5
    assert found.total.accumulated == near(one.difference)


def test_batch_norm_is_named_with_its_size():
    made = workload(model=with_batch_norm)
    found = alone(made)
    assert kinds(found) == {"batch_norm"}
    one = cause(found, "batch_norm")
    assert one.difference == near(slow_difference(made))
    assert one.where == ("1",)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_batch_norm_of_any_kind_is_frozen(options):
    made = workload(
        model=lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8, **options), plain_head())
    )
    found = alone(made)
    assert kinds(found) == {"batch_norm"}
    assert cause(found, "batch_norm").difference == near(slow_difference(made))


def test_batch_norm_synchronised_between_replicas_harms_accumulation_only():
    def model():
        return nn.SyncBatchNorm.convert_sync_batchnorm(with_batch_norm())

    # Local functions: no other process can load them, and the parts are tried in this one.
    found = audit(workload(model=model))
    assert found.replicas.outcome == "not_run"
    assert cause(found, "batch_norm").affects == ("accumulation",)
    assert kinds(found) == {"batch_norm"}
    plain = audit(workload(model=lambda: with_batch_norm()))
    assert cause(plain, "batch_norm").affects == ("accumulation", "replicas")


def plain_head():
    return nn.Linear(8, CLASSES)


def test_batch_norm_that_the_model_keeps_in_evaluation_is_no_cause():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    found = alone(workload(model=lambda: Frozen(*with_batch_norm())))
    assert found.verdict == "same"


def test_in_batch_negatives_are_named():
    made = workload(loss=in_batch_negatives)
    found = alone(made)
    assert kinds(found) == {"mixing"}
    one = cause(found, "mixing")
    assert one.difference == near(slow_difference(made))
    assert "the loss mixes them" in one.evidence
    assert one.where == ()


def test_a_module_that_mixes_is_named():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    made = workload(
        model=lambda: nn.Sequential(nn.Linear(WIDTH, 8), Centred(), nn.Tanh(), plain_head())
    )
    found = alone(made)
    assert kinds(found) == {"mixing"}
    assert cause(found, "mixing").where == ("1",)


def test_a_loss_over_pairs_of_neighbours_depends_on_their_order():
    def loss(model, batch):
        found = model(batch[0])
        return (found[::2] - found[1::2]).square().mean()

    # In even parts every pair stays whole: accumulation is right, whatever the order does.
    assert alone(workload(loss=loss)).verdict == "same"
    found = alone(workload(loss=loss), micro=16, batch_size=48)
    assert found.verdict == "same"

    def ring(model, batch):
        found = model(batch[0])
        return (found - found.roll(1, 0)).square().mean()

    found = alone(workload(loss=ring))
    assert kinds(found) == {"mixing"}
    assert "order matters" in cause(found, "mixing").evidence


def test_dropout_is_the_same_in_expectation():
    found = alone(workload(model=with_dropout))
    assert found.verdict == "same_in_expectation"
    assert kinds(found) == {"dropout"}
    one = cause(found, "dropout")
    assert one.where == ("2",)
    assert 0.05 < one.difference < 3
    assert 0.05 < found.total.rng < 3
    assert found.total.floating_point < 1e-6


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(F.dropout(self.inside(x).tanh(), 0.5, self.training))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = x[:, None] * torch.linspace(0.5, 1.5, TOKENS)[None, :, None]
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Scaled(nn.Module):
    """Attention as a function, with dropout."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.head.weight[:, None, :1].sum() * x
        x = x[:, None] * torch.linspace(0.5, 1.5, TOKENS)[None, :, None]
        found = F.scaled_dot_product_attention(x, x, x, None, 0.5 if self.training else 0.0)
        return self.head(found.mean(1))


@pytest.mark.parametrize("model", [Functional, Attending, Scaled])
def test_dropout_is_found_wherever_it_is_called(model):
    found = alone(workload(model=model))
    assert (found.verdict, kinds(found)) == ("same_in_expectation", {"dropout"})


class Noisy(nn.Module):
    """Noise in training mode that is not dropout."""

    def __init__(self, draw=torch.randn):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + 0.3 * self.draw(*x.shape).to(x) if self.training else x


def numpys(*shape):
    return torch.from_numpy(np.random.standard_normal(shape))  # noqa: NPY002


def pythons(*shape):
    return torch.full(shape, random.random())


@pytest.mark.parametrize("draw", [torch.randn, numpys, pythons])
def test_other_random_numbers_are_told_from_dropout(draw):
    made = workload(model=lambda: nn.Sequential(nn.Linear(WIDTH, 8), Noisy(draw), plain_head()))
    found = alone(made)
    assert (found.verdict, kinds(found)) == ("same_in_expectation", {"random"})
    assert cause(found, "random").where == ("1",)


def test_random_numbers_that_nothing_stops_are_averaged():
    def loss(model, batch):
        return cross_entropy(model, (batch[0] + 0.3 * torch.randn_like(batch[0]), batch[1]))

    found = alone(workload(loss=loss))
    assert (found.verdict, kinds(found)) == ("same_in_expectation", {"random"})
    assert cause(found, "random").where == ("(outside of modules)",)
    assert "16 seeds" in cause(found, "random").evidence
    assert "drawn over the batch (mixup" in cause(found, "random").remedy
    # What was seen is no rounding, and what was not seen is not claimed.
    assert found.total.floating_point is None
    assert f"a difference below {found.total.tolerance:.1%}" in found.detail

    def wrong(model, batch):
        return loss(model, batch) * len(batch[0])

    found = alone(workload(loss=wrong))
    assert kinds(found) == {"random", "sum"}


def test_a_generator_of_the_models_own_is_seeded_and_restored():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, CLASSES)
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            noise = torch.randn(x.shape, generator=self.generator)
            return self.head(x + 0.3 * noise if self.training else x)

    kept = Own()
    before = kept.generator.get_state()
    found = alone(workload(model=lambda: kept))
    assert kinds(found) == {"random"}
    assert torch.equal(kept.generator.get_state(), before)


def test_buffers_that_change_in_every_pass_are_named():
    made = workload(
        model=lambda: nn.Sequential(nn.Linear(WIDTH, 8), Growing(), nn.Tanh(), plain_head())
    )
    found = alone(made)
    assert kinds(found) == {"state"}
    one = cause(found, "state")
    assert one.where == ("1.passes",)
    assert one.difference == near(slow_stateful(made))


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return x * (1 + 0.1 * self.passes)


def slow_stateful(made):
    """Each gradient as training would have it, from the same start."""
    batch = rows(made, 32)
    one, other = fresh(made), fresh(made)
    whole = gradient(one, made.loss, batch)
    total = sum(gradient(other, made.loss, part) / 4 for part in parts_of(batch, 8))
    return float((total - whole).norm() / whole.norm())


def test_batch_norm_and_dropout_are_told_apart():
    found = alone(workload(model=with_both))
    assert found.verdict == "different"
    assert kinds(found) == {"batch_norm", "dropout"}
    quiet = workload(model=lambda: without_dropout(with_both()))
    assert cause(found, "batch_norm").difference == near(slow_difference(quiet))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_token_mean_and_batch_norm_are_told_apart():
    made = workload(model=with_batch_norm, loss=token_mean, train=sequences())
    found = alone(made)
    assert kinds(found) == {"batch_norm", "token_mean"}
    counts = [int((part[1] != IGNORED).sum()) for part in parts_of(rows(made, 32), 8)]
    weights = [count / sum(counts) for count in counts]
    assert cause(found, "token_mean").weights == pytest.approx(weights, rel=1e-3)
    assert cause(found, "batch_norm").difference == near(slow_difference(made, weights=weights))


def test_token_mean_dropout_and_a_partial_window_are_told_apart():
    model = nn.Sequential
    made = workload(model=lambda: model(*with_dropout()), loss=token_mean, train=sequences())
    found = alone(made, micro=10)
    assert kinds(found) == {"token_mean", "dropout", "partial_window"}
    quiet = workload(
        model=lambda: without_dropout(with_dropout()), loss=token_mean, train=sequences()
    )
    shares = [10 / 32, 10 / 32, 10 / 32, 2 / 32]
    true = slow_difference(quiet, micro=10, weights=shares)
    assert cause(found, "token_mean").difference == near(true)


def test_sum_and_batch_norm_are_told_apart():
    made = workload(model=with_batch_norm, loss=summed)
    found = alone(made)
    assert kinds(found) == {"sum", "batch_norm"}
    assert cause(found, "batch_norm").difference == near(slow_difference(made, weights=[1.0] * 4))


def test_negatives_and_batch_norm_are_both_named():
    found = alone(workload(model=with_batch_norm, loss=in_batch_negatives))
    assert kinds(found) == {"mixing", "batch_norm"}
    assert cause(found, "batch_norm").difference is None
    assert cause(found, "mixing").where == ()
    assert cause(found, "batch_norm").where == ("1",)


def test_negatives_and_dropout_are_both_named():
    found = alone(workload(model=with_dropout, loss=in_batch_negatives))
    assert found.verdict == "different"
    assert kinds(found) == {"mixing", "dropout"}


def padded(model=plain):
    inputs, labels = sequences()
    examples = [(x[y != IGNORED], y[y != IGNORED]) for x, y in zip(inputs, labels, strict=True)]

    def collate(found):
        length = max(len(y) for _, y in found)
        x = torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x, _ in found])
        y = torch.stack([F.pad(y, (0, length - len(y))) for _, y in found])
        return {"x": x, "y": y}

    def loss(model, batch):  # the padding counts
        return F.cross_entropy(model(batch["x"].flatten(0, 1)), batch["y"].flatten())

    return workload(model=model, loss=loss, train=examples, collate=collate)


def test_padding_that_counts_is_told_from_mixing():
    made = padded()
    found = alone(made, micro=2)
    assert kinds(found) == {"collate"}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    model, examples = fresh(made), [made.train[i] for i in order.tolist()]
    parts = [made.collate(examples[i : i + 2]) for i in range(0, 32, 2)]
    total = sum(gradient(model, made.loss, part) for part in parts) / 16
    whole = gradient(model, made.loss, made.collate(examples))
    true = float((total - whole).norm() / whole.norm())
    assert cause(found, "collate").difference == near(true)


def test_padding_that_counts_and_batch_norm_are_told_apart():
    found = alone(padded(with_batch_norm), micro=2)
    assert kinds(found) == {"collate", "batch_norm"}


def test_augmentation_is_held_still():
    class Augmented:
        def __init__(self):
            self.inputs, self.labels = data()

        def __len__(self):
            return len(self.inputs)

        def __getitem__(self, index):
            return self.inputs[index] + torch.randn(WIDTH), self.labels[index]

    found = alone(workload(train=Augmented()))
    assert found.verdict == "same"


def test_half_precision_has_its_own_floor():
    made = workload(model=lambda: plain().bfloat16(), loss=half_loss)
    found = alone(made)
    assert found.verdict == "same"
    assert found.total.floating_point > 1e-4
    made = workload(model=lambda: plain().bfloat16(), loss=lambda m, b: half_loss(m, b) * len(b[0]))
    assert kinds(alone(made)) == {"sum"}


def half_loss(model, batch):
    return F.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])


def test_one_weight_is_enough_to_tell_causes_apart():
    def model():
        return nn.Linear(1, 1, bias=False)

    train = (torch.linspace(-1, 2, 64)[:, None], torch.linspace(0, 1, 64)[:, None])

    def squares(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def normalised(model, batch):
        return squares(model, batch) / batch[0].square().mean()

    assert alone(workload(model=model, loss=squares, train=train)).verdict == "same"
    assert kinds(alone(workload(model=model, loss=normalised, train=train))) == {"token_mean"}

    def contrast(model, batch):
        found = model(batch[0])
        return (found - found.mean()).square().mean()

    assert kinds(alone(workload(model=model, loss=contrast, train=train))) == {"mixing"}


def test_parameters_without_a_gradient_do_no_harm():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(WIDTH, CLASSES), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    found = alone(workload(model=Unused))
    assert found.verdict == "same"
    row = next(row for row in found.groups if row.name == "unused")
    assert (row.accumulated, row.same) == (0, True)


def test_a_gradient_that_is_not_finite_leaves_it_undetermined():
    found = alone(workload(loss=lambda m, b: cross_entropy(m, b) * float("nan")))
    assert found.verdict == "undetermined"
    assert found.total.accumulated is None
    assert Audit.from_json(found.to_json()) == found


def test_nothing_of_the_callers_is_touched():
    model = with_both()
    model.eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    found = alone(workload(model=lambda: model))
    assert kinds(found) == {"batch_norm", "dropout"}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].p == 0.5
    assert model[1].momentum == 0.1
    assert not any(module._forward_hooks for module in model.modules())


def test_equal_calls_are_equal():
    made = workload(model=with_both)
    one, two = (alone(made) for _ in range(2))
    assert (one.total, one.groups, one.causes) == (two.total, two.groups, two.causes)
    assert alone(made, seed=1).total != one.total
    assert Audit.from_json(one.to_json()) == one


def test_clipping_is_compared_in_three_places():
    made = workload(recipe=Recipe(optimizer="sgd", lr=0.1, batch_size=32, clip_norm=0.2))
    found = alone(made).clipping
    model, batch = fresh(made), rows(made, 32)

    def clip(g):
        return g * min(1.0, 0.2 / (float(g.norm()) + 1e-6))

    each = [gradient(model, made.loss, part) for part in parts_of(batch, 8)]
    true = clip(gradient(model, made.loss, batch))
    assert found.micro_norms == pytest.approx([float(g.norm()) for g in each], rel=1e-4)
    assert found.clipped_micro_batches == 4
    assert found.after < 1e-5
    size = float(true.norm())
    assert found.each == near(float((sum(map(clip, each)) / 4 - true).norm()) / size)
    assert found.before_dividing == near(float((clip(sum(each)) / 4 - true).norm()) / size)
    assert alone(workload()).clipping is None


def test_autocast_has_its_own_floor():
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    assert alone(workload(loss=loss), micro=1).verdict == "same"
    found = alone(workload(loss=loss), micro=10)
    assert kinds(found) == {"partial_window"}


def test_complex_parameters_are_compared_too():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(WIDTH, CLASSES)
            self.turn = nn.Parameter(torch.randn(CLASSES, CLASSES, dtype=torch.complex64))

        def forward(self, x):
            return (self.inside(x).to(torch.complex64) @ self.turn).abs()

    assert alone(workload(model=Complex)).verdict == "same"
    found = alone(workload(model=Complex, loss=lambda m, b: cross_entropy(m, b) * len(b[0])))
    assert kinds(found) == {"sum"}
