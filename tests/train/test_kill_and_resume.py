"""A training with a batch schedule, killed anywhere, goes on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import killed_training
from killed_training import PLACES, PLAN, UPDATES, Training

PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import; torch's optimizers load _dynamo when the first one is made.
PROCESSES.set_forkserver_preload(["torch._dynamo", "noisescale.train", "torch.nn.parallel"])


def outcome(training):
    """Weights, momenta, rates and the sequence of global batches."""
    tensors = [*training.net.state_dict().values()]
    tensors += [state["momentum_buffer"] for state in training.optimizer.state.values()]
    rates = [group["lr"] for group in training.optimizer.param_groups]
    return tensors, rates, training.sequence


def assert_identical(one, other):
    assert one[2] == other[2]
    assert one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def in_processes(target, *argument_lists):
    processes = [PROCESSES.Process(target=target, args=args) for args in argument_lists]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # or what hangs would hold up the end of the tests
        process.join()
    return codes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {
        by: outcome(Training(tmp_path_factory.mktemp(by), by=by).run())
        for by in ("sampler", "accumulation")
    }


def test_the_undisturbed_run_follows_its_plan(undisturbed):
    steps = list(PLAN.steps(total=10**6) if PLAN.total else _first_steps())
    for _, _, sequence in undisturbed.values():
        assert [len(batch) for batch in sequence] == [step.batch_size for step in steps]
    assert undisturbed["sampler"][2] == undisturbed["accumulation"][2]
    assert sum(len(batch) for batch in undisturbed["sampler"][2]) > 5 * killed_training.EXAMPLES


def _first_steps():
    for number, step in enumerate(PLAN.steps()):
        if number == UPDATES:
            return
        yield step


@pytest.mark.parametrize("by", ["sampler", "accumulation"])
def test_killed_at_twenty_random_steps(by, undisturbed, tmp_path):
    draws = random.Random(5)
    updates = sorted(draws.sample(range(1, UPDATES), 20))
    for update in updates:
        place = draws.choice(PLACES)
        kill = (update - (place == "before the step"), place)
        codes = in_processes(killed_training.in_a_process, (tmp_path, {"by": by}, UPDATES, kill))
        assert codes == [-signal.SIGKILL]
    assert_identical(outcome(Training(tmp_path, by=by).run()), undisturbed[by])


@pytest.mark.parametrize("by", ["sampler", "accumulation"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_other_workers_change_nothing(by, undisturbed, tmp_path):
    Training(tmp_path, by=by, workers=2).run(until=19)
    Training(tmp_path, by=by).run(until=33)
    assert_identical(outcome(Training(tmp_path, by=by, workers=1).run()), undisturbed[by])


def test_resumed_by_two_processes_and_by_one_again(undisturbed, tmp_path):
    by = {"by": "accumulation", "micro": 1, "dropout": 0.0}
    Training(tmp_path, **by).run(until=13)
    replicas = [(rank, 2, tmp_path, by, 29) for rank in range(2)]
    assert in_processes(killed_training.as_replica, *replicas) == [0, 0]
    resumed = Training(tmp_path, **{**by, "micro": 4}).run(until=37)
    assert resumed.sequence == undisturbed["sampler"][2][:37]
    (tmp_path / "alone").mkdir()
    alone = Training(tmp_path / "alone", dropout=0.0).run(until=37)
    for one, other in zip(outcome(resumed)[0], outcome(alone)[0], strict=True):
        # Only the order of float32 sums differs, over 37 updates.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sampler_resumed_by_two_processes(undisturbed, tmp_path):
    Training(tmp_path).run(until=17)
    replicas = [(rank, 2, tmp_path, {}, 35) for rank in range(2)]
    assert in_processes(killed_training.as_replica, *replicas) == [0, 0]
    assert Training(tmp_path).run().sequence == undisturbed["sampler"][2]


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_flush_a_batch_that_the_data_cut_short(kind, tmp_path):
    replicas = [(rank, 2, tmp_path, kind) for rank in range(2)]
    assert in_processes(killed_training.flushed_gradient, *replicas) == [0, 0]
    position, gradient = torch.load(tmp_path / "gradient.pt", weights_only=True)
    rows, labels, _ = killed_training.some_data()[:24]
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    counts = [float(part.sum() + 1) for part in labels.split(4)]
    for count, inputs, targets in zip(counts, rows.split(4), labels.split(4), strict=True):
        (F.cross_entropy(model(inputs), targets) * count / sum(counts)).backward()
    assert position == 24
    torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-5, atol=1e-6)
