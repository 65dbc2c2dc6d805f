"""How much memory may be used, how much a process uses, and its peak over a stretch of work.

The limit on a CPU is what the system says is available, or what is left of the control
group's limit if that is less: a container is killed by its own limit, not by the machine's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

from noisescale.errors import InvalidInputError

# Usual places where control groups are mounted: version 2 first, then version 1.
_MOUNTS_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_MOUNT_V1 = Path("/sys/fs/cgroup/memory")


def available_bytes() -> int:
    """Return how many bytes this process may still take before something is killed.

    Returns:
        The least of the system's available memory and, for each enclosing control group
        with a limit, that limit minus what the group uses, in bytes.

    Raises:
        InvalidInputError: the system does not say.
    """
    known = [_system_available(), *_control_group_available()]
    amounts = [amount for amount in known if amount is not None]
    if not amounts:
        raise InvalidInputError(
            f"available memory on {sys.platform}",
            "the system does not say how much there is",
            "pass limit_bytes",
        )
    return max(0, min(amounts))


def resident_bytes(process_id: int) -> int | None:
    """Return the resident memory of a process in bytes, None where that cannot be read.

    >>> import os
    >>> resident_bytes(os.getpid()) != 0
    True
    """
    try:
        pages = Path(f"/proc/{process_id}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def release_free_memory() -> None:
    """Give memory that Python, malloc and torch hold but do not use back to the system.

    What a smaller batch left behind would otherwise count towards the next one.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; musl has none
        if trim is not None:
            trim(0)


class ProcessPeak:
    """Resident memory of this process, as the kernel counts it; all numbers in bytes.

    The kernel's high-water mark is exact: it misses no short spike, as polling would.
    """

    def now(self) -> int:
        """Return the resident memory."""
        return resident_bytes(os.getpid()) or _largest_ever()

    def reset(self) -> None:
        """Set the kernel's high-water mark back to what is in use, where it allows that."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # then the mark is that of the whole run: right while sizes climb

    def peak(self) -> int:
        """Return the high-water mark."""
        mark = _status_bytes("VmHWM")
        return _largest_ever() if mark is None else mark

    def limit(self, margin: float) -> int:
        """Return how much more may be taken with a share ``margin`` of it kept free."""
        return int(available_bytes() * (1 - margin))


class CudaPeak:
    """Memory that torch's allocator has reserved on one CUDA device; all numbers in bytes.

    Reserved, not allocated: that is what other users of the device can no longer have, and
    what fails when it cannot grow.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        """Return the reserved memory."""
        return torch.cuda.memory_reserved(self._device)

    def reset(self) -> None:
        """Forget the allocator's peaks."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the largest reserved memory."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def limit(self, margin: float) -> int:
        """Return how much more may be taken with a share ``margin`` of it kept free."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free * (1 - margin))

    def enforce(self, limit_bytes: int) -> None:
        """Make the allocator refuse to hold more than ``limit_bytes`` beyond what it holds."""
        _, total = torch.cuda.mem_get_info(self._device)
        share = min(1.0, (self.now() + limit_bytes) / total)
        torch.cuda.set_per_process_memory_fraction(share, self._device)


def peak_meter(device: torch.device) -> ProcessPeak | CudaPeak:
    """Return the meter for a device."""
    return CudaPeak(device) if device.type == "cuda" else ProcessPeak()


def control_group_available(
    membership: str, mounts_v2: tuple[Path, ...] = _MOUNTS_V2, mount_v1: Path = _MOUNT_V1
) -> list[int]:
    """Return what is left in each enclosing control group that has a limit, in bytes.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mounts_v2: where version 2 may be mounted.
        mount_v1: where version 1's memory controller may be mounted.
    """
    left: list[int | None] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for mount in mounts_v2:
                left += [_left_v2(group) for group in _upwards(mount, path)]
        elif "memory" in controllers.split(","):
            left += [_left_v1(group) for group in _upwards(mount_v1, path)]
    return [amount for amount in left if amount is not None]


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return a group's folder and its parents' up to the mount, those that exist.

    In a container the path is often the host's while the mount shows the container's own
    group as its root: the root is therefore always looked at.
    """
    parts = [part for part in path.split("/") if part and part != ".."]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _left_v2(group: Path) -> int | None:
    return _left(group / "memory.max", group / "memory.current", group, "inactive_file")


def _left_v1(group: Path) -> int | None:
    limit = group / "memory.limit_in_bytes"
    return _left(limit, group / "memory.usage_in_bytes", group, "total_inactive_file")


def _left(limit: Path, usage: Path, group: Path, reclaimable: str) -> int | None:
    """Return limit - usage + the file cache that the kernel drops before it kills."""
    try:
        allowed, used = limit.read_text().strip(), int(usage.read_text())
        if allowed == "max":
            return None
        return int(allowed) - used + _statistic(group / "memory.stat", reclaimable)
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
        return int(next(value for key, value in lines if key == name))
    except (OSError, ValueError, StopIteration):
        return 0


def _control_group_available() -> list[int]:
    try:
        return control_group_available(Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return []


def _system_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:  # no /proc: the whole memory is the best that the standard library can say
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def _largest_ever() -> int:
    try:
        import resource
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
