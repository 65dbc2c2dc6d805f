"""Ghost batch norm against separate BatchNorms on separate batches, one after another."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.train import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    convert_ghost_batch_norm,
)

KINDS = {
    2: (GhostBatchNorm1d, nn.BatchNorm1d),
    3: (GhostBatchNorm1d, nn.BatchNorm1d),
    4: (GhostBatchNorm2d, nn.BatchNorm2d),
    5: (GhostBatchNorm3d, nn.BatchNorm3d),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CHANNELS = 3


def some_batch(examples, rest, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, CHANNELS, *rest)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)


def pair(dims, size, remainder="merge", dtype=torch.float64, **keys):
    """A ghost layer and a BatchNorm with equal, non-trivial parameters and statistics."""
    ghost_kind, plain_kind = KINDS[dims]
    ghost = ghost_kind(CHANNELS, size, remainder=remainder, dtype=dtype, **keys)
    with torch.no_grad():
        for place, tensor in enumerate([*ghost.parameters(), *ghost.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(torch.linspace(0.5, 1.5, CHANNELS) + 0.1 * place)
    plain = plain_kind(CHANNELS, dtype=dtype, **keys)
    plain.load_state_dict(ghost.state_dict())
    return ghost, plain


def sizes_by_hand(examples, size, remainder):
    sizes = []
    while examples:
        take = min(size, examples)
        if remainder == "merge" and size <= examples < 2 * size:
            take = examples
        sizes.append(take)
        examples -= take
    return sizes


def one_by_one(plain, batch, sizes):
    return torch.cat([plain(part) for part in batch.split(sizes)])


def assert_equal(ghost, plain, batch, sizes, tolerance=1e-12):
    """Outputs, gradients of input and parameters, statistics and count."""
    batches = [batch.clone(memory_format=torch.preserve_format) for _ in range(2)]
    for each in batches:
        each.requires_grad_()
    outputs = ghost(batches[0]), one_by_one(plain, batches[1], sizes)
    for output in outputs:
        up = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
        (output * up.to(output.dtype)).sum().backward()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(*outputs, **close)
    torch.testing.assert_close(batches[0].grad, batches[1].grad, **close)
    for ours, theirs in zip(ghost.parameters(), plain.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, **close)
    for ours, theirs in zip(ghost.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    return outputs[0]


SHAPES = [(), (1,), (5,), (3, 2), (1, 1), (2, 1, 3)]


@pytest.mark.parametrize("remainder", ["merge", "separate"])
@pytest.mark.parametrize("examples", [4, 8, 9, 15, 16, 22])
@pytest.mark.parametrize("rest", SHAPES, ids=str)
def test_it_equals_separate_batches(rest, examples, remainder):
    if remainder == "separate" and examples % 4 == 1 and not rest:
        return  # one value per channel: refused, see below
    if remainder == "separate" and examples % 4 == 1 and rest in [(1,), (1, 1)]:
        return
    ghost, plain = pair(2 + len(rest), 4, remainder)
    sizes = sizes_by_hand(examples, 4, remainder)
    for seed in range(2):
        assert_equal(ghost, plain, some_batch(examples, rest, seed=seed), sizes)


@pytest.mark.parametrize(
    "keys",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"momentum": 0.7},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.3},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("rest", [(), (3, 2)], ids=str)
def test_every_option_of_batch_norm(rest, keys):
    ghost, plain = pair(2 + len(rest), 4, **keys)
    for seed, examples in enumerate((8, 11, 4, 20)):
        batch = some_batch(examples, rest, seed=seed)
        assert_equal(ghost, plain, batch, sizes_by_hand(examples, 4, "merge"))
    ghost.eval(), plain.eval()
    torch.testing.assert_close(ghost(batch), plain(batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rest", [(3, 2), (4, 1), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("examples", [8, 11])
def test_channels_last_stays(rest, examples):
    ghost, plain = pair(2 + len(rest), 4)
    form = FORMATS[2 + len(rest)]
    batch = some_batch(examples, rest).contiguous(memory_format=form)
    output = assert_equal(ghost, plain, batch, sizes_by_hand(examples, 4, "merge"))
    assert output.is_contiguous(memory_format=form)


def test_other_strides():
    ghost, plain = pair(4, 4)
    batch = some_batch(8, (3, 2)).flip(0).transpose(2, 3)[..., ::2]
    assert_equal(ghost, plain, batch, [4, 4])


@given(
    examples=st.integers(2, 40),
    size=st.integers(2, 12),
    length=st.integers(2, 4),
    momentum=st.none() | st.floats(0, 1),
    seed=st.integers(0, 999),
    remainder=st.sampled_from(["merge", "separate"]),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes(examples, size, length, momentum, seed, remainder):
    ghost, plain = pair(3, size, remainder, momentum=momentum)
    batch = some_batch(examples, (length,), seed=seed)
    assert_equal(ghost, plain, batch, sizes_by_hand(examples, size, remainder), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["single", "half"])
def test_half_precision(dtype, parameters):
    # Outputs of a few units: half a unit in the last place of the dtype, times a few roundings.
    tolerance = 16 * torch.finfo(dtype).eps
    ghost, plain = pair(4, 4, dtype=torch.float32 if parameters == "single" else dtype)
    batch = some_batch(11, (3, 2), dtype)
    ours, theirs = ghost(batch), one_by_one(plain, batch, [4, 7])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ghost.running_var, plain.running_var, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_without_running_statistics(dtype, affine):
    tolerance = 16 * torch.finfo(dtype).eps
    ghost, plain = pair(4, 4, dtype=torch.float32, affine=affine, track_running_stats=False)
    batch = some_batch(11, (3, 2), dtype)
    ours, theirs = ghost(batch), one_by_one(plain, batch, [4, 7])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_autocast():
    ghost, plain = pair(4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ghost(some_batch(8, (3, 2), torch.bfloat16)), None
        theirs = one_by_one(plain, some_batch(8, (3, 2), torch.bfloat16), [4, 4])
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_second_derivatives():
    layer, _ = pair(3, 2)
    batch = some_batch(4, (2,)).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, batch)


def test_a_small_batch_is_plain_batch_norm_to_the_bit():
    ghost, plain = pair(4, 8)
    batch = some_batch(8, (3, 2))
    assert torch.equal(ghost(batch), plain(batch))
    assert torch.equal(ghost.running_var, plain.running_var)


def test_the_statistics_weigh_the_last_ghost_most():
    layer = GhostBatchNorm1d(1, 2, momentum=0.5)
    layer(torch.tensor([[0.0], [2.0], [4.0], [6.0], [8.0], [10.0]]))
    # running mean 0, ghost means 1, 5, 9, each taking half: 0.125 x 1 + 0.25 x 5 + 0.5 x 9
    assert layer.running_mean.item() == pytest.approx(5.875)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_is_copied_to_the_host(momentum):
    layer = GhostBatchNorm2d(CHANNELS, 4, momentum=momentum, device="meta")
    assert layer(torch.empty(11, CHANNELS, 2, 2, device="meta")).shape == (11, CHANNELS, 2, 2)


def test_it_compiles_in_one_graph_at_any_batch_size():
    ghost, plain = pair(4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(ghost, backend="aot_eager", fullgraph=True)
    for examples in (8, 12, 11):
        batch = some_batch(examples, (3, 2))
        expected = one_by_one(plain, batch, sizes_by_hand(examples, 4, "merge"))
        torch.testing.assert_close(compiled(batch), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ghost.running_mean, plain.running_mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(ghost.num_batches_tracked, plain.num_batches_tracked)


def test_one_value_per_channel_is_refused():
    layer = GhostBatchNorm1d(CHANNELS, 4, remainder="separate")
    with pytest.raises(InvalidInputError, match=r"ghost batch of 1 in a batch of 9.*'merge'"):
        layer(some_batch(9, (), torch.float32))
    assert layer.num_batches_tracked == 0
    assert layer.eval()(some_batch(9, (), torch.float32)).shape == (9, CHANNELS)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None])
def test_sizes_out_of_range_are_refused(size):
    for make in (lambda: GhostBatchNorm1d(3, size), lambda: convert_ghost_batch_norm(net(), size)):
        with pytest.raises(InvalidInputError, match="virtual_batch_size"):
            make()


def test_unknown_remainders_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean merge"):
        GhostBatchNorm1d(3, 4, remainder="merged")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_other_dimensions_are_refused_as_in_torch(shape):
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        GhostBatchNorm1d(3, 2)(torch.ones(shape))


def test_an_empty_batch_is_what_it_is_in_torch():
    ghost, plain = pair(4, 4)
    empty = some_batch(0, (3, 2))
    assert ghost(empty).shape == plain(empty).shape


def net():
    shared = nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), shared),
        nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5, affine=False).eval(),
    ).double()  # fmt: skip


def test_conversion_keeps_everything():
    torch.manual_seed(0)
    model = net()
    before = copy.deepcopy(model)
    parameters, names = list(model.parameters()), list(model.state_dict())
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    assert convert_ghost_batch_norm(model, 4) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert isinstance(model[1], GhostBatchNorm2d)
    assert model[1] is model[3][1]
    assert model[1].momentum is None
    assert not model[6].training
    assert isinstance(model[6], GhostBatchNorm1d)
    batch = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(batch), before.eval()(batch), rtol=0, atol=0)
    assert len(seen) == 2
    assert "virtual_batch_size=4" in repr(model)


def test_whole_networks_equal_separate_passes():
    torch.manual_seed(0)
    model = convert_ghost_batch_norm(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
        ).double(),
        4,
    )
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).double()
    plain.load_state_dict(model.state_dict())
    batch = torch.randn(12, 3, 4, 4, dtype=torch.float64)
    model(batch).square().mean().backward()
    for part in batch.split(4):
        (plain(part).square().mean() / 3).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_states_load_either_way_and_copies_go_on():
    ghost, plain = pair(4, 4)
    file = io.BytesIO()
    torch.save(ghost.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(ghost)
    batch = some_batch(8, (3, 2))
    assert torch.equal(twin(batch), ghost(batch))
    assert twin.virtual_batch_size == 4


def test_converting_again_changes_the_size():
    model = convert_ghost_batch_norm(net(), 4)
    layer = model[1]
    convert_ghost_batch_norm(model, 8, remainder="separate")
    assert model[1] is layer
    assert (layer.virtual_batch_size, layer.remainder) == (8, "separate")


def test_a_bare_layer_is_returned():
    assert isinstance(convert_ghost_batch_norm(nn.BatchNorm3d(2), 4), GhostBatchNorm3d)
    layer = nn.Linear(2, 2)
    assert convert_ghost_batch_norm(layer, 4) is layer


class Odd(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.SyncBatchNorm(3), "1 is a SyncBatchNorm.*choose one"),
        (nn.LazyBatchNorm1d(), "1 is a LazyBatchNorm1d.*run one batch"),
        (Odd(3), "1 is a Odd.*by hand"),
    ],
    ids=["sync", "lazy", "derived"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_layers_that_would_lose_something_are_refused(layer, said):
    model = nn.Sequential(nn.BatchNorm1d(3), layer)
    with pytest.raises(InvalidInputError, match=said):
        convert_ghost_batch_norm(model, 4)
    assert type(model[0]) is nn.BatchNorm1d
