"""One replica: a process that differentiates its share of a batch and averages with the others.

It reads its task from standard input, which stays open: it dies with its parent when that closes.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import move
from noisescale.measure.inventory import Inventory
from noisescale.measure.microbatches import check_scalar, gradients_of
from noisescale.measure.probe import _load_workload
from noisescale.measure.untouched import untouched
from noisescale.run.audit.conditions import Condition, applied, seed_everything
from noisescale.run.dry_run import fresh_model
from noisescale.run.executors.worker import die_with_parent, end_group
from noisescale.workload import Workload

_SEED_STRIDE = 7919
"""Replicas draw different random numbers, as they should: seeds this far apart. (assumed)"""

_ALIKE = 1e-3
"""Norms of averaged gradients this near each other on two replicas are equal. (assumed)"""


def main() -> None:
    """Do the task that standard input holds; whatever goes wrong is told in a file."""
    task = json.loads(sys.stdin.buffer.readline())
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    content = sys.stdin.buffer.read(size)
    if len(content) < size:
        os._exit(1)  # the parent is gone
    _follow_parent()
    folder, rank = Path(task["folder"]), task["rank"]
    try:
        _work(task, content, folder)
    except (Exception, SystemExit) as problem:  # noqa: BLE001 - told to the parent in one line
        words = " ".join(str(problem).split()) or "no message"
        kind = "" if isinstance(problem, InvalidInputError) else f"{type(problem).__name__}: "
        _write(folder / f"problem-{rank}", f"{kind}{words}"[:400].encode())
        os._exit(1)
    sys.stdout.flush()
    # Not through the interpreter's end: threads of gloo may hold it up once a neighbour is gone.
    os._exit(0)


def _work(task: dict[str, Any], content: bytes, folder: Path) -> None:
    torch.set_num_threads(task["threads"])
    cut = task["workload_bytes"]
    workload = _load_workload(task["main"], content[:cut])
    load = pickle.loads(content[cut:])
    _join(task)
    torch.manual_seed(load["seed"])
    replica = _Replica(workload, load, task["rank"])
    found = [replica.average(quiet, seeds) for quiet, seeds in load["passes"]]
    if task["rank"] == 0:
        kept = {
            "found": found,
            "through": "DistributedDataParallel" if replica.parallel is not None else "all_reduce",
            "detail": replica.detail,
            "apart": replica.apart,
        }
        torch.save(kept, folder / "result.pt.part")
        os.replace(folder / "result.pt.part", folder / "result.pt")
    dist.barrier()


class _Replica:
    """A copy of the model and its share of the batch."""

    def __init__(self, workload: Workload, load: dict[str, Any], rank: int) -> None:
        self._workload, self._rank = workload, rank
        self.model = fresh_model(workload)
        _set_weights(self.model, load["state"])
        self.model.train()
        self.inventory = Inventory(self.model)
        self._batch = move(load["batch"], next(self.model.parameters()).device)
        self.apart: list[str] = []
        self.detail = ""
        self.parallel: nn.Module | None = None
        seed = load["passes"][0][1][0]
        self._under(None, seed, self._alone)  # what is wrong without the others is told as such
        self._try_parallel(seed)

    def average(self, quiet: str | None, seeds: list[int]) -> dict[int, Tensor]:
        """Return the mean over replicas and seeds."""
        total: dict[int, Tensor] = {}
        for seed in seeds:
            for index, value in self._one(quiet, seed).items():
                share = value / len(seeds)
                total[index] = total[index] + share if index in total else share
        return {index: value.cpu() for index, value in total.items()}

    def _one(self, quiet: str | None, seed: int) -> dict[int, Tensor]:
        if self.parallel is not None:
            return self._under(quiet, seed, lambda: self._through(self.parallel))
        own = self._under(quiet, seed, self._alone)
        return self._averaged(own)

    def _try_parallel(self, seed: int) -> None:
        """Use DistributedDataParallel if it works and leaves all replicas alike."""
        problem = ""
        wrapped: nn.Module | None = None
        try:
            wrapped = DistributedDataParallel(
                self.model, find_unused_parameters=True, broadcast_buffers=False
            )
            found = self._under(None, seed, lambda: self._through(wrapped))
        except Exception as error:  # noqa: BLE001 - the average is then taken by hand
            problem, found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200], {}
        worked = torch.tensor(0.0 if problem else 1.0)
        dist.all_reduce(worked, op=dist.ReduceOp.MIN)
        if not worked:
            self.detail = f"DistributedDataParallel did not work ({problem or 'elsewhere'})"
            return
        self.apart = self._unlike(found)
        if self.apart:
            self.detail = "DistributedDataParallel left the replicas with different gradients"
            return
        self.parallel = wrapped

    def _under(
        self, quiet: str | None, seed: int, run: Callable[[], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        condition = Condition(quiet=quiet)
        with (
            untouched(self.model),
            torch.enable_grad(),
            applied(self.model, condition, lambda: None),
        ):
            seed_everything(self.model, seed + _SEED_STRIDE * self._rank)
            return run()

    def _through(self, wrapped: nn.Module | None) -> dict[int, Tensor]:
        for slot in self.inventory.slots:
            slot.tensor.grad = None
        loss = self._workload.loss(wrapped, self._batch)
        check_scalar(loss)
        loss.backward()
        return {
            index: (g.to_dense() if g.is_sparse else g).detach().clone()
            for index, slot in enumerate(self.inventory.slots)
            if (g := slot.tensor.grad) is not None
        }

    def _alone(self) -> dict[int, Tensor]:
        loss = self._workload.loss(self.model, self._batch)
        return dict(gradients_of(loss, self.inventory))

    def _averaged(self, own: dict[int, Tensor]) -> dict[int, Tensor]:
        mean: dict[int, Tensor] = {}
        for index, slot in enumerate(self.inventory.slots):
            value = own.get(index, torch.zeros_like(slot.tensor)).detach().clone().contiguous()
            dist.all_reduce(value)
            mean[index] = value / dist.get_world_size()
        return mean

    def _unlike(self, found: dict[int, Tensor]) -> list[str]:
        """Name the parameters whose gradients differ between replicas."""
        slots = self.inventory.slots
        norms = torch.tensor(
            [float(found[i].double().norm()) if i in found else 0.0 for i in range(len(slots))],
            dtype=torch.float64,
        )
        least, most = norms.clone(), norms.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        unlike = ~(most - least <= _ALIKE * most)
        return [slots[i].name for i in unlike.nonzero().flatten().tolist()]


def _set_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value.copy_(state[name])


def _join(task: dict[str, Any]) -> None:
    """Meet the other replicas through a file: no port, no name of this machine is needed."""
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        with suppress(OSError):
            if "lo" in [name for _, name in socket.if_nameindex()]:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task['folder']}/meeting",
        rank=task["rank"],
        world_size=task["world"],
        timeout=datetime.timedelta(seconds=max(1.0, task["timeout"])),
    )


def _follow_parent() -> None:
    """Die when standard input closes."""
    die_with_parent(sys.stdin.fileno())

    def watch() -> None:
        sys.stdin.buffer.read()
        end_group()

    threading.Thread(target=watch, daemon=True).start()


def _write(file: Path, content: bytes) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)
