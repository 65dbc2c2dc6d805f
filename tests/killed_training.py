"""A training with a batch schedule that saves itself after every update and can be killed anywhere.

Run in a process of its own by the kill-and-resume test and benchmark; started again with the same
folder it goes on.
"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from noisescale.records.rate_schedule import RateSchedule, RateSegment
from noisescale.records.schedule import BatchPiece, BatchSchedule
from noisescale.train import BatchSizeSchedule, GradientAccumulation, ResizableBatchSampler

EXAMPLES = 100
UPDATES = 48
PLACES = ("before the step", "before saving", "while saving", "after saving")
PLAN = BatchSchedule(
    pieces=tuple(
        BatchPiece(start=start, batch_size=size)
        for start, size in ((0, 4), (60, 8), (150, 24), (400, 48))
    ),
    rate=RateSchedule(
        segments=(
            RateSegment(start=0, stop=100, shape="linear", first=0.01, last=0.05),
            RateSegment(start=100, stop=1500, shape="cosine", first=0.05, last=0.01),
        )
    ),
    coupling="square_root",
    reference_batch_size=8,
)


def some_data():
    """Rows, labels and their numbers."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(EXAMPLES, 6, generator=generator)
    labels = (rows @ torch.randn(6, 3, generator=generator)).argmax(1)
    return TensorDataset(rows, labels, torch.arange(EXAMPLES))


class Training:
    """The loop's parts, from the folder's checkpoint where there is one.

    Args:
        folder: of the checkpoint.
        by: whether the ``sampler`` changes the batch size or the ``accumulation``.
        micro: micro-batch of the accumulation.
        rank: this replica's.
        world: replicas; with several, torch.distributed's group is there already.
        workers: of the loader.
        dropout: after the hidden layer.
    """

    def __init__(self, folder, *, by="sampler", micro=2, rank=0, world=1, workers=0, dropout=0.2):
        torch.manual_seed(0)
        self.path = Path(folder) / "checkpoint.pt"
        self.rank = rank
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.model = DistributedDataParallel(self.net) if world > 1 else self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        size = {"micro_batch_size": micro} if by == "accumulation" else {"batch_size": world}
        sampler = ResizableBatchSampler(
            EXAMPLES, seed=11, last="carry", num_replicas=world, rank=rank, **size
        )
        self.window = None
        if by == "accumulation":
            self.window = GradientAccumulation(self.model, micro_batch_size=micro, sampler=sampler)
        self.schedule = BatchSizeSchedule(PLAN, self.window or sampler, self.optimizer)
        # Each iteration draws a number from the loader's generator, by default torch's own: a
        # resumed run iterates once more, and its dropout would differ.
        self.loader = DataLoader(
            some_data(),
            batch_sampler=sampler,
            num_workers=workers,
            generator=torch.Generator(),
        )
        self.sequence = []
        if self.path.exists():
            self._load()

    def run(self, until=UPDATES, kill=(None, None)):
        """Train up to so many updates; ``kill`` is the update and the place of a SIGKILL."""
        passes = []
        while self.schedule.updates < until:
            for rows, labels, numbers in self._batches():
                passes.append(numbers.tolist())
                if not self._backward(rows, labels):
                    continue
                self._die(kill, "before the step")
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.sequence.append(gathered(passes))
                passes = []
                self._die(kill, "before saving")
                self._save(kill)
                self._die(kill, "after saving")
                if self.schedule.updates == until:
                    break
        return self

    def _batches(self):
        return self.loader if self.window is None else self.window.over(self.loader)

    def _backward(self, rows, labels):
        if self.window is None:
            F.cross_entropy(self.model(rows), labels).backward()
            return True
        with self.window.micro_batch(len(rows)) as weight:
            (F.cross_entropy(self.model(rows), labels) * weight).backward()
        return self.window.is_update

    def _save(self, kill):
        if self.rank:
            return
        parts = {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "sequence": self.sequence,
        }
        image = io.BytesIO()
        torch.save(parts, image)
        written = self.path.with_suffix(".tmp")
        with written.open("wb") as file:
            file.write(image.getbuffer()[: len(image.getbuffer()) // 2])
            file.flush()
            self._die(kill, "while saving")
            file.write(image.getbuffer()[len(image.getbuffer()) // 2 :])
            file.flush()
            os.fsync(file.fileno())
        written.replace(self.path)

    def _load(self):
        parts = torch.load(self.path, weights_only=True)
        self.net.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        torch.set_rng_state(parts["random"])
        self.sequence = parts["sequence"]

    def _die(self, kill, place):
        if kill == (self.schedule.updates, place):
            os.kill(os.getpid(), signal.SIGKILL)


def gathered(passes):
    """One global batch in the order of the stream: by pass, then by replica."""
    together = [passes]
    if distributed.is_initialized():
        together = [None] * distributed.get_world_size()
        distributed.all_gather_object(together, passes)
    return [number for parts in zip(*together, strict=True) for part in parts for number in part]


def in_a_process(folder, arguments, until=UPDATES, kill=(None, None)):
    """Run in a process of its own."""
    torch.set_num_threads(1)
    Training(folder, **arguments).run(until, kill)


def flushed_gradient(rank, world, folder, kind):
    """Accumulate over data that end inside a batch, as one of several processes."""
    torch.set_num_threads(1)
    group_of(rank, world, folder, "flush")
    rows, labels, _ = some_data()[:24]
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    window = GradientAccumulation(model, micro_batch_size=4, batch_size=16 * world)
    parts = list(zip(rows.split(4), labels.split(4), strict=True))[rank::world]
    for inputs, targets in window.over(parts):
        with window.micro_batch(weight=float(targets.sum() + 1)) as weight:
            loss = F.cross_entropy(model(inputs), targets) * weight
            loss.backward()
        assert window.is_update == (inputs is parts[-1][0])
    gradient = next(model.parameters()).grad
    gradient = gradient.full_tensor() if kind == "sharded" else gradient
    if rank == 0:
        torch.save((window.position, gradient), Path(folder) / "gradient.pt")
    leave()


def group_of(rank, world, folder, name):
    """Join a process group of a name of its own."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{name}", rank=rank, world_size=world
    )


def leave():
    """End this process once all replicas are here.

    Not by destroy_process_group: what outlives it may wait for gloo's threads, and they for it.
    """
    distributed.barrier()
    os._exit(0)


def as_replica(rank, world, folder, arguments, until=UPDATES):
    """Run as one of several processes that average their gradients."""
    torch.set_num_threads(1)
    group_of(rank, world, folder, until)
    Training(folder, rank=rank, world=world, **arguments).run(until)
    leave()
