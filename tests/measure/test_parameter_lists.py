"""Parameters in lists and dictionaries, against a separate backward pass per example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale import NoiseMeter
from noisescale.measure.rules import whole_module
from per_example import assert_exact, mean_square, measured

WIDTH, LENGTH = 4, 5


def entries(*shapes):
    return nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def entries_by_name(**shapes):
    return nn.ParameterDict({k: nn.Parameter(torch.randn(s)) for k, s in shapes.items()})


class Holder(nn.Module):
    """Only holds a parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(WIDTH))


class Model(nn.Module):
    """Tokens -> what a test is about -> head."""

    def __init__(self, inside, **children):
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.inside = inside
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, ids):
        return self.head(torch.tanh(self.inside(self, self.table(ids))))


def tokens(size=6):
    return (torch.randint(0, 7, (size, LENGTH)),)


def every(model, x):
    for p in model.s:
        x = torch.tanh(x * p) + p
    return x


def shared():
    held = entries(WIDTH, WIDTH)
    held.append(held[0])
    return held


def partly_frozen():
    held = entries(WIDTH, WIDTH, WIDTH)
    held[1].requires_grad_(False)
    return held


def nested():
    return nn.ParameterList([*entries(WIDTH), entries(WIDTH, WIDTH)])


def in_nested(model, x):
    return every_of(x, [model.s[0], *model.s[1]])


def every_of(x, parameters):
    for p in parameters:
        x = torch.tanh(x * p) + p
    return x


CASES = {
    "list": (every, lambda: {"s": entries(WIDTH, (), (LENGTH, WIDTH))}),
    "dictionary": (
        lambda m, x: x * m.s["a"] + m.s["b"],
        lambda: {"s": entries_by_name(a=WIDTH, b=(LENGTH, WIDTH))},
    ),
    "beside plain ones": (
        lambda m, x: x * m.s[0] + m.p,
        lambda: {"s": entries(WIDTH), "p": nn.Parameter(torch.randn(WIDTH))},
    ),
    "shared entries": (every, lambda: {"s": shared()}),
    "one list of two names": (
        lambda m, x: every_of(x, [*m.s, *m.t]),
        lambda: (lambda held: {"s": held, "t": held})(entries(WIDTH, WIDTH)),
    ),
    "some frozen": (every, lambda: {"s": partly_frozen()}),
    "some not used": (lambda m, x: x * m.s[1], lambda: {"s": entries(3, WIDTH, WIDTH)}),
    "nested lists": (in_nested, lambda: {"s": nested()}),
    "lists in a dictionary": (
        lambda m, x: every_of(x, [*m.s["a"], *m.s["b"]]),
        lambda: {"s": nn.ParameterDict({"a": entries(WIDTH), "b": entries(WIDTH, WIDTH)})},
    ),
    "lists in a list of modules": (
        lambda m, x: every_of(x, [*m.s[0], *m.s[1]]),
        lambda: {"s": nn.ModuleList([entries(WIDTH), entries(WIDTH, WIDTH)])},
    ),
    "a module that only holds": (lambda m, x: x * m.s.inner, lambda: {"s": Holder()}),
    "one plain, shared with the list": (
        lambda m, x: every(m, x * m.p),
        lambda: (lambda held: {"s": held, "p": held[0]})(entries(WIDTH, WIDTH)),
    ),
    "low rank": (
        lambda m, x: x + (x[:, 0] @ m.s["a"] @ m.s["b"])[:, None],
        lambda: {"s": entries_by_name(a=(WIDTH, 2), b=(2, WIDTH))},
    ),
    # What has to be run again: no single node where the parameter meets the batch.
    "heads": (
        lambda m, x: sum(torch.einsum("nld,de->nle", x, p) for p in m.s),
        lambda: {"s": entries((WIDTH, WIDTH), (WIDTH, WIDTH))},
    ),
    "stacked": (
        lambda m, x: x * torch.stack(list(m.s)).softmax(0)[1] + F.linear(x, m.s[0].outer(m.s[1])),
        lambda: {"s": entries(WIDTH, WIDTH)},
    ),
    "shared entries, run again": (
        lambda m, x: x * torch.stack(list(m.s)).cumsum(0)[1],
        lambda: {"s": shared()},
    ),
    "some frozen, run again": (
        lambda m, x: x * torch.stack(list(m.s)).cumsum(0)[2],
        lambda: {"s": partly_frozen()},
    ),
    "nested, run again": (
        lambda m, x: x * torch.stack([m.s[0], *m.s[1]]).cumsum(0)[2],
        lambda: {"s": nested()},
    ),
}


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("case", CASES)
def test_exact(case, size):
    """Batches of as many examples as there are positions, channels or entries, too."""
    inside, children = CASES[case]
    torch.manual_seed(0)
    assert_exact(Model(inside, **children()), tokens(size))


def test_entries_that_meet_the_batch_are_not_run_again(monkeypatch):
    monkeypatch.setattr(whole_module, "vjp", None)
    torch.manual_seed(0)
    assert_exact(Model(every, s=entries(WIDTH, (LENGTH, WIDTH))), tokens())


class Branch(nn.Module):
    """A child with a layer and entries of its own, which may be another's, too."""

    def __init__(self, held):
        super().__init__()
        self.linear, self.held = nn.Linear(WIDTH, WIDTH), held

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.linear(x)) * self.held[0] * scale


def test_children_have_entries_and_parameters_of_their_own():
    torch.manual_seed(0)
    branches = nn.ModuleList(Branch(entries(WIDTH)) for _ in range(2))

    def inside(model, x):
        for branch, p in zip(model.branches, model.s, strict=True):
            x = branch(x) * p
        return x

    assert_exact(Model(inside, branches=branches, s=entries(WIDTH, WIDTH)), tokens())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("size", [4, 6])
def test_one_list_of_two_modules(size, again):
    """Both use it, each in its own calls."""

    def inside(model, x):
        p = torch.stack(list(model.s)).cumsum(0)[1] if again else model.s[1]
        return model.branch(model.branch(x) * model.s[0]) * p

    torch.manual_seed(0)
    held = entries(WIDTH, WIDTH)
    assert_exact(Model(inside, s=held, branch=Branch(held)), tokens(size))


@pytest.mark.parametrize("size", [4, 5, 6])
def test_entries_handed_to_a_child(size):
    torch.manual_seed(0)
    model = Model(lambda m, x: m.branch(x, m.s[0]), s=entries(WIDTH), branch=Branch(entries(WIDTH)))
    assert_exact(model, tokens(size))


@pytest.mark.parametrize("called", [False, True])
def test_entries_that_the_parent_uses_are_left_out_by_name(called):
    def inside(model, x):
        return (model.branch(x) if called else x) * model.branch.held[0] + model.s[0]

    torch.manual_seed(0)
    model = Model(inside, s=entries(WIDTH), branch=Branch(entries(WIDTH, WIDTH)))
    model.branch.held[1].requires_grad_(False)
    assert_exact(model, tokens(), left_out={"branch.held.0"})


def test_of_a_layer_with_a_rule_they_are_left_out_by_name():
    """The layer's own forward does not use them; whoever does is not known."""

    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(WIDTH, WIDTH)
            self.s = entries(WIDTH)

    torch.manual_seed(0)
    model = Model(lambda m, x: m.adapted(x) * m.adapted.s[0], adapted=Adapted())
    assert_exact(model, tokens(), left_out={"adapted.s.0"})


def test_a_child_with_a_forward_of_its_instance_is_no_holder():
    torch.manual_seed(0)
    child = Holder()
    child.forward = lambda x: x * child.inner.cumsum(0)
    again = Model(lambda m, x: m.child(x) * m.s[0].cumsum(0), s=entries(WIDTH), child=child)
    batch = tuple(t.double() if t.is_floating_point() else t for t in tokens())
    source = measured(again.double(), mean_square, batch)[0]
    assert set(source.inventory.missing) == {"child.inner"}


def test_what_mixes_examples_is_left_out_by_name():
    def inside(model, x):
        h = x * model.s[0]
        return (h - h.mean(0)) * model.s[1]

    torch.manual_seed(0)
    model = Model(inside, s=entries(WIDTH, WIDTH)).double()
    meter = NoiseMeter(model, source="examples")
    mean_square(model, tokens()).backward()
    meter.close_step()
    assert set(meter.missing) == {"s.0", "s.1"}


WAYS = {
    "scaled": lambda x, p: x * p,
    "added": lambda x, p: x + p,
    "squashed": lambda x, p: x - p.sigmoid() * p,
    "contracted": lambda x, p: torch.einsum("nld,d->nl", x, p.exp())[..., None] + x,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    uses=st.lists(
        st.tuples(st.sampled_from(sorted(WAYS)), st.sampled_from("abcd")), min_size=1, max_size=5
    ),
    tied=st.lists(st.tuples(*[st.sampled_from("abcd")] * 2), max_size=2),
    frozen=st.sets(st.sampled_from("abcd"), max_size=3),
    depth=st.integers(0, 2),
    size=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_any_uses_of_any_entries(uses, tied, frozen, depth, size, seed):
    torch.manual_seed(seed)
    named = {key: nn.Parameter(torch.randn(WIDTH)) for key in "abcd"}
    for one, other in tied:
        named[one] = named[other]
    for key in frozen:
        named[key].requires_grad_(False)
    held = nn.ParameterDict(named)
    for _ in range(depth):
        held = nn.ParameterList([held])

    def inside(model, x):
        found = model.s
        for _ in range(depth):
            found = found[0]
        for way, key in uses:
            x = WAYS[way](x, found[key])
        return torch.tanh(x)

    assert_exact(Model(inside, s=held), tokens(size))


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_training_is_bit_identical_and_the_meter_agrees(mode):
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Model(every, s=nn.ParameterList([*shared(), *entries((LENGTH, WIDTH))]))
        optimizer = torch.optim.AdamW(model.parameters())
        meter = NoiseMeter(model, optimizer, mode=mode, source="examples") if watched else None
        for _ in range(4):
            optimizer.zero_grad()
            mean_square(model, tokens()).backward()
            optimizer.step()
        weights.append([*model.state_dict().values(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert (meter.steps, meter.missing) == (4, {})
    found = meter.check(tokens(), mean_square)
    assert found.agrees, found.detail
    assert found.missing == {}
