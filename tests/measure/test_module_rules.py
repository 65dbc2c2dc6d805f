"""Layers that are run again: recurrent ones, attention, and modules without a rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale import NoiseMeter
from noisescale.measure.example_rules import rule_for
from per_example import assert_exact, mean_square, measured

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float64, torch.float32])


class Recurrent(nn.Module):
    """A recurrent layer whose outputs and last states all count."""

    def __init__(self, layer, width, states=False):
        super().__init__()
        self.first = nn.Linear(3, layer.input_size)
        self.layer, self.states = layer, states
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        first = self.layer.batch_first
        h = h if first else h.transpose(0, 1)
        out, last = self.layer(h, self.start(h)) if self.states else self.layer(h)
        out = out if first else out.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        ends = torch.cat([s.transpose(0, 1).flatten(1) for s in last], 1).sum(1)
        return self.head(out) + ends[:, None, None]

    def start(self, h):
        layer, batch = self.layer, h.shape[0 if self.layer.batch_first else 1]
        many = layer.num_layers * (2 if layer.bidirectional else 1)
        hidden = h.new_full((many, batch, layer.proj_size or layer.hidden_size), 0.3)
        cell = h.new_full((many, batch, layer.hidden_size), 0.2)
        return (hidden, cell) if isinstance(layer, nn.LSTM) else hidden


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@FEW
@given(
    kind=st.sampled_from(["LSTM", "GRU", "tanh", "relu", "projected"]),
    options=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 2),
            "bidirectional": st.booleans(),
            "batch_first": st.booleans(),
            "bias": st.booleans(),
        }
    ),
    length=st.integers(1, 5),
    states=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_recurrent_layers(kind, options, length, states, seed, dtype):
    torch.manual_seed(seed)
    if kind == "projected":
        layer = nn.LSTM(2, 4, proj_size=3, **options)
    elif kind in ("tanh", "relu"):
        layer = nn.RNN(2, 4, nonlinearity=kind, **options)
    else:
        layer = getattr(nn, kind)(2, 4, **options)
    width = (3 if kind == "projected" else 4) * (2 if options["bidirectional"] else 1)
    assert_exact(Recurrent(layer, width, states), (torch.randn(4, length, 3),), dtype=dtype)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("started", [False, True])
def test_cells_called_step_by_step(kind, started):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(3, 4)

        def forward(self, x):
            state = None
            if started:
                h = x.new_full((len(x), 4), 0.1)
                state = (h, 2 * h) if kind is nn.LSTMCell else h
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return state[0] if kind is nn.LSTMCell else state

    torch.manual_seed(0)
    assert_exact(Steps(), (torch.randn(4, 3, 3),))


@pytest.mark.filterwarnings("ignore:.*")
def test_recurrent_layers_left_out():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(self.rnn(packed)[1][0])

    torch.manual_seed(0)
    names = {f"rnn.{n}_{k}_l0" for n in ("weight", "bias") for k in ("ih", "hh")}
    assert_exact(Packed(), (torch.randn(4, 3, 3),), left_out=names)
    assert "dropout" in rule_for(nn.LSTM(2, 2, num_layers=2, dropout=0.1))


class Attentive(nn.Module):
    def __init__(self, mask=None, weights=False, **options):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.mask, self.weights = mask, weights

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h if self.attention.batch_first else h.transpose(0, 1)
        options = {}
        if self.mask == "causal":
            n = x.shape[1]
            options["attn_mask"] = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        if self.mask == "padding":
            options["key_padding_mask"] = x[..., 0].argsort(1).argsort(1) < 2
        y, a = self.attention(h, h, value=h + 1, need_weights=self.weights, **options)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return y + a.square().sum((1, 2))[:, None, None] if self.weights else y


@FEW
@given(
    mask=st.sampled_from([None, "causal", "padding"]),
    weights=st.booleans(),
    first=st.booleans(),
    bias=st.booleans(),
    extra=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_attention(mask, weights, first, bias, extra, seed, dtype):
    torch.manual_seed(seed)
    model = Attentive(mask, weights, batch_first=first, bias=bias, add_bias_kv=extra)
    assert_exact(model, (torch.randn(4, 5, 3),), dtype=dtype)


def test_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for dtype in (torch.float64, torch.float32):
        assert_exact(model, (torch.randn(4, 5, 4),), dtype=dtype)
    loud = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    assert "dropout" in rule_for(loud.self_attn)


class Vit(nn.Module):
    """Plain parameters: a class token, positions, and a scale on each branch."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.full((4,), 0.5)), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.scale * torch.tanh(self.inner(x))

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(3, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(8, 4))
        self.branches = nn.Sequential(self.Branch(), self.Branch())
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1)
        h = h + self.positions[: h.shape[1]]
        return self.branches(h) * self.temperature.exp()


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pair = nn.Linear(4, 3), nn.Bilinear(3, 4, 2)

    def forward(self, x):
        return self.pair(self.a(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Vit, (5, 3)),
        (lambda: nn.Sequential(nn.Linear(4, 4), RmsNorm(4)), (5, 4)),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), (4,)),
        (lambda: nn.Sequential(nn.Linear(4, 4), Doubled(4, 2)), (4,)),
        (Two, (4,)),
    ],
)
def test_modules_without_a_rule(make, shape, dtype):
    torch.manual_seed(0)
    assert_exact(make(), (torch.randn(6, *shape),), dtype=dtype)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.first(x) * self.scale


class Centred(Mixing):
    def forward(self, x):
        h = x * self.scale
        return self.first(h - h.mean(0))


class Loud(Mixing):
    def forward(self, x):
        return nn.functional.dropout(self.first(x) * self.scale.cumsum(0), 0.5)


def test_modules_that_mix_examples_or_draw_random_numbers_are_left_out():
    torch.manual_seed(0)
    batch = (torch.randn(6, 4).double(),)
    for make, reason in ((Centred, "calls"), (Loud, "random")):
        source, _ = measured(make().double(), mean_square, batch)
        assert list(source.inventory.missing) == ["scale"]
        assert reason in source.inventory.missing["scale"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", ["scripted", "traced"])
def test_what_torch_jit_compiled_is_left_out_by_name(compiled):
    torch.manual_seed(0)
    inner = Mixing().double()
    example = torch.randn(6, 4).double()
    inner = torch.jit.script(inner) if compiled == "scripted" else torch.jit.trace(inner, example)
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2)).double()
    meter = NoiseMeter(model, source="examples")
    mean_square(model, (example,)).backward()
    meter.close_step()
    assert set(meter.missing) == {"1.scale", "1.first.weight", "1.first.bias"}
    assert "torch.jit" in meter.missing["1.scale"]
    model.zero_grad()
    found = meter.check((example,), mean_square)
    assert found.agrees, found.detail


def test_running_again_leaves_no_trace():
    class Counting(Mixing):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = 0

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return super().forward(x)

    torch.manual_seed(0)
    model, fired = Counting().double(), []
    model.first.register_forward_hook(lambda *_: fired.append(1))
    state = torch.get_rng_state()
    measured(model, mean_square, (torch.randn(6, 4).double(),))
    torch.set_rng_state(state)
    assert (float(model.calls), model.seen, len(fired)) == (1, 1, 1)


def test_chunks_do_not_change_the_answer(monkeypatch):
    torch.manual_seed(0)
    model, batch = Attentive(batch_first=True).double(), (torch.randn(7, 5, 3).double(),)
    whole = measured(model, mean_square, batch)[1]
    monkeypatch.setattr("noisescale.measure.rules.parts.CHUNK_ELEMENTS", 300)
    torch.testing.assert_close(measured(model, mean_square, batch)[1].weighted, whole.weighted)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Vit, (5, 3)),
        (lambda: Attentive(batch_first=True), (5, 3)),
        (lambda: Recurrent(nn.LSTM(2, 4, batch_first=True), 4), (5, 3)),
        (lambda: Recurrent(nn.GRU(2, 4), 4, states=True), (5, 3)),
    ],
)
def test_training_is_bit_identical(make, shape):
    def trained(measuring):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer, source="examples") if measuring else None
        for _ in range(4):
            optimizer.zero_grad()
            mean_square(model, (torch.randn(6, *shape),)).backward()
            optimizer.step()
        assert meter is None or (meter.missing, meter.steps) == ({}, 4)
        return list(model.parameters()), torch.rand(2)

    (weights, drawn), (expected, also) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert torch.equal(drawn, also)
