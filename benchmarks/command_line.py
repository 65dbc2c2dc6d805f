"""What a user waits for: `noisescale --help`, light commands, `advise digits`; whole processes.

    python benchmarks/command_line.py [--runs 9] [--out benchmarks/out/command_line.json]

Bounds, on 2 cores: help, convert, schedule and split in at most 0.35 s (median) importing neither
torch nor scipy; the advice in at most 60 s with less than 2 GB at its peak (the largest process).
Beside them stands the start of a bare interpreter in the same run, in turn with them: what the
machine itself takes. Bytecode is kept, as an installed package has it, in a folder of this run's
own: a shell that sets PYTHONDONTWRITEBYTECODE would have every start compile the sources again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELP_SECONDS = 0.35
ADVICE_SECONDS = 60.0
PEAK_BYTES = 2e9
RECIPE = """
optimizer = "sgd"
lr = 0.1
momentum = 0.9
batch_size = 256
dataset_size = 50000
total_steps = 9000
warmup_steps = 500
schedule = {kind = "step", milestones = [3000, 6000]}
"""
LIGHT = {
    "convert": ["convert", "recipe.toml", "--batch-size", "1024"],
    "convert --json": ["convert", "recipe.toml", "--batch-size", "1024", "--json"],
    "schedule": ["schedule", "recipe.toml", "--grow"],
    "schedule --json": ["schedule", "recipe.toml", "--grow", "--json"],
    "split": ["split", "--global-batch-size", "512", "--replicas", "8"],
}


def seconds_of(command: list[str], folder: str | None = None) -> float:
    """Wall seconds of one whole process."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, **quiet)
    return time.perf_counter() - began


def light(program: list[str], runs: int) -> dict[str, list[float]]:
    """Seconds of the commands that need neither torch nor scipy, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text(RECIPE)
        for command in LIGHT.values():
            seconds_of([*program, *command], folder)
        rounds = [
            [seconds_of([*program, *command], folder) for command in LIGHT.values()]
            for _ in range(runs)
        ]
    return dict(zip(LIGHT, map(list, zip(*rounds, strict=True)), strict=True))


def keep_bytecode(folder: str) -> None:
    """Have the processes to come write and read their bytecode there."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = folder


def verdict(met: bool) -> str:
    """Spell whether a bound is met."""
    return "met" if met else "MISSED"


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/command_line.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as bytecode:
        keep_bytecode(bytecode)
        measure(arguments.runs, arguments.out)


def measure(runs: int, out: Path) -> None:
    """Run everything in turn, print it, write JSON."""
    program = [sys.executable, "-m", "noisescale"]
    bare = [sys.executable, "-c", "pass"]
    seconds_of([*program, "--help"])
    seconds_of(bare)
    pairs = [(seconds_of([*program, "--help"]), seconds_of(bare)) for _ in range(runs)]
    helps = [first for first, _ in pairs]
    others = light(program, runs)
    code = (
        "import sys, noisescale.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stderr.strip()
    with tempfile.TemporaryDirectory() as folder:
        page = str(Path(folder) / "report.html")
        advice = seconds_of([*program, "advise", "digits", "--quiet", "--report", page])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    median, plain = statistics.median(helps), statistics.median(second for _, second in pairs)
    print(
        f"--help: median {median:.3f} s (least {min(helps):.3f}, most {max(helps):.3f};"
        f" bare interpreter {plain:.3f}): {verdict(median <= HELP_SECONDS)};"
        f" imports of torch and scipy {imported}: {verdict(imported == '[]')}"
    )
    for name, seconds in others.items():
        middle = statistics.median(seconds)
        print(f"{name}: median {middle:.3f} s (least {min(seconds):.3f}, most {max(seconds):.3f}):"
              f" {verdict(middle <= HELP_SECONDS)}")  # fmt: skip
    print(
        f"advise digits: {advice:.1f} s: {verdict(advice <= ADVICE_SECONDS)};"
        f" peak {peak / 1e9:.2f} GB: {verdict(peak < PEAK_BYTES)}"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "help_seconds": helps,
        "bare_seconds": plain,
        "light_seconds": others,
        "advice_seconds": advice,
        "peak": peak,
    }
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
