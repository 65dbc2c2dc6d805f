"""Replicas in real processes: what they find, and what becomes of those that die."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from noisescale import InvalidInputError
from noisescale.run.audit import audit, replicas
from run.audit.defects import cause, kinds, workload

FILE = """
import os, signal, sys, time
import torch
from torch import nn
from torch.nn import functional as F
from noisescale import Recipe, Workload

generator = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=generator)
Y = torch.randint(4, (64,), generator=generator)

def model():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)
    )

def loss(model, batch):
    print("the user prints", len(batch[0]))
    return F.cross_entropy(model(batch[0]), batch[1])

def around_the_wrapper(model, batch):
    inner = getattr(model, "module", model)
    return F.cross_entropy(inner(batch[0]), batch[1])

class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x * (1 + 0.1 * self.passes)

def dies(model, batch):
    if os.environ.get("RANK") == "1":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(model, batch)

def made(loss, model=model):
    recipe = Recipe(lr=0.1, batch_size=32)
    return Workload(name="file", model=model, loss=loss, train=(X, Y), recipe=recipe)

sound, dying = made(loss), made(dies)
around = made(around_the_wrapper, lambda: nn.Linear(6, 4))
growing = made(loss, lambda: nn.Sequential(nn.Linear(6, 4), Growing()))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "replicated.py").write_text(FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path / "replicated.py")
    sys.modules.pop("replicated", None)


def children():
    """Process ids of what this process started and what still is there."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(stat.parent.name)
    return found


def test_two_processes_average_as_data_parallelism_does(file):
    before = children()
    found = audit(f"{file}:sound", micro=16, replicas=2)
    assert found.replicas.outcome == "compared", found.replicas
    assert found.replicas.through == "DistributedDataParallel"
    assert found.replicas.detail == ""
    # The same split in halves, here and there: the same causes, and none of the processes' own.
    assert kinds(found) == {"batch_norm", "dropout"}
    assert set(cause(found, "batch_norm").affects) == {"accumulation", "replicas"}
    assert found.total.replicas > found.total.floating_point
    assert found.verdict == "different"
    assert children() == before


def test_buffers_that_change_in_every_pass_are_each_process_own(file):
    found = audit(f"{file}:growing", micro=16, replicas=2)
    assert found.replicas.outcome == "compared", found.replicas
    assert found.total.replicas <= found.total.tolerance < found.total.accumulated
    assert kinds(found) == {"state"}
    assert cause(found, "state").affects == ("accumulation",)


def test_a_dead_replica_is_told_in_one_line_and_none_is_left(file):
    before, began = children(), time.monotonic()
    found = audit(f"{file}:dying", replicas=2)
    assert found.replicas.outcome == "failed"
    assert found.replicas.detail == ("replica 1 of 2 was killed by SIGKILL (the last words)")
    assert found.warnings[0] == f"replicas were not compared: {found.replicas.detail}"
    assert found.total.replicas is None
    assert kinds(found) == {"batch_norm", "dropout"}  # what needs no processes is there
    assert children() == before
    assert time.monotonic() - began < 200


FAKE = """
import json, os, sys, time
from pathlib import Path
sys.path[:] = json.loads(sys.argv.pop())
task = json.loads(sys.stdin.buffer.readline())
print("a line", flush=True)
if task["rank"] == 1:
    {fails}
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("pass", "replica 0 and 1 of 2 did not finish within 1 s"),
        ("os._exit(3)", "replica 1 of 2 ended by itself with exit status 3 (a line)"),
        (
            "Path(task['folder'], 'problem-1').write_text('no such label'); os._exit(1)",
            "replica 1 of 2 failed: no such label",
        ),
        ("os.close(0); os.kill(os.getpid(), 11)", "replica 1 of 2 was killed by SIGSEGV (a line)"),
    ],
)
def test_however_a_replica_ends_it_is_told_and_none_is_left(file, monkeypatch, fails, words):
    before = children()
    monkeypatch.setattr(replicas, "_PROGRAM", FAKE.format(fails=fails))
    # Time enough to fail on a busy machine; only what hangs needs little.
    seconds = 1 if fails == "pass" else 120
    found = audit(f"{file}:sound", replicas=2, replica_seconds=seconds)
    assert found.replicas.detail == words
    assert children() == before


def test_a_loss_that_goes_around_the_wrapper_is_named(file):
    found = audit(f"{file}:around", replicas=2)
    assert found.replicas.through == "all_reduce"
    assert kinds(found) == {"replicas"}
    assert cause(found, "replicas").where == ("weight", "bias")
    # By hand the average is right.
    assert found.total.replicas < 1e-5


def test_a_workload_that_cannot_be_sent_is_told_in_one_line():
    made = workload(model=lambda: torch.nn.Linear(6, 4))
    with pytest.raises(InvalidInputError, match="picklable") as problem:
        audit(made, replicas=2)
    assert "1 replica" in str(problem.value)
    assert "\n" not in str(problem.value)
    found = audit(made)
    assert (found.verdict, found.replicas.outcome) == ("same", "not_run")
    assert "cannot be sent" in found.warnings[0]
