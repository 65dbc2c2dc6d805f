"""Every rule, through a whole model, against a separate backward pass per example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale.measure.example_rules import example_rule, rule_for
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms
from reference import per_example_gradients


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(width), Attention(width)
        self.ln2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width, bias=False))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 7, length: int = 9, width: int = 8, padding=None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.head(self.blocks(self.tokens(ids) + self.positions(positions)))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.label, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.label(ids)))


def conv(**options) -> nn.Module:
    body = nn.Conv2d(4, 8, **options)
    size = body(torch.zeros(1, 4, 7, 9)).numel()
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        body,
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(size, 3),
    )


def image(n):
    return torch.randn(n, 2, 7, 9), torch.randint(0, 3, (n,))


def rows(*shape, classes=3):
    return lambda n: (torch.randn(n, *shape), torch.randint(0, classes, (n,)))


def tokens(length, vocabulary=7):
    def make(n):
        ids = torch.randint(0, vocabulary, (n, length + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return make


CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)),
        rows(5),
    ),
    "mlp without bias": (
        lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)),
        rows(5),
    ),
    "frozen weight": (
        lambda: freeze(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), "0.weight"),
        rows(5),
    ),
    "3-D, Gram form": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3)),
        rows(3, 12),
    ),
    "3-D, product form": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)),
        rows(20, 3),
    ),
    "4-D": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        rows(2, 3, 3),
    ),
    "conv": (lambda: conv(kernel_size=3), image),
    "conv stride, dilation": (
        lambda: conv(kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
        image,
    ),
    "conv groups": (lambda: conv(kernel_size=3, groups=2, padding=1, bias=False), image),
    "conv depthwise": (lambda: conv(kernel_size=3, groups=4), image),
    "conv 1x1": (lambda: conv(kernel_size=1), image),
    "conv same": (lambda: conv(kernel_size=(4, 3), padding="same", dilation=(1, 2)), image),
    "conv valid": (lambda: conv(kernel_size=3, padding="valid"), image),
    "conv reflect": (
        lambda: conv(kernel_size=3, padding=(2, 1), padding_mode="reflect"),
        image,
    ),
    "conv circular, same": (
        lambda: conv(kernel_size=3, padding="same", padding_mode="circular"),
        image,
    ),
    "conv replicate": (lambda: conv(kernel_size=3, padding=1, padding_mode="replicate"), image),
    "embedding of labels": (Bag, lambda n: (torch.randint(0, 5, (n,)), torch.randint(0, 3, (n,)))),
    "gpt": (Gpt, tokens(6)),
    "gpt, long, padding": (lambda: Gpt(length=40, padding=2), tokens(40)),
    "layer norm over two dimensions": (
        lambda: nn.Sequential(nn.LayerNorm((4, 3)), nn.Flatten(), nn.Linear(60, 3)),
        rows(5, 4, 3),
    ),
    "layer norm of rows": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        rows(5),
    ),
}


def freeze(model, name):
    dict(model.named_parameters())[name].requires_grad_(False)
    return model


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def measured(model, batch, loss=cross_entropy) -> tuple[ExamplesSource, StepNorms]:
    source = ExamplesSource(model, Inventory(model))
    source.open()
    loss(model, batch).backward()
    norms = source.close()
    source.detach()
    assert isinstance(norms, StepNorms), norms
    return source, norms


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_slow_loop(name, dtype, tolerance):
    torch.manual_seed(0)
    make, data = CASES[name]
    model = make().to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in data(11))
    truth = per_example_gradients(model, cross_entropy, batch)
    source, norms = measured(model, batch)
    assert source.inventory.missing == {}
    assert (norms.units, norms.examples) == (11, 11)
    for i, (slot_name, rows_) in enumerate(truth.items()):
        assert source.inventory.slots[i].name == slot_name
        square = float(rows_.square().sum())
        # The key's bias has no gradient under attention but rounding: an absolute floor.
        floor = 1e-20 if dtype == torch.float64 else 1e-9
        assert float(norms.weighted[i]) * norms.weighted_factor == pytest.approx(
            square, rel=tolerance, abs=floor
        ), slot_name
        assert float(norms.mean[i]) == pytest.approx(
            float(rows_.mean(0).square().sum()), rel=5 * tolerance, abs=floor
        ), slot_name


def test_chunks_do_not_change_the_answer(monkeypatch):
    torch.manual_seed(0)
    model, batch = conv(kernel_size=3, groups=2, padding=1).double(), image(11)
    batch = (batch[0].double(), batch[1])
    whole = measured(model, batch)[1]
    monkeypatch.setattr("noisescale.measure.rules.parts.CHUNK_ELEMENTS", 500)
    model.zero_grad()
    torch.testing.assert_close(measured(model, batch)[1].weighted, whole.weighted)


def test_a_rule_of_ones_own():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.factor

    model = nn.Sequential(nn.Linear(5, 4), Scale(), nn.Linear(4, 3)).double()
    before = rule_for(model[1])
    torch.manual_seed(0)
    batch = (torch.randn(6, 5).double(), torch.randint(0, 3, (6,)))

    @example_rule(Scale)
    def scale_norms(layer, x, g):
        return {"factor": x * g}

    assert rule_for(model[1]) is not before
    source, norms = measured(model, batch)
    truth = per_example_gradients(model, cross_entropy, batch)
    assert source.inventory.missing == {}
    assert float(norms.weighted[2]) * 36 == pytest.approx(float(truth["1.factor"].square().sum()))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.EmbeddingBag(5, 4, mode="max"), "max"),
        (nn.ParameterList([torch.zeros(2)]), "never called"),
    ],
)
def test_layers_that_cannot_be_measured_say_why(layer, reason):
    assert reason in rule_for(layer)


def test_subclasses_count_only_with_their_parents_forward():
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert not isinstance(rule_for(Same(2, 2)), str)
    assert rule_for(Other(2, 2)) is not rule_for(Same(2, 2))
