"""Observing leaves training bit-identical: weights, buffers and random state after 20 steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale import NoiseMeter

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Net(nn.Module):
    """Convolution, in-place ReLU, normalisation, dropout, checkpointing, embedding."""

    def __init__(self, norm: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(inplace=True))
        self.mlp = nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.Dropout(0.2))
        self.label = nn.Embedding(4, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, kind):
        h = self.conv(x).flatten(1)
        h = checkpoint(self.mlp, h, use_reentrant=self.reentrant) + self.label(kind)
        return self.head(F.relu(h, inplace=True))


def run(optimizer, *, source=None, every=1, pieces=1, clip=None, norm=nn.Identity, **options):
    torch.manual_seed(0)
    backend, dtype = options.pop("backend", None), options.pop("autocast", None)
    model = Net(norm(4) if norm is nn.BatchNorm2d else norm(), **options)
    called = model if backend is None else torch.compile(model, backend=backend)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    meter = None if source is None else NoiseMeter(model, optimizer, source=source, every=every)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        x = torch.randn(8, 1, 4, 4, generator=generator)
        kind, y = (torch.randint(0, n, (8,), generator=generator) for n in (4, 3))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in zip(x.chunk(pieces), kind.chunk(pieces), y.chunk(pieces), strict=True):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                value = F.cross_entropy(called(part[0], part[1]), part[2]) / pieces
            value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if step % 5 == 4:
            model.eval()
            with torch.no_grad():
                model(x, kind)
            model.train()
    if meter is not None:
        assert meter.steps == -(-20 // every)
        meter.estimate()
        meter.detach()
    return [*model.state_dict().values(), torch.rand(4)]


def assert_identical(*arguments, source, every=1, **options):
    watched = run(*arguments, source=source, every=every, **options)
    plain = run(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("source", "pieces"), [("examples", 1), ("examples", 2), ("microbatches", 2)]
)
def test_weights_are_bit_identical(source, pieces, optimizer, every):
    assert_identical(optimizer, source=source, every=every, pieces=pieces, clip=0.5)


@pytest.mark.parametrize("source", ["examples", "microbatches"])
def test_without_clipping(source):
    assert_identical("momentum", source=source, pieces=2)


def test_with_batchnorm():
    assert_identical("adam", source="microbatches", pieces=2, norm=nn.BatchNorm2d)


# The evaluation inside the loop is what torch warns of.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("every", [1, 3])
def test_with_reentrant_checkpointing(every):
    assert_identical("adam", source="examples", pieces=2, every=every, reentrant=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    assert_identical("momentum", source="examples", every=2, autocast=dtype, clip=0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("source", ["examples", "microbatches"])
@pytest.mark.parametrize("every", [1, 3])
def test_with_a_compiled_model(source, every):
    """aot_eager runs the kernels of eager mode, dropout included."""
    torch.compiler.reset()
    assert_identical("adam", source=source, pieces=2, every=every, backend="aot_eager")
