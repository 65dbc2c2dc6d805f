"""Kill a training with a batch schedule at random moments: is it the same training in the end?

    python benchmarks/kills_schedule.py [--kills 20] [--updates 240] [--seed 0]
                                        [--out benchmarks/out/kills_schedule.json]

The training of the kill-and-resume test (tests/killed_training.py: momentum, dropout, batches of
4, 8, 24 and 48 over many epochs, a checkpoint after every update) runs in a process of its own,
driven by a sampler, by accumulation, and by a sampler whose loader has two workers. The moments of
the SIGKILLs are random in wall time, so anywhere: while it loads, in a step, while saving. It is
started again with the same arguments. Bounds: so many kills fell before the training's end;
weights, momenta and rates are those of an undisturbed run bit for bit, and so is the sequence of
global batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from killed_training import Training, in_a_process

KINDS: dict[str, dict[str, Any]] = {
    "sampler": {"by": "sampler"},
    "accumulation": {"by": "accumulation"},
    "workers": {"by": "sampler", "workers": 2},
}
PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import; torch's optimizers load _dynamo when the first one is made.
PROCESSES.set_forkserver_preload(["torch._dynamo", "noisescale.train", "torch.nn.parallel"])


def identical(one: Training, other: Training) -> bool:
    """Whether two trainings ended alike, bit for bit."""
    pairs = zip(one.net.parameters(), other.net.parameters(), strict=True)
    weights = all(torch.equal(a, b) for a, b in pairs)
    states = zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True)
    momenta = all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in states)
    rates = one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
    return weights and momenta and rates and one.sequence == other.sequence


def run(kind: str, folder: Path, updates: int, seconds: float | None = None) -> bool:
    """Train in a process; killed after so many seconds, if it is still there.

    Returns:
        Whether it was killed.
    """
    process = PROCESSES.Process(target=in_a_process, args=(folder, KINDS[kind], updates))
    process.start()
    process.join(seconds)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    assert was_alive or process.exitcode == 0, "the training failed by itself"
    return was_alive


def killed(kind: str, folder: Path, updates: int, kills: int, gap: float, seed: int) -> int:
    """Train with kills; return how many there were."""
    draws, fell = random.Random(seed), 0
    while fell < kills and run(kind, folder, updates, seconds=draws.uniform(0, 2 * gap)):
        fell += 1
    run(kind, folder, updates)
    return fell


def report(kind: str, home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one kind, print the verdict."""
    folders = [home / f"{kind}-{name}" for name in ("alone", "killed")]
    for folder in folders:
        folder.mkdir()
    run(kind, folders[0], 1)  # starts the server
    began = time.perf_counter()
    run(kind, folders[0], arguments.updates)
    # Half of the gaps' sum goes by before the end, where updates take as long as alone.
    gap = (time.perf_counter() - began) / arguments.kills / 2
    fell = killed(kind, folders[1], arguments.updates, arguments.kills, gap, arguments.seed)
    same = identical(*(Training(folder, **KINDS[kind]) for folder in folders))
    met = "MET" if same and fell == arguments.kills else "MISSED"
    print(
        f"{kind}: {fell} kills, one per {gap:.2f} s, in {arguments.updates} updates:"
        f" {'identical' if same else 'DIFFERENT'}: {met}",
        flush=True,
    )
    return {"kills": fell, "gap": gap, "updates": arguments.updates, "same": same, "met": met}


def main() -> None:
    """Kill, print, write JSON; exit 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="per kind")
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/kills_schedule.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with tempfile.TemporaryDirectory() as home:
        reports = {kind: report(kind, Path(home), arguments) for kind in KINDS}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=1))
    sys.exit(any(found["met"] != "MET" for found in reports.values()))


if __name__ == "__main__":
    main()
