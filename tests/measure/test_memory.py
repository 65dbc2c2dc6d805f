"""Limits from control groups that are made up, peaks of allocations that are known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from noisescale.measure import memory

GB = 1_000_000_000

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def make_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_group_version_2_counts_its_parents_and_reclaimable_cache(tmp_path):
    make_group(tmp_path / "a", memory__max=4 * GB, memory__current=3 * GB)
    make_group(
        tmp_path / "a" / "b",
        memory__max=2 * GB,
        memory__current=1 * GB,
        memory__stat=f"anon 5\ninactive_file {GB // 2}",
    )
    left = memory.control_group_available("0::/a/b", (tmp_path,), tmp_path / "none")
    assert left == [2 * GB - GB + GB // 2, 4 * GB - 3 * GB]


def test_group_without_a_limit_limits_nothing(tmp_path):
    make_group(tmp_path, memory__max="max", memory__current=3 * GB)
    assert memory.control_group_available("0::/", (tmp_path,), tmp_path / "none") == []


def test_group_version_1_seen_from_inside_a_container(tmp_path):
    """The path is the host's and does not exist here: the mount's root is the group."""
    make_group(
        tmp_path,
        memory__limit_in_bytes=3 * GB,
        memory__usage_in_bytes=1 * GB,
        memory__stat=f"inactive_file 7\ntotal_inactive_file {GB // 4}",
    )
    membership = "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n"
    left = memory.control_group_available(membership, (tmp_path / "none",), tmp_path)
    assert left == [2 * GB + GB // 4]


@linux
def test_available_is_the_least_of_system_and_group(monkeypatch):
    system = memory.available_bytes()
    assert 0 < system < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "_control_group_available", lambda: [1000])
    assert memory.available_bytes() == 1000
    assert memory.ProcessPeak().limit(0.25) == 750


@linux
def test_peak_finds_a_short_spike_and_is_reset():
    meter = memory.ProcessPeak()
    memory.release_free_memory()
    meter.reset()
    before = meter.now()
    spike = torch.ones(25_000_000)  # 100 MB
    del spike
    # The kernel counts pages per core and sums up when a batch of them is full: a few MB.
    assert meter.peak() - before == pytest.approx(100e6, rel=0.05)
    meter.reset()
    assert meter.peak() - before < 5e6


@linux
def test_resident_memory_of_a_process_that_is_gone_is_unknown():
    assert memory.resident_bytes(2**22 + 1) is None
