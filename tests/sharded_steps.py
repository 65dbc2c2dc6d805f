"""Steps of an optimizer whose parameters are spread over processes, beside the same on one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from killed_training import group_of, leave
from noisescale.errors import InvalidInputError
from noisescale.train import LAMB, LARS

KINDS = {"LARS": (LARS, {"lr": 2.0, "weight_decay": 0.1}), "LAMB": (LAMB, {"lr": 0.1})}


def a_model():
    """Weights of 7 rows and of 3, which two processes cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(model, optimizer, steps=3):
    """The same batches on every process."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def steps(rank, world, folder):
    """Save the weights of every way, and what a way that is refused says."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    torch.set_num_threads(1)
    group_of(rank, world, folder, "steps")
    found = {}
    for name, (kind, settings) in KINDS.items():
        model = a_model()
        train(model, kind(model.named_parameters(), **settings))
        found[name, "alone"] = [p.detach() for p in model.parameters()]
        model = a_model()
        fully_shard(model)
        train(model, kind(model.named_parameters(), **settings))
        found[name, "fully_shard"] = [p.detach().full_tensor() for p in model.parameters()]
        model = DistributedDataParallel(a_model())
        train(model, ZeroRedundancyOptimizer(model.parameters(), kind, **settings))
        found[name, "ZeRO"] = [p.detach() for p in model.parameters()]
        for originals in (True, False):
            model = FullyShardedDataParallel(
                a_model(), use_orig_params=originals, device_id=torch.device("cpu")
            )
            try:
                kind(model.parameters(), **settings)
            except InvalidInputError as problem:
                found[name, f"flattened, {originals}"] = str(problem)
    if rank == 0:
        torch.save(found, Path(folder) / "weights.pt")
    leave()
