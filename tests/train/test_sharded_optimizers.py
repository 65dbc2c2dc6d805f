"""LARS and LAMB where parameters or states are spread over processes: norms of whole tensors."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

import sharded_steps

PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    replicas = [
        PROCESSES.Process(target=sharded_steps.steps, args=(rank, 2, folder)) for rank in range(2)
    ]
    for process in replicas:
        process.start()
    for process in replicas:
        process.join(120)
    codes = [process.exitcode for process in replicas]
    for process in replicas:
        process.kill()  # or what hangs would hold up the end of the tests
        process.join()
    assert codes == [0, 0]
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("way", ["fully_shard", "ZeRO"])
@pytest.mark.parametrize("kind", sharded_steps.KINDS)
def test_spread_over_processes_the_steps_are_the_same(kind, way, found):
    for ours, alone in zip(found[kind, way], found[kind, "alone"], strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize("kind", sharded_steps.KINDS)
def test_flattened_shards_are_refused_rather_than_taken_for_vectors(kind, originals, found):
    said = found[kind, f"flattened, {originals}"]
    assert "whole tensors are required" in said
    assert "fully_shard" in said
    assert "\n" not in said
