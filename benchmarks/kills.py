"""Kill workers, drivers and Ray workers at random moments: is any result lost or counted twice?

    python benchmarks/kills.py [--local 150] [--driver 40] [--ray 10] [--trials 240]
                               [--seed 0] [--out benchmarks/out/kills.json]

Small sweeps run one after the other, each into a store of its own, until so many SIGKILLs have been
sent. The moments are a Poisson process in wall time, start-up and writes included. A killed driver
is started again with the same command. Bounds, for each kind: no result that was once in a store is
ever missing from it again, no trial's result stands in a store twice, and every sweep's final table
equals the undisturbed one (wall seconds aside). No worker may outlive its driver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from killed_trial import TARGET, TRAIN

from noisescale.records import Recipe, TrialPlan
from noisescale.run.executors.executor import Executor, WorkerSpec, held
from noisescale.run.executors.local import LocalExecutor
from noisescale.run.executors.running import run_plans
from noisescale.run.store import TRIALS, TrialStore

WORKLOAD = "killed-trial 1"
SPEC = WorkerSpec(workload=None, train=TRAIN, keep_curves=True)
SLOTS = 2
GAP_STARTS = {"local": 2.0, "driver": 3.0, "ray": 5.0}
"""Mean time between two kills, over what it takes here and now until a fresh local executor has its
first result: less, and hardly anything but starting workers is killed."""

Table = dict[str, dict[str, Any]]


def plans(count: int) -> list[TrialPlan]:
    """The sweep: batch sizes, rates and seeds."""
    return [
        TrialPlan(
            workload=WORKLOAD,
            recipe=Recipe(lr=0.01 * 2 ** (number % 6), batch_size=2 ** (number % 8)),
            seed=number,
            order_seed=number,
            targets=(TARGET,),
            max_steps=5000,
        )
        for number in range(count)
    ]


def open_store(folder: Path) -> TrialStore:
    """The sweep's store."""
    return TrialStore.open(folder, workload=WORKLOAD)


def table(store: TrialStore) -> Table:
    """What must be equal: all but wall times."""
    return {row["key"]: {**row, "seconds": None} for row in store.rows()}


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    own: set[int] = set()
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            own.update(int(text) for text in (task / "children").read_text().split())
    return own | {deeper for child in own for deeper in children(child)}


def words_of(pid: int) -> bytes:
    """A process's command line; empty for one that is dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Tally:
    """What was found over all sweeps of one kind."""

    def __init__(self, kind: str, wanted: int, undisturbed: Table, start: float) -> None:
        self.kind, self.wanted, self.undisturbed = kind, wanted, undisturbed
        self.trials = len(undisturbed)
        self.gap = GAP_STARTS[kind] * start
        self.kills = self.sweeps = self.lost = self.twice = self.different = self.orphans = 0
        self.began = time.perf_counter()

    @property
    def enough(self) -> bool:
        """Whether all kills have been sent."""
        return self.kills >= self.wanted

    def judge(self, folder: Path, seen: set[str]) -> None:
        """Look at a store after its sweep; `seen` are keys that were in it at some time."""
        store = open_store(folder)
        found = table(store)
        lines = (folder / TRIALS).read_bytes().splitlines()
        self.sweeps += 1
        self.lost += len((seen | set(self.undisturbed)) - set(found))
        self.twice += len(lines) - len(found)
        self.different += sum(row != self.undisturbed.get(key) for key, row in found.items())

    def report(self) -> dict[str, Any]:
        """Print the verdict and return the figures."""
        seconds = time.perf_counter() - self.began
        bad = self.lost + self.twice + self.different + self.orphans
        met = "MET" if not bad and self.enough else "MISSED"
        print(
            f"{self.kind}: {self.kills} kills in {self.sweeps} sweeps of {self.trials} trials"
            f" ({seconds:.0f} s, one per {self.gap:.1f} s):"
            f" {self.lost} results lost, {self.twice} twice, {self.different} different,"
            f" {self.orphans} workers left: {met}",
            flush=True,
        )
        names = ("kills", "sweeps", "lost", "twice", "different", "orphans")
        return {**{name: getattr(self, name) for name in names}, "seconds": seconds, "met": met}


class Killer(threading.Thread):
    """Kills one of the processes that `victims` names, now and then, until there were enough."""

    def __init__(
        self, tally: Tally, draws: random.Random, victims: Callable[[], list[int]]
    ) -> None:
        super().__init__(daemon=True)
        self._tally, self._draws, self._victims = tally, draws, victims

    def run(self) -> None:
        """Kill."""
        while not self._tally.enough:
            time.sleep(self._draws.expovariate(1 / self._tally.gap))
            victims = self._victims()
            if victims:
                with suppress(ProcessLookupError):
                    os.kill(self._draws.choice(victims), signal.SIGKILL)
                    self._tally.kills += 1


def kill_workers(tally: Tally, home: Path, executor: Executor, killer: Killer) -> None:
    """Sweeps in this process, whose workers are killed."""
    sweep = plans(tally.trials)
    killer.start()
    with held(executor):
        while not tally.enough:
            folder = home / f"{tally.kind}-{tally.sweeps}"
            run_plans(sweep, open_store(folder), executor)
            tally.judge(folder, set())
    killer.join()


def kill_drivers(tally: Tally, home: Path, draws: random.Random) -> None:
    """Drivers in processes of their own, started again with the same command."""
    command = [sys.executable, __file__, "--trials", str(tally.trials), "--child"]
    seen: set[str] = set()
    folder = home / "driver-0"
    while not tally.enough:
        driver = subprocess.Popen([*command, str(folder)])
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=draws.expovariate(1 / tally.gap))
        workers = children(driver.pid)
        if driver.poll() is None:
            driver.kill()
            driver.wait()
            tally.kills += 1
            tally.orphans += left_alive(workers)
            if (folder / "study.json").exists():
                found = open_store(folder).keys()
                tally.lost += len(seen - found)
                seen |= found
        else:
            assert driver.returncode == 0, "the driver failed by itself"
            tally.judge(folder, seen)
            folder, seen = home / f"driver-{tally.sweeps}", set()
    subprocess.run([*command, str(folder)], check=True)
    tally.judge(folder, seen)


def left_alive(pids: set[int]) -> int:
    """How many processes are still there a few seconds later."""
    until = time.monotonic() + 5
    while any(words_of(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    return sum(bool(words_of(pid)) for pid in pids)


def ray_workers() -> list[int]:
    """The workers of the Ray cluster that this process has started, idle ones included.

    Not Ray's own agents, whose titles begin alike: without them the machine's part of Ray ends.
    """
    titles = (b"ray::IDLE", b"ray::_train")
    return [pid for pid in children(os.getpid()) if words_of(pid).startswith(titles)]


def local_workers() -> list[int]:
    """The workers of the local executor, those that are starting included."""
    return [pid for pid in children(os.getpid()) if b"executors.worker" in words_of(pid)]


def undisturbed(home: Path, trials: int) -> tuple[Table, float]:
    """The table without any kill, and the seconds until its first result."""
    store = open_store(home / "undisturbed")
    came: list[float] = []
    began = time.perf_counter()
    run_plans(
        plans(trials),
        store,
        LocalExecutor(SPEC, slots=SLOTS),
        on_result=lambda _: came.append(time.perf_counter()),
    )
    return table(store), came[0] - began


def main() -> None:
    """Kill, print, write JSON; exit 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for kind, count in (("local", 150), ("driver", 40), ("ray", 10)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--trials", type=int, default=240, help="per sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/kills.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        sweep = plans(arguments.trials)
        run_plans(sweep, open_store(arguments.child), LocalExecutor(SPEC, slots=SLOTS))
        return
    draws = random.Random(arguments.seed)
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        expected, start = undisturbed(home, arguments.trials)
        if arguments.local:
            tally = Tally("local", arguments.local, expected, start)
            killer = Killer(tally, draws, local_workers)
            kill_workers(tally, home, LocalExecutor(SPEC, slots=SLOTS), killer)
            reports["local"] = tally.report()
        if arguments.driver:
            tally = Tally("driver", arguments.driver, expected, start)
            kill_drivers(tally, home, draws)
            reports["driver"] = tally.report()
        if arguments.ray:
            from noisescale.run.executors.ray import RayExecutor

            tally = Tally("ray", arguments.ray, expected, start)
            killer = Killer(tally, draws, ray_workers)
            kill_workers(tally, home, RayExecutor(SPEC, slots=SLOTS), killer)
            reports["ray"] = tally.report()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=1))
    sys.exit(any(report["met"] != "MET" for report in reports.values()))


if __name__ == "__main__":
    main()
