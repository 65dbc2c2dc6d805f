"""Whether the system has killed processes for want of memory."""

from __future__ import annotations

from pathlib import Path

_COUNTERS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")


def count_oom_kills(counters: tuple[str, ...] = _COUNTERS) -> int:
    """Return how many processes the kernel has killed for want of memory since it started.

    Counts the machine's and the control group's kills together: only a rise means something.
    0 where the system does not say. A SIGKILL without a rise is no evidence: people, schedulers
    and supervisors send it as well.
    """
    return sum(_count(Path(counter)) for counter in counters)


def _count(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    numbers = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return sum(int(number) for number in numbers if number.isdigit())
