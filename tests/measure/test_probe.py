"""What the child measures, here in the test's own process: no start-up, no deaths."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.probe import Bench

MB = 1_000_000
SETTINGS = {"threads": None, "device": None, "margin": 0.1, "limit_bytes": None, "main": None}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with torch.random.fork_rng():
        yield


def load(function, **arguments):
    source = (f"probe_workloads:{function}", arguments)
    return Bench.load(SETTINGS, pickle.dumps(source))


def measure(bench, size, seconds=0.05):
    message = bench.try_size(size=size, slice_seconds=seconds, seconds_left=60.0)
    assert message["event"] == "measured", message
    return message


def peaks(function, *sizes, **arguments):
    """Peak bytes at each size, in a process of its own as the scan has it.

    Here the memory that earlier tests freed would be counted or not, as the allocator likes.
    """
    code = (
        "import json, sys\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        "from test_probe import load, measure\n"
        "bench = load(sys.argv[2], **json.loads(sys.argv[3]))\n"
        "print([measure(bench, size)['peak_bytes'] for size in json.loads(sys.argv[4])])\n"
    )
    path = [str(Path(__file__).parent), *sys.path]
    words = [json.dumps(path), function, json.dumps(arguments), json.dumps(sizes)]
    answer = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=True,
        # Each thread keeps buffers of its own: with one the peak is the step's. And glibc raises
        # its threshold for memory that goes straight back to the system with the size of what
        # is freed, up to 32 MB, then keeps up to twice that for itself: at a fixed threshold
        # the peak is the tensors'.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    return json.loads(answer.stdout)


def test_peak_is_what_a_step_takes():
    assert peaks("hungry", 5, 10, megabytes=20) == pytest.approx([100 * MB, 200 * MB], rel=0.15)


def test_peak_counts_optimizer_state_and_weight_average():
    weights = 40 * MB
    (plain,) = peaks("wide", 1)
    (average,) = peaks("wide", 1, ema_decay=0.9)
    (adam,) = peaks("wide", 1, optimizer="adam")
    assert average - plain == pytest.approx(weights, rel=0.15)
    # Two averages per weight, and up to two temporary vectors in the update.
    assert 0.85 * 2 * weights < adam - plain < 1.15 * 4 * weights


def test_peak_counts_the_worst_case_batch():
    # 48 MB for the batch that is drawn, ten times that for the worst case. (With glibc's own
    # moving threshold up to 48 MB more, what malloc keeps of the drawn batches.)
    (peak,) = peaks("long_sequences", 4)
    assert peak == pytest.approx(10 * 4 * 12 * MB, rel=0.05)


def test_peak_counts_one_evaluation_batch():
    """Of that size, or all the evaluation data if there is less."""
    assert peaks("evaluates_in_bulk", 2, 8) == pytest.approx([100 * MB, 150 * MB], rel=0.15)


def test_wait_for_data_is_told_apart():
    message = measure(load("data_bound"), 4)
    assert message["data_seconds"] >= 4 * 0.002
    assert message["data_seconds"] > message["compute_seconds"]
    assert message["seconds_low"] <= message["seconds_per_step"] <= message["seconds_high"]
    assert message["seconds_per_step"] >= message["data_seconds"]


def test_repeats_are_at_least_five_and_three_where_a_step_takes_long():
    bench = load("sleeps", seconds_per_size={2: 0.06})
    assert measure(bench, 1, seconds=0.05)["repeats"] >= 5
    assert measure(bench, 2, seconds=0.05)["repeats"] == 3


def test_weights_hold_still():
    bench = load("hungry", megabytes=0.1)
    before = [parameter.clone() for parameter in bench.step.model.parameters()]
    measure(bench, 2)
    assert all(map(torch.equal, before, bench.step.model.parameters()))
    assert bench.step.optimizer.param_groups[0]["lr"] == 0


def test_exception_of_a_step_is_the_result_on_one_line():
    bench = load("raises", sizes=[2])
    message = bench.try_size(size=2, slice_seconds=0.05, seconds_left=60.0)
    assert message == {"event": "error", "reason": "RuntimeError: no batches of 2", "parts": None}
    measure(bench, 3)


def test_out_of_memory_is_told_by_type(monkeypatch):
    bench = load("hungry", megabytes=0.1)

    def refuse(model, batch):
        raise torch.OutOfMemoryError("the text may say anything")

    monkeypatch.setattr(bench.step, "_loss", refuse)
    message = bench.try_size(size=2, slice_seconds=0.05, seconds_left=60.0)
    assert message["event"] == "out of memory"


def test_description_says_what_the_workload_has():
    facts = load("data_bound").describe()
    assert (facts["train_size"], facts["evaluate_size"], facts["shapes_vary"]) == (16, 0, True)
    assert facts["limit_bytes"] > 0
    assert facts["baseline_bytes"] > 50 * MB or sys.platform != "linux"
    assert load("hungry", megabytes=1).describe()["shapes_vary"] is False


def test_loader_that_returns_something_else_is_refused():
    with pytest.raises(InvalidInputError, match="loader returned int"):
        load("not_a_workload")
