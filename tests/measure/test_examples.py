"""What the source of per-example norms refuses or leaves out, and what must not disturb it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale.measure.example_rules import example_rule
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, Refused, StepNorms
from reference import flat, per_example_gradients

WIDTH = 6


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(n=8, width=WIDTH):
    torch.manual_seed(1)
    return torch.randn(n, width).double(), torch.randint(0, 3, (n,))


def watch(model, batch=None, *, steps=1, loss=loss):
    model.double()
    source = ExamplesSource(model, Inventory(model))
    batch = batch_of() if batch is None else batch
    for _ in range(steps):
        model.zero_grad()
        source.open()
        loss(model, batch).backward()
        result = source.close()
    source.detach()
    return source, result


def check_against_loop(model, batch=None, loss=loss):
    """Seen parameters are exact, and |mean gradient|^2 is restricted to them."""
    batch = batch_of() if batch is None else batch
    source, norms = watch(model, batch, loss=loss)
    assert isinstance(norms, StepNorms), norms
    truth = per_example_gradients(model, loss, batch)
    seen = {k: v for k, v in truth.items() if k not in source.inventory.missing}
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(
        float(flat(seen).square().sum()), rel=1e-9
    )
    assert float(norms.mean.sum()) == pytest.approx(
        float(flat(seen).mean(0).square().sum()), rel=1e-9
    )
    return source.inventory.missing


class Body(nn.Module):
    """linear -> something -> head; the something is what a test is about."""

    def __init__(self, middle=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = middle
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.inside(torch.tanh(self.first(x))))

    def inside(self, h):
        return self.middle(h)


class Reused(Body):
    def inside(self, h):
        return self.middle(torch.tanh(self.middle(h)))


class Functional(Body):
    def inside(self, h):
        return F.linear(h, self.middle.weight, self.middle.bias)


class CalledAndFunctional(Body):
    def inside(self, h):
        return self.middle(h) + 0.5 * F.linear(torch.tanh(h), self.middle.weight)


class ByKeyword(Body):
    def inside(self, h):
        return self.middle(input=h)


class Plain(Body):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def inside(self, h):
        return h * self.scale


class TiedTwins(Body):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH))
        self.middle.weight = self.first.weight


class Attended(Body):
    def __init__(self):
        super().__init__(nn.MultiheadAttention(WIDTH, 2, batch_first=True))

    def inside(self, h):
        h = h.unsqueeze(1)
        return self.middle(h, h, h, need_weights=False)[0].squeeze(1)


class Positions(Body):
    """A table looked up by position, not by example: its input has no batch dimension."""

    def __init__(self, length):
        super().__init__(nn.Embedding(length, 1))

    def forward(self, x):
        table = self.middle(torch.arange(x.shape[1]))
        return self.head(torch.tanh(self.first(x + table.squeeze(1))))


class TimeFirst(Body):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH))

    def inside(self, h):
        time_first = h.unsqueeze(1).expand(-1, WIDTH, -1).transpose(0, 1)
        return self.middle(time_first.contiguous()).mean(0)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Drawing(Plain):
    def inside(self, h):
        return h * F.dropout(self.scale, 1e-9).cumsum(0)


MIDDLE = ("middle.weight", "middle.bias")


@pytest.mark.parametrize(
    ("make", "names", "reason"),
    [
        (lambda: Functional(nn.Linear(WIDTH, WIDTH)), MIDDLE, "not come from calls"),
        (lambda: CalledAndFunctional(nn.Linear(WIDTH, WIDTH)), MIDDLE, "not come from calls"),
        (Drawing, ("scale",), "random"),
        (lambda: Positions(WIDTH), ("middle.weight",), "batch dimension"),
        (
            lambda: Body(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
            [f"middle.parametrizations.weight.original{i}" for i in (0, 1)],
            "",
        ),
    ],
)
def test_left_out_by_name_never_wrong(make, names, reason):
    torch.manual_seed(0)
    missing = check_against_loop(make())
    assert set(missing) == set(names)
    assert all(reason in why for why in missing.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reused(nn.Linear(WIDTH, WIDTH)),
        lambda: ByKeyword(nn.Linear(WIDTH, WIDTH)),
        lambda: Body(Doubled(WIDTH, WIDTH)),
        lambda: Body(nn.PReLU()),
        Plain,
        Attended,
    ],
)
def test_unusual_layers_and_calls_that_are_measured(make):
    torch.manual_seed(0)
    assert check_against_loop(make()) == {}


def test_a_tied_weight_counts_with_its_cross_terms():
    torch.manual_seed(0)
    assert check_against_loop(TiedTwins()) == {}


def test_an_input_changed_in_place_after_the_call_is_left_out():
    class Overwriting(Body):
        def inside(self, h):
            h = h * 1
            y = self.middle(h)
            h.mul_(2)
            return y

    model = Overwriting(nn.Linear(WIDTH, WIDTH))
    model.middle.weight.requires_grad_(False)  # autograd itself needs the input otherwise
    source, _ = watch(model)
    assert "in place" in source.inventory.missing["middle.bias"]


def test_a_length_equal_to_the_batch_is_no_batch_dimension():
    """WIDTH positions or WIDTH time steps in a batch of WIDTH examples: told apart."""
    torch.manual_seed(0)
    batch = batch_of(WIDTH)
    assert set(check_against_loop(Positions(WIDTH), batch)) == {"middle.weight"}
    torch.manual_seed(0)
    source, _ = watch(TimeFirst(), batch)
    assert set(source.inventory.missing) == set(MIDDLE)


def test_an_input_of_the_batch_size_on_both_sides_is_measured():
    assert check_against_loop(Body(nn.Identity()), batch_of(WIDTH)) == {}


def test_normalised_inputs_are_measured():
    class Normalising(Body):
        def forward(self, x):
            return super().forward((x - 0.5) / 2)

    assert check_against_loop(Normalising(nn.Identity())) == {}


def test_a_model_that_cannot_run_on_half_a_batch_leaves_the_doubtful_out():
    class Fixed(Positions):
        def forward(self, x):
            assert len(x) == WIDTH
            return super().forward(x)

    source, _ = watch(Fixed(WIDTH), batch_of(WIDTH))
    assert "could not be told" in source.inventory.missing["middle.weight"]
    assert "first.weight" not in source.inventory.missing or (
        "could not be told" in source.inventory.missing["first.weight"]
    )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_in_training_mode_is_refused_by_name(momentum):
    model = Body(nn.BatchNorm1d(WIDTH, momentum=momentum))
    _, result = watch(model)
    assert isinstance(result, Refused)
    assert "'middle'" in result.detail
    assert "microbatches" in result.detail


def test_batchnorm_in_eval_mode_is_measured():
    class Frozen(Body):
        def train(self, mode=True):
            super().train(mode)
            self.middle.eval()
            return self

    assert check_against_loop(Frozen(nn.BatchNorm1d(WIDTH)).train()) == {}


def test_nothing_seen_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return F.dropout(x[:, :3] * self.scale.cumsum(0))

    _, result = watch(Scale())
    assert isinstance(result, Refused)
    assert "microbatches" in result.detail


def test_a_failing_rule_leaves_its_layer_out_and_training_alone():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return x * self.weight

    @example_rule(Broken)
    def broken(layer, x, g):
        raise ValueError("no idea")

    assert "no idea" in check_against_loop(Body(Broken()))["middle.weight"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Saved(Body):
        def inside(self, h):
            return checkpoint(self.middle, h, use_reentrant=reentrant)

    model = Saved(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
    assert check_against_loop(model) == {}


def test_half_precision_under_autocast_is_close():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    batch = torch.randn(16, 32), torch.randint(0, 3, (16,))
    truth = flat(per_example_gradients(model, loss, batch)).square().sum()
    source = ExamplesSource(model, Inventory(model))
    source.open()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, batch)
    value.backward()
    norms = source.close()
    assert isinstance(norms, StepNorms)
    assert norms.weighted.dtype == torch.float32
    assert source.inventory.missing == {}
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(
        float(truth), rel=0.03
    )


def test_frozen_parameters_do_not_count():
    model = Body(nn.Identity())
    model.first.weight.requires_grad_(False)
    assert check_against_loop(model) == {}
    source, _ = watch(model)
    assert source.inventory.parameters_seen().total == WIDTH + 3 * WIDTH + 3


def test_an_unused_layer_contributes_nothing():
    class Unused(Body):
        def inside(self, h):
            return h

    assert check_against_loop(Unused(nn.Linear(WIDTH, WIDTH))) == {}


def test_several_forwards_of_one_step_add_up():
    """Two half batches, each loss halved: the same as the whole batch at once."""
    model = Body(nn.Identity()).double()
    x, y = batch_of(8)
    whole = watch(model, (x, y))[1]

    def halves(model, batch):
        return sum(loss(model, (batch[0][i], batch[1][i])) / 2 for i in (slice(4), slice(4, 8)))

    parts = watch(model, (x, y), loss=halves)[1]
    torch.testing.assert_close(parts.weighted, whole.weighted)
    torch.testing.assert_close(parts.mean, whole.mean)
    assert (parts.units, parts.examples) == (whole.units, whole.examples) == (8, 8)


def test_unequal_passes_of_a_mean_loss_weigh_their_examples():
    """3 and 5 examples, each pass a mean: effective size 1 / sum w^2, moments unbiased."""
    model = Body(nn.Identity()).double()
    x, y = batch_of(8)

    def parts(model, batch):
        return sum(loss(model, (batch[0][i], batch[1][i])) / 2 for i in (slice(3), slice(3, 8)))

    norms = watch(model, (x, y), loss=parts)[1]
    rows = flat(per_example_gradients(model, loss, (x, y)))
    weights = torch.tensor([1 / 6] * 3 + [1 / 10] * 5).double()
    assert norms.effective == pytest.approx(1 / float(weights.square().sum()))
    assert float(norms.mean.sum()) == pytest.approx(float((weights @ rows).square().sum()))
    expected = (weights[:, None] * rows).square().sum() / weights.square().sum() ** 2
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(float(expected))


def test_a_second_backward_through_one_forward_is_left_out():
    model = Body(nn.Identity())

    def twice(model, batch):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        return value

    _, result = watch(model, loss=twice)
    assert isinstance(result, Refused)
    assert "twice" in result.detail


def test_kept_alive_is_nothing():
    """After the step neither gradients nor inputs hang on the meter."""
    model = Body(nn.Identity()).double()
    source = ExamplesSource(model, Inventory(model))
    for _ in range(2):
        x, y = batch_of()
        model.zero_grad()
        source.open()
        loss(model, (x, y)).backward()
        source.close()
        alive = [weakref.ref(p.grad) for p in model.parameters()] + [weakref.ref(x)]
        model.zero_grad()
        del x
        gc.collect()
        assert all(ref() is None for ref in alive)


def test_inputs_do_not_outlive_the_graph():
    model = Body(nn.Identity()).double()
    source = ExamplesSource(model, Inventory(model))
    source.open()
    x, y = batch_of()
    where = x.data_ptr()
    value = loss(model, (x, y))
    del value, x
    gc.collect()
    # Of what other tests left, some tensors have no storage.
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.device.type == "cpu"]
    kept = [t for t in tensors if torch._C._has_storage(t)]
    assert kept
    assert all(t.data_ptr() != where for t in kept)


def test_gradient_of_outputs_alone_counts_nothing():
    """Eval-mode and no-grad passes are not measured."""
    model = Body(nn.Identity()).double()
    source = ExamplesSource(model, Inventory(model))
    source.open()
    with torch.no_grad():
        model(batch_of()[0])
    model.eval()
    model(batch_of()[0])
    model.train()
    loss(model, batch_of()).backward()
    norms = source.close()
    assert norms.examples == 8
    assert source.close() is None


def test_eval_mode_training_is_refused_with_the_reason():
    model = Body(nn.Identity()).eval()
    _, result = watch(model)
    assert isinstance(result, Refused)
    assert "eval mode" in result.detail


def test_leaves_random_state_and_buffers_alone_while_probing():
    """The half-batch probe of a doubtful model leaves no trace."""

    class Noisy(Positions):
        def __init__(self):
            super().__init__(WIDTH)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(F.dropout(x))

    def after(probing):
        torch.manual_seed(0)
        model = Noisy().double()
        source = ExamplesSource(model, Inventory(model))
        if probing:
            source.open()
        torch.manual_seed(3)
        loss(model, batch_of(WIDTH)).backward()
        return torch.rand(3), model.calls, model.first.weight.grad

    for with_probe, without in zip(after(True), after(False), strict=True):
        assert torch.equal(with_probe, without)
