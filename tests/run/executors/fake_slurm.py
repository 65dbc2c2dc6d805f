"""A Slurm made of scripts: it loses, delays, duplicates and refuses jobs as a test asks.

:func:`install` puts ``sbatch``, ``srun``, ``squeue``, ``sacct`` and ``scancel`` into a folder that
the test puts on PATH. What happens to each job is the next word of ``acts``; ``ok`` after the
last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_HEAD = f"""#!{sys.executable} -IS
import os, pathlib, signal, subprocess, sys, time
home = pathlib.Path({{home!r}})
queue = home / "queue"
"""

_SCRIPTS = {
    "sbatch": """
acts = (home / "acts").read_text().split()
act = acts.pop(0) if acts else "ok"
(home / "acts").write_text(" ".join(acts))
if act == "refuse":
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out")
number = str(100 + len(list(home.glob("job-*"))))
(home / f"job-{number}").write_text(act)
print("Submitted batch job", number)
if act in ("lose", "OUT_OF_MEMORY"):
    sys.exit()
run = f"bash {sys.argv[1]} > {home}/log-{number} 2>&1"
steps = {
    "ok": run, "delay": f"sleep 1; {run}", "twice": f"{run} & {run}; wait", "stuck": "sleep 60"
}
environment = dict(
    os.environ, SLURM_JOB_ID=number, SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
    SLURM_JOB_NODELIST="here", SLURM_PROCID="0", SLURM_LOCALID="0",
)
(queue / number).write_text("")
command = f"({steps[act]}); rm -f {queue}/{number}"
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
job = subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True, **quiet)
(queue / number).write_text(str(job.pid))
""",
    "srun": """
words = [word for word in sys.argv[1:]]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
""",
    "squeue": """
if (home / "deaf").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
for job in queue.iterdir():
    print(job.name, "RUNNING")
""",
    "sacct": """
number = sys.argv[-1].removeprefix("--jobs=")
act = (home / f"job-{number}").read_text()
print(act if act.isupper() else "COMPLETED")
""",
    "scancel": """
job = queue / sys.argv[1]
if job.exists():
    (home / "cancelled").open("a").write(sys.argv[1] + " ")
    os.killpg(int(job.read_text()), signal.SIGKILL)
    job.unlink()
""",
}


def install(home: Path, acts: Sequence[str] = ()) -> Path:
    """Make the scripts and return the folder for PATH."""
    (home / "queue").mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "acts").write_text(" ".join(acts))
    for name, body in _SCRIPTS.items():
        script = home / "bin" / name
        script.write_text(_HEAD.format(home=str(home)) + body)
        script.chmod(0o755)
    return home / "bin"


def submitted(home: Path) -> list[str]:
    """Return what befell each job, in order."""
    return [job.read_text() for job in sorted(home.glob("job-*"))]
