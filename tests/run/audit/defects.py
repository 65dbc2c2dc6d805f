"""Small workloads with exactly one defect each, and what composes them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from noisescale import Recipe, Workload

WIDTH, CLASSES, TOKENS, COUNT = 6, 4, 5, 64
IGNORED = -100


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, WIDTH, generator=g), torch.randint(CLASSES, (COUNT,), generator=g)


def sequences(seed=0):
    """Inputs of several tokens; labels, ever more of which are ignored."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, TOKENS, WIDTH, generator=g)
    labels = torch.randint(CLASSES, (COUNT, TOKENS), generator=g)
    lengths = torch.randint(1, TOKENS + 1, (COUNT, 1), generator=g)
    return inputs, labels.masked_fill(torch.arange(TOKENS) >= lengths, IGNORED)


def plain():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def with_batch_norm():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def with_dropout():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def with_both():
    return nn.Sequential(
        nn.Linear(WIDTH, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def summed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def token_mean(model, batch):
    inputs, labels = batch
    logits = model(inputs.flatten(0, 1))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def in_batch_negatives(model, batch):
    """Every example against all others of the batch, as contrastive losses have it."""
    found = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(found @ found.T.detach() / 0.2, torch.arange(len(found)))


def workload(model=plain, loss=cross_entropy, train=None, **fields):
    recipe = fields.pop("recipe", Recipe(optimizer="sgd", lr=0.1, batch_size=32))
    return Workload(
        name="defective",
        model=model,
        loss=loss,
        train=data() if train is None else train,
        recipe=recipe,
        **fields,
    )


def kinds(found):
    return {cause.kind for cause in found.causes}


def cause(found, kind):
    return next(one for one in found.causes if one.kind == kind)


# The slow way: no class of the package, one backward pass after another.


def rows(made, batch_size, seed=0):
    """The batch that an audit with this seed takes, as the training data has it."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(made.train[0]), generator=g)[:batch_size]
    return tuple(part[indices] for part in made.train)


def gradient(model, loss, batch):
    model.zero_grad()
    loss(model, batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def fresh(made, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made.model().train()


def parts_of(batch, size):
    count = len(batch[0])
    return [tuple(p[i : i + size] for p in batch) for i in range(0, count, size)]


def slow_difference(made, *, batch_size=32, micro=8, weights=None, model=None):
    """|sum_j w_j g_j - g| / |g| with equal weights by default."""
    model = fresh(made) if model is None else model
    batch = rows(made, batch_size)
    parts = parts_of(batch, micro)
    weights = [1 / len(parts)] * len(parts) if weights is None else weights
    each = [gradient(model, made.loss, part) for part in parts]
    whole = gradient(model, made.loss, batch)
    total = sum(w * g for w, g in zip(weights, each, strict=True))
    return float((total - whole).norm() / whole.norm())


def alone(made, **options):
    from noisescale.run.audit import audit

    return audit(made, replicas=1, **options)
