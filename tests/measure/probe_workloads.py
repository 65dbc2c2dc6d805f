"""Workloads with a known appetite for memory and time, importable by a scan's child process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from noisescale import Recipe, Workload

MB = 1_000_000


class OneWeight(nn.Module):
    """Takes ``megabytes`` per example for a step: two matrices of half of that at a time.

    The forward pass makes ones and the product; the ones are kept for the backward pass, which
    makes the gradient of the product before that is summed to the weight's shape.
    """

    def __init__(self, megabytes: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.columns = int(megabytes * MB / 8)

    def forward(self, batch):
        ones = torch.ones(len(batch), self.columns)
        return (ones * self.weight).sum(dim=1)


def mean_output(model, batch):
    return model(batch).mean()


def sgd(**changes):
    return Recipe(lr=0.1, batch_size=8).with_changes(**changes)


def workload(loss=mean_output, *, megabytes=0.01, examples=64, **fields):
    fields.setdefault("recipe", sgd())
    return Workload(
        name="test",
        model=lambda: OneWeight(megabytes),
        loss=loss,
        train=torch.zeros(examples, 1),
        **fields,
    )


def hungry(megabytes):
    return workload(megabytes=megabytes)


def dies(above):
    """Killed, as by the kernel, in a step on more than ``above`` examples; it prints a lot."""

    def loss(model, batch):
        print('{"event": "measured"}')
        if len(batch) > above:
            os.kill(os.getpid(), signal.SIGKILL)
        return mean_output(model, batch)

    print("loading")
    return workload(loss)


def exits(above):
    def loss(model, batch):
        if len(batch) > above:
            print("cannot go on")
            os._exit(3)
        return mean_output(model, batch)

    return workload(loss)


def raises(sizes):
    def loss(model, batch):
        if len(batch) in sizes:
            raise RuntimeError(f"no batches\nof {len(batch)}")
        return mean_output(model, batch)

    return workload(loss)


def sleeps(seconds_per_size):
    """A step on b examples takes ``seconds_per_size[b]`` seconds more, 1 ms if not given."""

    def loss(model, batch):
        time.sleep(seconds_per_size.get(len(batch), 0.001))
        return mean_output(model, batch)

    return workload(loss)


def notes_its_process_group(file):
    Path(file).write_text(str(os.getpgrp()))
    return sleeps({})


class SlowData:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        time.sleep(0.002)
        return torch.zeros(1)


def data_bound():
    return Workload(
        name="slow data", model=lambda: OneWeight(0.01), loss=mean_output, train=SlowData(),
        recipe=sgd(),
    )  # fmt: skip


class ManyWeights(nn.Module):
    """10 million weights (40 MB: malloc gives so much back at once) and no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10 * MB))

    def forward(self, batch):
        return batch + self.weight.sum()


def wide(**recipe):
    return Workload(
        name="wide",
        model=ManyWeights,
        loss=mean_output,
        train=torch.zeros(4, 1),
        recipe=sgd(**recipe),
    )


def long_sequences():
    """Examples are counted 1 but the worst case counts 10: ten times the memory."""

    def loss(model, batch):
        return mean_output(model, batch.repeat_interleave(int(1 + 9 * batch.max()), dim=0))

    return workload(loss, megabytes=12, worst_case_batch=lambda size: torch.ones(size, 1))


def evaluates_in_bulk():
    """Evaluation takes 50 MB per example, training next to nothing."""

    def metrics(model, batch):
        assert not model.training
        return {"kept": torch.ones(len(batch), int(50 * MB / 4)).sum(dim=1)}

    return workload(evaluate=torch.zeros(3, 1), metrics=metrics)


def no_file():
    return Path("/nowhere/data.csv").read_text()


def not_a_workload():
    return 3
