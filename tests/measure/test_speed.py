"""The climb with a scripted child, then a few scans with real children that really die."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import noisescale.measure.speed as speed
from noisescale.errors import InvalidInputError
from noisescale.measure.probe_process import pack
from noisescale.measure.speed import scan_speed
from noisescale.records import SpeedPoint

HERE = Path(__file__).parent
GB = 1_000_000_000


class ScriptedChild:
    """Plays a child: ``script(size)`` returns its message; counts how many were started."""

    script = None
    started = 0
    train_size = 100

    def __init__(self, parcel, settings):
        type(self).started += 1
        self.size = None

    def send(self, *, size, slice_seconds, seconds_left):
        self.size = size

    def receive(self, *, until, resident_limit):
        if self.size is None:
            return {
                "event": "ready", "train_size": self.train_size, "evaluate_size": 0,
                "shapes_vary": False, "worst_case": False, "watched": True, "unit": "examples",
                "device": "script", "device_type": "cpu", "baseline_bytes": 10,
                "resident_bytes": 10, "limit_bytes": GB,
            }  # fmt: skip
        return type(self).script(self.size)

    def restart(self):
        return False

    def kill(self):
        pass


def measured(size, seconds=None, peak=None, undisturbed=None, queued=0.0):
    seconds = 0.001 + 0.0001 * size if seconds is None else seconds
    return {
        "event": "measured",
        "peak_bytes": size if peak is None else peak,
        "seconds_per_step": seconds,
        "seconds_low": seconds,
        "seconds_high": seconds,
        "data_seconds": 0.0,
        "compute_seconds": seconds,
        "repeats": 5,
        "undisturbed_seconds": seconds if undisturbed is None else undisturbed,
        "queued_share": queued,
    }


DEATH = {"event": "died", "reason": "the process died: SIGKILL"}


@pytest.fixture
def scripted(monkeypatch):
    def scan(script, train_size=100, **arguments):
        child = type("Child", (ScriptedChild,), {"train_size": train_size})
        child.script = staticmethod(script)
        monkeypatch.setattr(speed, "ProbeProcess", child)
        curve = scan_speed(("nowhere:nothing", {}), **arguments)
        return curve, child.started

    return scan


def sizes_of(curve):
    return [point.micro_batch_size for point in curve.points]


def failed(curve):
    return [failure.micro_batch_size for failure in curve.failures]


def test_all_sizes_up_to_exactly_the_largest(scripted):
    curve, started = scripted(measured, train_size=20)
    assert sizes_of(curve) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert (curve.stopped, curve.failures, started) == ("largest size", (), 1)
    assert curve.points[-1].examples_per_second == pytest.approx(20 / 0.003)
    assert (curve.limit_bytes, curve.baseline_bytes, curve.device) == (GB, 10, "script")


@pytest.mark.parametrize(("largest", "last"), [(7, 7), (1000, 100), (1, 1)])
def test_max_size(scripted, largest, last):
    curve, _ = scripted(measured, max_size=largest)
    assert sizes_of(curve)[-1] == last


def test_given_sizes_only_and_no_bisection(scripted):
    curve, _ = scripted(lambda b: measured(b) if b < 30 else dict(DEATH), sizes=[40, 5, 5, 20])
    assert (sizes_of(curve), failed(curve)) == ([5, 20], [40])


@pytest.mark.parametrize("fits", [1, 2, 5, 13, 16, 31, 99])
def test_death_is_confirmed_then_bisected_to_the_last_that_fits(scripted, fits):
    asked = []

    def script(size):
        asked.append(size)
        return measured(size) if size <= fits else dict(DEATH)

    curve, started = scripted(script)
    assert curve.stopped == "does not fit"
    assert fits - max(1, fits // 32) < max(sizes_of(curve)) <= fits < min(failed(curve))
    assert set(sizes_of(curve)) | set(failed(curve)) == set(asked)
    assert set(sizes_of(curve)).isdisjoint(failed(curve))
    first_failure = next(size for size in asked if size > fits)
    assert asked.count(first_failure) == 2
    deaths = [size for size in asked if size > fits]
    assert len(deaths) <= started <= len(deaths) + 1


def test_a_death_by_mishap_is_forgiven(scripted):
    deaths = iter([True])
    curve, started = scripted(
        lambda b: dict(DEATH) if b == 8 and next(deaths, False) else measured(b)
    )
    assert (curve.stopped, curve.failures, started) == ("largest size", (), 2)
    assert 8 in sizes_of(curve)


def test_peak_over_the_limit_does_not_fit_though_it_ran(scripted):
    curve, _ = scripted(lambda b: measured(b, peak=b * GB // 10))
    assert max(sizes_of(curve)) == 10
    assert "over the limit: 1,100 MB of 1,000 MB" in curve.failures[0].reason


def test_collapse_does_not_fit(scripted):
    curve, started = scripted(lambda b: measured(b, seconds=0.01 if b < 24 else 0.01 * b))
    assert max(sizes_of(curve)) == 23
    assert "collapsed" in curve.failures[0].reason
    assert started == 1


def test_slow_but_proportional_is_no_collapse(scripted):
    """A best size early on and time in proportion after it: throughput merely stays low."""
    curve, _ = scripted(lambda b: measured(b, seconds=0.001 if b == 1 else 0.002 * b))
    assert curve.failures == ()


def test_interrupted_steps_are_no_collapse(scripted):
    """On a busy machine long steps wait for a core and short ones do not."""

    def script(size):
        if size < 24:
            return measured(size, seconds=0.01)
        return measured(size, seconds=0.01 * size, undisturbed=0.01, queued=0.9)

    curve, _ = scripted(script)
    assert curve.failures == ()
    assert any("other programs held the processor" in note for note in curve.not_probed)


def test_milliseconds_are_no_collapse(scripted):
    """Two threads on a busy machine: what is swapped takes much longer than that."""
    curve, _ = scripted(lambda b: measured(b, seconds=0.001 if b < 2 else 0.02))
    assert curve.failures == ()


def test_exceptions_at_single_sizes_are_passed_over(scripted):
    def script(size):
        if size % 2:
            return {"event": "error", "reason": f"ValueError: odd {size}", "parts": None}
        return measured(size)

    curve, _ = scripted(script, train_size=64)
    assert failed(curve) == [1, 3]
    assert curve.failures[1].reason == "ValueError: odd 3"
    assert curve.stopped == "largest size"
    assert sizes_of(curve)[-1] == 64


def test_exceptions_in_a_row_end_the_climb(scripted):
    def script(size):
        if size > 9:
            return {"event": "error", "reason": "RuntimeError: too many", "parts": None}
        return measured(size)

    curve, _ = scripted(script)
    assert curve.stopped == "does not fit"
    assert max(sizes_of(curve)) == 9
    assert failed(curve) == [10, 12, 16]


def test_exception_at_the_last_size_is_no_success(scripted):
    script = {"event": "error", "reason": "RuntimeError: no", "parts": None}
    curve, _ = scripted(lambda b: dict(script) if b == 8 else measured(b), train_size=8)
    assert curve.stopped == "does not fit"
    assert max(sizes_of(curve)) == 7


def test_a_step_that_never_works_is_the_users_error(scripted):
    script = {"event": "error", "reason": "TypeError: bad shapes", "parts": None}
    with pytest.raises(InvalidInputError, match="1, 2, 3: TypeError: bad shapes"):
        scripted(lambda b: dict(script))


def test_nothing_fits(scripted):
    curve, _ = scripted(lambda b: dict(DEATH))
    assert (curve.points, failed(curve), curve.stopped) == ((), [1], "does not fit")


def test_time_that_ends_is_said(scripted):
    def script(size):
        return measured(size) if size < 4 else {"event": "late", "reason": "the time ended"}

    curve, _ = scripted(script)
    assert (sizes_of(curve), curve.failures, curve.stopped) == ([1, 2, 3], (), "time")
    assert "micro-batch sizes from 4 up: the time ended" in curve.not_probed


def test_sizes_in_between_are_left_out_when_time_is_short(scripted):
    curve, _ = scripted(lambda b: measured(b, seconds=0.01 * b), train_size=1000, seconds=140.0)
    tried = sizes_of(curve)
    assert tried[-1] == 1000
    assert len(tried) < 19
    assert any("left out to stay within the time" in note for note in curve.not_probed)


def test_progress_tells_points_and_failures(scripted):
    told = []
    scripted(lambda b: measured(b) if b < 4 else dict(DEATH), on_progress=told.append)
    assert [type(result) is SpeedPoint for result in told] == [True, True, True, False]
    assert [result.micro_batch_size for result in told] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seconds": 0.0}, "seconds 0.0"),
        ({"seconds": float("nan")}, "seconds nan"),
        ({"margin": 1.0}, "margin 1.0"),
        ({"max_size": 0}, "max_size 0"),
        ({"sizes": []}, "no sizes"),
        ({"sizes": [4, -1]}, "size -1"),
        ({"sizes": [4, 101]}, "size 101"),
        ({"limit_bytes": 0}, "limit_bytes 0"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_bad_arguments_are_refused(scripted, arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        scripted(measured, **arguments)


def test_what_cannot_be_pickled_is_refused_with_the_remedy():
    with pytest.raises(InvalidInputError, match=r"picklable.*functools\.partial"):
        scan_speed(lambda: None)


def test_a_scan_inside_a_scan_is_refused(monkeypatch):
    monkeypatch.setenv("NOISESCALE_PROBE", "1")
    with pytest.raises(InvalidInputError, match="if __name__"):
        pack(("module:function", {}))


# From here on with real children. Each takes seconds to start, so there are few.


@pytest.fixture
def scan_real(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))

    def scan(function, arguments=None, **settings):
        settings.setdefault("threads", 1)
        return scan_speed((f"probe_workloads:{function}", arguments or {}), **settings)

    yield scan
    assert children() == []


def children():
    return processes(parent=os.getpid())


def processes(parent=None, group=None):
    """Return the live processes with a parent or of a process group."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, its_parent, its_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if state != "Z" and (int(its_parent) == parent or int(its_group) == group):
            found.append(int(file.parent.name))
    return found


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux
def test_real_memory_limit(scan_real, monkeypatch):
    """20 MB per example and 319 MB: 15 fit with 19 MB to spare, 16 do not."""
    # A busy machine must not look like a collapse here: memory is what this is about.
    monkeypatch.setattr("noisescale.measure.speed.collapses", lambda *_: False)
    curve = scan_real("hungry", {"megabytes": 20}, limit_bytes=319_000_000, seconds=60)
    assert (max(sizes_of(curve)), min(failed(curve))) == (15, 16)
    assert curve.points[-1].peak_bytes == pytest.approx(300e6, rel=0.15)
    assert all(point.peak_bytes <= curve.limit_bytes for point in curve.points)
    assert "over the limit" in curve.failures[0].reason
    assert curve.limit_bytes == 319_000_000


@linux
def test_real_death_and_prints(scan_real):
    curve = scan_real("dies", {"above": 1}, sizes=[1, 2])
    assert (sizes_of(curve), failed(curve)) == ([1], [2])
    assert "SIGKILL, most likely out of memory" in curve.failures[0].reason


@linux
def test_real_time_budget(scan_real):
    """Sizes of a second per step in two seconds: the child is killed in the midst of one."""
    began = []
    curve = scan_real(
        "sleeps",
        {"seconds_per_size": {8: 1.0}},
        sizes=[1, 8],
        seconds=2.0,
        on_progress=lambda _: began.append(time.monotonic()),
    )
    assert time.monotonic() - began[0] < 3.0
    assert (sizes_of(curve), failed(curve), curve.stopped) == ([1], [], "time")


@linux
def test_real_error_of_the_loader(scan_real):
    with pytest.raises(InvalidInputError, match="No such file") as caught:
        scan_real("no_file")
    assert "\n" not in str(caught.value)
    assert "does not fit" not in str(caught.value)


@linux
def test_interrupt_leaves_no_process(scan_real):
    def interrupt(_):
        assert len(children()) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_real("hungry", {"megabytes": 1}, on_progress=interrupt)


GUARDED = """
import functools, json, sys
import torch
from torch import nn
from noisescale import Recipe, Workload
from noisescale.measure.speed import scan_speed

def model():
    return nn.Linear(1, 1)

def loss(model, batch):
    return model(batch).mean()

print("imported as", __name__)
if __name__ == "__main__":
    workload = Workload(name="here", model=model, loss=loss, train=torch.zeros(3, 1),
                        recipe=Recipe(lr=0.1, batch_size=2))
    print("RESULT", scan_speed(workload, threads=1).to_json())
"""


@linux
def test_workload_in_the_running_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GUARDED)
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=180, check=True
    )
    imported, result = run.stdout.splitlines()
    assert imported == "imported as __main__"
    points = json.loads(result.removeprefix("RESULT "))["points"]
    assert [point["micro_batch_size"] for point in points] == [1, 2, 3]


@linux
def test_script_without_a_guard_is_refused_not_run_twice(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GUARDED.replace('if __name__ == "__main__":', "if True:"))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=180)
    assert run.stdout == "imported as __main__\n"
    assert "module of its own" in run.stderr.splitlines()[-1]


@linux
def test_child_dies_with_its_parent(tmp_path):
    file = tmp_path / "pid"
    program = (
        "from noisescale.measure.speed import scan_speed;"
        f"scan_speed(('probe_workloads:notes_its_process_group', {{'file': {str(file)!r}}}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    group = None
    try:
        wait_until(lambda: file.exists() and file.read_text())
        group = int(file.read_text())
        parent.kill()
        parent.wait()
        wait_until(lambda: processes(group=group) == [], seconds=20.0)
    finally:
        parent.kill()
        parent.wait()
        if group is not None and processes(group=group):
            os.killpg(group, signal.SIGKILL)


def wait_until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_loader_may_be_a_partial():
    assert pack(functools.partial(children)).main_module is None
